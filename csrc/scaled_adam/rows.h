// The parameters of an optimizer's group, their state and their gradients, as Python's objects: whether all are as they
// were, and where they lie. A step asks this of some thousand tensors, which are in no cache by then, so each is
// visited once. torch answers through DLPack's table of C functions, which is stable within a major version: nothing
// here knows torch. The structs in `dlpack` are that table's, under names of ours.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace zk {

namespace dlpack {

constexpr uint32_t major = 1;

struct Device {
  int32_t type, index;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  const int64_t* sizes;
  const int64_t* strides;
  uint64_t byte_offset;

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data) + byte_offset; }
};

struct Exchange {
  uint32_t major, minor;
  const Exchange* previous;
  void (*allocate)();
  void (*managed_of)();
  void (*object_of)();
  int (*view)(void* object, Tensor* out);  // null where a library has none; where it fails, Python has an error set
  void (*current_stream)();
};

}  // namespace dlpack

class AdamRows {
 public:
  // exchange: torch's `__dlpack_c_exchange_api__`. params: tensors. entries: of each a dict, which holds among others
  // the tensors `moments`, two names; a gradient has the strides of the first. plain: the classes of tensors whose
  // numbers stand in memory as torch's own do. is_negated: asks whether a tensor stands for its negative.
  AdamRows(const pybind11::capsule& exchange, pybind11::list params, pybind11::list entries,
           const pybind11::tuple& moments, pybind11::tuple plain, pybind11::object is_negated)
      : params_(std::move(params)),
        entries_(std::move(entries)),
        plain_(std::move(plain)),
        is_negated_(std::move(is_negated)),
        grad_(pybind11::str("grad")) {
    auto table = static_cast<const dlpack::Exchange*>(exchange.get_pointer());
    while (table && table->major != dlpack::major) table = table->previous;
    if (!table || !table->view) throw pybind11::value_error("exchange has no function that looks at tensors");
    view_ = table->view;
    for (size_t i = 0; i < params_.size(); ++i) {
      pybind11::dict entry = entries_[i];
      dlpack::Tensor p = seen(params_[i].ptr()), v = seen(pybind11::object(entry[moments[0]]).ptr());
      rows_.push_back({p.dtype, p.device, p.dims, dims_.size(), values_.size(), {}, {p.sizes}});
      for (const int64_t* dims : {p.sizes, p.strides, v.strides}) dims_.insert(dims_.end(), dims, dims + p.dims);
      for (auto [key, value] : entry) {
        for (size_t k : {0, 1}) {
          if (!key.equal(moments[k])) continue;
          dlpack::Tensor x = seen(value.ptr());
          rows_[i].moments[k] = {values_.size() - rows_[i].first_value, x.address()};
          rows_[i].near[1 + k] = x.sizes;
        }
        values_.append(value);
      }
    }
  }

