// Python's entry points to the kernels of conv_module; zipformer_kernels/ops/conv_module/native.py calls them.
#pragma once

#include "common/bind.h"
#include "conv_module/conv_module.h"

namespace zk {

inline void bind_conv_module(pybind11::module_& m) {
  bind_struct<ConvModuleShape>(m, "ConvModuleShape");
  bind_cpu(m, "conv_module_forward_cpu", conv_module_forward_cpu);
  bind_cpu<ConvModuleInfer>(m, "conv_module_infer_cpu", [](const auto& args) { conv_module_forward_cpu(args); });
  bind_cpu(m, "conv_module_backward_cpu", conv_module_backward_cpu);
#if ZK_WITH_CUDA
  bind_cuda(m, "conv_module_forward_cuda", conv_module_forward_cuda);
  bind_cuda(m, "conv_module_backward_cuda", conv_module_backward_cuda);
#endif
}

}  // namespace zk
