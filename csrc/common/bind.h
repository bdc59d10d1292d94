// How arguments come from Python. Tensors arrive as addresses: nothing here knows torch.
//
// An entry point takes the fields of its struct (ZK_FIELDS), in their order or by name, and all of them. A struct
// within another comes as a tuple, which in Python is a NamedTuple of the same names; `fields` of the module lists
// them.
//
// Bindings are headers, all included by bindings.cpp: pybind11 takes longer to compile than all that they add to it.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace zk {

inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// "x", "frame" of "x, shape.frame".
inline pybind11::tuple names_of(std::string listed) {
  pybind11::list names;
  for (size_t begin = 0; begin < listed.size();) {
    size_t end = std::min(listed.find(", ", begin), listed.size());
    std::string name = listed.substr(begin, end - begin);
    name = name.substr(name.rfind('.') + 1);
    names.append(pybind11::reinterpret_steal<pybind11::object>(PyUnicode_InternFromString(name.c_str())));
    begin = end + 2;
  }
  return pybind11::tuple(names);
}

template <class T, class = void>
struct has_fields : std::false_type {};
template <class T>
struct has_fields<T, std::void_t<decltype(T::field_names())>> : std::true_type {};

template <class T>
void read(PyObject* from, std::vector<T>& to);

// Throws pybind11::error_already_set, a TypeError, where `from` is something else.
template <class T>
void read(PyObject* from, T& to) {
  if constexpr (has_fields<T>::value) {
    auto fields = to.fields();
    constexpr Py_ssize_t count = std::tuple_size_v<decltype(fields)>;
    if (!PyTuple_Check(from) || PyTuple_GET_SIZE(from) != count) {
      throw pybind11::type_error(std::string("wanted a tuple of ") + T::field_names());
    }
    Py_ssize_t i = 0;
    std::apply([&](auto&... field) { (read(PyTuple_GET_ITEM(from, i++), field), ...); }, fields);
  } else if constexpr (std::is_pointer_v<T>) {
    to = static_cast<T>(PyLong_AsVoidPtr(from));
  } else if constexpr (std::is_floating_point_v<T>) {
    to = T(PyFloat_AsDouble(from));
  } else {
    to = T(PyLong_AsLongLong(from));  // numbers, bool, enums
  }
  if (PyErr_Occurred()) throw pybind11::error_already_set();
}

template <class T>
void read(PyObject* from, std::vector<T>& to) {
  auto items = pybind11::reinterpret_borrow<pybind11::sequence>(from);
  for (size_t i = 0; i < items.size(); ++i) {
    pybind11::object item = items[i];
    read(item.ptr(), to.emplace_back());
  }
}

// Fills all of `fields`, the first from `given`, the others from `named`.
template <class Fields>
void read_arguments(const pybind11::tuple& names, const pybind11::args& given, const pybind11::kwargs& named,
                    Fields fields) {
  Py_ssize_t i = 0, places = PyTuple_GET_SIZE(given.ptr());
  auto next = [&](auto& field) {
    PyObject* name = PyTuple_GET_ITEM(names.ptr(), i);
    PyObject* value = i < places ? PyTuple_GET_ITEM(given.ptr(), i) : PyDict_GetItemWithError(named.ptr(), name);
    if (!value) throw pybind11::type_error("the argument " + std::string(pybind11::str(name)) + " is missing");
    read(value, field);
    ++i;
  };
  std::apply([&](auto&... field) { (next(field), ...); }, fields);
  if (places + PyDict_GET_SIZE(named.ptr()) != PyTuple_GET_SIZE(names.ptr())) {
    throw pybind11::type_error("wanted the arguments " + std::string(pybind11::str(names)));
  }
}

// Adds the names of a struct, or of an entry point's arguments, to `fields` of the module.
inline pybind11::tuple add_fields(pybind11::module_& m, const std::string& name, const std::string& listed) {
  if (!hasattr(m, "fields")) m.attr("fields") = pybind11::dict();
  pybind11::tuple names = names_of(listed);
  m.attr("fields")[pybind11::str(name)] = names;
  return names;
}

// Adds the names of a struct that stands within others.
template <class T>
void bind_struct(pybind11::module_& m, const char* name) {
  add_fields(m, name, T::field_names());
}

// A kernel on the CPU; its last argument is the number of threads.
template <class Args>
void bind_cpu(pybind11::module_& m, const char* name, void (*run)(const Args&)) {
  pybind11::tuple names = add_fields(m, name, Args::field_names() + std::string(", threads"));
  m.def(name, [run, names](const pybind11::args& given, const pybind11::kwargs& named) {
    Args args{};
    read_arguments(names, given, named, std::tuple_cat(args.fields(), std::tie(args.threads)));
    pybind11::gil_scoped_release released;
    run(args);
  });
}

// A kernel on the GPU; its last argument is the stream.
template <class Args>
void bind_cuda(pybind11::module_& m, const char* name, void (*run)(const Args&, void*)) {
  pybind11::tuple names = add_fields(m, name, Args::field_names() + std::string(", stream"));
  m.def(name, [run, names](const pybind11::args& given, const pybind11::kwargs& named) {
    Args args{};
    void* stream = nullptr;
    read_arguments(names, given, named, std::tuple_cat(args.fields(), std::tie(stream)));
    run(args, stream);
  });
}

}  // namespace zk
