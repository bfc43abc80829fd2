#include "thin_matmul.h"

#include <algorithm>
#include <memory>

#include "gemm.h"

namespace krrst::cpu {
namespace {

// Size of the part of `a` that a thread packs at a time: the longest contiguous runs of its layout
// that fit into half of the L2 cache.
struct Block {
  int64_t panels, depth;
};
constexpr Block kColumnMajor{8, 128}, kRowMajor{2, 512};

// out^T of the rows [i0, i1), accumulated in `sums` [columns][block.panels * width], then written
// as rows.
template <typename T>
void rows_of(const Gemm<T>& kernel, const T* a, int64_t a_row, int64_t a_depth, const T* b,
             int64_t i0, int64_t i1, int64_t depth, int64_t columns, Block block, T* out, T* panels,
             T* sums) {
  const int64_t width = kernel.width, stride = block.panels * width,
                count = (i1 - i0 + width - 1) / width;
  for (int64_t k0 = 0; k0 < depth; k0 += block.depth) {
    const int64_t kc = std::min(block.depth, depth - k0);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t row = i0 + p * width;
      T* const panel = panels + p * width * block.depth;
      kernel.pack(a + row * a_row + k0 * a_depth, a_row, a_depth, std::min(width, i1 - row), kc,
                  panel);
      for (int64_t c = 0; c < columns; c += kernel.rows)
        kernel.tiles(kc, b + k0 * columns + c, columns, std::min(kernel.rows, columns - c), panel,
                     sums + c * stride + p * width, stride, k0 > 0);
    }
  }
  for (int64_t i = i0; i < i1; ++i)
    for (int64_t c = 0; c < columns; ++c)
      out[i * columns + c] = depth > 0 ? sums[c * stride + i - i0] : T(0);
}

}  // namespace

template <typename T>
void thin_matmul(const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_depth,
                 int64_t b_column, int64_t n, int64_t depth, int64_t columns, T* out,
                 const Parallel& parallel) {
  const Gemm<T>& kernel = gemm<T>();
  const std::unique_ptr<T[]> rows(new T[static_cast<size_t>(depth * columns)]);  // b, row-major
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t c = 0; c < columns; ++c) rows[k * columns + c] = b[k * b_depth + c * b_column];
  const Block block = a_row == 1 ? kColumnMajor : kRowMajor;
  const int64_t span = block.panels * kernel.width;
  parallel((n + span - 1) / span, [&](int64_t first, int64_t last) {
    const std::unique_ptr<T[]> panels(new T[static_cast<size_t>(span * block.depth)]);
    const std::unique_ptr<T[]> sums(new T[static_cast<size_t>(span * columns)]);
    for (int64_t s = first; s < last; ++s)
      rows_of(kernel, a, a_row, a_depth, rows.get(), s * span, std::min(n, (s + 1) * span), depth,
              columns, block, out, panels.get(), sums.get());
  });
}

template void thin_matmul<float>(const float*, int64_t, int64_t, const float*, int64_t, int64_t,
                                 int64_t, int64_t, int64_t, float*, const Parallel&);
template void thin_matmul<double>(const double*, int64_t, int64_t, const double*, int64_t, int64_t,
                                  int64_t, int64_t, int64_t, double*, const Parallel&);

}  // namespace krrst::cpu
