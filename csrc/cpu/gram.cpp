#include "gram.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "gemm.h"

namespace krrst::cpu {
namespace {

// Depth of a packed chunk: with it, a panel of either operand stays in a 1 MB L2 next to its tiles.
constexpr int64_t kChunk = 256;

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

}  // namespace

template <typename T>
void gram(const T* x, int64_t row_stride, int64_t depth_stride, int64_t n, int64_t depth, T scale,
          T bias, T* k, const Parallel& parallel) {
  const Gemm<T>& kernel = gemm<T>();
  const int64_t width = kernel.width, panels = (n + width - 1) / width,
                blocks = panels * (panels + 1) / 2;
  const int64_t chunk = std::min(depth, kChunk);
  if (depth == 0) std::fill(k, k + n * n, T(0));
  const std::unique_ptr<T[]> packed(new T[static_cast<size_t>(panels * width * chunk)]);
  for (int64_t k0 = 0; k0 < depth; k0 += chunk) {
    const int64_t kc = std::min(chunk, depth - k0);
    parallel(panels, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p)
        kernel.pack(x + p * width * row_stride + k0 * depth_stride, row_stride, depth_stride,
                    std::min(width, n - p * width), kc, packed.get() + p * width * chunk);
    });
    parallel(blocks, [&](int64_t first, int64_t last) {
      const std::unique_ptr<T[]> local(new T[static_cast<size_t>(kernel.rows * width)]);
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

template void gram<float>(const float*, int64_t, int64_t, int64_t, int64_t, float, float, float*,
                          const Parallel&);
template void gram<double>(const double*, int64_t, int64_t, int64_t, int64_t, double, double,
                           double*, const Parallel&);

}  // namespace krrst::cpu
