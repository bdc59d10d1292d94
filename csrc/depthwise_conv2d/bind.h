// Python's entry point to the kernel of depthwise_conv2d; zipformer_kernels/ops/depthwise_conv2d/cpu.py calls it.
#pragma once

#include "common/bind.h"
#include "depthwise_conv2d/depthwise_conv2d.h"

namespace zk {

inline void bind_depthwise_conv2d(pybind11::module_& m) {
  bind_struct<Image>(m, "Image");
  bind_cpu(m, "depthwise_conv2d_weight_gradient_cpu", depthwise_conv2d_weight_gradient_cpu);
}

}  // namespace zk
