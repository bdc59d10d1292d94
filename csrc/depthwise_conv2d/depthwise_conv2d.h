// Arguments of the kernel of depthwise_conv2d, and its entry point.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/fields.h"
#include "common/isa.h"

namespace zk {

// A tensor of (batch, channels, frames, bins) with stride 1 for channels; strides in elements.
struct Image {
  const void* data;
  int64_t batch_stride, frame_stride, bin_stride;

  ZK_FIELDS(data, batch_stride, frame_stride, bin_stride)
};

// The gradient of the weight of y_tfc = b_c + sum_ij w_cij x_(t + i - I / 2)(f + j - J / 2)c, zeros around x:
// dw_cij = sum_tf dy_tfc x_(t + i - I / 2)(f + j - J / 2)c.
struct DepthwiseConv2dWeightGradient {
  Image x, dy;
  // (parts, I, J, channels), dense, double for float64 and float for the others: each of `parts` groups of frames
  // leaves its share of the sums there.
  void* partials;
  int64_t parts;
  int64_t batch, channels, frames, bins;
  int64_t kernel_frames, kernel_bins;  // I and J, odd
  DType dtype;                         // of x and dy
  int threads;

  ZK_FIELDS(x, dy, partials, parts, batch, channels, frames, bins, kernel_frames, kernel_bins, dtype)
};

ZK_DECLARE_CPU(depthwise_conv2d_weight_gradient, DepthwiseConv2dWeightGradient)

}  // namespace zk
