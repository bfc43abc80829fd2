#pragma once
#include <cstdint>

#include "parallel.h"

namespace krrst::cpu {

// out[i * columns + c] = sum_k a[i, k] b[k, c] for a tall or wide a [n, depth] and a b of few
// columns, any strides. a is read once, at memory speed. The same bits on any number of threads.
template <typename T>
void thin_matmul(const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_depth,
                 int64_t b_column, int64_t n, int64_t depth, int64_t columns, T* out,
                 const Parallel& parallel);

}  // namespace krrst::cpu
