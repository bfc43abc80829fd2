#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define KRRST_ISA isa_avx512
#define KRRST_VECTOR_BYTES 64
#define KRRST_REGISTERS 32
#include "kernels.inc"
namespace krrst::cpu {
const Kernels kernels_avx512 = isa_avx512::table("avx512");
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
