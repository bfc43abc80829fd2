#include <algorithm>
#include <cmath>

#include "batched_cholesky.h"
#include "krr.h"

namespace krrst::cpu {
namespace {

// out [rows, 2 columns] = [a, -b], all by rows.
template <typename T>
void join_columns(const T* a, const T* b, int64_t rows, int64_t columns, T* out) {
  for (int64_t i = 0; i < rows; ++i) {
    T* const row = out + 2 * i * columns;
    std::copy(a + i * columns, a + (i + 1) * columns, row);
    for (int64_t j = 0; j < columns; ++j) row[columns + j] = -b[i * columns + j];
  }
}

template <typename T>
class Backward {
 public:
  Backward(const Krr<T>& krr, const Left<T>& left, const Gradients<T>& out)
      : krr_(krr),
        left_(left),
        out_(out),
        order_(krr.order()),
        through_rows_(out.f_syn || out.y_syn || out.ridge),
        r_(krr.b * krr.p),
        sums_(krr.p),
        adjoint_(order_ * krr.p),
        solution_(order_ * krr.p) {
    const int64_t m = krr.m, d = krr.d, p = krr.p;
    const bool f_syn = out.f_syn;
    if (krr.form == Form::k) {
      across_ = Scratch<T>(out.f_real || f_syn ? krr.b * m : 0);
      joined_ = Scratch<T>(f_syn ? 2 * m * m : 0);
      closing_ = Scratch<T>(f_syn ? m * d : 0);
    } else {
      joined_ = Scratch<T>(f_syn ? 2 * m * p : 0);
      closing_ = Scratch<T>(through_rows_ ? (f_syn ? 2 : 1) * p * d : 0);
      across_ = Scratch<T>(krr.form == Form::w ? p * d : 2 * m * p);
    }
  }

  void operator()(int64_t n, const Parallel& parallel) const {
    take_gradient(n);
    switch (krr_.form) {
      case Form::k:
        return form_k(n, parallel);
      case Form::w:
        return form_w(n, parallel);
      case Form::primal:
        return form_primal(n, parallel);
    }
  }

 private:
  T* f_syn(int64_t n) const { return out_.f_syn + n * krr_.m * krr_.d; }
  T* f_real(int64_t n) const { return out_.f_real + n * krr_.b * krr_.d; }
  Matrix<const T> r() const { return by_rows<T>(r_.get(), krr_.p); }

  // R = dLoss/dPrediction, and dLoss/dY_r = -R.
  void take_gradient(int64_t n) const {
    const int64_t b = krr_.b, p = krr_.p;
    copy(left_.gradient[n], b, p, Matrix<T>{r_.get(), p, 1});
    scale_all(r_.get(), b * p, left_.weight[n]);
    if (out_.y_real)
      for (int64_t i = 0; i < b * p; ++i) out_.y_real[n * b * p + i] = -r_.get()[i];
  }

  // Solves with the factor of the forward pass for `adjoint_`.
  void solve(int64_t n, T* out, const Parallel& parallel) const {
    batched_cholesky_solve<T>(only(by_rows<T>(adjoint_.get(), krr_.p)), only(left_.factor[n]), 1,
                              order_, krr_.p, {out, 0, krr_.p, 1}, parallel);
  }

  // beta = A^-1 K_rs^T R, from the product without scale and constant. It is the gradient to Y_s.
  const T* beta(int64_t n, T scale, const Parallel& parallel) const {
    const int64_t m = krr_.m, p = krr_.p;
    scale_all(adjoint_.get(), m * p, scale);
    if (krr_.has_bias) {
      sum_rows(r(), krr_.b, p, sums_.get());
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < p; ++j) adjoint_.get()[i * p + j] += krr_.bias * sums_.get()[j];
    }
    T* const beta = out_.y_syn ? out_.y_syn + n * m * p : solution_.get();
    solve(n, beta, parallel);
    return beta;
  }

