// Convolutions of whole batches on the threads of a pool; conv.h has the kernels.
#pragma once
#include "conv.h"
#include "parallel.h"

namespace krrst::cpu {

void conv_forward(const Layer& layer, const float* x, const Filters& filters, const Epilogue& to,
                  const Parallel& threads);

// d_x [batch, height, width, inputs] and d_filters [outputs, inputs, 3, 3]; nullptr leaves one out.
void conv_backward(const Layer& layer, const float* x, const Filters& filters, const Gradient& from,
                   float* d_x, float* d_filters, const Parallel& threads);

// What batch norm keeps of z, [channels] each.
struct Statistics {
  float *mean, *variance, *scale;  // the variance is divided by the pixels; scale: 1 / deviation
};

// The mean over all pixels of z [batch, height, width, outputs], and of the squared distance to it.
void conv_statistics(const Layer& layer, const float* z, double eps, const Statistics& of,
                     const Parallel& threads);

// y [batch, height / 2, width / 2, outputs] and the mask of pooled relu(gain (z - mean) scale +
// shift).
void conv_normalise(const Layer& layer, const float* z, const Statistics& of, const float* gain,
                    const float* shift, float* y, uint8_t* mask, const Parallel& threads);

// The gradients by gain and shift; `from` has all but the last two members, which become their
// means over the pixels in `means` [2, outputs].
void conv_norm_gradient(const Layer& layer, const Gradient& from, float* d_gain, float* d_shift,
                        float* means, const Parallel& threads);

}  // namespace krrst::cpu
