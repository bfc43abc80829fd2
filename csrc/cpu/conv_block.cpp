#include "conv_block.h"

#include <algorithm>
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
constexpr int64_t kPartBytes = int64_t{1} << 28;

}  // namespace

void conv_forward(const Layer& layer, const float* x, const Filters& filters, const Epilogue& to,
                  const Parallel& threads) {
  const Buffer weights = packed(layer, filters, false, threads);
  threads(conv().forward_blocks(layer, to.pooled), [&](int64_t first, int64_t last) {
    const Buffer scratch = buffer(conv().forward_scratch(layer));
    conv().forward(layer, x, weights.get(), to, first, last, scratch.get());
  });
}

void conv_backward(const Layer& layer, const float* x, const Filters& filters, const Gradient& from,
                   float* d_x, float* d_filters, const Parallel& threads) {
  const Buffer weights = d_x ? packed(layer, filters, true, threads) : nullptr;
  const int64_t size = conv().gradient_size(layer);
  // A part has gradients of its own, so that there are not too many where there are many threads.
  const int64_t most = d_filters ? std::max<int64_t>(8, kPartBytes / 4 / size) : layer.batch;
  const int64_t count = std::min(layer.batch, most);
  Parts<float> parts;
  threads(count, [&](int64_t first, int64_t last) {
    const Buffer scratch = buffer(conv().backward_scratch(layer, d_filters != nullptr));
    float* const part = d_filters ? parts.add(first, size) : nullptr;
    conv().backward(layer, x, weights.get(), from, first * layer.batch / count,
                    last * layer.batch / count, d_x, part, scratch.get());
  });
  if (!d_filters) return;
  const Buffer total = buffer(size);
  threads(size / 16,
          [&](int64_t first, int64_t last) { parts.sum(16 * first, 16 * last, total.get()); });
  conv().unpack_gradient(layer, total.get(), d_filters);
}

void conv_moments(const Layer& layer, const float* z, double* mean, double* squares,
                  const Parallel& threads) {
  const int64_t channels = layer.outputs, pixels = layer.pixels();
  const int64_t blocks = (pixels + kRows - 1) / kRows;
  // Blocks that fit in a cache for two passes, merged as by Chan, Golub and LeVeque.
  std::vector<double> means(static_cast<size_t>(blocks * channels)), around(means.size());
  threads(blocks, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      conv().moments(z + b * kRows * channels, std::min(kRows, pixels - b * kRows), channels,
                     means.data() + b * channels, around.data() + b * channels);
  });
  for (int64_t c = 0; c < channels; ++c) {
    double middle = 0, square = 0, count = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const double more = static_cast<double>(std::min(kRows, pixels - b * kRows));
      const double off = means[b * channels + c] - middle, all = count + more;
      middle += off * more / all;
      square += around[b * channels + c] + off * off * count * more / all;
      count = all;
    }
    mean[c] = middle;
    squares[c] = square;
  }
}

void conv_normalise(const Layer& layer, const float* z, const float* factor, const float* shift,
                    float* y, uint8_t* mask, const Parallel& threads) {
  threads(layer.batch, [&](int64_t first, int64_t last) {
    conv().normalise(layer, z, factor, shift, first, last, y, mask);
  });
}

void conv_gradient_sums(const Layer& layer, const Gradient& from, double* sums,
                        const Parallel& threads) {
  const int64_t size = 2 * layer.outputs;
  Parts<double> parts;
  threads(layer.batch, [&](int64_t first, int64_t last) {
    conv().gradient_sums(layer, from, first, last, parts.add(first, size));
  });
  parts.sum(0, size, sums);
}

}  // namespace krrst::cpu
