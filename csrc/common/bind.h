// What the bindings of every op share. Tensors arrive as addresses: nothing here knows torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace zk {

using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;

inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace zk
