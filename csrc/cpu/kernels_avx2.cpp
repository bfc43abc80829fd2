#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define KRRST_ISA isa_avx2
#define KRRST_VECTOR_BYTES 32
#define KRRST_REGISTERS 16
#include "kernels.inc"
namespace krrst::cpu {
const Kernels kernels_avx2 = isa_avx2::table("avx2");
}
#endif
