#include "batched_matmul.h"

#include "small.h"

namespace krrst::cpu {
namespace {

// From this many problems on, each problem is one task. Fewer problems are cut into blocks, whose
// size depends on the shapes alone, so that results do not depend on the number of threads.
constexpr int64_t kManyProblems = 64;
constexpr int64_t kBlockRows = 60, kBlockColumns = 960;

// A way to compute a product: as a b or as b^T a^T = out^T, which operands are copied, and the
// inner loop. `narrow`: out has fewer columns than a vector, and b is copied with columns of zeros.
struct Plan {
  bool transposed, pack_a, pack_b, dot, narrow;
};

template <typename T>
Product<T> transposed(const Product<T>& p) {
  return {p.columns,  p.depth, p.rows, p.b,          p.b_column, p.b_row, p.a,
          p.a_column, p.a_row, p.out,  p.out_column, p.out_row,  p.next};
}

// The way with the fewest vector operations. The weights were measured: a sum over the lanes of a
// tile of dot products, and a copied value, each cost as much as one or several operations.
template <typename T>
Plan choose(const Product<T>& p) {
  const int64_t lanes = small<T>().lanes, outputs = p.rows * p.columns;
  const bool deep = p.depth >= lanes, wide = p.columns >= lanes, tall = p.rows >= lanes;
  const auto vectors = [lanes](int64_t count) { return (count + lanes - 1) / lanes; };
  const auto copied = [&p](bool is, int64_t count) { return is ? p.depth * count : 0; };
  struct Way {
    Plan plan;
    bool possible;
    int64_t cost;
  };
  const Way ways[] = {
      {{false, p.a_column != 1, p.b_row != 1, true, false},
       deep,
       outputs * (vectors(p.depth) + 6) + copied(p.a_column != 1, p.rows) +
           copied(p.b_row != 1, p.columns)},
      {{false, false, p.b_column != 1, false, false},
       wide,
       p.rows * vectors(p.columns) * (p.depth + 2) + copied(p.b_column != 1, p.columns)},
      {{true, false, p.a_row != 1, false, false},
       tall,
       p.columns * vectors(p.rows) * (p.depth + 2) + copied(p.a_row != 1, p.rows) + outputs},
      {{false, false, true, false, true}, !wide, (p.rows + p.columns) * p.depth + outputs},
  };
  const Way* best = nullptr;
  for (const Way& way : ways)
    if (way.possible && (!best || way.cost < best->cost)) best = &way;
  return best->plan;
}

// Computes products of at most the size of `largest`, with the scratch they need.
template <typename T>
class Compute {
 public:
  Compute(const Plan& plan, const Product<T>& largest)
      : plan_(plan),
        kernel_(small<T>()),
        a_(plan.pack_a ? largest.rows * largest.depth : 0),
        b_(plan.pack_b ? largest.depth * std::max(largest.columns, kernel_.lanes) : 0),
        out_(plan.transposed || plan.narrow
                 ? largest.rows * std::max(largest.columns, kernel_.lanes)
                 : 0) {}

  void operator()(Product<T> p) const {
    if (plan_.pack_a) {
      take({p.a, p.a_row, p.a_column}, p.rows, p.depth, row_major(a_, p.depth));
      p.a = a_.get(), p.a_row = p.depth, p.a_column = 1;
    }
    if (plan_.pack_b) pack_b(&p);
    if (plan_.pack_a || plan_.pack_b) p.next = plan_.dot ? p.a : p.b;
    if (plan_.dot) return kernel_.dot(p);
    if (p.out_column == 1 && !plan_.narrow) return kernel_.outer(p);
    Product<T> local = p;
    local.columns = std::max(p.columns, kernel_.lanes);
    local.out = out_.get(), local.out_row = local.columns, local.out_column = 1;
    kernel_.outer(local);
    take({local.out, local.columns, 1}, p.rows, p.columns, {p.out, p.out_row, p.out_column});
  }

