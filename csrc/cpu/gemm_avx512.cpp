#include <cstdint>
#include <type_traits>

#include "gemm.h"
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define KRRST_ISA isa_avx512
#define KRRST_VECTOR_BYTES 64
#define KRRST_ROWS 8
#include "gemm.inc"
namespace krrst::cpu {
const Kernels kernels_avx512{"avx512", isa_avx512::table<float>(), isa_avx512::table<double>()};
}
#endif
