// The operators `krr_forward` and `krr_backward`: a problem [., .], or a batch of them [N, ., .].
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "glue.h"
#include "krr.h"

using namespace krrst::glue;
using krrst::cpu::Form;
using krrst::cpu::Matrices;
using krrst::cpu::RidgeOf;

namespace {

Form form_of(const char* op, const std::string& name) {
  KRRST_CHECK(name == "k" || name == "w" || name == "primal", op,
              ": form must be 'k', 'w' or 'primal', got '", name, "'");
  return name == "k" ? Form::k : name == "w" ? Form::w : Form::primal;
}

RidgeOf ridge_of_name(const char* op, const std::string& name) {
  KRRST_CHECK(name == "absolute" || name == "trace" || name == "mean_diagonal", op,
              ": ridge_of must be 'absolute', 'trace' or 'mean_diagonal', got '", name, "'");
  return name == "absolute" ? RidgeOf::absolute
         : name == "trace"  ? RidgeOf::trace
                            : RidgeOf::mean_diagonal;
}

// Checks that x is [rows, columns], or for a batch [N, rows, columns], like f_syn.
void check_matrix(const char* op, const char* name, const Tensor& x, const Tensor& f_syn,
                  int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t d = f_syn.dim();
  KRRST_CHECK(x.dim() == d && x.size(d - 2) == rows && x.size(d - 1) == columns &&
                  (d == 2 || x.size(0) == f_syn.size(0)),
              op, ": ", name, " must be [N?, ", rows, ", ", columns, "] like f_syn");
  KRRST_CHECK(x.scalar_type() == dtype && x.is_cpu(), op, ": ", name,
              " has a wrong dtype, or is not on the CPU");
}

void check_numbers(const char* op, const char* name, const Tensor& x, const Tensor& f_syn,
                   ScalarType dtype) {
  const bool many = f_syn.dim() == 3;
  KRRST_CHECK(x.dim() == (many ? 1 : 0) && (!many || x.size(0) == f_syn.size(0)), op, ": ", name,
              " must be [N?] like f_syn");
  KRRST_CHECK(x.scalar_type() == dtype && x.is_cpu(), op, ": ", name,
              " has a wrong dtype, or is not on the CPU");
}

// The numbers [N?] of any stride.
template <typename T, typename S = T>
std::vector<T> numbers(const Tensor& x, int64_t problems) {
  const auto* data = static_cast<const S*>(x.data_ptr());
  const int64_t step = x.dim() ? x.stride(0) : 0;
  std::vector<T> out(static_cast<size_t>(problems));
  for (int64_t n = 0; n < problems; ++n) out[n] = static_cast<T>(data[n * step]);
  return out;
}

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// A new tensor [N?, rows, columns], or [N?] without them.
Tensor like(const Tensor& f_syn, int64_t rows, int64_t columns, ScalarType dtype,
            bool by_columns = false) {
  if (f_syn.dim() == 3) return fresh(dtype, {f_syn.size(0), rows, columns}, by_columns);
  return fresh(dtype, {rows, columns}, by_columns);
}
Tensor like(const Tensor& f_syn, ScalarType dtype) {
  return f_syn.dim() == 3 ? fresh(dtype, {f_syn.size(0)}) : fresh(dtype, {});
}

template <typename T>
krrst::cpu::Krr<T> krr_of(Form form, const Tensor& f_syn, const Tensor& y_syn, const Tensor& f_real,
                          double scale, double bias) {
  const int64_t d = f_syn.dim();
  return {form,
          d == 3 ? f_syn.size(0) : 1,
          f_syn.size(d - 2),
          f_real.size(d - 2),
          f_syn.size(d - 1),
          y_syn.size(d - 1),
          matrices<T>(f_syn),
          matrices<T>(y_syn),
          matrices<T>(f_real),
          Matrices<const T>{},
          static_cast<T>(scale),
          static_cast<T>(bias),
          bias != 0};
}

void check_rows(const char* op, const Tensor& f_syn, const Tensor& y_syn, const Tensor& f_real) {
  const int64_t d = f_syn.dim();
  KRRST_CHECK(d == 2 || d == 3, op, ": f_syn must be [M, D] or [N, M, D]");
  KRRST_CHECK(y_syn.dim() == d && f_real.dim() == d, op,
              ": f_syn, y_syn and f_real must all be matrices, or batches of them");
  const ScalarType dtype = f_syn.scalar_type();
  check_matrix(op, "y_syn", y_syn, f_syn, f_syn.size(d - 2), y_syn.size(d - 1), dtype);
  check_matrix(op, "f_real", f_real, f_syn, f_real.size(d - 2), f_syn.size(d - 1), dtype);
}

using Forward =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward krr_forward(Tensor f_syn, Tensor y_syn, Tensor f_real, std::optional<Tensor> y_real,
                    std::optional<Tensor> ridge, double ridge_number, std::string ridge_of,
                    int64_t retries, double scale, double bias, std::string form_name) {
  const char* const op = "krr_forward";
  check_rows(op, f_syn, y_syn, f_real);
  const Form form = form_of(op, form_name);
  const RidgeOf of = ridge_of_name(op, ridge_of);
  const ScalarType dtype = f_syn.scalar_type();
  const int64_t d = f_syn.dim(), b = f_real.size(d - 2), p = y_syn.size(d - 1);
  if (y_real) check_matrix(op, "y_real", *y_real, f_syn, b, p, dtype);
  if (ridge) check_numbers(op, "ridge", *ridge, f_syn, dtype);
  Tensor met = fresh(ScalarType::Long, {});
  Forward out;
  for_real_dtype(op, f_syn, [&](auto zero) {
    using T = decltype(zero);
    auto krr = krr_of<T>(form, f_syn, y_syn, f_real, scale, bias);
    if (y_real) krr.y_real = matrices<T>(*y_real);
    const int64_t order = krr.order(), m = krr.m;
    const T number = static_cast<T>(ridge_number);
    const krrst::cpu::Ridge<T> lambda{ridge ? static_cast<const T*>(ridge->data_ptr()) : &number,
                                      ridge && d == 3 ? ridge->stride(0) : 0, of, retries};
    Tensor readout = like(f_syn, b, p, dtype),
           loss = y_real ? like(f_syn, dtype) : fresh(dtype, {0}),
           factor = like(f_syn, order, order, ScalarType::Double, true), lam = like(f_syn, dtype),
           count = like(f_syn, ScalarType::Long), pivot = like(f_syn, ScalarType::Int),
           base = like(f_syn, dtype), coefficients = like(f_syn, order, p, dtype),
           product = form == Form::k   ? like(f_syn, m, b, dtype)
                     : form == Form::w ? like(f_syn, krr.d, p, dtype, true)
                                       : fresh(dtype, {0});
    const krrst::cpu::Solved<T> solved{
        data<double>(factor), data<T>(lam),          data<T>(base),   data<int64_t>(count),
        data<int32_t>(pivot), data<T>(coefficients), data<T>(product)};
    *data<int64_t>(met) = krrst::cpu::krr_forward<T>(krr, lambda, solved, data<T>(readout),
                                                     data<T>(loss), on_torch_threads);
    out = {loss, readout, factor, lam, count, pivot, base, coefficients, product, met};
  });
  return out;
}

// Bits of `needs`, in the order of the gradients.
enum : int64_t { kFSyn = 1, kYSyn = 2, kFReal = 4, kYReal = 8, kRidge = 16 };

std::vector<Tensor> krr_backward(Tensor gradient, Tensor f_syn, Tensor y_syn, Tensor f_real,
                                 std::optional<Tensor> residual, Tensor factor, Tensor retries,
                                 Tensor base, Tensor coefficients, Tensor product,
                                 std::optional<Tensor> ridge, double ridge_number,
                                 std::string ridge_of, bool detach_ridge, double scale, double bias,
                                 std::string form_name, int64_t needs) {
  const char* const op = "krr_backward";
  check_rows(op, f_syn, y_syn, f_real);
  const Form form = form_of(op, form_name);
  const RidgeOf of = ridge_of_name(op, ridge_of);
  const ScalarType dtype = f_syn.scalar_type();
  const int64_t d = f_syn.dim(), b = f_real.size(d - 2), p = y_syn.size(d - 1);
  if (residual) {
    check_matrix(op, "residual", *residual, f_syn, b, p, dtype);
    check_numbers(op, "gradient", gradient, f_syn, dtype);
  } else {
    check_matrix(op, "gradient", gradient, f_syn, b, p, dtype);
  }
  if (ridge) check_numbers(op, "ridge", *ridge, f_syn, dtype);
  check_numbers(op, "retries", retries, f_syn, ScalarType::Long);
  check_numbers(op, "base", base, f_syn, dtype);
  std::vector<Tensor> out;
  for_real_dtype(op, f_syn, [&](auto zero) {
    using T = decltype(zero);
    const auto krr = krr_of<T>(form, f_syn, y_syn, f_real, scale, bias);
    const int64_t order = krr.order(), problems = krr.problems;
    check_matrix(op, "factor", factor, f_syn, order, order, ScalarType::Double);
    check_matrix(op, "coefficients", coefficients, f_syn, order, p, dtype);
    if (form == Form::k) check_matrix(op, "product", product, f_syn, krr.m, b, dtype);
    if (form == Form::w) check_matrix(op, "product", product, f_syn, krr.d, p, dtype);
    std::vector<T> weight(static_cast<size_t>(problems), T(1)),
        to_ridge = numbers<T, int64_t>(retries, problems), to_trace;
    if (residual) {
      weight = numbers<T>(gradient, problems);
      for (T& value : weight) value *= static_cast<T>(2.0 / static_cast<double>(b * p));
    }
    for (T& value : to_ridge) value = std::pow(T(10), value);
    if ((needs & kFSyn) && !detach_ridge && of != RidgeOf::absolute) {
      to_trace = ridge
                     ? numbers<T>(*ridge, problems)
                     : std::vector<T>(static_cast<size_t>(problems), static_cast<T>(ridge_number));
      // lam = ridge * base, and dtrace(K_ss)/dF_s = 2 scale F_s
      const T rows = of == RidgeOf::trace ? T(1) : static_cast<T>(std::max<int64_t>(krr.m, 1));
      for (int64_t n = 0; n < problems; ++n)
        to_trace[n] *= to_ridge[n] / rows * (2 * static_cast<T>(scale));
    }
    const std::vector<T> bases = numbers<T>(base, problems);
    for (int64_t n = 0; n < problems; ++n) to_ridge[n] *= bases[n];
    const krrst::cpu::Left<T> left{
        matrices<double>(factor),
        matrices<T>(coefficients),
        form == Form::primal ? Matrices<const T>{} : matrices<T>(product),
        matrices<T>(residual ? *residual : gradient),
        weight.data(),
        to_ridge.data(),
        to_trace.empty() ? nullptr : to_trace.data()};
    const auto made = [&](const Tensor& x) {
      out.push_back(x);
      return data<T>(x);
    };
    const auto matrix = [&](int64_t bit, int64_t rows, int64_t columns) -> T* {
      return needs & bit ? made(like(f_syn, rows, columns, dtype)) : nullptr;
    };
    T *const f_syn_out = matrix(kFSyn, krr.m, krr.d), *const y_syn_out = matrix(kYSyn, krr.m, p),
             *const f_real_out = matrix(kFReal, b, krr.d), *const y_real_out = matrix(kYReal, b, p),
             *const ridge_out = needs & kRidge ? made(like(f_syn, dtype)) : nullptr;
    krrst::cpu::krr_backward<T>(
        krr, left, {f_syn_out, y_syn_out, f_real_out, y_real_out, ridge_out}, on_torch_threads);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(krrst_fast, CPU, m) {
  m.impl("krr_forward", TORCH_BOX(&krr_forward));
  m.impl("krr_backward", TORCH_BOX(&krr_backward));
}
