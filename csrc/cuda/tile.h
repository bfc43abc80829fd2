#pragma once
// Square tiles of kSide x kSide entries, each held by one block: thread t has the 4 x 4 entries of
// rows 4 (t % lanes) .. + 3 and columns 4 (t / lanes) .. + 3 in registers.
#include "block.h"

namespace krrst::cuda {

// Entry (i, j) of a matrix of any strides.
template <typename T>
struct View {
  T* data;
  int64_t row, column;

  KRRST_DEVICE T& at(int64_t i, int64_t j) const { return data[i * row + j * column]; }
  KRRST_DEVICE View from(int64_t i, int64_t j) const { return {&at(i, j), row, column}; }
  KRRST_DEVICE View transposed() const { return {data, column, row}; }
};

template <int kSide>
struct Shape {
  static constexpr int lanes = kSide / 4, threads = lanes * lanes;
  static constexpr int depth = kSide / 4, pad = kSide + 4;
};

// Shared memory of a block. `slabs` holds two slabs of either operand of a product, or
// a triangle: [column][row].
template <typename T, int kSide>
struct Shared {
  using Column = T[Shape<kSide>::pad];
  alignas(16) Column slabs[kSide];
  alignas(16) T line[2][kSide];
  T inverse[kSide];
  int failed;

  KRRST_DEVICE Column* slab(int buffer, int operand) {
    return slabs + (2 * buffer + operand) * Shape<kSide>::depth;
  }
};

template <typename T, int kSide>
using Tile = Private<T, 16, Shape<kSide>::threads>;

// The left or right operand of a product: entries [rows, depth], and zeros around them.
template <typename T>
struct Operand {
  View<T> view;
  int64_t rows, depth;
};

// Calls body(row, column, place of the entry in the tile) for the entries of a thread.
template <int kSide, typename F>
KRRST_DEVICE void each_entry(int t, F&& body) {
  const int row = t % Shape<kSide>::lanes * 4, column = t / Shape<kSide>::lanes * 4;
  KRRST_UNROLL
  for (int s = 0; s < 4; ++s) {
    KRRST_UNROLL
    for (int r = 0; r < 4; ++r) body(row + r, column + s, s * 4 + r);
  }
}

KRRST_ANYWHERE int64_t tiles_of(int64_t count, int64_t side) { return (count + side - 1) / side; }

template <int kSide, typename T>
KRRST_DEVICE void clear(const Block& block, Tile<T, kSide>& tile) {
  block.alone([&](int t) { each_entry<kSide>(t, [&](int, int, int e) { tile[t][e] = 0; }); });
}

// Rows, or columns, of a tile that lie inside the matrix, when `count` remain from its start on.
template <int kSide>
KRRST_DEVICE int cut(int64_t count) {
  return count < kSide ? static_cast<int>(count) : kSide;
}

// The entries of a slab [kSide rows, depth] that thread t moves: neighbouring threads take what are
// neighbours in memory. All four lie on one line, so that one address and one stride reach them.
template <int kSide>
struct SlabPart {
  static constexpr int entries = kSide * Shape<kSide>::depth / Shape<kSide>::threads;
  int row, depth, row_step, depth_step;

