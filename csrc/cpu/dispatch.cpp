#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace krrst::cpu {
namespace {

const Kernels* choose() {
#if defined(__x86_64__)
  const char* cap = std::getenv("KRRST_FAST_ISA");
  const auto capped = [cap](const char* isa) { return cap && !std::strcmp(cap, isa); };
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (capped("baseline")) return &kernels_baseline;
  if (avx512 && !capped("avx2")) return &kernels_avx512;
  if (avx2) return &kernels_avx2;
#endif
  return &kernels_baseline;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

template <>
const Gemm<float>& gemm<float>() {
  return kernels().gemm_f32;
}
template <>
const Gemm<double>& gemm<double>() {
  return kernels().gemm_f64;
}
template <>
const Small<float>& small<float>() {
  return kernels().small_f32;
}
template <>
const Small<double>& small<double>() {
  return kernels().small_f64;
}
const Triangular& triangular() { return kernels().triangular; }

}  // namespace krrst::cpu
