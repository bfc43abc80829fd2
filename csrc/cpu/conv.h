// 3x3 convolutions of stride 1 and padding 1 in float32, channels innermost, by Winograd's
// F(2x2, 3x3): the image is cut in tiles of 2x2 outputs, each of which 16 products make out of 4x4
// inputs where plain arithmetic takes 36 (Lavin and Gray, arXiv 1509.09308). A tile is also what
// 2x2 average pooling makes one pixel of, so bias, ReLU and pooling happen before it is stored.
// Where there are few input channels, as of images, transforms cost more than they save, and the
// nine inputs of each output are multiplied as they are.
//
// Raw pointers, no torch headers. Images are [batch, height, width, channels], contiguous.
#pragma once
#include <cstdint>

namespace krrst::cpu {

struct Layer {
  int64_t batch, height, width, inputs, outputs;

  bool direct() const { return inputs < 8; }
  // How many terms a product of positions sums.
  int64_t depth() const { return direct() ? 9 * inputs : inputs; }
  int64_t pixels() const { return batch * height * width; }
};

// A 3x3 filter bank with strides in elements.
struct Filters {
  const float* data;
  int64_t output, input, row, column;
};

// The signs of the four outputs of a tile are four bits for each channel. Channel c is in the low
// half of byte c, or in the high half of byte c - mask_bytes.
inline int64_t mask_bytes(int64_t channels) { return (channels + 31) / 32 * 16; }

// What becomes of the outputs z of a convolution.
struct Epilogue {
  const float* bias;      // [outputs]
  const float* shortcut;  // added before the ReLU: as the outputs, or nullptr
  bool relu, pooled;      // pooled: 2x2 averages of the ReLU, an odd last row or column left out
  float* out;
  uint8_t* mask;  // pooled: [tiles, mask_bytes], or nullptr
};

// Where the gradient by z comes from.
struct Gradient {
  const float* out;     // by the pooled outputs
  const uint8_t* mask;  // of the tiles
  // Batch norm between z and the ReLU, or nullptr: z [batch, height, width, outputs], its mean,
  // 1 / deviation and gain, and the means over the pixels of the gradient by what is normalised,
  // and of its product with that.
  const float *z, *mean, *scale, *gain, *mean_gradient, *mean_product;
};

struct Conv {
  int64_t (*packed_size)(const Layer& layer, bool backward);
  void (*pack)(const Layer& layer, const Filters& filters, bool backward, int64_t first,
               int64_t last, float* packed);

  // The blocks first .. last - 1 of forward_blocks.
  int64_t (*forward_blocks)(const Layer& layer, bool pooled);
  int64_t (*forward_scratch)(const Layer& layer);
  void (*forward)(const Layer& layer, const float* x, const float* packed, const Epilogue& to,
                  int64_t first, int64_t last, float* scratch);

  // The images first .. last - 1: d_x, which the filters packed with `backward` give, unless it is
  // nullptr, and products of positions [positions, rows, columns] that are added to d_packed.
  int64_t (*backward_scratch)(const Layer& layer, bool filters);
  int64_t (*gradient_size)(const Layer& layer);
  void (*backward)(const Layer& layer, const float* x, const float* packed, const Gradient& from,
                   int64_t first, int64_t last, float* d_x, float* d_packed, float* scratch);
  void (*unpack_gradient)(const Layer& layer, const float* d_packed, float* d_filters);

  // The mean of the rows of x [count, channels], and the sum of squared distances to it.
  void (*moments)(const float* x, int64_t count, int64_t channels, double* mean, double* squares);

  // Tiles of the images first .. last - 1: y = pooled relu(factor z + shift), and the mask.
  void (*normalise)(const Layer& layer, const float* z, const float* factor, const float* shift,
                    int64_t first, int64_t last, float* y, uint8_t* mask);
  // Adds to [2, channels] the sum over these images of the gradient by the normalised z and that of
  // its product with the normalised z.
  void (*gradient_sums)(const Layer& layer, const Gradient& from, int64_t first, int64_t last,
                        double* sums);
};

const Conv& conv();

}  // namespace krrst::cpu
