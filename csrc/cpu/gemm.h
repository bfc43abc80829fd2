// Packed matrix products on raw pointers: no torch headers, so that each instruction set compiles
// in a second. A "panel" is `width` rows of an operand stored [depth][width]: for each depth index
// the width values lie side by side, zero-padded. One layout serves both operands of a product: a
// tile reads one panel by vectors and up to `rows` values of the other by broadcast.
#pragma once
#include <cstdint>

namespace krrst::cpu {

template <typename T>
struct Gemm {
  // One tile sums at most this many products in a row before they are added to c: a longer chain of
  // float32 additions loses digits that plain PyTorch keeps.
  static constexpr int64_t chain = 128;

  int64_t width;  // panel width
  int64_t rows;   // rows of a tile, a divisor of width

  // panel[k * width + r] = x[r * row_stride + k * depth_stride], r < count, zero for count <= r <
  // width.
  void (*pack)(const T* x, int64_t row_stride, int64_t depth_stride, int64_t count, int64_t depth,
               T* panel);

  // c[r * ldc + j] (+)= sum_k x[k * x_stride + r] * panel[k * width + j], r < count <= rows, j <
  // width.
  void (*tile)(int64_t depth, const T* x, int64_t x_stride, int64_t count, const T* panel, T* c,
               int64_t ldc, bool accumulate);

  // The same for any depth, in chains.
  void tiles(int64_t depth, const T* x, int64_t x_stride, int64_t count, const T* panel, T* c,
             int64_t ldc, bool accumulate) const {
    for (int64_t k = 0; k < depth; k += chain)
      tile(chain < depth - k ? chain : depth - k, x + k * x_stride, x_stride, count,
           panel + k * width, c, ldc, accumulate || k > 0);
  }
};

template <typename T>
const Gemm<T>& gemm();

}  // namespace krrst::cpu
