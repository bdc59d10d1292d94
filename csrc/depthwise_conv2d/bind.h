// Python's entry point to the kernel of depthwise_conv2d; zipformer_kernels/ops/depthwise_conv2d/native.py calls it.
#pragma once

#include "common/bind.h"
#include "depthwise_conv2d/depthwise_conv2d.h"

namespace zk {

using Strides = std::array<int64_t, 3>;     // batch, frames, bins
using ImageSizes = std::array<int64_t, 6>;  // batch, channels, frames, bins, kernel_frames, kernel_bins

static Image image(uintptr_t data, const Strides& strides) {
  return {pointer(data), strides[0], strides[1], strides[2]};
}

inline void bind_depthwise_conv2d(pybind11::module_& m) {
  m.def(
      "depthwise_conv2d_weight_gradient_cpu",
      [](uintptr_t x, const Strides& x_strides, uintptr_t dy, const Strides& dy_strides, uintptr_t partials,
         int64_t parts, const ImageSizes& n, int dtype, int threads) {
        depthwise_conv2d_weight_gradient_cpu({image(x, x_strides), image(dy, dy_strides), pointer(partials), parts,
                                              n[0], n[1], n[2], n[3], n[4], n[5], DType(dtype), threads});
      },
      release_gil());
}

}  // namespace zk
