// Glue between torch and the CUDA kernels, on torch's stable ABI: takes pointers and the stream,
// allocates, launches on the tensors' device. The Python operators check shapes and dtypes; this
// file checks again what would otherwise read outside of a tensor when one is called directly.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <tuple>

#include "../check.h"
#include "../cpu/module.h"
#include "cholesky.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

bool is_real(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double;
}

// Entries [.., i, j] of a 2-D or 3-D tensor, of the first problem.
template <typename T>
krrst::cuda::View<const T> view(const Tensor& x) {
  return {static_cast<const T*>(x.data_ptr()), x.stride(x.dim() - 2), x.stride(x.dim() - 1)};
}

int64_t problem_stride(const Tensor& x) { return x.dim() == 3 ? x.stride(0) : 0; }

template <typename T>
T* data(const Tensor& x) {
  return x.numel() == 0 ? nullptr : static_cast<T*>(x.data_ptr());
}

void require_one_device(const char* op, const Tensor& x, const Tensor& y) {
  KRRST_CHECK(x.is_cuda() && y.is_cuda() && x.get_device_index() == y.get_device_index(), op,
              ": the tensors must be on one CUDA device");
}

struct Factored {
  Tensor factor, half, pivot;
};

template <typename Source, typename T>
Factored factor_in(const Tensor& k, const Tensor& ridge, const Tensor* y) {
  constexpr ScalarType dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  constexpr int64_t tile = krrst::cuda::kTile;
  const int64_t problems = k.dim() == 3 ? k.size(0) : 1, m = k.size(k.dim() - 1),
                columns = y == nullptr ? 0 : y->size(1), scratch = m > tile || columns > 0;
  Factored out = {torch::stable::new_empty(k, {problems, m, m}, dtype),
                  torch::stable::new_empty(k, {m, columns}, dtype),
                  torch::stable::new_empty(k, {problems}, ScalarType::Int)};
  Tensor inverse = torch::stable::new_empty(k, {scratch * problems, tile, tile}, dtype);
  const krrst::cuda::View<const Source> none = {nullptr, 0, 0};
  STD_CUDA_CHECK(krrst::cuda::cholesky(
      view<Source>(k), problem_stride(k), y == nullptr ? none : view<Source>(*y),
      krrst::cuda::Ridge{ridge.data_ptr(), ridge.dim() == 0 ? 0 : ridge.stride(0),
                         ridge.scalar_type() == ScalarType::Double},
      krrst::cuda::Cholesky<T>{m, columns, data<T>(out.factor), data<T>(out.half), data<T>(inverse),
                               data<int32_t>(out.pivot)},
      problems, stream_of(k)));
  return out;
}

Factored factor(const Tensor& k, const Tensor& ridge, const Tensor* y, bool float64) {
  if (k.scalar_type() == ScalarType::Double) return factor_in<double, double>(k, ridge, y);
  return float64 ? factor_in<float, double>(k, ridge, y) : factor_in<float, float>(k, ridge, y);
}

std::tuple<Tensor, Tensor, Tensor> cholesky(Tensor k, Tensor ridge, Tensor y, bool float64) {
  require_one_device("cholesky", k, ridge);
  require_one_device("cholesky", k, y);
  KRRST_CHECK(k.dim() == 2 && k.size(0) == k.size(1) && ridge.numel() == 1 && y.dim() == 2 &&
                  y.size(0) == k.size(0),
              "cholesky: k, ridge and y must be [M, M], [] and [M, P]");
  KRRST_CHECK(is_real(k) && is_real(ridge) && k.scalar_type() == y.scalar_type(),
              "cholesky: k and y must have one dtype, float32 or float64");
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  const Factored out = factor(k, ridge, &y, float64);
  return {torch::stable::transpose(torch::stable::select(out.factor, 0, 0), 0, 1), out.half,
          torch::stable::select(out.pivot, 0, 0)};
}

std::tuple<Tensor, Tensor> batched_cholesky(Tensor k, Tensor ridge) {
  require_one_device("batched_cholesky", k, ridge);
  KRRST_CHECK(
      k.dim() == 3 && k.size(1) == k.size(2) && ridge.dim() == 1 && ridge.size(0) == k.size(0),
      "batched_cholesky: k and ridge must be [N, M, M] and [N]");
  KRRST_CHECK(is_real(k) && is_real(ridge),
              "batched_cholesky: the tensors must be float32 or float64");
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  const Factored out = factor(k, ridge, nullptr, true);
  return {torch::stable::transpose(out.factor, 1, 2), out.pivot};
}

template <typename Y>
Tensor solve_in(const Tensor& y, const Tensor& factor) {
  const int64_t problems = y.size(0), m = y.size(1), columns = y.size(2);
  const bool wide = std::is_same_v<Y, double>, keeps = m > krrst::cuda::kTile && !wide;
  Tensor out = torch::stable::new_empty(y, {problems, columns, m});
  Tensor work = torch::stable::new_empty(y, {keeps ? problems : 0, columns, m}, ScalarType::Double);
  STD_CUDA_CHECK(krrst::cuda::cholesky_solve(
      krrst::cuda::CholeskySolve<Y, double>{m, columns, view<Y>(y), problem_stride(y),
                                            view<double>(factor), problem_stride(factor),
                                            data<double>(wide ? out : work), data<Y>(out)},
      problems, stream_of(y)));
  return torch::stable::transpose(out, 1, 2);
}

Tensor batched_cholesky_solve(Tensor y, Tensor factor) {
  require_one_device("batched_cholesky_solve", y, factor);
  KRRST_CHECK(y.dim() == 3 && factor.dim() == 3 && y.size(0) == factor.size(0) &&
                  y.size(1) == factor.size(1) && factor.size(1) == factor.size(2),
              "batched_cholesky_solve: y and factor must be [N, M, P] and [N, M, M]");
  KRRST_CHECK(is_real(y) && factor.scalar_type() == ScalarType::Double,
              "batched_cholesky_solve: the factor must be float64, y float32 or float64");
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  return y.scalar_type() == ScalarType::Double ? solve_in<double>(y, factor)
                                               : solve_in<float>(y, factor);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(krrst_fast, CUDA, m) {
  m.impl("cholesky", TORCH_BOX(&cholesky));
  m.impl("batched_cholesky", TORCH_BOX(&batched_cholesky));
  m.impl("batched_cholesky_solve", TORCH_BOX(&batched_cholesky_solve));
}
