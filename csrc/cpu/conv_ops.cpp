// The operators of the convolutions. Images are contiguous [N, H, W, C] float32 tensors.
#include <tuple>

#include "conv_block.h"
#include "glue.h"

using namespace krrst::glue;
using krrst::cpu::Epilogue;
using krrst::cpu::Filters;
using krrst::cpu::Gradient;
using krrst::cpu::Layer;
using krrst::cpu::Statistics;

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

Tensor conv_bias(Tensor x, Tensor w, Tensor bias, std::optional<Tensor> shortcut, bool relu) {
  const char* const op = "conv_bias";
  const Layer layer = layer_of(op, x, w);
  check(op, "bias", bias, {layer.outputs});
  if (shortcut)
    check(op, "shortcut", *shortcut, {layer.batch, layer.height, layer.width, layer.outputs});
  Tensor out = fresh(x, {layer.batch, layer.height, layer.width, layer.outputs});
  const Epilogue to{read(bias), shortcut ? read(*shortcut) : nullptr, relu, false, write(out),
                    nullptr};
  krrst::cpu::conv_forward(layer, read(x), filters_of(w), to, on_torch_threads);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_norm_relu_pool(Tensor x, Tensor w,
                                                                               Tensor gain,
                                                                               Tensor shift,
                                                                               double eps) {
  const char* const op = "conv_norm_relu_pool";
  const Layer layer = layer_of(op, x, w);
  check(op, "gain", gain, {layer.outputs});
  check(op, "shift", shift, {layer.outputs});
  Tensor z = fresh(x, {layer.batch, layer.height, layer.width, layer.outputs}),
         out = pooled_like(x, layer), mask = fresh_mask(x, tiles(layer), layer),
         mean = fresh(x, {layer.outputs}), variance = fresh(x, {layer.outputs}),
         scale = fresh(x, {layer.outputs});
  const Epilogue to{nullptr, nullptr, false, false, write(z), nullptr};
  const Statistics of{write(mean), write(variance), write(scale)};
  krrst::cpu::conv_forward(layer, read(x), filters_of(w), to, on_torch_threads);
  krrst::cpu::conv_statistics(layer, read(z), eps, of, on_torch_threads);
  krrst::cpu::conv_normalise(layer, read(z), of, read(gain), read(shift), write(out), bytes(mask),
                             on_torch_threads);
  return {out, z, mask, mean, variance, scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_norm_relu_pool_backward(Tensor d_out, Tensor x,
                                                                        Tensor w, Tensor gain,
                                                                        Tensor z, Tensor mask,
                                                                        Tensor mean, Tensor scale,
                                                                        bool needs_d_x) {
  const char* const op = "conv_norm_relu_pool_backward";
  const Layer layer = layer_of(op, x, w);
  check(op, "d_out", d_out, {layer.batch, layer.height / 2, layer.width / 2, layer.outputs});
  check(op, "z", z, {layer.batch, layer.height, layer.width, layer.outputs});
  check(op, "mask", mask, {tiles(layer), krrst::cpu::mask_bytes(layer.outputs)}, ScalarType::Byte);
  for (const Tensor* one : {&gain, &mean, &scale}) check(op, "gain", *one, {layer.outputs});
  Tensor d_x = needs_d_x ? fresh(x, {layer.batch, layer.height, layer.width, layer.inputs})
                         : fresh(x, {0}),
         d_w = fresh(x, {layer.outputs, layer.inputs, 3, 3}), d_gain = fresh(x, {layer.outputs}),
         d_shift = fresh(x, {layer.outputs}), means = fresh(x, {2, layer.outputs});
  Gradient from{read(d_out), bytes(mask), read(z), read(mean),
                read(scale), read(gain),  nullptr, nullptr};
  krrst::cpu::conv_norm_gradient(layer, from, write(d_gain), write(d_shift), write(means),
                                 on_torch_threads);
  from.mean_gradient = read(means), from.mean_product = read(means) + layer.outputs;
  krrst::cpu::conv_backward(layer, read(x), filters_of(w), from, needs_d_x ? write(d_x) : nullptr,
                            write(d_w), on_torch_threads);
  return {d_x, d_w, d_gain, d_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(krrst_fast, CPU, m) {
  m.impl("conv_relu_pool", TORCH_BOX(&conv_relu_pool));
  m.impl("conv_relu_pool_backward", TORCH_BOX(&conv_relu_pool_backward));
  m.impl("conv_bias", TORCH_BOX(&conv_bias));
  m.impl("conv_norm_relu_pool", TORCH_BOX(&conv_norm_relu_pool));
  m.impl("conv_norm_relu_pool_backward", TORCH_BOX(&conv_norm_relu_pool_backward));
}
