// The compiled module zipformer_kernels._native. It links no torch library: pointers, sizes and streams are integers.
#include "attention/bind.h"
#include "balancer/bind.h"
#include "bias_norm/bind.h"
#include "branch/bind.h"
#include "bypass/bind.h"
#include "common/bind.h"
#include "common/isa.h"
#include "conv_module/bind.h"
#include "depthwise_conv2d/bind.h"
#include "nonlin_attention/bind.h"
#include "scaled_adam/bind.h"
#include "swoosh/bind.h"
#include "swoosh_linear/bind.h"

namespace zk {

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
  bind_branch(m);
  bind_bypass(m);
  bind_conv_module(m);
  bind_depthwise_conv2d(m);
  bind_nonlin_attention(m);
  bind_scaled_adam(m);
  bind_swoosh(m);
  bind_swoosh_linear(m);
}
