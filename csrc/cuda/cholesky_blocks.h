#pragma once
// The work of one block of threads in each launch of cholesky.cu; also compiles as plain C++.
// Matrices are cut into tiles of kSide x kSide. Letters: M rows, P right-hand sides, N problems.
#include "cholesky.h"
#include "tile.h"

namespace krrst::cuda {

// The block's place in its grid, or the grid.
struct Place {
  int64_t x, y, z;
};

// What is factored: k, below it y^T, from which the same steps make (L^-1 y)^T. In the first step
// they are the operator's inputs, later `factor` and `half`, where the steps leave what remains.
template <typename Source>
struct System {
  View<const Source> k;
  int64_t k_problem;
  View<const Source> y_t;
  Ridge ridge;
};

// A row of tiles of the system: entries [rows, M] from row `first` on.
template <typename Source, typename T>
struct TileRow {
  View<const Source> source;
  View<T> target;
  int64_t first, rows;
  bool in_factor;

  KRRST_DEVICE TileRow(const System<Source>& system, const Cholesky<T>& out, int64_t problem,
                       int64_t i) {
    const int64_t tiles = tiles_of(out.m, kTile);
    in_factor = i < tiles;
    first = (in_factor ? i : i - tiles) * kTile;
    rows = (in_factor ? out.m : out.columns) - first;
    source = in_factor ? system.k.from(first, 0) : system.y_t.from(first, 0);
    if (in_factor) source.data += problem * system.k_problem;
    target = in_factor ? View<T>{out.factor + problem * out.m * out.m + first, 1, out.m}
                       : View<T>{out.half + first, 1, out.columns};
  }
};

// Adds the lower triangle of a diagonal tile of k + ridge I, with ones on the diagonal beyond it.
template <int kSide, typename Source, typename T>
KRRST_DEVICE void add_diagonal(int t, const View<const Source>& k, T ridge, int64_t count,
                               T* values) {
  each_entry<kSide>(t, [&](int row, int column, int e) {
    const bool inside = row < count && column <= row;
    if (inside) values[e] += static_cast<T>(k.at(row, column));
    if (row == column) values[e] += inside ? ridge : T(1);
  });
}

// Finishes the diagonal tile [count, count] at `first`: its factor, the inverse of it for the tiles
// below, and the status, which keeps the first failure.
template <typename T, int kSide>
KRRST_DEVICE void finish_diagonal(const Block& block, Shared<T, kSide>& shared,
                                  Tile<T, kSide>& tile, const Cholesky<T>& out, int64_t problem,
                                  int64_t first) {
  const int count = static_cast<int>(out.m - first < kSide ? out.m - first : kSide);
  T* const factor = out.factor + problem * out.m * out.m + first * out.m + first;
  T* const inverse = out.inverse == nullptr ? nullptr : out.inverse + problem * kTile * kTile;
  eliminate(block, shared, tile, (count + 3) / 4 * 4, [&](int j, int k, T lower, T inverted) {
    if (j >= count || k >= count) return;
    factor[j * out.m + k] = lower;
    if (inverse != nullptr) inverse[j * kTile + k] = inverted;
  });
  block.alone([&](int t) {
    if (t == 0 && (first == 0 || (shared.failed != 0 && out.pivot[problem] == 0)))
      out.pivot[problem] = shared.failed == 0 ? 0 : static_cast<int32_t>(first + shared.failed);
  });
}

// The first diagonal tile; for M <= kSide the whole factorisation.
template <int kSide, typename Source, typename T>
KRRST_DEVICE void first_block(const Block& block, Shared<T, kSide>& shared,
                              const System<Source>& system, const Cholesky<T>& out,
                              const Place& place) {
  const int64_t problem = place.x;
  Tile<T, kSide> tile;
  const View<const Source> k = {system.k.data + problem * system.k_problem, system.k.row,
                                system.k.column};
  const T ridge = system.ridge.template of<T>(problem);
  clear<kSide>(block, tile);
  block.alone([&](int t) { add_diagonal<kSide>(t, k, ridge, out.m, tile[t]); });
  finish_diagonal(block, shared, tile, out, problem, 0);
}

// Tile i of column `step` becomes that of the factor: times the inverse of the diagonal tile,
// transposed. The tile across the diagonal becomes zero.
template <typename Source, typename T>
KRRST_DEVICE void panel_block(const Block& block, Shared<T, kTile>& shared,
                              const System<Source>& system, const Cholesky<T>& out, int64_t step,
                              const Place& place) {
  const int64_t problem = place.x, i = step + 1 + place.y;
  const TileRow<Source, T> row(system, out, problem, i);
  const int64_t column = step * kTile, count = out.m - column;
  Tile<T, kTile> tile;
  block.alone([&](int t) { each_entry<kTile>(t, [&](int, int, int e) { tile[t][e] = 0; }); });
  const Operand<const Source> left = {row.source.from(0, column), row.rows,
                                      count < kTile ? count : kTile};
  const Operand<T> right = {{out.inverse + problem * kTile * kTile, kTile, 1}, count, count};
  multiply<kTile, 1>(block, shared, tile, left, right);
  block.alone([&](int t) {
    each_entry<kTile>(t, [&](int r, int c, int e) {
      if (r < row.rows && c < count) row.target.at(r, column + c) = tile[t][e];
    });
    if (!row.in_factor) return;
    T* const across = out.factor + problem * out.m * out.m + row.first * out.m + column;
    each_entry<kTile>(t, [&](int r, int c, int) {
      if (c < row.rows) across[c * out.m + r] = 0;
    });
  });
}

// Subtracts the product of column `step` of the factor from tile (i, j) of the trailing matrix. The
// block of the next diagonal tile also factors it, while other blocks still update the rest.
template <typename Source, typename T>
KRRST_DEVICE void update_block(const Block& block, Shared<T, kTile>& shared,
                               const System<Source>& system, const Cholesky<T>& out, int64_t step,
                               const Place& place) {
  const int64_t problem = place.x, i = step + 1 + place.y, j = step + 1 + place.z;
  if (i < j) return;
  const TileRow<Source, T> row(system, out, problem, i), other(system, out, problem, j);
  const int64_t column = j * kTile, done = step * kTile, count = out.m - column;
  const T ridge = system.ridge.template of<T>(problem);
  Tile<T, kTile> tile;
  clear<kTile>(block, tile);
  const Operand<T> left = {row.target.from(0, done), row.rows, kTile},
                   right = {other.target.from(0, done), count, kTile};
  multiply<kTile, -1>(block, shared, tile, left, right);
  // Added last: the sum of the products is smaller, and so are its rounding errors.
  block.alone([&](int t) {
    if (i == j) return add_diagonal<kTile>(t, row.source.from(0, column), ridge, count, tile[t]);
    each_entry<kTile>(t, [&](int r, int c, int e) {
      if (r < row.rows && c < count) tile[t][e] += static_cast<T>(row.source.at(r, column + c));
    });
  });
  if (i == j && j == step + 1) return finish_diagonal(block, shared, tile, out, problem, column);
  block.alone([&](int t) {
    each_entry<kTile>(t, [&](int r, int c, int e) {
      // Above the diagonal the panels write their zeros.
      const bool kept = i != j || r >= c;
      if (r < row.rows && c < count && kept) row.target.at(r, column + c) = tile[t][e];
    });
  });
}

// (L L^T)^-1 y for kSide columns of y from `column` on. Between tiles of rows the solution is kept
// in `work`, in the precision of the factor.
template <int kSide, typename Y, typename T>
KRRST_DEVICE void solve_block(const Block& block, Shared<T, kSide>& shared,
                              const CholeskySolve<Y, T>& solve, const Place& place) {
  const int64_t problem = place.x, column = place.y * kSide;
  const int64_t m = solve.m, columns = solve.columns - column, tiles = tiles_of(m, kSide);
  const View<const T> factor = {solve.factor.data + problem * solve.factor_problem,
                                solve.factor.row, solve.factor.column};
  const View<const Y> y = {&solve.y.at(0, column) + problem * solve.y_problem, solve.y.row,
                           solve.y.column};
  const int64_t offset = (problem * solve.columns + column) * m;
  const View<T> work = {solve.work == nullptr ? nullptr : solve.work + offset, 1, m};
  const View<Y> out = {solve.out + offset, 1, m};
  Tile<T, kSide> tile;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = i * kSide, rows = m - first;
    block.alone([&](int t) {
      each_entry<kSide>(t, [&](int r, int c, int e) {
        const bool inside = r < rows && c < columns;
        tile[t][e] = inside ? static_cast<T>(y.at(first + r, c)) : T(0);
      });
    });
    if (i > 0)
      multiply<kSide, -1>(block, shared, tile, Operand<const T>{factor.from(first, 0), rows, first},
                          Operand<T>{work.transposed(), columns, first});
    substitute<true>(block, shared, tile, factor.from(first, first), rows < kSide ? rows : kSide);
    if (i + 1 == tiles) break;
    block.each([&](int t) {
      each_entry<kSide>(t, [&](int r, int c, int e) {
        if (c < columns) work.at(first + r, c) = tile[t][e];
      });
    });
  }
  for (int64_t i = tiles - 1; i >= 0; --i) {
    const int64_t first = i * kSide, rows = m - first, below = first + kSide;
    if (i + 1 < tiles) {
      block.alone([&](int t) {
        each_entry<kSide>(t, [&](int r, int c, int e) {
          tile[t][e] = c < columns ? work.at(first + r, c) : T(0);
        });
      });
      multiply<kSide, -1>(
          block, shared, tile,
          Operand<const T>{factor.from(below, first).transposed(), kSide, m - below},
          Operand<T>{work.from(below, 0).transposed(), columns, m - below});
    }
    substitute<false>(block, shared, tile, factor.from(first, first).transposed(),
                      rows < kSide ? rows : kSide);
    block.each([&](int t) {
      each_entry<kSide>(t, [&](int r, int c, int e) {
        if (r >= rows || c >= columns) return;
        if (tiles > 1) work.at(first + r, c) = tile[t][e];
        out.at(first + r, c) = static_cast<Y>(tile[t][e]);
      });
    });
  }
}

