// Kernel ridge regression of one problem, or of each of many, in the closed forms of docs/maths.md:
// the forward pass and the gradients, each in one call.
#pragma once
#include <cstdint>

#include "batched_matmul.h"
#include "matrix.h"
#include "parallel.h"

namespace krrst::cpu {

enum class Form { k, w, primal };

// F_s [m, d], Y_s [m, p], F_r [b, d] and Y_r [b, p] of each problem, of any strides; Y_r has no
// data for a prediction. The kernel is scale <x, y> + bias.
template <typename T>
struct Krr {
  Form form;
  int64_t problems, m, b, d, p;
  Matrices<const T> f_syn, y_syn, f_real, y_real;
  T scale, bias;
  bool has_bias;  // a constant so small that it rounds to 0 is one nonetheless

  // Rows of the system that is solved, and the numbers of `Solved::product`, of one problem.
  int64_t order() const { return form == Form::primal ? d + has_bias : m; }
  int64_t product() const { return form == Form::k ? m * b : form == Form::w ? p * d : 0; }
  // About the multiplications of a pass over all problems.
  int64_t work() const { return problems * (m * m * d + (m + b) * d * p + b * m * p); }
};

enum class RidgeOf { absolute, trace, mean_diagonal };

// The ridge is value[n * step] times what `of` says.
template <typename T>
struct Ridge {
  const T* value;
  int64_t step;
  RidgeOf of;
  int64_t retries;  // how often a failed factorisation is repeated with ten times the ridge
};

// What a forward pass leaves for the gradients, problem by problem without gaps.
template <typename T>
struct Solved {
  double* factor;  // [order, order], L by columns; NaN where the factorisation failed
  T* lam;          // what was added to the diagonal
  T* base;         // what the ridge was multiplied by
  int64_t* retries;
  int32_t* pivot;   // 0, or the number, from 1, of the pivot that failed
  T* coefficients;  // [order, p]: alpha, or in primal form W
  T* product;       // form k: scale F_s F_r^T [m, b]; w: alpha^T F_s [p, d]
};

// What a forward pass met, in any problem.
enum : int64_t { kFailed = 1, kNotFinite = 2, kRaised = 4 };

// Writes the predictions [b, p] to `readout`, or with Y_r their differences to it, whose mean
// squares go to loss[n]. Returns flags of the above. The same bits on any number of threads.
template <typename T>
int64_t krr_forward(const Krr<T>& krr, const Ridge<T>& ridge, const Solved<T>& out, T* readout,
                    T* loss, const Parallel& threads);

// What a forward pass left, of any strides, and the gradient to its result.
template <typename T>
struct Left {
  Matrices<const double> factor;
  Matrices<const T> coefficients, product;  // in form w the product is [d, p]
  Matrices<const T> gradient;               // dLoss/dPrediction[n] = weight[n] gradient[n]
  const T* weight;
  // dLoss/dlam[n] is multiplied by to_ridge[n] for the gradient to the ridge, and by to_trace[n]
  // for the multiple of F_s that is added to its gradient. Null where the trace is a constant.
  const T *to_ridge, *to_trace;
};

// Gradients, problem by problem without gaps; null where one is not needed.
template <typename T>
struct Gradients {
  T *f_syn, *y_syn, *f_real, *y_real, *ridge;
};

template <typename T>
void krr_backward(const Krr<T>& krr, const Left<T>& left, const Gradients<T>& out,
                  const Parallel& threads);

template <typename T>
Matrix<const T> by_rows(const T* data, int64_t columns) {
  return {data, columns, 1};
}

template <typename T>
Matrices<T> only(const Matrix<T>& x) {
  return {x.data, 0, x.row, x.column};
}

// out [rows, columns] = a b, by rows.
template <typename T>
void times(const Matrix<const T>& a, const Matrix<const T>& b, int64_t rows, int64_t depth,
           int64_t columns, T* out, const Parallel& parallel) {
  batched_matmul<T>(only(a), only(b), 1, rows, depth, columns, out, parallel);
}

template <typename T>
void scale_all(T* x, int64_t count, T scale) {
  if (scale == T(1)) return;
  for (int64_t i = 0; i < count; ++i) x[i] *= scale;
}

// out[j] = sum_i x(i, j), in float64: dual coefficients may be large and cancel.
template <typename T>
void sum_rows(const Matrix<const T>& x, int64_t rows, int64_t columns, T* out) {
  const Scratch<double> sums(columns);
  std::fill(sums.get(), sums.get() + columns, 0.0);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      sums.get()[j] += static_cast<double>(x.data[i * x.row + j * x.column]);
  std::copy(sums.get(), sums.get() + columns, out);
}

// Runs body(first, last, threads of a problem) over the problems: one takes all threads, and of
// many each takes one.
template <typename F>
void for_each_problem(int64_t problems, int64_t work, const Parallel& threads, const F& body) {
  if (problems == 1) return body(0, 1, threads);
  worth(work, threads)(problems,
                       [&](int64_t first, int64_t last) { body(first, last, this_thread()); });
}

}  // namespace krrst::cpu
