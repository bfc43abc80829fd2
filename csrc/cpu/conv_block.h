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

// The mean over all pixels of z [batch, height, width, outputs], and the sum of squared distances
// to it, [outputs] each.
void conv_moments(const Layer& layer, const float* z, double* mean, double* squares,
                  const Parallel& threads);

// y [batch, height / 2, width / 2, outputs] and the mask of pooled relu(factor z + shift).
void conv_normalise(const Layer& layer, const float* z, const float* factor, const float* shift,
                    float* y, uint8_t* mask, const Parallel& threads);

// [2, outputs]: the sum over all pixels of the gradient by the normalised z, and of its product
// with the normalised z. `from` has all but gain and the last two members.
void conv_gradient_sums(const Layer& layer, const Gradient& from, double* sums,
                        const Parallel& threads);

}  // namespace krrst::cpu
