// Glue between torch and the CPU kernels, on torch's stable ABI: takes pointers, allocates, lends
// the thread pool. Shapes and dtypes were checked by the Python operator; what is checked here is
// what would be a wild read if somebody called the operator past it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>

#include "gram.h"
#include "module.h"
#include "thin_matmul.h"
#include "views.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// An exception may not leave a parallel region: it is noted there and thrown here.
void on_torch_threads(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    try {
      body(first, last);
    } catch (...) {
      failed = true;
    }
  });
  STD_TORCH_CHECK(!failed, "krrst_fast: a CPU kernel ran out of memory");
}

template <typename F>
void for_real_dtype(const char* op, const Tensor& x, F&& body) {
  if (x.scalar_type() == ScalarType::Float) return body(float{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, op,
                  ": the tensors must be float32 or float64");
  body(double{});
}

Tensor gram(Tensor x, double scale, double bias) {
  STD_TORCH_CHECK(x.dim() == 2, "gram: x must be a matrix");
  const int64_t n = x.size(0);
  Tensor k = torch::stable::new_empty(x, {n, n});
  for_real_dtype("gram", x, [&](auto zero) {
    using T = decltype(zero);
    krrst::cpu::gram<T>(static_cast<const T*>(x.data_ptr()), x.stride(0), x.stride(1), n, x.size(1),
                        static_cast<T>(scale), static_cast<T>(bias), static_cast<T*>(k.data_ptr()),
                        on_torch_threads);
  });
  return k;
}

Tensor thin_matmul(Tensor a, Tensor b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0),
                  "thin_matmul: a and b must be [N, K] and [K, P]");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "thin_matmul: a and b must have one dtype");
  Tensor out = torch::stable::new_empty(a, {a.size(0), b.size(1)});
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
  STD_TORCH_CHECK(images.dim() == 4, "views: images must be [N, C, H, W]");
  const int64_t batch = index.numel(), channels = images.size(1);
  STD_TORCH_CHECK(offset.numel() == 2 * batch && flip.numel() == batch &&
                      static_cast<int64_t>(mean.size()) == channels && mean.size() == std.size(),
                  "views: the shapes do not fit together");
  STD_TORCH_CHECK(
      images.scalar_type() == ScalarType::Byte && index.scalar_type() == ScalarType::Long &&
          offset.scalar_type() == ScalarType::Long && flip.scalar_type() == ScalarType::Bool,
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
  STD_TORCH_CHECK(reason == nullptr, "views: ", reason);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(krrst_fast, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("thin_matmul", TORCH_BOX(&thin_matmul));
  m.impl("views", TORCH_BOX(&views));
}
