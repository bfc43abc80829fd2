#include <cstdint>
#include <type_traits>

#include "gemm.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define KRRST_ISA isa_avx2
#define KRRST_VECTOR_BYTES 32
#define KRRST_ROWS 4
#include "gemm.inc"
namespace krrst::cpu {
const Kernels kernels_avx2{"avx2", isa_avx2::table<float>(), isa_avx2::table<double>()};
}
#endif