  // Whether these are the parameters, with the same forms, and all entries hold the same objects, of which the moments
  // lie where they did. If so, writes the addresses of parameters and gradients; appends gradients, None where there is
  // none, and the places of those that have not their parameter's dtype and device or the moment's strides, or cannot
  // be read as they are. The address of what does not exist or cannot be read is 0.
  bool look(const pybind11::list& params, uintptr_t param_places, uintptr_t grad_places, pybind11::list grads,
            pybind11::list odd) const {
    if (params.size() != rows_.size()) return false;
    auto p_out = reinterpret_cast<int64_t*>(param_places), g_out = reinterpret_cast<int64_t*>(grad_places);
    for (size_t i = 0; i < rows_.size(); ++i) {
      prefetch(i);
      PyObject* p = PyList_GET_ITEM(params.ptr(), i);
      uintptr_t address = 0;
      if (p != PyList_GET_ITEM(params_.ptr(), i) || !holds(i)) return false;
      if (!has_form(p, rows_[i], param_strides, address)) return false;
      p_out[i] = int64_t(address);
      auto g = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(p, grad_.ptr()));
      if (!g) throw pybind11::error_already_set();
      address = 0;
      if (!g.is_none() && (!has_form(g.ptr(), rows_[i], grad_strides, address) || negated(g.ptr()))) {
        odd.append(i);
        address = 0;
      }
      g_out[i] = int64_t(address);
      grads.append(std::move(g));
    }
    return true;
  }

 private:
  struct Moment {
    size_t place;  // among the values of its entry
    uintptr_t address;
  };

  struct Row {
    dlpack::DataType dtype;
    dlpack::Device device;
    int32_t dims;
    size_t first;        // in dims_: sizes, the parameter's strides, a gradient's
    size_t first_value;  // in values_
    Moment moments[2];
    const int64_t* near[3];  // where the sizes of the three stood: within torch's objects, so worth fetching ahead
  };

  static constexpr int param_strides = 1, grad_strides = 2;

  // No heap of a process of 64 bits, or hardly any, has an address below this: such a tensor is looked into elsewhere.
  static constexpr uintptr_t lowest = uintptr_t(1) << 32;

  static constexpr size_t ahead = 8;

  void prefetch(size_t i) const {
    if (i + ahead >= rows_.size()) return;
    __builtin_prefetch(PyList_GET_ITEM(params_.ptr(), i + ahead));
    __builtin_prefetch(PyList_GET_ITEM(entries_.ptr(), i + ahead));
    for (const Moment& moment : rows_[i + ahead].moments) {
      __builtin_prefetch(PyList_GET_ITEM(values_.ptr(), rows_[i + ahead].first_value + moment.place));
    }
    for (const int64_t* sizes : rows_[i + ahead].near) {
      for (int line = -1; line <= 2; ++line) __builtin_prefetch(sizes + 8 * line);
    }
  }

  dlpack::Tensor seen(PyObject* object) const {
    dlpack::Tensor x{};
    if (!is_plain(object)) throw pybind11::type_error("tensors must be plain");
    if (view_(object, &x) != 0) throw pybind11::error_already_set();
    return x;
  }

  bool is_plain(PyObject* object) const {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(plain_.ptr()); ++i) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == PyTuple_GET_ITEM(plain_.ptr(), i)) return true;
    }
    return false;
  }

  // Whether the entry of row i holds what it did, and its moments lie where they did.
  bool holds(size_t i) const {
    PyObject *key, *value, *entry = PyList_GET_ITEM(entries_.ptr(), i);
    size_t next = rows_[i].first_value;
    size_t end = i + 1 < rows_.size() ? rows_[i + 1].first_value : values_.size();
    for (Py_ssize_t place = 0; PyDict_Next(entry, &place, &key, &value); ++next) {
      if (next == end || PyList_GET_ITEM(values_.ptr(), next) != value) return false;
    }
    if (next != end) return false;
    for (const Moment& moment : rows_[i].moments) {
      dlpack::Tensor x{};
      PyObject* object = PyList_GET_ITEM(values_.ptr(), rows_[i].first_value + moment.place);
      if (!is_plain(object) || !views(object, x) || x.address() != moment.address) return false;
    }
    return true;
  }

  bool views(PyObject* object, dlpack::Tensor& x) const {
    if (view_(object, &x) == 0) return true;
    PyErr_Clear();  // it is sparse, say, or wrapped by a transform
    return false;
  }

  bool has_form(PyObject* object, const Row& row, int strides_of, uintptr_t& address) const {
    dlpack::Tensor x{};
    if (!is_plain(object) || !views(object, x)) return false;
    if (x.dims != row.dims || std::memcmp(&x.dtype, &row.dtype, sizeof x.dtype) != 0 ||
        std::memcmp(&x.device, &row.device, sizeof x.device) != 0) {
      return false;
    }
    const int64_t *sizes = dims_.data() + row.first, *strides = sizes + strides_of * row.dims;
    bool empty = false;
    for (int32_t k = 0; k < x.dims; ++k) {  // no element lies elsewhere for the stride of an axis of one
      if (x.sizes[k] != sizes[k] || (sizes[k] != 1 && x.strides[k] != strides[k])) return false;
      empty = empty || sizes[k] == 0;
    }
    address = x.address();
    return address >= lowest || empty;
  }

  bool negated(PyObject* object) const {
    auto answer = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallOneArg(is_negated_.ptr(), object));
    if (!answer) throw pybind11::error_already_set();
    return answer.ptr() != Py_False;
  }

  pybind11::list params_, entries_, values_;
  pybind11::tuple plain_;
  pybind11::object is_negated_;
  pybind11::str grad_;
  int (*view_)(void*, dlpack::Tensor*);
  std::vector<Row> rows_;
  std::vector<int64_t> dims_;
};

// Whether the values of a dict are these objects.
inline bool same_values(const pybind11::dict& dict, const pybind11::list& values) {
  Py_ssize_t next = 0, count = PyList_GET_SIZE(values.ptr());
  PyObject *key, *value;
  for (Py_ssize_t place = 0; PyDict_Next(dict.ptr(), &place, &key, &value); ++next) {
    if (next == count || PyList_GET_ITEM(values.ptr(), next) != value) return false;
  }
  return next == count;
}

inline void bind_rows(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<AdamRows>(m, "AdamRows", py::module_local())  // the emulator's module has one of its own
      .def(py::init<const py::capsule&, py::list, py::list, const py::tuple&, py::tuple, py::object>())
      .def("look", &AdamRows::look);
  m.def("same_values", same_values);
}

}  // namespace zk
