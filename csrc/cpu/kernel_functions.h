// Kernels as functions of inner products and norms, and their derivatives, a row at a time.
#pragma once
#include <cstdint>

namespace krrst::cpu {

enum class Kind { rbf, polynomial, arccos };

// rbf: exp(-|x - y|^2); polynomial: (<x, y> + constant)^degree; arccos: |x| |y| (sin t + (pi - t)
// cos t) / pi with the angle t.
struct KernelFunction {
  Kind kind;
  int64_t degree;
  double constant;
  // A squared distance below this share of |x|^2 + |y|^2 is computed from the differences: of the
  // sum |x|^2 + |y|^2 - 2 <x, y> only rounding would be left.
  double near;
};

// One row x against rows y.
struct KernelRow {
  int64_t count, depth;
  const double* products;  // <x, y_j>
  const double* x;         // [depth]
  double square;           // |x|^2
  const double* y;         // [count][depth]
  const double* squares;   // |y_j|^2
};

template <typename T>
struct KernelRows {
  // out[j] = k(x, y_j).
  void (*values)(const KernelFunction& kernel, const KernelRow& row, T* out);

  // The gradient of sum_j weight[j] k(x, y_j) to x is sum_j slope[j] y_j + (what is returned) x; to
  // y_j it is slope[j] x + column[j] y_j, where column is added to. Without `values` none are
  // written.
  double (*slopes)(const KernelFunction& kernel, const KernelRow& row, const T* weight, T* values,
                   double* slope, double* column);
};

template <typename T>
const KernelRows<T>& kernel_rows();

}  // namespace krrst::cpu
