#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define KRRST_ISA isa_avx512
#define KRRST_VECTOR_BYTES 64
#define KRRST_REGISTERS 32
#include "kernels.inc"
namespace krrst::cpu {
const Kernels kernels_avx512 = isa_avx512::table("avx512");
}
#endif
