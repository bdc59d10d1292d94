// What the bindings of every op share. Tensors arrive as addresses: nothing here knows torch.
//
// Bindings are headers, all included by bindings.cpp: pybind11 takes longer to compile than all that they add to it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

namespace zk {

using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;

inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace zk