// The launches of a factorisation, one after the other; `launch` has a member for each of the
// above.
template <typename Source, typename T, typename Launch>
void factor_step(const System<Source>& system, const Cholesky<T>& out, int64_t problems,
                 int64_t step, Launch&& launch) {
  const int64_t right = tiles_of(out.m, kTile) - step - 1,
                below = right + tiles_of(out.columns, kTile);
  if (below > 0) launch.panel(Place{problems, below, 1}, system, out, step);
  if (right > 0) launch.update(Place{problems, below, right}, system, out, step);
}

template <typename Source, typename T, typename Launch>
void factor(const System<Source>& system, const Cholesky<T>& out, int64_t problems,
            Launch&& launch) {
  const Place grid{problems, 1, 1};
  if (out.m <= kSmall && out.columns == 0) return launch.template first<kSmall>(grid, system, out);
  launch.template first<kTile>(grid, system, out);
  factor_step(system, out, problems, 0, launch);
  const System<T> rest{
      {out.factor, 1, out.m}, out.m * out.m, {out.half, 1, out.columns}, {nullptr, 0, false}};
  for (int64_t step = 1; step < tiles_of(out.m, kTile); ++step)
    factor_step(rest, out, problems, step, launch);
}

template <typename Y, typename T, typename Launch>
void solve(const CholeskySolve<Y, T>& call, int64_t problems, Launch&& launch) {
  if (call.m <= kSmall)
    launch.template solve<kSmall>(Place{problems, tiles_of(call.columns, kSmall), 1}, call);
  else
    launch.template solve<kTile>(Place{problems, tiles_of(call.columns, kTile), 1}, call);
}

}  // namespace krrst::cuda
