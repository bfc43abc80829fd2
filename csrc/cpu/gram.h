#pragma once
#include <cstdint>

#include "parallel.h"

namespace krrst::cpu {

// k[i * n + j] = scale * <x[i], x[j]> + bias for an x of n rows and any two strides. Only the tiles
// on and below the diagonal are computed. Sums run over the depth in one fixed order: the same bits
// on any number of threads.
template <typename T>
void gram(const T* x, int64_t row_stride, int64_t depth_stride, int64_t n, int64_t depth, T scale,
          T bias, T* k, const Parallel& parallel);

}  // namespace krrst::cpu