  KRRST_DEVICE SlabPart(int t, bool by_rows)
      : row(by_rows ? t % kSide : t / Shape<kSide>::depth),
        depth(by_rows ? t / kSide : t % Shape<kSide>::depth),
        row_step(by_rows ? 0 : Shape<kSide>::threads / Shape<kSide>::depth),
        depth_step(by_rows ? Shape<kSide>::threads / kSide : 0) {}
};

template <int kSide, typename T, typename Source>
KRRST_DEVICE void load_slab(int t, const Operand<Source>& source, int64_t first, T* values) {
  const SlabPart<kSide> part(t, source.view.row == 1);
  const int64_t place = part.row * source.view.row + (first + part.depth) * source.view.column,
                step = part.row_step * source.view.row + part.depth_step * source.view.column;
  const int rows = cut<kSide>(source.rows), depth = cut<kSide>(source.depth - first);
  KRRST_UNROLL
  for (int e = 0; e < part.entries; ++e) {
    const bool inside =
        part.row + e * part.row_step < rows && part.depth + e * part.depth_step < depth;
    values[e] = inside ? static_cast<T>(source.view.data[place + e * step]) : T(0);
  }
}

template <int kSide, typename T>
KRRST_DEVICE void store_slab(int t, bool by_rows, const T* values,
                             typename Shared<T, kSide>::Column* slab) {
  const SlabPart<kSide> part(t, by_rows);
  KRRST_UNROLL
  for (int e = 0; e < part.entries; ++e)
    slab[part.depth + e * part.depth_step][part.row + e * part.row_step] = values[e];
}

// tile += sign * left right^T, in slabs; the next slab is loaded while one is multiplied.
template <int kSide, int kSign, typename T, typename A, typename B>
KRRST_DEVICE void multiply(const Block& block, Shared<T, kSide>& shared, Tile<T, kSide>& tile,
                           const Operand<A>& left, const Operand<B>& right) {
  using Sizes = Shape<kSide>;
  constexpr int share = SlabPart<kSide>::entries;
  block.each([&](int t) {
    T a[share], b[share];
    load_slab<kSide>(t, left, 0, a);
    load_slab<kSide>(t, right, 0, b);
    store_slab<kSide, T>(t, left.view.row == 1, a, shared.slab(0, 0));
    store_slab<kSide, T>(t, right.view.row == 1, b, shared.slab(0, 1));
  });
  for (int64_t first = 0; first < left.depth; first += Sizes::depth) {
    const int now = first / Sizes::depth % 2;
    const int64_t next = first + Sizes::depth;
    block.each([&](int t) {
      T a[share], b[share];
      if (next < left.depth) {
        load_slab<kSide>(t, left, next, a);
        load_slab<kSide>(t, right, next, b);
      }
      const int row = t % Sizes::lanes * 4, column = t / Sizes::lanes * 4;
      KRRST_UNROLL_BY(16 / sizeof(T))
      for (int k = 0; k < Sizes::depth; ++k) {
        const Four<T> rows = load_four(shared.slab(now, 0)[k] + row),
                      columns = load_four(shared.slab(now, 1)[k] + column);
        KRRST_UNROLL
        for (int e = 0; e < 16; ++e) {
          const T left = kSign > 0 ? rows[e % 4] : -rows[e % 4];
          tile[t][e] += left * columns[e / 4];
        }
      }
      if (next < left.depth) {
        store_slab<kSide, T>(t, left.view.row == 1, a, shared.slab(1 - now, 0));
        store_slab<kSide, T>(t, right.view.row == 1, b, shared.slab(1 - now, 1));
      }
    });
  }
}

template <typename T, int kSide>
KRRST_DEVICE void publish_column(int t, int column, int place, Shared<T, kSide>& shared,
                                 Tile<T, kSide>& tile) {
  constexpr int lanes = Shape<kSide>::lanes;
  if (t / lanes != column / 4) return;
  KRRST_UNROLL
  for (int r = 0; r < 4; ++r) shared.line[column % 2][t % lanes * 4 + r] = tile[t][place * 4 + r];
}

// Cholesky factor L and its inverse of a symmetric tile of which the lower triangle counts, in
// place: what is left of a column once it is finished holds the inverse, so one line a step is all
// that the threads exchange. In step j < steps (a multiple of 4) calls
// store(j, k, L[k, j], (L^-1)[j, k]) once for each k. shared.failed is 0 or the number, from 1, of
// the first pivot that is not a positive, finite number; from that column on all is NaN.
template <typename T, int kSide, typename F>
KRRST_DEVICE void eliminate(const Block& block, Shared<T, kSide>& shared, Tile<T, kSide>& tile,
                            int steps, F&& store) {
  constexpr int lanes = Shape<kSide>::lanes;
  block.each([&](int t) {
    if (t == 0) shared.failed = 0;
    publish_column(t, 0, 0, shared, tile);
  });
  for (int base = 0; base < steps; base += 4) {
    KRRST_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int j = base + r;
      block.each([&](int t) {
        const T* line = shared.line[j % 2];
        const T pivot = line[j];
        const bool good = pivot > 0 && pivot < T(INFINITY);
        const T scale = good ? inverse_sqrt(pivot) : T(NAN);
        if (t == 0 && !good && shared.failed == 0) shared.failed = j + 1;
        if (t < kSide) {
          const T value = line[t] * scale;
          store(j, t, t < j ? T(0) : value, t < j ? value : t == j ? scale : T(0));
        }
        const int lane = t % lanes, column = t / lanes * 4;
        if (column + 3 > j) {
          const Four<T> rows = load_four(line + lane * 4), columns = load_four(line + column);
          KRRST_UNROLL
          for (int e = 0; e < 16; ++e) {
            const bool own = e % 4 == r && lane == base / 4;
            const T left = own ? scale : rows[e % 4] * scale;
            tile[t][e] = (own ? T(0) : tile[t][e]) - left * (columns[e / 4] * scale);
          }
        }
        if (j + 1 < steps) publish_column(t, j + 1, (r + 1) % 4, shared, tile);
      });
    }
  }
}

