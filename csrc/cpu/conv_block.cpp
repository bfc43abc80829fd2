#include "conv_block.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace krrst::cpu {
namespace {

using Buffer = std::unique_ptr<float[]>;

Buffer buffer(int64_t size) { return Buffer(new float[static_cast<size_t>(size)]); }

Buffer packed(const Layer& layer, const Filters& filters, bool backward, const Parallel& threads) {
  Buffer out = buffer(conv().packed_size(layer, backward));
  threads(backward ? layer.outputs : layer.depth(), [&](int64_t first, int64_t last) {
    conv().pack(layer, filters, backward, first, last, out.get());
  });
  return out;
}

// One for each part of a loop, and read in the order of the parts: sums have the same bits however
// the threads were scheduled.
template <typename T>
class Parts {
 public:
  T* add(int64_t first, int64_t size) {
    std::unique_ptr<T[]> part(new T[static_cast<size_t>(size)]());
    T* const values = part.get();
    const std::lock_guard<std::mutex> lock(mutex_);
    parts_[first] = std::move(part);
    return values;
  }
  void sum(int64_t first, int64_t last, T* out) const {
    for (int64_t i = first; i < last; ++i) out[i] = T(0);
    for (const auto& part : parts_)
      for (int64_t i = first; i < last; ++i) out[i] += part.second[i];
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::unique_ptr<T[]>> parts_;
};

// Rows whose moments are taken at a time: few enough to stay in the cache between the two passes.
constexpr int64_t kRows = 64;

}  // namespace

void conv_forward(const Layer& layer, const float* x, const Filters& filters, const Epilogue& to,
                  const Parallel& threads) {
  const Buffer weights = packed(layer, filters, false, threads);
  const int64_t rows = (layer.height + !to.pooled) / 2, columns = (layer.width + !to.pooled) / 2;
  const int64_t tiles = layer.batch * rows * columns;
  threads((tiles + conv().tiles - 1) / conv().tiles, [&](int64_t first, int64_t last) {
    const Buffer scratch = buffer(conv().forward_scratch(layer));
    conv().forward(layer, x, weights.get(), to, first, last, scratch.get());
  });
}

void conv_backward(const Layer& layer, const float* x, const Filters& filters, const Gradient& from,
                   float* d_x, float* d_filters, const Parallel& threads) {
  const Buffer weights = d_x ? packed(layer, filters, true, threads) : nullptr;
  const int64_t size = conv().gradient_size(layer);
  Parts<float> parts;
  threads(layer.batch, [&](int64_t first, int64_t last) {
    const Buffer scratch = buffer(conv().backward_scratch(layer, d_filters != nullptr));
    float* const part = d_filters ? parts.add(first, size) : nullptr;
    conv().backward(layer, x, weights.get(), from, first, last, d_x, part, scratch.get());
  });
  if (!d_filters) return;
  const Buffer total = buffer(size);
  threads(size / 16,
          [&](int64_t first, int64_t last) { parts.sum(16 * first, 16 * last, total.get()); });
  conv().unpack_gradient(layer, total.get(), d_filters);
}

void conv_statistics(const Layer& layer, const float* z, double eps, const Statistics& of,
                     const Parallel& threads) {
  const int64_t channels = layer.outputs, pixels = layer.pixels();
  const int64_t blocks = (pixels + kRows - 1) / kRows;
  // By Chan, Golub and LeVeque: blocks in float32 around their own means, merged in float64.
  std::vector<float> means(static_cast<size_t>(blocks * channels)), squares(means.size());
  threads(blocks, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      conv().moments(z + b * kRows * channels, std::min(kRows, pixels - b * kRows), channels,
                     means.data() + b * channels, squares.data() + b * channels);
  });
  for (int64_t c = 0; c < channels; ++c) {
    double mean = 0, square = 0, count = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const double more = static_cast<double>(std::min(kRows, pixels - b * kRows));
      const double off = means[b * channels + c] - mean, all = count + more;
      mean += off * more / all;
      square += squares[b * channels + c] + off * off * count * more / all;
      count = all;
    }
    const double variance = square / std::max(count, 1.0);
    of.mean[c] = static_cast<float>(mean);
    of.variance[c] = static_cast<float>(variance);
    of.scale[c] = static_cast<float>(1 / std::sqrt(variance + eps));
  }
}

void conv_normalise(const Layer& layer, const float* z, const Statistics& of, const float* gain,
                    const float* shift, float* y, uint8_t* mask, const Parallel& threads) {
  std::vector<float> factor(static_cast<size_t>(layer.outputs)), offset(factor.size());
  for (int64_t c = 0; c < layer.outputs; ++c) {
    factor[c] = gain[c] * of.scale[c];
    offset[c] = shift[c] - of.mean[c] * factor[c];
  }
  threads(layer.batch, [&](int64_t first, int64_t last) {
    conv().normalise(layer, z, factor.data(), offset.data(), first, last, y, mask);
  });
}

void conv_norm_gradient(const Layer& layer, const Gradient& from, float* d_gain, float* d_shift,
                        float* means, const Parallel& threads) {
  const int64_t channels = layer.outputs;
  Parts<double> parts;
  threads(layer.batch, [&](int64_t first, int64_t last) {
    conv().gradient_sums(layer, from, first, last, parts.add(first, 2 * channels));
  });
  std::vector<double> sums(static_cast<size_t>(2 * channels));
  parts.sum(0, 2 * channels, sums.data());
  const auto pixels = static_cast<double>(layer.pixels());
  for (int64_t c = 0; c < channels; ++c) {
    d_shift[c] = static_cast<float>(sums[c]);
    d_gain[c] = static_cast<float>(sums[channels + c]);
    means[c] = static_cast<float>(sums[c] / pixels);
    means[channels + c] = static_cast<float>(sums[channels + c] / pixels);
  }
}

}  // namespace krrst::cpu
