#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define KRRST_ISA isa_avx2
#define KRRST_VECTOR_BYTES 32
#define KRRST_REGISTERS 16
#include "kernels.inc"
namespace krrst::cpu {
const Kernels kernels_avx2 = isa_avx2::table("avx2");
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