// Loads a triangle [count, count] into shared.slabs, with ones on the diagonal beyond it.
template <typename T, int kSide, typename Source>
KRRST_DEVICE void take_triangle(const Block& block, Shared<T, kSide>& shared,
                                const View<Source>& triangle, int64_t count) {
  const bool by_rows = triangle.row == 1;
  block.each([&](int t) {
    for (int place = t; place < kSide * kSide; place += Shape<kSide>::threads) {
      const int fast = place % kSide, slow = place / kSide;
      const int row = by_rows ? fast : slow, column = by_rows ? slow : fast;
      const bool inside = row < count && column < count;
      shared.slabs[column][row] =
          inside ? static_cast<T>(triangle.at(row, column)) : T(row == column);
    }
  });
  block.each([&](int t) {
    if (t < kSide) shared.inverse[t] = 1 / shared.slabs[t][t];
  });
}

template <typename T, int kSide>
KRRST_DEVICE void publish_row(int t, int row, int place, Shared<T, kSide>& shared,
                              Tile<T, kSide>& tile) {
  constexpr int lanes = Shape<kSide>::lanes;
  if (t % lanes != row / 4) return;
  KRRST_UNROLL
  for (int s = 0; s < 4; ++s) {
    tile[t][s * 4 + place] *= shared.inverse[row];
    shared.line[row % 2][t / lanes * 4 + s] = tile[t][s * 4 + place];
  }
}

// tile = triangle^-1 tile for a triangle [count, count]: lower, or upper when not kForward.
template <bool kForward, typename T, int kSide, typename Source>
KRRST_DEVICE void substitute(const Block& block, Shared<T, kSide>& shared, Tile<T, kSide>& tile,
                             const View<Source>& triangle, int64_t count) {
  constexpr int lanes = Shape<kSide>::lanes, way = kForward ? 1 : -1;
  const int fours = static_cast<int>((count + 3) / 4);
  take_triangle(block, shared, triangle, count);
  block.each(
      [&](int t) { publish_row(t, kForward ? 0 : 4 * fours - 1, kForward ? 0 : 3, shared, tile); });
  for (int four = 0; four < fours; ++four) {
    const int base = 4 * (kForward ? four : fours - 1 - four);
    KRRST_UNROLL
    for (int step = 0; step < 4; ++step) {
      const int place = kForward ? step : 3 - step, j = base + place;
      block.each([&](int t) {
        const int row = t % lanes * 4;
        const Four<T> solved = load_four(shared.line[j % 2] + t / lanes * 4),
                      factors = load_four(shared.slabs[j] + row);
        KRRST_UNROLL
        for (int e = 0; e < 16; ++e) {
          const int i = row + e % 4;
          if (kForward ? i > j : i < j) tile[t][e] -= factors[e % 4] * solved[e / 4];
        }
        if (four + 1 < fours || step < 3)
          publish_row(t, j + way, (place + way + 4) % 4, shared, tile);
      });
    }
  }
}

}  // namespace krrst::cuda
