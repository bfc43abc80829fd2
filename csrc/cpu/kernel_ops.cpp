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
using krrst::cpu::KernelRows;
using krrst::cpu::Kind;

namespace {

// Of the expanded distance 64 roundings of float64 are left, or half a rounding of float32.
constexpr double kNear = 0x1p-6, kNearForFloat = 0x1p-28;
// A row costs as much as so many multiplications for each of its columns.
constexpr int64_t kCost = 32;
// The columns are summed up in so many parts, whatever the number of threads: the same bits.
constexpr int64_t kParts = 16;

KernelFunction function_of(const char* op, const std::string& name, int64_t degree, double constant,
                           bool single) {
  KRRST_CHECK(name == "rbf" || name == "polynomial" || name == "arccos", op,
              ": kernel must be 'rbf', 'polynomial' or 'arccos', got '", name, "'");
  KRRST_CHECK(degree >= 1, op, ": degree must be 1 or more, got ", degree);
  const Kind kind = name == "rbf"          ? Kind::rbf
                    : name == "polynomial" ? Kind::polynomial
                                           : Kind::arccos;
  return {kind, degree, constant, single ? kNearForFloat : kNear};
}

// Rows of products, features and squared norms, checked, each stored by rows.
struct Operands {
  Tensor products, x, y, squares_x, squares_y;
  int64_t problems, rows, columns, depth;

  Operands(const char* op, const Tensor& g, const Tensor& f, const Tensor& h, const Tensor& nf,
           const Tensor& nh)
      : products(torch::stable::contiguous(g)),
        x(torch::stable::contiguous(f)),
        y(torch::stable::contiguous(h)),
        squares_x(torch::stable::contiguous(nf)),
        squares_y(torch::stable::contiguous(nh)) {
    const int64_t d = g.dim();
    KRRST_CHECK((d == 2 || d == 3) && f.dim() == d && h.dim() == d && nf.dim() == d - 1 &&
                    nh.dim() == d - 1,
                op, ": all must be of one problem, or of a batch of them");
    for (const Tensor* tensor : {&g, &f, &h, &nf, &nh}) {
      KRRST_CHECK(tensor->scalar_type() == ScalarType::Double, op, ": all must be float64");
      KRRST_CHECK(d == 2 || tensor->size(0) == g.size(0), op, ": the batches differ");
    }
    problems = d == 3 ? g.size(0) : 1;
    rows = g.size(d - 2);
    columns = g.size(d - 1);
    depth = f.size(d - 1);
    KRRST_CHECK(f.size(d - 2) == rows && h.size(d - 2) == columns && h.size(d - 1) == depth &&
                    nf.size(d - 2) == rows && nh.size(d - 2) == columns,
                op, ": products must be [I, J] for x [I, D] and y [J, D]");
  }

  // Row i of all rows of all problems.
  KernelRow row(int64_t i) const {
    const int64_t problem = i / rows;
    return {columns,
            depth,
            data(products) + i * columns,
            data(x) + i * depth,
            data(squares_x)[i],
            data(y) + problem * columns * depth,
            data(squares_y) + problem * columns};
  }

  Tensor like_products(ScalarType dtype) const {
    return products.dim() == 3 ? fresh(dtype, {problems, rows, columns})
                               : fresh(dtype, {rows, columns});
  }

  const krrst::cpu::Parallel& parallel() const {
    static const krrst::cpu::Parallel threads = on_torch_threads;
    return krrst::cpu::worth(problems * rows * columns * kCost, threads);
  }

