#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace krrst::cpu {
namespace {

const Kernels* choose() {
  const char* cap = std::getenv("KRRST_FAST_ISA");
  const Kernels* widest = nullptr;
  for (const Kernels* set : supported()) {
    widest = set;
    if (cap && !std::strcmp(cap, set->isa)) break;
  }
  return widest;
}

}  // namespace

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> sets{&kernels_baseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    sets.push_back(&kernels_avx2);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    sets.push_back(&kernels_avx512);
  }
#endif
  return sets;
}

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
const Conv& conv() { return kernels().conv; }
const Triangular& triangular() { return kernels().triangular; }
template <>
const KernelRows<float>& kernel_rows<float>() {
  return kernels().kernel_rows_f32;
}
template <>
const KernelRows<double>& kernel_rows<double>() {
  return kernels().kernel_rows_f64;
}

}  // namespace krrst::cpu
