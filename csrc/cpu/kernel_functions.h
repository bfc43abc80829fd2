// Kernels as functions of inner products and norms, and their derivatives, a row at a time.
#pragma once
#include <cstdint>

namespace krrst::cpu {

enum class Kind { rbf, polynomial, arccos };

// rbf: exp(-gamma |x - y|^2); polynomial: (gamma <x, y> + constant)^degree; arccos:
// |x| |y| (sin t + (pi - t) cos t) / pi with the angle t.
struct KernelFunction {
  Kind kind;
  int64_t degree;
  double constant, gamma;
};

// One row x against rows y. Products and squares may be those of rows less a common one.
template <typename T>
struct KernelRow {
  int64_t count, depth;
  const T* products;  // <x, y_j>
  const T* x;         // [depth]
  T square;           // |x|^2
  const T* y;         // [count][depth]
  const T* squares;   // |y_j|^2
  int64_t same;       // the j for which y_j is x, or -1
};

// What the derivatives of a row add up to.
struct RowSums {
  double own;    // times x: its part of the gradient to x
  double gamma;  // the derivative to gamma
  int64_t near;  // how many rows are so near that differences of slopes have lost digits of T
};

template <typename T>
struct KernelRows {
  // out[j] = k(x, y_j).
  void (*values)(const KernelFunction& kernel, const KernelRow<T>& row, T* out);

  // The gradient of sum_j weight[j] k(x, y_j) to x is sum_j slope[j] y_j + own x; to y_j it is
  // slope[j] x + column[j] y_j, where column is added to. Without `values` none are written.
  RowSums (*slopes)(const KernelFunction& kernel, const KernelRow<T>& row, const T* weight,
                    T* values, T* slope, double* column);
};

template <typename T>
const KernelRows<T>& kernel_rows();

}  // namespace krrst::cpu