  // dLoss/dlam = -<x, y> for x [order, p] of the forward pass and y by rows; returns the factor of
  // F_s in its gradient through the trace.
  T ridge(int64_t n, const Matrix<const T>& x, const T* y) const {
    if (!out_.ridge && !left_.to_trace) return 0;
    double sum = 0;
    for (int64_t i = 0; i < order_; ++i)
      for (int64_t j = 0; j < krr_.p; ++j)
        sum -= static_cast<double>(x.data[i * x.row + j * x.column]) *
               static_cast<double>(y[i * krr_.p + j]);
    if (out_.ridge) out_.ridge[n] = static_cast<T>(sum) * left_.to_ridge[n];
    return left_.to_trace ? static_cast<T>(sum) * left_.to_trace[n] : T(0);
  }

  // x = scale x + trace F_s.
  void close(int64_t n, T scale, T trace) const {
    const int64_t m = krr_.m, d = krr_.d;
    T* const x = f_syn(n);
    scale_all(x, m * d, scale);
    if (!left_.to_trace) return;
    const Matrix<const T> f = krr_.f_syn[n];
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < d; ++j) x[i * d + j] += trace * f.data[i * f.row + j * f.column];
  }

  void form_k(int64_t n, const Parallel& parallel) const {
    const int64_t m = krr_.m, b = krr_.b, d = krr_.d, p = krr_.p;
    const Matrix<const T> alpha = left_.coefficients[n], f = krr_.f_syn[n];
    const Matrix<const T> across = by_rows<T>(across_.get(), m);  // R alpha^T [b, m]
    if (out_.f_real || out_.f_syn)
      times<T>(r(), alpha.transposed(), b, p, m, across_.get(), parallel);
    if (out_.f_real) {
      times<T>(across, f, b, m, d, f_real(n), parallel);
      scale_all(f_real(n), b * d, krr_.scale);
    }
    if (!through_rows_) return;
    times<T>(left_.product[n], r(), m, b, p, adjoint_.get(), parallel);
    const T* const solution = beta(n, T(1), parallel);
    const T trace = ridge(n, alpha, solution);
    if (!out_.f_syn) return;
    T *const outer = joined_.get(), *const symmetric = outer + m * m;
    times<T>(by_rows(solution, p), alpha.transposed(), m, p, m, outer, parallel);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < m; ++j) symmetric[i * m + j] = outer[i * m + j] + outer[j * m + i];
    times<T>(across.transposed(), krr_.f_real[n], m, b, d, f_syn(n), parallel);
    times<T>(by_rows<T>(symmetric, m), f, m, m, d, closing_.get(), parallel);
    T* const x = f_syn(n);
    for (int64_t i = 0; i < m * d; ++i) x[i] -= closing_.get()[i];
    close(n, krr_.scale, trace);
  }

  void form_w(int64_t n, const Parallel& parallel) const {
    const int64_t m = krr_.m, b = krr_.b, d = krr_.d, p = krr_.p;
    const Matrix<const T> alpha = left_.coefficients[n], f = krr_.f_syn[n],
                          w = left_.product[n].transposed();  // [p, d]
    if (out_.f_real) {
      times<T>(r(), w, b, p, d, f_real(n), parallel);
      scale_all(f_real(n), b * d, krr_.scale);
    }
    if (!through_rows_) return;
    T* const dw = closing_.get();  // F_r^T R, as [p, d]
    times<T>(r().transposed(), krr_.f_real[n], p, b, d, dw, parallel);
    times<T>(f, by_rows<T>(dw, d).transposed(), m, d, p, adjoint_.get(), parallel);
    const T* const solution = beta(n, krr_.scale, parallel);
    const T trace = ridge(n, alpha, solution);
    if (!out_.f_syn) return;
    times<T>(by_rows(solution, p).transposed(), f, p, m, d, across_.get(), parallel);
    for (int64_t i = 0; i < p * d; ++i) dw[i] -= across_.get()[i];
    copy(w, p, d, Matrix<T>{dw + p * d, d, 1});
    T* const rows = adjoint_.get();
    copy(alpha, m, p, Matrix<T>{rows, p, 1});
    join_columns(rows, solution, m, p, joined_.get());
    times<T>(by_rows<T>(joined_.get(), 2 * p), by_rows<T>(dw, d), m, 2 * p, d, f_syn(n), parallel);
    close(n, krr_.scale, trace);
  }

  // Phi_s x [m, p] for x [order, p] by rows.
  void of_rows(int64_t n, const Matrix<const T>& x, T* out, const Parallel& parallel) const {
    const int64_t m = krr_.m, d = krr_.d, p = krr_.p;
    times<T>(krr_.f_syn[n], x, m, d, p, out, parallel);
    scale_all(out, m * p, static_cast<T>(std::sqrt(krr_.scale)));
    if (order_ == d) return;
    const T constant = std::sqrt(krr_.bias);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < p; ++j) out[i * p + j] += constant * x.data[d * x.row + j * x.column];
  }

  void form_primal(int64_t n, const Parallel& parallel) const {
    const int64_t m = krr_.m, b = krr_.b, d = krr_.d, p = krr_.p;
    const Matrix<const T> w = left_.coefficients[n];
    const T root = std::sqrt(krr_.scale), constant = std::sqrt(krr_.bias);
    if (out_.f_real) {
      times<T>(r(), w.transposed(), b, p, d, f_real(n), parallel);
      scale_all(f_real(n), b * d, root);
    }
    if (!through_rows_) return;
    times<T>(krr_.f_real[n].transposed(), r(), d, b, p, adjoint_.get(), parallel);
    scale_all(adjoint_.get(), d * p, root);
    if (order_ > d) {
      sum_rows(r(), b, p, sums_.get());
      for (int64_t j = 0; j < p; ++j) adjoint_.get()[d * p + j] = constant * sums_.get()[j];
    }
    T* const v = solution_.get();
    solve(n, v, parallel);
    const T trace = ridge(n, w, v);
    if (!out_.f_syn && !out_.y_syn) return;
    T *const y = out_.y_syn ? out_.y_syn + n * m * p : across_.get(), *const error =
                                                                          across_.get() + m * p;
    of_rows(n, by_rows<T>(v, p), y, parallel);
    if (!out_.f_syn) return;
    of_rows(n, w, error, parallel);
    const Matrix<const T> target = krr_.y_syn[n];
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < p; ++j)
        error[i * p + j] = target.data[i * target.row + j * target.column] - error[i * p + j];
    join_columns<T>(error, y, m, p, joined_.get());
    T* const right = closing_.get();  // [V, W]^T [2 p, d]
    copy(by_rows<T>(v, p), d, p, Matrix<T>{right, 1, d});
    copy(w, d, p, Matrix<T>{right + p * d, 1, d});
    times<T>(by_rows<T>(joined_.get(), 2 * p), by_rows<T>(right, d), m, 2 * p, d, f_syn(n),
             parallel);
    close(n, root, trace);
  }

  const Krr<T>& krr_;
  const Left<T>& left_;
  const Gradients<T>& out_;
  const int64_t order_;
  const bool through_rows_;  // whether a gradient needs the adjoint system
  const Scratch<T> r_, sums_, adjoint_, solution_;
  Scratch<T> across_{0}, joined_{0}, closing_{0};
};

}  // namespace

template <typename T>
void krr_backward(const Krr<T>& krr, const Left<T>& left, const Gradients<T>& out,
                  const Parallel& threads) {
  for_each_problem(krr.problems, krr.work(), threads,
                   [&](int64_t first, int64_t last, const Parallel& parallel) {
                     const Backward<T> backward(krr, left, out);
                     for (int64_t n = first; n < last; ++n) backward(n, parallel);
                   });
}

#define KRRST_INSTANTIATE(T)                                                        \
  template void krr_backward<T>(const Krr<T>&, const Left<T>&, const Gradients<T>&, \
                                const Parallel&);
KRRST_INSTANTIATE(float)
KRRST_INSTANTIATE(double)

}  // namespace krrst::cpu
