#pragma once
#include <cstdint>

#include "matrix.h"
#include "parallel.h"

namespace krrst::cpu {

// k[p][i * n + j] = scale * <x[p][i], x[p][j]> + bias for p < problems, each x[p] [n, depth] of any
// strides. Only what is on and below the diagonal is computed. Sums run over the depth in one fixed
// order: the same bits on any number of threads.
template <typename T>
void gram(const Matrices<const T>& x, int64_t problems, int64_t n, int64_t depth, T scale, T bias,
          T* k, const Parallel& parallel);

}  // namespace krrst::cpu
