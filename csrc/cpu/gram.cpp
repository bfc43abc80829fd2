#include "gram.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "gemm.h"
#include "small.h"

namespace krrst::cpu {
namespace {

// Depth of a packed chunk: with it, a panel of either operand stays in a 1 MB L2 next to its tiles.
constexpr int64_t kChunk = 256;
// Up to this many rows, dot products along the rows are faster than packed panels, which few rows
// do not fill.
constexpr int64_t kFewRows = 64, kDotRows = 192;
// With at least this many problems, of at most this many rows, every thread computes whole
// problems.
constexpr int64_t kManyProblems = 16, kManyRows = 512;

// The (row, column) of entry t of a lower triangle stored row by row.
void lower_entry(int64_t t, int64_t* row, int64_t* column) {
  int64_t i = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(t) + 1.0) - 1.0) / 2.0);
  while (i * (i + 1) / 2 > t) --i;
  while ((i + 1) * (i + 2) / 2 <= t) ++i;
  *row = i;
  *column = t - i * (i + 1) / 2;
}

// Adds panel i times panel j to its block of k; blocks at the border go through a local one.
template <typename T>
void add_block(const Gemm<T>& gemm, int64_t depth, const T* panel_i, const T* panel_j, int64_t rows,
               int64_t columns, T* block, int64_t n, T* local, bool accumulate) {
  const int64_t width = gemm.width;
  const bool whole = columns == width;
  for (int64_t r = 0; r < rows; r += gemm.rows) {
    const int64_t count = std::min(gemm.rows, rows - r);
    if (whole) {
      gemm.tiles(depth, panel_i + r, width, count, panel_j, block + r * n, n, accumulate);
      continue;
    }
    gemm.tiles(depth, panel_i + r, width, count, panel_j, local, width, false);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        T& out = block[(r + i) * n + j];
        out = accumulate ? out + local[i * width + j] : local[i * width + j];
      }
  }
}

// scale * value + bias on and below the diagonal of a block, and its mirror image above.
template <typename T>
void finish_block(T* k, int64_t n, int64_t i0, int64_t i1, int64_t j0, int64_t j1, T scale,
                  T bias) {
  for (int64_t i = i0; i < i1; ++i) {
    const int64_t last = std::min(j1, i + 1);
    for (int64_t j = j0; j < last; ++j) {
      const T value = scale * k[i * n + j] + bias;
      k[i * n + j] = value;
      k[j * n + i] = value;
    }
  }
}

// One gram of many rows: packed panels, and one task for each block of the lower triangle.
template <typename T>
void gram_of_panels(const Matrix<const T>& x, int64_t n, int64_t depth, T scale, T bias, T* k,
                    const Parallel& parallel) {
  const Gemm<T>& kernel = gemm<T>();
  const int64_t width = kernel.width, panels = (n + width - 1) / width,
                blocks = panels * (panels + 1) / 2;
  const int64_t chunk = std::min(depth, kChunk);
  const Scratch<T> packed(panels * width * chunk);
  for (int64_t k0 = 0; k0 < depth; k0 += chunk) {
    const int64_t kc = std::min(chunk, depth - k0);
    parallel(panels, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p)
        kernel.pack(x.from(p * width, k0).data, x.row, x.column, std::min(width, n - p * width), kc,
                    packed.get() + p * width * chunk);
    });
    parallel(blocks, [&](int64_t first, int64_t last) {
      const Scratch<T> local(kernel.rows * width);
      for (int64_t t = first; t < last; ++t) {
        int64_t i, j;
        lower_entry(t, &i, &j);
        add_block(kernel, kc, packed.get() + i * width * chunk, packed.get() + j * width * chunk,
                  std::min(width, n - i * width), std::min(width, n - j * width),
                  k + i * width * n + j * width, n, local.get(), k0 > 0);
      }
    });
  }
  parallel(blocks, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      int64_t i, j;
      lower_entry(t, &i, &j);
      finish_block(k, n, i * width, std::min(n, (i + 1) * width), j * width,
                   std::min(n, (j + 1) * width), scale, bias);
    }
  });
}

// Few rows: dot products along them. A row block is at most `kernel.rows` rows of the lower
// triangle.
template <typename T>
struct Dots {
  const Small<T>& kernel = small<T>();
  int64_t n, depth;
  T scale, bias;

