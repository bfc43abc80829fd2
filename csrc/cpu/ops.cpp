// The operators of the CPU kernels. The Python operators check shapes and dtypes; this file checks
// again what would otherwise read outside of a tensor when an operator is called directly.
#include <string>
#include <tuple>
#include <vector>

#include "batched_cholesky.h"
#include "batched_matmul.h"
#include "glue.h"
#include "gram.h"
#include "kernels.h"
#include "module.h"
#include "thin_matmul.h"
#include "views.h"

using namespace krrst::glue;

namespace {

Tensor gram(Tensor x, double scale, double bias) {
  const int64_t d = x.dim();
  KRRST_CHECK(d == 2 || d == 3, "gram: x must be [M, D] or [N, M, D]");
  const int64_t problems = d == 3 ? x.size(0) : 1, n = x.size(d - 2);
  Tensor k = d == 3 ? fresh(x, {problems, n, n}) : fresh(x, {n, n});
  for_real_dtype("gram", x, [&](auto zero) {
    using T = decltype(zero);
    krrst::cpu::gram<T>(matrices<T>(x), problems, n, x.size(d - 1), static_cast<T>(scale),
                        static_cast<T>(bias), static_cast<T*>(k.data_ptr()), on_torch_threads);
  });
  return k;
}

Tensor batched_matmul(Tensor a, Tensor b) {
  KRRST_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(1),
              "batched_matmul: a and b must be [N, I, K] and [N, K, J]");
  KRRST_CHECK(a.scalar_type() == b.scalar_type(), "batched_matmul: a and b must have one dtype");
  Tensor out = fresh(a, {a.size(0), a.size(1), b.size(2)});
  for_real_dtype("batched_matmul", a, [&](auto zero) {
    using T = decltype(zero);
    krrst::cpu::batched_matmul<T>(matrices<T>(a), matrices<T>(b), a.size(0), a.size(1), a.size(2),
                                  b.size(2), static_cast<T*>(out.data_ptr()), on_torch_threads);
  });
  return out;
}

std::tuple<Tensor, Tensor> batched_cholesky(Tensor k, Tensor ridge) {
  KRRST_CHECK(
      k.dim() == 3 && k.size(1) == k.size(2) && ridge.dim() == 1 && ridge.size(0) == k.size(0),
      "batched_cholesky: k and ridge must be [N, M, M] and [N]");
  const int64_t problems = k.size(0), m = k.size(1);
  std::vector<double> ridges(static_cast<size_t>(problems));
  for_real_dtype("batched_cholesky", ridge, [&](auto zero) {
    const auto* values = static_cast<const decltype(zero)*>(ridge.data_ptr());
    for (int64_t n = 0; n < problems; ++n) ridges[n] = values[n * ridge.stride(0)];
  });
  Tensor factor = fresh(ScalarType::Double, {problems, m, m}, true);
  Tensor pivot = fresh(ScalarType::Int, {problems});
  for_real_dtype("batched_cholesky", k, [&](auto zero) {
    using T = decltype(zero);
    krrst::cpu::batched_cholesky<T>(matrices<T>(k), ridges.data(), problems, m,
                                    static_cast<double*>(factor.data_ptr()),
                                    static_cast<int32_t*>(pivot.data_ptr()), on_torch_threads);
  });
  return {factor, pivot};
}

Tensor batched_cholesky_solve(Tensor y, Tensor factor) {
  KRRST_CHECK(y.dim() == 3 && factor.dim() == 3 && y.size(0) == factor.size(0) &&
                  y.size(1) == factor.size(1) && factor.size(1) == factor.size(2),
              "batched_cholesky_solve: y and factor must be [N, M, P] and [N, M, M]");
  KRRST_CHECK(factor.scalar_type() == ScalarType::Double,
              "batched_cholesky_solve: the factor must be float64");
  Tensor out = fresh(y, {y.size(0), y.size(1), y.size(2)}, true);
  for_real_dtype("batched_cholesky_solve", y, [&](auto zero) {
    using T = decltype(zero);
    const int64_t m = y.size(1), columns = y.size(2);
    krrst::cpu::batched_cholesky_solve<T>(
        matrices<T>(y), matrices<double>(factor), y.size(0), m, columns,
        {static_cast<T*>(out.data_ptr()), m * columns, 1, m}, on_torch_threads);
  });
  return out;
}

