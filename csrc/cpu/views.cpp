#include "views.h"

#include <algorithm>

namespace krrst::cpu {
namespace {

constexpr int64_t kLevels = 256;

// The part [first, last) of an output row that a source row covers; the rest is padding.
struct Span {
  int64_t first, last;
};

Span covered(int64_t length, int64_t shift) {
  const int64_t first = std::clamp<int64_t>(-shift, 0, length);
  return {first, std::clamp<int64_t>(length - shift, first, length)};
}

// A pixel has 256 values, so it is looked up: exact, and no slower than memory allows.
void row(const uint8_t* source, int64_t stride, int64_t width, int64_t shift, bool flip,
         const float* level, float* out) {
  const Span span = covered(width, shift);
  const Span target = flip ? Span{width - span.last, width - span.first} : span;
  std::fill(out, out + target.first, level[0]);
  const int64_t step = flip ? -stride : stride;
  const uint8_t* pixel = source + (flip ? span.last - 1 + shift : span.first + shift) * stride;
  for (int64_t x = target.first; x < target.last; ++x, pixel += step) out[x] = level[*pixel];
  std::fill(out + target.last, out + width, level[0]);
}

}  // namespace

std::vector<float> normalised_levels(const double* mean, const double* std, int64_t channels) {
  std::vector<float> levels(channels * kLevels);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t v = 0; v < kLevels; ++v)
      levels[c * kLevels + v] = (static_cast<float>(v) / 255.0f - static_cast<float>(mean[c])) /
                                static_cast<float>(std[c]);
  return levels;
}

const char* refuse_views(const Images& images, const Draw& draw) {
  if (draw.padding < 0) return "padding must not be negative";
  for (int64_t b = 0; b < draw.batch; ++b)
    if (draw.index[b] < 0 || draw.index[b] >= images.count)
      return "an index is not that of an image";
  for (int64_t i = 0; i < 2 * draw.batch; ++i)
    if (draw.offset[i] < 0 || draw.offset[i] > 2 * draw.padding)
      return "an offset is not from 0 to 2 * padding";
  return nullptr;
}

void views(const Images& images, const Draw& draw, const float* levels, int64_t first, int64_t last,
           float* out) {
  const int64_t height = images.height, width = images.width;
  for (int64_t b = first; b < last; ++b) {
    const int64_t dy = draw.offset[2 * b] - draw.padding,
                  dx = draw.offset[2 * b + 1] - draw.padding;
    const Span rows = covered(height, dy);
    for (int64_t c = 0; c < images.channels; ++c) {
      const uint8_t* plane =
          images.pixels + draw.index[b] * images.stride[0] + c * images.stride[1];
      const float* level = levels + c * kLevels;
      float* target = out + (b * images.channels + c) * height * width;
      std::fill(target, target + rows.first * width, level[0]);
      for (int64_t y = rows.first; y < rows.last; ++y)
        row(plane + (y + dy) * images.stride[2], images.stride[3], width, dx, draw.flip[b], level,
            target + y * width);
      std::fill(target + rows.last * width, target + height * width, level[0]);
    }
  }
}

}  // namespace krrst::cpu
