// The operators of the convolutions. Images are contiguous [N, H, W, C] float32 tensors.
#include <tuple>

#include "conv_block.h"
#include "glue.h"

using namespace krrst::glue;
using krrst::cpu::Epilogue;
using krrst::cpu::Filters;
using krrst::cpu::Gradient;
using krrst::cpu::Layer;

namespace {

const float* read(const Tensor& x) { return static_cast<const float*>(x.data_ptr()); }
float* write(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }
uint8_t* bytes(const Tensor& x) { return static_cast<uint8_t*>(x.data_ptr()); }

void check(const char* op, const char* name, const Tensor& x, std::initializer_list<int64_t> shape,
           ScalarType dtype = ScalarType::Float) {
  bool fits = x.scalar_type() == dtype && x.dim() == static_cast<int64_t>(shape.size()) &&
              x.is_contiguous();
  for (int64_t i = 0; fits && i < x.dim(); ++i) fits = x.size(i) == shape.begin()[i];
  KRRST_CHECK(fits, op, ": ", name, " must be contiguous, of another shape or dtype than it is");
}

Layer layer_of(const char* op, const Tensor& w, int64_t batch, int64_t height, int64_t width) {
  KRRST_CHECK(
      w.dim() == 4 && w.size(2) == 3 && w.size(3) == 3 && w.scalar_type() == ScalarType::Float, op,
      ": w must be [C', C, 3, 3] in float32");
  const Layer layer{batch, height, width, w.size(1), w.size(0)};
  KRRST_CHECK(layer.inputs > 0 && layer.outputs > 0 && height > 0 && width > 0, op,
              ": there must be channels and pixels");
  return layer;
}

Layer layer_of(const char* op, const Tensor& x, const Tensor& w) {
  KRRST_CHECK(x.dim() == 4, op, ": x must be [N, H, W, C]");
  const Layer layer = layer_of(op, w, x.size(0), x.size(1), x.size(2));
  check(op, "x", x, {layer.batch, layer.height, layer.width, layer.inputs});
  return layer;
}

Filters filters_of(const Tensor& w) {
  return {read(w), w.stride(0), w.stride(1), w.stride(2), w.stride(3)};
}

int64_t tiles(const Layer& layer) { return layer.batch * (layer.height / 2) * (layer.width / 2); }

Tensor fresh_mask(const Tensor& x, int64_t rows, const Layer& layer) {
  Tensor mask =
      torch::stable::new_empty(x, {rows, krrst::cpu::mask_bytes(layer.outputs)}, ScalarType::Byte);
  // Bytes of channels that there are not stay as they are.
  if (layer.outputs % 32) torch::stable::zero_(mask);
  return mask;
}

Tensor pooled_like(const Tensor& x, const Layer& layer) {
  return fresh(x, {layer.batch, layer.height / 2, layer.width / 2, layer.outputs});
}

std::tuple<Tensor, Tensor> conv_relu_pool(Tensor x, Tensor w, Tensor bias, bool needs_mask) {
  const char* const op = "conv_relu_pool";
  const Layer layer = layer_of(op, x, w);
  check(op, "bias", bias, {layer.outputs});
  Tensor out = pooled_like(x, layer);
  Tensor mask = fresh_mask(x, needs_mask ? tiles(layer) : 0, layer);
  const Epilogue to{read(bias), nullptr,    true,
                    true,       write(out), needs_mask ? bytes(mask) : nullptr};
  krrst::cpu::conv_forward(layer, read(x), filters_of(w), to, on_torch_threads);
  return {out, mask};
}

Tensor conv_relu_pool_backward(Tensor d_out, Tensor mask, Tensor w, int64_t height, int64_t width) {
  const char* const op = "conv_relu_pool_backward";
  KRRST_CHECK(d_out.dim() == 4, op, ": d_out must be [N, H, W, C]");
  const Layer layer = layer_of(op, w, d_out.size(0), height, width);
  check(op, "d_out", d_out, {layer.batch, height / 2, width / 2, layer.outputs});
  check(op, "mask", mask, {tiles(layer), krrst::cpu::mask_bytes(layer.outputs)}, ScalarType::Byte);
  Tensor d_x = fresh(d_out, {layer.batch, height, width, layer.inputs});
  Gradient from{};
  from.out = read(d_out), from.mask = bytes(mask);
  krrst::cpu::conv_backward(layer, nullptr, filters_of(w), from, write(d_x), nullptr,
                            on_torch_threads);
  return d_x;
}

Tensor conv3x3(Tensor x, Tensor w, std::optional<Tensor> bias, std::optional<Tensor> shortcut,
               bool relu) {
  const char* const op = "conv3x3";
  const Layer layer = layer_of(op, x, w);
  if (bias) check(op, "bias", *bias, {layer.outputs});
  if (shortcut)
    check(op, "shortcut", *shortcut, {layer.batch, layer.height, layer.width, layer.outputs});
  Tensor out = fresh(x, {layer.batch, layer.height, layer.width, layer.outputs});
  const Epilogue to{bias ? read(*bias) : nullptr,
                    shortcut ? read(*shortcut) : nullptr,
                    relu,
                    false,
                    write(out),
                    nullptr};
  krrst::cpu::conv_forward(layer, read(x), filters_of(w), to, on_torch_threads);
  return out;
}

// The layer of which z [N, H, W, C] is the output.
Layer layer_of_outputs(const char* op, const Tensor& z) {
  KRRST_CHECK(z.dim() == 4, op, ": z must be [N, H, W, C]");
  const Layer layer{z.size(0), z.size(1), z.size(2), 1, z.size(3)};
  check(op, "z", z, {layer.batch, layer.height, layer.width, layer.outputs});
  KRRST_CHECK(layer.pixels() > 0 && layer.outputs > 0, op, ": z must have channels and pixels");
  return layer;
}

void check_pooled(const char* op, const Layer& layer, const Tensor& d_out, const Tensor& mask) {
  check(op, "d_out", d_out, {layer.batch, layer.height / 2, layer.width / 2, layer.outputs});
  check(op, "mask", mask, {tiles(layer), krrst::cpu::mask_bytes(layer.outputs)}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor> channel_moments(Tensor z) {
  const Layer layer = layer_of_outputs("channel_moments", z);
  Tensor mean = fresh(ScalarType::Double, {layer.outputs}),
         squares = fresh(ScalarType::Double, {layer.outputs});
  krrst::cpu::conv_moments(layer, read(z), static_cast<double*>(mean.data_ptr()),
                           static_cast<double*>(squares.data_ptr()), on_torch_threads);
  return {mean, squares};
}

std::tuple<Tensor, Tensor> scale_relu_pool(Tensor z, Tensor factor, Tensor shift) {
  const char* const op = "scale_relu_pool";
  const Layer layer = layer_of_outputs(op, z);
  check(op, "factor", factor, {layer.outputs});
  check(op, "shift", shift, {layer.outputs});
  Tensor out = pooled_like(z, layer), mask = fresh_mask(z, tiles(layer), layer);
  krrst::cpu::conv_normalise(layer, read(z), read(factor), read(shift), write(out), bytes(mask),
                             on_torch_threads);
  return {out, mask};
}

Tensor norm_relu_pool_sums(Tensor d_out, Tensor mask, Tensor z, Tensor mean, Tensor scale) {
  const char* const op = "norm_relu_pool_sums";
  const Layer layer = layer_of_outputs(op, z);
  check_pooled(op, layer, d_out, mask);
  check(op, "mean", mean, {layer.outputs});
  check(op, "scale", scale, {layer.outputs});
  Gradient from{};
  from.out = read(d_out), from.mask = bytes(mask), from.z = read(z);
  from.mean = read(mean), from.scale = read(scale);
  Tensor sums = fresh(ScalarType::Double, {2, layer.outputs});
  krrst::cpu::conv_gradient_sums(layer, from, static_cast<double*>(sums.data_ptr()),
                                 on_torch_threads);
  return sums;
}

std::tuple<Tensor, Tensor> conv_norm_backward(Tensor d_out, Tensor mask, Tensor x, Tensor w,
                                              Tensor z, Tensor mean, Tensor scale, Tensor gain,
                                              Tensor means, bool needs_d_x, bool needs_d_w) {
  const char* const op = "conv_norm_backward";
  const Layer layer = layer_of(op, x, w);
  check_pooled(op, layer, d_out, mask);
  check(op, "z", z, {layer.batch, layer.height, layer.width, layer.outputs});
  check(op, "mean", mean, {layer.outputs});
  check(op, "scale", scale, {layer.outputs});
  check(op, "gain", gain, {layer.outputs});
  check(op, "means", means, {2, layer.outputs});
  Tensor d_x = needs_d_x ? fresh(x, {layer.batch, layer.height, layer.width, layer.inputs})
                         : fresh(x, {0}),
         d_w = needs_d_w ? fresh(x, {layer.outputs, layer.inputs, 3, 3}) : fresh(x, {0});
  const Gradient from{read(d_out), bytes(mask), read(z),     read(mean),
                      read(scale), read(gain),  read(means), read(means) + layer.outputs};
  krrst::cpu::conv_backward(layer, read(x), filters_of(w), from, needs_d_x ? write(d_x) : nullptr,
                            needs_d_w ? write(d_w) : nullptr, on_torch_threads);
  return {d_x, d_w};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(krrst_fast, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv_relu_pool", TORCH_BOX(&conv_relu_pool));
  m.impl("conv_relu_pool_backward", TORCH_BOX(&conv_relu_pool_backward));
  m.impl("channel_moments", TORCH_BOX(&channel_moments));
  m.impl("scale_relu_pool", TORCH_BOX(&scale_relu_pool));
  m.impl("norm_relu_pool_sums", TORCH_BOX(&norm_relu_pool_sums));
  m.impl("conv_norm_backward", TORCH_BOX(&conv_norm_backward));
}