 private:
  static Matrix<T> row_major(const Scratch<T>& scratch, int64_t columns) {
    return {scratch.get(), columns, 1};
  }

  void take(const Matrix<const T>& x, int64_t rows, int64_t columns, const Matrix<T>& out) const {
    if (x.column == 1 && out.row == 1)
      kernel_.transpose(rows, columns, x.data, x.row, out.data, out.column);
    else if (x.row == 1 && out.column == 1)
      kernel_.transpose(columns, rows, x.data, x.column, out.data, out.row);
    else
      copy(x, rows, columns, out);
  }

  // Column-major for dot products, row-major for outer ones.
  void pack_b(Product<T>* p) const {
    const Matrix<const T> b{p->b, p->b_row, p->b_column};
    const int64_t width = std::max(p->columns, plan_.narrow ? kernel_.lanes : 0);
    if (plan_.narrow) std::fill(b_.get(), b_.get() + p->depth * width, T(0));
    const Matrix<T> target =
        plan_.dot ? row_major(b_, p->depth).transposed() : row_major(b_, width);
    take(b, p->depth, p->columns, target);
    p->b = target.data, p->b_row = target.row, p->b_column = target.column;
  }

  const Plan plan_;
  const Small<T>& kernel_;
  const Scratch<T> a_, b_, out_;
};

// The beginning of part i of a range that is cut into `parts` of almost equal size.
int64_t cut(int64_t length, int64_t parts, int64_t i) { return length * i / parts; }

}  // namespace

template <typename T>
void batched_matmul(const Matrices<const T>& a, const Matrices<const T>& b, int64_t problems,
                    int64_t rows, int64_t depth, int64_t columns, T* out, const Parallel& threads) {
  if (depth == 0) std::fill(out, out + problems * rows * columns, T(0));
  if (problems == 0 || rows == 0 || depth == 0 || columns == 0) return;
  const auto block = [&](int64_t n, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    const Matrix<const T> x = a[n].from(i0, 0), y = b[n].from(0, j0);
    return Product<T>{i1 - i0,  depth,  j1 - j0, x.data,   x.row,
                      x.column, y.data, y.row,   y.column, out + (n * rows + i0) * columns + j0,
                      columns,  1,      y.data};
  };
  const Parallel& parallel = worth(problems * rows * depth * columns, threads);
  const Plan plan = choose(block(0, 0, rows, 0, columns));
  const Matrices<const T>& streamed = plan.dot || plan.transposed ? a : b;
  const bool whole = problems >= kManyProblems;
  const int64_t down = whole ? 1 : (rows + kBlockRows - 1) / kBlockRows,
                across = whole ? 1 : (columns + kBlockColumns - 1) / kBlockColumns;
  parallel(problems * down * across, [&](int64_t first, int64_t last) {
    const auto oriented = [&](const Product<T>& p) { return plan.transposed ? transposed(p) : p; };
    const Compute<T> compute(
        plan, oriented(block(0, 0, (rows + down - 1) / down, 0, (columns + across - 1) / across)));
    for (int64_t t = first; t < last; ++t) {
      const int64_t n = t / (down * across), i = t / across % down, j = t % across;
      Product<T> p = block(n, cut(rows, down, i), cut(rows, down, i + 1), cut(columns, across, j),
                           cut(columns, across, j + 1));
      p.next = streamed[whole ? std::min(n + 1, last - 1) : n].data;
      compute(oriented(p));
    }
  });
}

template void batched_matmul<float>(const Matrices<const float>&, const Matrices<const float>&,
                                    int64_t, int64_t, int64_t, int64_t, float*, const Parallel&);
template void batched_matmul<double>(const Matrices<const double>&, const Matrices<const double>&,
                                     int64_t, int64_t, int64_t, int64_t, double*, const Parallel&);

}  // namespace krrst::cpu
