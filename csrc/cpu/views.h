// Crop, flip and normalise a batch of uint8 images. No torch here: _C and _native share this
// kernel.
#pragma once
#include <cstdint>
#include <vector>

namespace krrst::cpu {

// uint8 [count, channels, height, width] with strides in elements.
struct Images {
  const uint8_t* pixels;
  int64_t count, channels, height, width;
  int64_t stride[4];
};

// One view for each b in [0, batch): row index[b] of the images, moved by offset[2 b] and
// offset[2 b + 1] (from 0 to 2 * padding), and mirrored where flip[b].
struct Draw {
  const int64_t* index;
  const int64_t* offset;
  const bool* flip;
  int64_t batch, padding;
};

// (level / 255 - mean[c]) / std[c] for each channel and each of the 256 levels: [channels, 256].
std::vector<float> normalised_levels(const double* mean, const double* std, int64_t channels);

// Why these views cannot be taken, or nullptr.
const char* refuse_views(const Images& images, const Draw& draw);

// The views first .. last - 1 into out [batch, channels, height, width], contiguous.
void views(const Images& images, const Draw& draw, const float* levels, int64_t first, int64_t last,
           float* out);

}  // namespace krrst::cpu
