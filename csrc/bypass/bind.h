// Python's entry points to the bypass kernels; zipformer_kernels/ops/bypass/native.py calls them.
#pragma once

#include "bypass/bypass.h"
#include "common/bind.h"

namespace zk {

inline void bind_bypass(pybind11::module_& m) {
  m.def(
      "bypass_forward_cpu",
      [](uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t y, int64_t rows, int64_t channels, int dtype, int threads) {
        bypass_forward_cpu({pointer(a), pointer(b), pointer(c), pointer(y), rows, channels, DType(dtype), threads});
      },
      release_gil());
  m.def(
      "bypass_backward_cpu",
      [](uintptr_t g, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t da, uintptr_t db, uintptr_t dc,
         uintptr_t partials, int64_t rows, int64_t channels, int64_t parts, int dtype, int threads) {
        bypass_backward_cpu({pointer(g), pointer(a), pointer(b), pointer(c), pointer(da), pointer(db), pointer(dc),
                             pointer(partials), rows, channels, parts, DType(dtype), threads});
      },
      release_gil());
}

}  // namespace zk