  int64_t blocks() const { return (n + kernel.rows - 1) / kernel.rows; }
  int64_t packed_depth() const { return round_up(depth, kernel.lanes); }
  bool packs(const Matrix<const T>& x) const { return x.column != 1 || depth < kernel.lanes; }

  // x, or a copy in `packed` [n, packed_depth()] whose rows are contiguous and at least a vector.
  Matrix<const T> rows_of(const Matrix<const T>& x, T* packed) const {
    if (!packs(x)) return x;
    const int64_t stride = packed_depth();
    if (depth < stride) std::fill(packed, packed + n * stride, T(0));
    copy(x, n, depth, Matrix<T>{packed, stride, 1});
    return {packed, stride, 1};
  }

  // A row block of k from the rows of x; `next` is what is read after the last one.
  void block(int64_t b, const Matrix<const T>& x, const T* next, T* k) const {
    const int64_t i = b * kernel.rows, rows = std::min(kernel.rows, n - i);
    const T* const first = x.data + i * x.row;
    kernel.dot({rows, std::max(depth, kernel.lanes), i + rows, first, x.row, 1, x.data, 1, x.row,
                k + i * n, n, 1, i + rows < n ? first + rows * x.row : next});
    finish_block(k, n, i, i + rows, 0, i + rows, scale, bias);
  }
};

// Few problems: the threads share each one; a task takes a long row block and a short one.
template <typename T>
void gram_of_dots(const Dots<T>& dots, const Matrix<const T>& x, T* k, const Parallel& parallel) {
  const Scratch<T> packed(dots.packs(x) ? dots.n * dots.packed_depth() : 0);
  const Matrix<const T> rows = dots.rows_of(x, packed.get());
  parallel(dots.blocks(), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      dots.block(t % 2 ? t / 2 : dots.blocks() - 1 - t / 2, rows, rows.data, k);
  });
}

// Many problems: one thread computes a whole problem.
template <typename T>
void grams_of_dots(const Dots<T>& dots, const Matrices<const T>& x, int64_t problems, T* k,
                   const Parallel& parallel) {
  parallel(problems, [&](int64_t first, int64_t last) {
    const bool packs = dots.packs(x[0]);
    const Scratch<T> packed(packs ? dots.n * dots.packed_depth() : 0);
    for (int64_t p = first; p < last; ++p) {
      const Matrix<const T> rows = dots.rows_of(x[p], packed.get());
      const T* const next = packs ? rows.data : x[std::min(p + 1, last - 1)].data;
      for (int64_t b = 0; b < dots.blocks(); ++b)
        dots.block(b, rows, next, k + p * dots.n * dots.n);
    }
  });
}

}  // namespace

template <typename T>
void gram(const Matrices<const T>& x, int64_t problems, int64_t n, int64_t depth, T scale, T bias,
          T* k, const Parallel& threads) {
  if (depth == 0) std::fill(k, k + problems * n * n, bias);
  if (problems == 0 || n == 0 || depth == 0) return;
  const Parallel& parallel = worth(problems * n * n * depth, threads);
  const bool many = problems >= kManyProblems && n <= kManyRows;
  if (n < kFewRows || (n <= kDotRows && n <= depth)) {
    const Dots<T> dots{small<T>(), n, depth, scale, bias};
    if (many) return grams_of_dots(dots, x, problems, k, parallel);
    for (int64_t p = 0; p < problems; ++p) gram_of_dots(dots, x[p], k + p * n * n, parallel);
    return;
  }
  const auto panels = [&](int64_t p, const Parallel& inner) {
    gram_of_panels(x[p], n, depth, scale, bias, k + p * n * n, inner);
  };
  if (!many) {
    for (int64_t p = 0; p < problems; ++p) panels(p, parallel);
    return;
  }
  parallel(problems, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) panels(p, this_thread());
  });
}

template void gram<float>(const Matrices<const float>&, int64_t, int64_t, int64_t, float, float,
                          float*, const Parallel&);
template void gram<double>(const Matrices<const double>&, int64_t, int64_t, int64_t, double, double,
                           double*, const Parallel&);

}  // namespace krrst::cpu
