// A blocked right-looking Cholesky factorisation. Two launches a step: `panel` multiplies the tiles
// below a diagonal tile by the inverse of its factor; `update` subtracts their product from the
// rest and factors and inverts the next diagonal tile, hidden behind the rest of the update.
// Products are plain fused multiply-adds in the precision of the factor.
#include "cholesky_blocks.h"

namespace krrst::cuda {
namespace {

// Blocks that a multiprocessor holds at the same time, at least: 128 registers a thread.
template <int kSide>
constexpr int kResident = 512 / Shape<kSide>::threads;

KRRST_DEVICE Place place() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }

template <int kSide, typename Source, typename T>
__global__ void __launch_bounds__(Shape<kSide>::threads, kResident<kSide>)
    first_kernel(System<Source> system, Cholesky<T> out) {
  __shared__ Shared<T, kSide> shared;
  first_block<kSide>(Block{}, shared, system, out, place());
}

template <typename Source, typename T>
__global__ void __launch_bounds__(Shape<kTile>::threads, kResident<kTile>)
    panel_kernel(System<Source> system, Cholesky<T> out, int64_t step) {
  __shared__ Shared<T, kTile> shared;
  panel_block(Block{}, shared, system, out, step, place());
}

template <typename Source, typename T>
__global__ void __launch_bounds__(Shape<kTile>::threads, kResident<kTile>)
    update_kernel(System<Source> system, Cholesky<T> out, int64_t step) {
  __shared__ Shared<T, kTile> shared;
  update_block(Block{}, shared, system, out, step, place());
}

// Half as many blocks: two triangles in registers leave room for fewer.
template <int kSide, typename Y, typename T>
__global__ void __launch_bounds__(Shape<kSide>::threads, kResident<kSide> / 2)
    solve_kernel(CholeskySolve<Y, T> call) {
  __shared__ Shared<T, kSide> shared;
  solve_block(Block{}, shared, call, place());
}

struct Launch {
  cudaStream_t stream;

  static dim3 blocks(const Place& grid) {
    return dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                static_cast<unsigned>(grid.z));
  }

  template <int kSide, typename Source, typename T>
  void first(const Place& grid, const System<Source>& system, const Cholesky<T>& out) const {
    first_kernel<kSide><<<blocks(grid), Shape<kSide>::threads, 0, stream>>>(system, out);
  }

  template <typename Source, typename T>
  void panel(const Place& grid, const System<Source>& system, const Cholesky<T>& out,
             int64_t step) const {
    panel_kernel<<<blocks(grid), Shape<kTile>::threads, 0, stream>>>(system, out, step);
  }

  template <typename Source, typename T>
  void update(const Place& grid, const System<Source>& system, const Cholesky<T>& out,
              int64_t step) const {
    update_kernel<<<blocks(grid), Shape<kTile>::threads, 0, stream>>>(system, out, step);
  }

  template <int kSide, typename Y, typename T>
  void solve(const Place& grid, const CholeskySolve<Y, T>& call) const {
    solve_kernel<kSide><<<blocks(grid), Shape<kSide>::threads, 0, stream>>>(call);
  }
};

}  // namespace

template <typename Source, typename T>
cudaError_t cholesky(View<const Source> k, int64_t k_problem, View<const Source> y, Ridge ridge,
                     const Cholesky<T>& out, int64_t problems, cudaStream_t stream) {
  if (problems == 0) return cudaSuccess;
  if (out.m == 0) return cudaMemsetAsync(out.pivot, 0, problems * sizeof(int32_t), stream);
  const View<const Source> y_t = {y.data, y.column, y.row};
  factor(System<Source>{k, k_problem, y_t, ridge}, out, problems, Launch{stream});
  return cudaGetLastError();
}

template <typename Y, typename T>
cudaError_t cholesky_solve(const CholeskySolve<Y, T>& call, int64_t problems, cudaStream_t stream) {
  if (problems == 0 || call.m == 0 || call.columns == 0) return cudaSuccess;
  solve(call, problems, Launch{stream});
  return cudaGetLastError();
}

#define KRRST_CHOLESKY(Source, T)                                                                  \
  template cudaError_t cholesky<Source, T>(View<const Source>, int64_t, View<const Source>, Ridge, \
                                           const Cholesky<T>&, int64_t, cudaStream_t);
KRRST_CHOLESKY(float, float)
KRRST_CHOLESKY(float, double)
KRRST_CHOLESKY(double, double)

template cudaError_t cholesky_solve(const CholeskySolve<float, double>&, int64_t, cudaStream_t);
template cudaError_t cholesky_solve(const CholeskySolve<double, double>&, int64_t, cudaStream_t);

}  // namespace krrst::cuda
