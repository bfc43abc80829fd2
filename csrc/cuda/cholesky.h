#pragma once
// Cholesky factors on the GPU: launchers on raw pointers. Nothing here allocates or waits for the
// device; with the buffers in place all of it can be captured in a CUDA graph.
#include <cstdint>

#include "tile.h"

#if defined(__CUDACC__) || defined(USE_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace krrst::cuda {

// Rows of a tile; problems of at most kSmall rows take smaller ones.
constexpr int kTile = 64, kSmall = 32;

// The number that is added to the diagonal of each problem, read on the device.
struct Ridge {
  const void* data;
  int64_t stride;
  bool is_double;

  template <typename T>
  KRRST_DEVICE T of(int64_t problem) const {
    if (data == nullptr) return T(0);
    const int64_t at = problem * stride;
    return is_double ? static_cast<T>(static_cast<const double*>(data)[at])
                     : static_cast<T>(static_cast<const float*>(data)[at]);
  }
};

// factor [N, M, M] holds L by columns, zero above the diagonal. pivot [N] is 0, or the number, from
// 1, of the first pivot that is not a positive, finite number; the columns of L are NaN from there
// on. half [M, P] is L^-1 y of a single problem, row-major. inverse [N, kTile, kTile] is scratch,
// not needed for M <= kTile without y.
template <typename T>
struct Cholesky {
  int64_t m, columns;
  T *factor, *half, *inverse;
  int32_t* pivot;
};

// out[n] = (L L^T)^-1 y[n] [M, P], transposed: [N, P, M] row-major. work is like out in the
// precision of the factor; it is not needed for M <= kTile and may be out itself where the
// precisions agree.
template <typename Y, typename T>
struct CholeskySolve {
  int64_t m, columns;
  View<const Y> y;
  int64_t y_problem;
  View<const T> factor;
  int64_t factor_problem;
  T* work;
  Y* out;
};

#if defined(__CUDACC__) || defined(USE_CUDA)

// Factors of k[n] + ridge[n] I for symmetric k[n] of any strides, computed in T. y [M, P], or null,
// goes with a single problem only. Returns the status of the launches.
template <typename Source, typename T>
cudaError_t cholesky(View<const Source> k, int64_t k_problem, View<const Source> y, Ridge ridge,
                     const Cholesky<T>& out, int64_t problems, cudaStream_t stream);

template <typename Y, typename T>
cudaError_t cholesky_solve(const CholeskySolve<Y, T>& call, int64_t problems, cudaStream_t stream);

#endif

}  // namespace krrst::cuda
