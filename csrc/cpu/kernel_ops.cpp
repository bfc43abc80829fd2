// The operators `kernel_values` and `kernel_slopes`: kernels as functions of inner products, of one
// problem [I, J] or of a batch of them [N, I, J].
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "glue.h"
#include "kernel_functions.h"
#include "parallel.h"

using namespace krrst::glue;
using krrst::cpu::KernelFunction;
using krrst::cpu::KernelRow;
using krrst::cpu::Kind;
using krrst::cpu::RowSums;

namespace {

// A row costs as much as so many multiplications for each of its columns.
constexpr int64_t kCost = 32;
// The columns are summed up in so many parts, whatever the number of threads: the same bits.
constexpr int64_t kParts = 16;

KernelFunction function_of(const char* op, const std::string& name, int64_t degree,
                           double constant) {
  KRRST_CHECK(name == "rbf" || name == "polynomial" || name == "arccos", op,
              ": kernel must be 'rbf', 'polynomial' or 'arccos', got '", name, "'");
  KRRST_CHECK(degree >= 1, op, ": degree must be 1 or more, got ", degree);
  const Kind kind = name == "rbf"          ? Kind::rbf
                    : name == "polynomial" ? Kind::polynomial
                                           : Kind::arccos;
  return {kind, degree, constant, 1.0};
}

// Rows of products, features and squared norms, checked, each stored by rows; a gamma of each
// problem.
struct Operands {
  Tensor products, x, y, squares_x, squares_y, gamma;
  int64_t problems, rows, columns, depth, same;

  Operands(const char* op, const Tensor& g, const Tensor& f, const Tensor& h, const Tensor& nf,
           const Tensor& nh, const Tensor& numbers, int64_t first)
      : products(torch::stable::contiguous(g)),
        x(torch::stable::contiguous(f)),
        y(torch::stable::contiguous(h)),
        squares_x(torch::stable::contiguous(nf)),
        squares_y(torch::stable::contiguous(nh)),
        gamma(torch::stable::contiguous(numbers)),
        same(first) {
    const int64_t d = g.dim();
    KRRST_CHECK((d == 2 || d == 3) && f.dim() == d && h.dim() == d && nf.dim() == d - 1 &&
                    nh.dim() == d - 1 && numbers.dim() == d - 2,
                op, ": all must be of one problem, or of a batch of them");
    for (const Tensor* tensor : {&g, &f, &h, &nf, &nh, &numbers})
      KRRST_CHECK(d == 2 || tensor->size(0) == g.size(0), op, ": the batches differ");
    for (const Tensor* tensor : {&f, &h, &nf, &nh})
      KRRST_CHECK(tensor->scalar_type() == g.scalar_type(), op, ": all must have one dtype");
    KRRST_CHECK(numbers.scalar_type() == ScalarType::Double, op, ": gamma must be float64");
    problems = d == 3 ? g.size(0) : 1;
    rows = g.size(d - 2);
    columns = g.size(d - 1);
    depth = f.size(d - 1);
    KRRST_CHECK(f.size(d - 2) == rows && h.size(d - 2) == columns && h.size(d - 1) == depth &&
                    nf.size(d - 2) == rows && nh.size(d - 2) == columns,
                op, ": products must be [I, J] for x [I, D] and y [J, D]");
  }

  // Row i of all rows of all problems.
  template <typename T>
  KernelRow<T> row(int64_t i) const {
    const int64_t problem = i / rows;
    return {columns,
            depth,
            data<T>(products) + i * columns,
            data<T>(x) + i * depth,
            data<T>(squares_x)[i],
            data<T>(y) + problem * columns * depth,
            data<T>(squares_y) + problem * columns,
            same < 0 ? -1 : same + i % rows};
  }

  KernelFunction of_problem(KernelFunction function, int64_t problem) const {
    function.gamma = data<double>(gamma)[problem];
    return function;
  }

  // [rows of all problems or none .., ..] as the problems have them.
  Tensor matrix() const {
    return products.dim() == 3 ? fresh(products, {problems, rows, columns})
                               : fresh(products, {rows, columns});
  }
  Tensor vector(int64_t size) const {
    return products.dim() == 3 ? fresh(products, {problems, size}) : fresh(products, {size});
  }

  const krrst::cpu::Parallel& parallel() const {
    static const krrst::cpu::Parallel threads = on_torch_threads;
    return krrst::cpu::worth(problems * rows * columns * kCost, threads);
  }

  template <typename T>
  static const T* data(const Tensor& tensor) {
    return static_cast<const T*>(tensor.data_ptr());
  }
};

Tensor kernel_values(Tensor products, Tensor x, Tensor y, Tensor squares_x, Tensor squares_y,
                     Tensor gamma, int64_t same, std::string kernel, int64_t degree,
                     double constant) {
  const Operands of("kernel_values", products, x, y, squares_x, squares_y, gamma, same);
  const KernelFunction function = function_of("kernel_values", kernel, degree, constant);
  Tensor out = of.matrix();
  for_real_dtype("kernel_values", out, [&](auto zero) {
    using T = decltype(zero);
    auto* values = static_cast<T*>(out.data_ptr());
    of.parallel()(of.problems * of.rows, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        krrst::cpu::kernel_rows<T>().values(of.of_problem(function, i / of.rows), of.row<T>(i),
                                            values + i * of.columns);
    });
  });
  return out;
}

