// The inner loops of one instruction set.
#pragma once
#include <vector>

#include "conv.h"
#include "gemm.h"
#include "kernel_functions.h"
#include "small.h"

namespace krrst::cpu {

struct Kernels {
  const char* isa;
  Gemm<float> gemm_f32;
  Gemm<double> gemm_f64;
  Small<float> small_f32;
  Small<double> small_f64;
  Triangular triangular;
  KernelRows<float> kernel_rows_f32;
  KernelRows<double> kernel_rows_f64;
  Conv conv;
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

// The sets that this processor runs, narrowest first.
std::vector<const Kernels*> supported();

// The widest of them, chosen once per process; KRRST_FAST_ISA=baseline|avx2|avx512 lowers it.
const Kernels& kernels();

}  // namespace krrst::cpu
