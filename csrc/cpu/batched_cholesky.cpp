#include "batched_cholesky.h"

#include <limits>

#include "small.h"

namespace krrst::cpu {
namespace {

// Right-hand sides that are solved together: the vectors of a tile.
constexpr int64_t kVectors = 4;

// The upper triangle of k, by rows, and zeros around it.
template <typename T>
void take_upper(const Matrix<const T>& k, double ridge, int64_t m, double* u, int64_t stride) {
  std::fill(u, u + m * stride, 0.0);
  for (int64_t i = 0; i < m; ++i) {
    copy(k.from(i, i), 1, m - i, Matrix<double>{u + i * stride + i, stride, 1});
    u[i * stride + i] += ridge;
  }
}

}  // namespace

template <typename T>
void batched_cholesky(const Matrices<const T>& k, const double* ridge, int64_t problems, int64_t m,
                      double* factor, int32_t* pivot, const Parallel& threads) {
  const Triangular& kernel = triangular();
  const Parallel& parallel = worth(problems * m * m * m / 6, threads);
  const int64_t stride = round_up(m, kernel.lanes);
  parallel(problems, [&](int64_t first, int64_t last) {
    const Scratch<double> u(m * stride);
    for (int64_t n = first; n < last; ++n) {
      const Matrix<const T> source = k[n].row < k[n].column ? k[n].transposed() : k[n];
      double* const out = factor + n * m * m;
      take_upper(source, ridge[n], m, u.get(), stride);
      pivot[n] = kernel.factor(m, u.get(), stride);
      if (pivot[n] == 0)
        for (int64_t i = 0; i < m; ++i) {
          std::fill(out + i * m, out + i * m + i, 0.0);
          std::copy(u.get() + i * stride + i, u.get() + i * stride + m, out + i * m + i);
        }
      else
        std::fill(out, out + m * m, std::numeric_limits<double>::quiet_NaN());
    }
  });
}

template <typename T>
void batched_cholesky_solve(const Matrices<const T>& y, const Matrices<const double>& factor,
                            int64_t problems, int64_t m, int64_t columns, const Matrices<T>& out,
                            const Parallel& threads) {
  if (m == 0 || columns == 0) return;
  const Triangular& kernel = triangular();
  const Parallel& parallel = worth(problems * m * m * columns, threads);
  const int64_t width = kVectors * kernel.lanes, parts = (columns + width - 1) / width;
  parallel(problems * parts, [&](int64_t first, int64_t last) {
    const Scratch<double> x(m * width), inverse(m);
    for (int64_t t = first; t < last; ++t) {
      const int64_t n = t / parts, j = t % parts * width, count = std::min(width, columns - j),
                    stride = round_up(count, kernel.lanes);
      const Matrix<const double> l = factor[n];
      for (int64_t i = 0; i < m; ++i) inverse.get()[i] = 1 / l.data[i * (l.row + l.column)];
      if (count < stride) std::fill(x.get(), x.get() + m * stride, 0.0);
      copy(y[n].from(0, j), m, count, Matrix<double>{x.get(), stride, 1});
      kernel.solve(m, l.data, l.row, l.column, inverse.get(), x.get(), stride);
      copy(Matrix<const double>{x.get(), stride, 1}, m, count, out[n].from(0, j));
    }
  });
}

#define KRRST_INSTANTIATE(T)                                                                       \
  template void batched_cholesky<T>(const Matrices<const T>&, const double*, int64_t, int64_t,     \
                                    double*, int32_t*, const Parallel&);                           \
  template void batched_cholesky_solve<T>(const Matrices<const T>&, const Matrices<const double>&, \
                                          int64_t, int64_t, int64_t, const Matrices<T>&,           \
                                          const Parallel&);
KRRST_INSTANTIATE(float)
KRRST_INSTANTIATE(double)

}  // namespace krrst::cpu