// Where the results of `kernel_slopes` go; of a part, the sums over its rows.
template <typename T>
struct Slopes {
  const T* weight;
  T *values, *slope, *own;
  std::vector<double> columns;  // [problems * parts][columns]
  std::vector<RowSums> sums;    // [problems * parts]
};

// Part q of a problem takes rows [q rows / parts, (q + 1) rows / parts).
template <typename T>
void slopes_of_part(const Operands& of, const KernelFunction& function, int64_t number,
                    int64_t parts, Slopes<T>& out) {
  const int64_t problem = number / parts, part = number % parts;
  const int64_t begin = problem * of.rows + part * of.rows / parts;
  const int64_t end = problem * of.rows + (part + 1) * of.rows / parts;
  const KernelFunction own = of.of_problem(function, problem);
  RowSums& sums = out.sums[static_cast<size_t>(number)];
  for (int64_t i = begin; i < end; ++i) {
    const RowSums row = krrst::cpu::kernel_rows<T>().slopes(
        own, of.row<T>(i), out.weight + i * of.columns,
        out.values ? out.values + i * of.columns : nullptr, out.slope + i * of.columns,
        out.columns.data() + number * of.columns);
    out.own[i] = static_cast<T>(row.own);
    sums.gamma += row.gamma;
    sums.near += row.near;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> kernel_slopes(
    Tensor products, Tensor x, Tensor y, Tensor squares_x, Tensor squares_y, Tensor gamma,
    int64_t same, Tensor weight, std::string kernel, int64_t degree, double constant,
    bool needs_values) {
  const char* const op = "kernel_slopes";
  const Operands of(op, products, x, y, squares_x, squares_y, gamma, same);
  const KernelFunction function = function_of(op, kernel, degree, constant);
  const Tensor weights = torch::stable::contiguous(weight);
  KRRST_CHECK(weight.dim() == products.dim() && weight.numel() == products.numel() &&
                  weight.size(weight.dim() - 1) == of.columns &&
                  weight.scalar_type() == products.scalar_type(),
              op, ": weight must be of the shape and dtype of products");
  Tensor values = needs_values ? of.matrix() : fresh(products, {0}), slope = of.matrix();
  Tensor own = of.vector(of.rows), column = of.vector(of.columns);
  Tensor d_gamma = products.dim() == 3 ? fresh(ScalarType::Double, {of.problems})
                                       : fresh(ScalarType::Double, {});
  Tensor near = fresh(ScalarType::Long, {});
  const int64_t parts = std::max<int64_t>(1, std::min(kParts, of.rows));
  const auto all = static_cast<size_t>(of.problems * parts);
  for_real_dtype(op, weights, [&](auto zero) {
    using T = decltype(zero);
    Slopes<T> out{static_cast<const T*>(weights.data_ptr()),
                  needs_values ? static_cast<T*>(values.data_ptr()) : nullptr,
                  static_cast<T*>(slope.data_ptr()),
                  static_cast<T*>(own.data_ptr()),
                  std::vector<double>(all * static_cast<size_t>(of.columns)),
                  std::vector<RowSums>(all, RowSums{0, 0, 0})};
    of.parallel()(of.problems * parts, [&](int64_t first, int64_t last) {
      for (int64_t number = first; number < last; ++number)
        slopes_of_part(of, function, number, parts, out);
    });
    int64_t count = 0;
    std::vector<double> total(static_cast<size_t>(of.columns));
    for (int64_t problem = 0; problem < of.problems; ++problem) {
      std::fill(total.begin(), total.end(), 0.0);
      double change = 0;
      for (int64_t number = problem * parts; number < (problem + 1) * parts; ++number) {
        const double* const part = out.columns.data() + number * of.columns;
        for (size_t j = 0; j < total.size(); ++j) total[j] += part[j];
        change += out.sums[static_cast<size_t>(number)].gamma;
        count += out.sums[static_cast<size_t>(number)].near;
      }
      auto* const to = static_cast<T*>(column.data_ptr()) + problem * of.columns;
      for (size_t j = 0; j < total.size(); ++j) to[j] = static_cast<T>(total[j]);
      static_cast<double*>(d_gamma.data_ptr())[problem] = change;
    }
    *static_cast<int64_t*>(near.data_ptr()) = count;
  });
  return {values, slope, own, column, d_gamma, near};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(krrst_fast, CPU, m) {
  m.impl("kernel_values", TORCH_BOX(&kernel_values));
  m.impl("kernel_slopes", TORCH_BOX(&kernel_slopes));
}