  static const double* data(const Tensor& tensor) {
    return static_cast<const double*>(tensor.data_ptr());
  }
};

Tensor kernel_values(Tensor products, Tensor x, Tensor y, Tensor squares_x, Tensor squares_y,
                     std::string kernel, int64_t degree, double constant, bool single) {
  const Operands of("kernel_values", products, x, y, squares_x, squares_y);
  const KernelFunction function = function_of("kernel_values", kernel, degree, constant, single);
  Tensor out = of.like_products(single ? ScalarType::Float : ScalarType::Double);
  for_real_dtype("kernel_values", out, [&](auto zero) {
    using T = decltype(zero);
    auto* values = static_cast<T*>(out.data_ptr());
    const KernelRows<T>& rows = krrst::cpu::kernel_rows<T>();
    of.parallel()(of.problems * of.rows, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        rows.values(function, of.row(i), values + i * of.columns);
    });
  });
  return out;
}

// Part q of a problem takes rows [q rows / parts, (q + 1) rows / parts).
template <typename T>
void slopes_of_part(const Operands& of, const KernelFunction& function, int64_t problem,
                    int64_t part, int64_t parts, const T* weight, T* values, double* slope,
                    double* own, double* column) {
  std::fill(column, column + of.columns, 0.0);
  const int64_t begin = problem * of.rows + part * of.rows / parts;
  const int64_t end = problem * of.rows + (part + 1) * of.rows / parts;
  for (int64_t i = begin; i < end; ++i)
    own[i] = krrst::cpu::kernel_rows<T>().slopes(function, of.row(i), weight + i * of.columns,
                                                 values ? values + i * of.columns : nullptr,
                                                 slope + i * of.columns, column);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kernel_slopes(Tensor products, Tensor x, Tensor y,
                                                         Tensor squares_x, Tensor squares_y,
                                                         Tensor weight, std::string kernel,
                                                         int64_t degree, double constant,
                                                         bool needs_values) {
  const char* const op = "kernel_slopes";
  const Operands of(op, products, x, y, squares_x, squares_y);
  const bool single = weight.scalar_type() == ScalarType::Float;
  const KernelFunction function = function_of(op, kernel, degree, constant, single);
  const Tensor weights = torch::stable::contiguous(weight);
  KRRST_CHECK(weight.dim() == products.dim() && weight.numel() == products.numel() &&
                  weight.size(weight.dim() - 1) == of.columns,
              op, ": weight must be of the shape of products");
  const bool batch = products.dim() == 3;
  Tensor values = needs_values ? of.like_products(weight.scalar_type()) : fresh(weight, {0});
  Tensor slope = of.like_products(ScalarType::Double);
  Tensor own = batch ? fresh(ScalarType::Double, {of.problems, of.rows})
                     : fresh(ScalarType::Double, {of.rows});
  Tensor column = batch ? fresh(ScalarType::Double, {of.problems, of.columns})
                        : fresh(ScalarType::Double, {of.columns});
  const int64_t parts = std::max<int64_t>(1, std::min(kParts, of.rows));
  std::vector<double> sums(static_cast<size_t>(of.problems * parts * of.columns));
  for_real_dtype(op, weights, [&](auto zero) {
    using T = decltype(zero);
    of.parallel()(of.problems * parts, [&](int64_t first, int64_t last) {
      for (int64_t q = first; q < last; ++q)
        slopes_of_part(of, function, q / parts, q % parts, parts,
                       static_cast<const T*>(weights.data_ptr()),
                       needs_values ? static_cast<T*>(values.data_ptr()) : nullptr,
                       static_cast<double*>(slope.data_ptr()), static_cast<double*>(own.data_ptr()),
                       sums.data() + q * of.columns);
    });
  });
  auto* total = static_cast<double*>(column.data_ptr());
  std::fill(total, total + of.problems * of.columns, 0.0);
  for (int64_t q = 0; q < of.problems * parts; ++q)
    for (int64_t j = 0; j < of.columns; ++j)
      total[q / parts * of.columns + j] += sums[static_cast<size_t>(q * of.columns + j)];
  return {values, slope, own, column};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(krrst_fast, CPU, m) {
  m.impl("kernel_values", TORCH_BOX(&kernel_values));
  m.impl("kernel_slopes", TORCH_BOX(&kernel_slopes));
}
