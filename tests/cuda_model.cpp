// The CUDA Cholesky played on the CPU: the code of the kernels and of their launches, with loops
// for threads and blocks. Reads calls from stdin and writes results to stdout, both as
// test_cuda_model.py packs them. Fresh memory is NaN, buffers have their exact sizes (run it under
// AddressSanitizer), and threads and blocks take their turns in the order the call names: it must
// not matter.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/cholesky_blocks.h"

namespace {

using namespace krrst::cuda;

enum Order : int64_t { kForward, kBackward, kShuffled };
enum Operation : int64_t { kCholesky, kSolve };

struct Call {
  int64_t operation, source_is_double, result_is_double, problems, m, columns, order;
  int64_t k_length, k_row, k_column, k_problem;
  int64_t y_length, y_row, y_column, y_problem;
  int64_t ridge_is_double, ridge_stride;
};

template <typename T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(count);
  if (count == 0) return values;
  if (fread(values.data(), sizeof(T), count, stdin) != static_cast<size_t>(count)) exit(2);
  return values;
}

template <typename T>
void write(const std::vector<T>& values) {
  if (!values.empty()) fwrite(values.data(), sizeof(T), values.size(), stdout);
}

std::vector<int> ordered(int64_t count, int64_t order) {
  static std::mt19937 generator(0);
  std::vector<int> places(count);
  std::iota(places.begin(), places.end(), 0);
  if (order == kBackward) std::reverse(places.begin(), places.end());
  if (order == kShuffled) std::shuffle(places.begin(), places.end(), generator);
  return places;
}

struct Launch {
  int64_t order;

  template <int kSide, typename T, typename F>
  void run(const Place& grid, F&& block) const {
    for (int place : ordered(grid.x * grid.y * grid.z, order)) {
      const std::vector<int> threads = ordered(Shape<kSide>::threads, order);
      const auto shared = std::make_unique<Shared<T, kSide>>();
      std::fill_n(&shared->slabs[0][0], sizeof(shared->slabs) / sizeof(T), T(NAN));
      std::fill_n(&shared->line[0][0], sizeof(shared->line) / sizeof(T), T(NAN));
      std::fill_n(shared->inverse, kSide, T(NAN));
      shared->failed = -1;
      block(Block{threads.data(), Shape<kSide>::threads}, *shared,
            Place{place % grid.x, place / grid.x % grid.y, place / grid.x / grid.y});
    }
  }

  template <int kSide, typename Source, typename T>
  void first(const Place& grid, const System<Source>& system, const Cholesky<T>& out) const {
    run<kSide, T>(grid, [&](const Block& block, Shared<T, kSide>& shared, const Place& place) {
      first_block<kSide>(block, shared, system, out, place);
    });
  }

  template <typename Source, typename T>
  void panel(const Place& grid, const System<Source>& system, const Cholesky<T>& out,
             int64_t step) const {
    run<kTile, T>(grid, [&](const Block& block, Shared<T, kTile>& shared, const Place& place) {
      panel_block(block, shared, system, out, step, place);
    });
  }

  template <typename Source, typename T>
  void update(const Place& grid, const System<Source>& system, const Cholesky<T>& out,
              int64_t step) const {
    run<kTile, T>(grid, [&](const Block& block, Shared<T, kTile>& shared, const Place& place) {
      update_block(block, shared, system, out, step, place);
    });
  }

  template <int kSide, typename Y, typename T>
  void solve(const Place& grid, const CholeskySolve<Y, T>& call) const {
    run<kSide, T>(grid, [&](const Block& block, Shared<T, kSide>& shared, const Place& place) {
      solve_block(block, shared, call, place);
    });
  }
};

template <typename Source, typename T>
void run_cholesky(const Call& call) {
  const auto k = read<Source>(call.k_length), y = read<Source>(call.y_length);
  const auto ridge = read<char>(call.problems * std::max<int64_t>(call.ridge_stride, 1) *
                                (call.ridge_is_double ? sizeof(double) : sizeof(float)));
  const int64_t m = call.m, problems = call.problems;
  const bool one_tile = m <= kTile && call.columns == 0;
  std::vector<T> factor(problems * m * m, T(NAN)), half(m * call.columns, T(NAN)),
      inverse(one_tile ? 0 : problems * kTile * kTile, T(NAN));
  std::vector<int32_t> pivot(problems, -7);
  const System<Source> system{{k.data(), call.k_row, call.k_column},
                              call.k_problem,
                              {y.data(), call.y_column, call.y_row},
                              {ridge.data(), call.ridge_stride, call.ridge_is_double != 0}};
  const Cholesky<T> out{
      m,           call.columns, factor.data(), half.data(), one_tile ? nullptr : inverse.data(),
      pivot.data()};
  krrst::cuda::factor(system, out, problems, Launch{call.order});
  write(factor);
  write(half);
  write(pivot);
}

template <typename Y, typename T>
void run_solve(const Call& call) {
  const auto factor = read<T>(call.k_length);
  const auto y = read<Y>(call.y_length);
  const int64_t size = call.problems * call.m * call.columns;
  std::vector<Y> out(size, Y(NAN));
  std::vector<T> work(call.m <= kTile ? 0 : size, T(NAN));
  const CholeskySolve<Y, T> solve{call.m,
                                  call.columns,
                                  {y.data(), call.y_row, call.y_column},
                                  call.y_problem,
                                  {factor.data(), call.k_row, call.k_column},
                                  call.k_problem,
                                  work.empty() ? nullptr : work.data(),
                                  out.data()};
  krrst::cuda::solve(solve, call.problems, Launch{call.order});
  write(out);
}

template <typename Source, typename T>
void run(const Call& call) {
  if (call.operation == kCholesky) return run_cholesky<Source, T>(call);
  if constexpr (std::is_same_v<T, double>) run_solve<Source, T>(call);
}

}  // namespace

int main() {
  Call call;
  while (fread(&call, sizeof(call), 1, stdin) == 1) {
    if (call.source_is_double)
      run<double, double>(call);
    else if (call.result_is_double)
      run<float, double>(call);
    else
      run<float, float>(call);
    fflush(stdout);
  }
  return 0;
}
