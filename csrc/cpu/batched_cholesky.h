#pragma once
#include <cstdint>

#include "matrix.h"
#include "parallel.h"

namespace krrst::cpu {

// k[n] + ridge[n] I = L L^T in float64 for symmetric k[n] [m, m] of any strides. factor [problems,
// m, m] holds L^T row-major, with zeros below the diagonal: L as LAPACK stores it. pivot[n] is 0,
// or the number, from 1, of the first pivot that is not a positive, finite number; the factor is
// then full of NaN.
template <typename T>
void batched_cholesky(const Matrices<const T>& k, const double* ridge, int64_t problems, int64_t m,
                      double* factor, int32_t* pivot, const Parallel& parallel);

// out[n] = (L L^T)^-1 y[n] in float64, for L = factor[n] [m, m], y[n] and out[n]
// [m, columns] of any strides.
template <typename T>
void batched_cholesky_solve(const Matrices<const T>& y, const Matrices<const double>& factor,
                            int64_t problems, int64_t m, int64_t columns, const Matrices<T>& out,
                            const Parallel& parallel);

}  // namespace krrst::cpu
