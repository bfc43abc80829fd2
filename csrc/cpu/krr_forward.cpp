#include <atomic>
#include <cmath>
#include <limits>

#include "batched_cholesky.h"
#include "gram.h"
#include "krr.h"

namespace krrst::cpu {
namespace {

constexpr double kRidgeFactor = 10;  // krrst_fast.cholesky.RIDGE_FACTOR

// The sum of term(x[i]): in `kLanes` interleaved sums of a chunk, and chunks in float64.
template <typename T, typename F>
double sum_of(const T* x, int64_t count, F term) {
  constexpr int64_t kLanes = 16, kChunk = 1024;
  double total = 0;
  for (int64_t i = 0, end; i < count; i = end) {
    end = std::min(count, i + kChunk);
    T lanes[kLanes] = {};
    int64_t j = i;
    for (; j + kLanes <= end; j += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += term(x[j + l]);
    for (; j < end; ++j) lanes[0] += term(x[j]);
    for (const T lane : lanes) total += static_cast<double>(lane);
  }
  return total;
}

template <typename T>
class Forward {
 public:
  Forward(const Krr<T>& krr, const Ridge<T>& ridge, const Solved<T>& out)
      : krr_(krr),
        ridge_(ridge),
        out_(out),
        order_(krr.order()),
        gram_(order_ * order_),
        target_(krr.form == Form::primal ? order_ * krr.p + krr.d * krr.d : 0),
        offset_(krr.p) {}

  int64_t operator()(int64_t n, T* readout, T* loss, const Parallel& parallel) const {
    const bool primal = krr_.form == Form::primal;
    primal ? primal_system(n, parallel) : dual_system(n, parallel);
    int64_t met = factor(n);
    const Matrix<const T> target = primal ? by_rows<T>(target_.get(), krr_.p) : krr_.y_syn[n];
    const int64_t size = order_ * krr_.p;
    batched_cholesky_solve<T>(only(target), {out_.factor + n * order_ * order_, 0, 1, order_}, 1,
                              order_, krr_.p, {out_.coefficients + n * size, 0, krr_.p, 1},
                              parallel);
    const T scale = predict(n, readout, parallel);
    return met | finish(n, scale, readout, loss);
  }

 private:
  void dual_system(int64_t n, const Parallel& parallel) const {
    gram<T>(only(krr_.f_syn[n]), 1, krr_.m, krr_.d, krr_.scale, krr_.bias, gram_.get(), parallel);
  }

  // Phi_s^T Phi_s and Phi_s^T Y_s for Phi_s = [sqrt(scale) F_s, sqrt(bias)].
  void primal_system(int64_t n, const Parallel& parallel) const {
    const int64_t m = krr_.m, d = krr_.d, p = krr_.p;
    const Matrix<const T> f = krr_.f_syn[n], y = krr_.y_syn[n];
    const T root = std::sqrt(krr_.scale), constant = std::sqrt(krr_.bias);
    times<T>(f.transposed(), y, d, m, p, target_.get(), parallel);
    scale_all(target_.get(), d * p, root);
    if (order_ == d)
      return gram<T>(only(f.transposed()), 1, d, m, krr_.scale, T(0), gram_.get(), parallel);
    T* const inner = target_.get() + order_ * p;
    gram<T>(only(f.transposed()), 1, d, m, krr_.scale, T(0), inner, parallel);
    copy(by_rows<T>(inner, d), d, d, Matrix<T>{gram_.get(), order_, 1});
    T *const border = gram_.get() + d * order_, *const last = target_.get() + d * p;
    sum_rows(f, m, d, border);
    sum_rows(y, m, p, last);
    // Not by the root of the product, which may lie outside of float32.
    scale_all(border, d, constant);
    scale_all(border, d, root);
    scale_all(last, p, constant);
    for (int64_t j = 0; j < d; ++j) gram_.get()[j * order_ + d] = border[j];
    border[d] = static_cast<T>(m) * krr_.bias;
  }

  // Adds the ridge to the Gram and factors, with ten times the ridge where that fails.
  int64_t factor(int64_t n) const {
    double trace = 0;
    for (int64_t i = 0; i < order_; ++i)
      trace += static_cast<double>(gram_.get()[i * (order_ + 1)]);
    const T sum = static_cast<T>(trace), mean = sum / static_cast<T>(std::max<int64_t>(krr_.m, 1));
    const T base = ridge_.of == RidgeOf::absolute ? T(1) : ridge_.of == RidgeOf::trace ? sum : mean;
    T lam = ridge_.value[n * ridge_.step] * base;
    double* const factor = out_.factor + n * order_ * order_;
    int64_t retries = 0;
    int32_t pivot;
    for (;; ++retries, lam *= static_cast<T>(kRidgeFactor)) {
      const double ridge = static_cast<double>(lam);
      batched_cholesky<T>(only(by_rows<T>(gram_.get(), order_)), &ridge, 1, order_, factor, &pivot,
                          this_thread());
      if (pivot == 0 || retries == ridge_.retries) break;
    }
    if (pivot == 0 && !(lam > 0)) {
      pivot = 1;
      std::fill(factor, factor + order_ * order_, std::numeric_limits<double>::quiet_NaN());
    }
    out_.lam[n] = lam, out_.base[n] = base, out_.retries[n] = retries, out_.pivot[n] = pivot;
    return (pivot ? kFailed : 0) | (retries ? kRaised : 0);
  }

  // The prediction before it is scaled and the offset is added. Returns the scale.
  T predict(int64_t n, T* readout, const Parallel& parallel) const {
    const int64_t m = krr_.m, b = krr_.b, d = krr_.d, p = krr_.p;
    const T* const coefficients = out_.coefficients + n * order_ * p;
    T *const product = out_.product + n * krr_.product(), *const offset = offset_.get();
    const Matrix<const T> rows = by_rows(coefficients, p), f_real = krr_.f_real[n];
    if (krr_.form == Form::primal) {
      const T constant = std::sqrt(krr_.bias);
      for (int64_t j = 0; j < p && order_ > d; ++j) offset[j] = constant * coefficients[d * p + j];
      times<T>(f_real, rows, b, d, p, readout, parallel);
      return std::sqrt(krr_.scale);
    }
    if (krr_.has_bias) offset_of_all(coefficients);
    if (krr_.form == Form::w) {
      times<T>(rows.transposed(), krr_.f_syn[n], p, m, d, product, parallel);
      times<T>(f_real, by_rows<T>(product, d).transposed(), b, d, p, readout, parallel);
      return krr_.scale;
    }
    times<T>(krr_.f_syn[n], f_real.transposed(), m, d, b, product, parallel);
    scale_all(product, m * b, krr_.scale);
    times<T>(by_rows<T>(product, b).transposed(), rows, b, m, p, readout, parallel);
    return T(1);
  }

  // What the constant of the kernel adds to every prediction.
  void offset_of_all(const T* alpha) const {
    sum_rows(by_rows(alpha, krr_.p), krr_.m, krr_.p, offset_.get());
    scale_all(offset_.get(), krr_.p, krr_.bias);
  }

  int64_t finish(int64_t n, T scale, T* readout, T* loss) const {
    const int64_t p = krr_.p, count = krr_.b * p;
    scale_all(readout, count, scale);
    if (krr_.has_bias)
      for (int64_t i = 0; i < krr_.b; ++i)
        for (int64_t j = 0; j < p; ++j) readout[i * p + j] += offset_.get()[j];
    // 0, or NaN where a value is not finite.
    if (!krr_.y_real.data)
      return sum_of(readout, count, [](T x) { return x * T(0); }) == 0 ? 0 : kNotFinite;
    const Matrix<const T> y = krr_.y_real[n];
    for (int64_t i = 0; i < krr_.b; ++i)
      for (int64_t j = 0; j < p; ++j) readout[i * p + j] -= y.data[i * y.row + j * y.column];
    const double sum = sum_of(readout, count, [](T x) { return x * x; });
    loss[n] = static_cast<T>(sum / static_cast<double>(count));
    return std::isfinite(loss[n]) ? 0 : kNotFinite;
  }

  const Krr<T>& krr_;
  const Ridge<T>& ridge_;
  const Solved<T>& out_;
  const int64_t order_;
  const Scratch<T> gram_, target_, offset_;
};

}  // namespace

template <typename T>
int64_t krr_forward(const Krr<T>& krr, const Ridge<T>& ridge, const Solved<T>& out, T* readout,
                    T* loss, const Parallel& threads) {
  std::atomic<int64_t> met{0};
  for_each_problem(krr.problems, krr.work(), threads,
                   [&](int64_t first, int64_t last, const Parallel& parallel) {
                     const Forward<T> forward(krr, ridge, out);
                     for (int64_t n = first; n < last; ++n)
                       met |= forward(n, readout + n * krr.b * krr.p, loss, parallel);
                   });
  return met;
}

#define KRRST_INSTANTIATE(T)                                                                \
  template int64_t krr_forward<T>(const Krr<T>&, const Ridge<T>&, const Solved<T>&, T*, T*, \
                                  const Parallel&);
KRRST_INSTANTIATE(float)
KRRST_INSTANTIATE(double)

}  // namespace krrst::cpu
