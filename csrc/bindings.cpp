// The compiled module zipformer_kernels._native. It links no torch library: pointers, sizes and streams are integers.
#include <pybind11/pybind11.h>

#include <string>

#include "common/isa.h"

namespace zk {

void bind_attention(pybind11::module_& m);
void bind_balancer(pybind11::module_& m);
void bind_bias_norm(pybind11::module_& m);
void bind_bypass(pybind11::module_& m);
void bind_conv_module(pybind11::module_& m);
void bind_depthwise_conv2d(pybind11::module_& m);
void bind_nonlin_attention(pybind11::module_& m);
void bind_scaled_adam(pybind11::module_& m);
void bind_swoosh(pybind11::module_& m);
void bind_swoosh_linear(pybind11::module_& m);

static const char* const isa_names[] = {"baseline", "avx2", "avx512"};

static Isa isa_named(const std::string& name) {
  for (int i = 0; i < 3; ++i) {
    if (name == isa_names[i]) return Isa(i);
  }
  throw pybind11::value_error("isa must be baseline, avx2 or avx512, got " + name);
}

}  // namespace zk

PYBIND11_MODULE(ZK_MODULE_NAME, m) {
  using namespace zk;
  pybind11::dict build;
  build["cuda_targets"] = ZK_CUDA_TARGETS;
  build["emulated"] = bool(ZK_EMULATED);
  build["compiler"] = __VERSION__;
  m.attr("build") = build;

  m.def("detected_isa", [] { return isa_names[int(detected_isa())]; });
  m.def("current_isa", [] { return isa_names[int(current_isa())]; });
  m.def("set_isa", [](const std::string& name) { set_isa(isa_named(name)); });

  bind_attention(m);
  bind_balancer(m);
  bind_bias_norm(m);
  bind_bypass(m);
  bind_conv_module(m);
  bind_depthwise_conv2d(m);
  bind_nonlin_attention(m);
  bind_scaled_adam(m);
  bind_swoosh(m);
  bind_swoosh_linear(m);
}