Tensor thin_matmul(Tensor a, Tensor b) {
  KRRST_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0),
              "thin_matmul: a and b must be [N, K] and [K, P]");
  KRRST_CHECK(a.scalar_type() == b.scalar_type(), "thin_matmul: a and b must have one dtype");
  Tensor out = fresh(a, {a.size(0), b.size(1)});
  for_real_dtype("thin_matmul", a, [&](auto zero) {
    using T = decltype(zero);
    krrst::cpu::thin_matmul<T>(static_cast<const T*>(a.data_ptr()), a.stride(0), a.stride(1),
                               static_cast<const T*>(b.data_ptr()), b.stride(0), b.stride(1),
                               a.size(0), a.size(1), b.size(1), static_cast<T*>(out.data_ptr()),
                               on_torch_threads);
  });
  return out;
}

Tensor views(Tensor images, Tensor index, Tensor offset, Tensor flip, int64_t padding,
             std::vector<double> mean, std::vector<double> std) {
  KRRST_CHECK(images.dim() == 4, "views: images must be [N, C, H, W]");
  const int64_t batch = index.numel(), channels = images.size(1);
  KRRST_CHECK(offset.numel() == 2 * batch && flip.numel() == batch &&
                  static_cast<int64_t>(mean.size()) == channels && mean.size() == std.size(),
              "views: the shapes do not fit together");
  KRRST_CHECK(images.scalar_type() == ScalarType::Byte && index.scalar_type() == ScalarType::Long &&
                  offset.scalar_type() == ScalarType::Long &&
                  flip.scalar_type() == ScalarType::Bool,
              "views: images, index, offset and flip must be uint8, int64, int64 and bool");
  const Tensor rows = torch::stable::contiguous(index), corners = torch::stable::contiguous(offset),
               mirrored = torch::stable::contiguous(flip);
  const krrst::cpu::Images source{
      images.const_data_ptr<uint8_t>(),
      images.size(0),
      channels,
      images.size(2),
      images.size(3),
      {images.stride(0), images.stride(1), images.stride(2), images.stride(3)}};
  const krrst::cpu::Draw draw{rows.const_data_ptr<int64_t>(), corners.const_data_ptr<int64_t>(),
                              mirrored.const_data_ptr<bool>(), batch, padding};
  const char* reason = krrst::cpu::refuse_views(source, draw);
  KRRST_CHECK(reason == nullptr, "views: ", reason);
  Tensor out = torch::stable::new_empty(images, {batch, channels, images.size(2), images.size(3)},
                                        ScalarType::Float);
  const std::vector<float> levels =
      krrst::cpu::normalised_levels(mean.data(), std.data(), channels);
  float* target = out.mutable_data_ptr<float>();
  on_torch_threads(batch, [&](int64_t first, int64_t last) {
    krrst::cpu::views(source, draw, levels.data(), first, last, target);
  });
  return out;
}

std::string isa() { return krrst::cpu::kernels().isa; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const krrst::cpu::Kernels* set : krrst::cpu::supported()) names.emplace_back(set->isa);
  return names;
}

}  // namespace

// Operators without a tensor argument, which have no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(krrst_fast, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("isas", TORCH_BOX(&isas));
}

STABLE_TORCH_LIBRARY_IMPL(krrst_fast, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("thin_matmul", TORCH_BOX(&thin_matmul));
  m.impl("batched_matmul", TORCH_BOX(&batched_matmul));
  m.impl("batched_cholesky", TORCH_BOX(&batched_cholesky));
  m.impl("batched_cholesky_solve", TORCH_BOX(&batched_cholesky_solve));
  m.impl("views", TORCH_BOX(&views));
}
