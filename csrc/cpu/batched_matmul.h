#pragma once
#include <cstdint>

#include "matrix.h"
#include "parallel.h"

namespace krrst::cpu {

// out[n] = a[n] b[n] for n < problems, a[n] [rows, depth] and b[n] [depth, columns] of any strides,
// out [problems, rows, columns] row-major. Fastest, because nothing is copied, where b is row-major
// (any a), or a is row-major and b column-major. The same bits on any number of threads.
template <typename T>
void batched_matmul(const Matrices<const T>& a, const Matrices<const T>& b, int64_t problems,
                    int64_t rows, int64_t depth, int64_t columns, T* out, const Parallel& parallel);

}  // namespace krrst::cpu
