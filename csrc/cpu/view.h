// A view is what a kernel knows of a tensor: where it lies, its strides and its type.
// Tensors have the shape [B, C, S]: batch, channels, and all positions of a channel as one dimension.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastflow {

enum class DType : int { f32, f64, bf16, f16, i64 };

struct View {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t size[3] = {1, 1, 1};
  int64_t stride[3] = {0, 0, 0};   // in elements
  const int64_t* index = nullptr;  // channel c lies at index[c] where given

  explicit operator bool() const { return data != nullptr; }

  int64_t itemsize() const { return dtype == DType::f64 || dtype == DType::i64 ? 8 : dtype == DType::f32 ? 4 : 2; }
  int64_t offset(int64_t b, int64_t c, int64_t s) const {
    return b * stride[0] + (index ? index[c] : c) * stride[1] + s * stride[2];
  }

  // channels start, start + step, ... : `count` of them
  View channels(int64_t start, int64_t count, int64_t step = 1) const {
    View v = *this;
    if (start < 0 || count < 0 || (count > 0 && start + (count - 1) * step >= size[1]))
      throw std::invalid_argument("channels [" + std::to_string(start) + ", +" + std::to_string(count) +
                                  ") reach outside a tensor of " + std::to_string(size[1]) + " channels");
    v.data += start * stride[1] * itemsize();
    v.stride[1] *= step;
    v.size[1] = count;
    return v;
  }

  View gather(const int64_t* channel, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      if (channel[i] < 0 || channel[i] >= size[1])
        throw std::invalid_argument("channel index " + std::to_string(channel[i]) + " reaches outside a tensor of " +
                                    std::to_string(size[1]) + " channels");
    View v = *this;
    v.index = channel;
    v.size[1] = count;
    return v;
  }

  // the same value at every [b, c, s] of a dimension that has size 1
  View expand(const int64_t* shape) const {
    View v = *this;
    for (int d = 0; d < 3; ++d) {
      if (v.size[d] == shape[d]) continue;
      if (v.size[d] != 1)
        throw std::invalid_argument("a tensor of size " + std::to_string(v.size[d]) + " in dimension " +
                                    std::to_string(d) + " does not match " + std::to_string(shape[d]));
      v.size[d] = shape[d];
      v.stride[d] = 0;
    }
    return v;
  }
};

// element [i, j, k] of a view without an index
template <class T>
T& at(const View& v, int64_t i = 0, int64_t j = 0, int64_t k = 0) {
  return reinterpret_cast<T*>(v.data)[i * v.stride[0] + j * v.stride[1] + k * v.stride[2]];
}

// The torch dtypes in the order of DType; handed over once by fastflow/ops/cpu.py.
inline PyObject* dtype_objects[5] = {};

}  // namespace fastflow

namespace pybind11::detail {

// Reads data_ptr(), dtype, shape and stride() of a tensor; None becomes a null view.
template <>
struct type_caster<fastflow::View> {
  PYBIND11_TYPE_CASTER(fastflow::View, const_name("Tensor"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    static PyObject* names[5] = {PyUnicode_InternFromString("data_ptr"), PyUnicode_InternFromString("dtype"),
                                 PyUnicode_InternFromString("shape"), PyUnicode_InternFromString("stride"),
                                 PyUnicode_InternFromString("is_cpu")};
    const auto is_cpu = reinterpret_steal<object>(PyObject_GetAttr(source.ptr(), names[4]));
    if (!is_cpu) throw error_already_set();
    if (is_cpu.ptr() != Py_True) throw type_error("the CPU kernels take tensors on the CPU only");
    const auto dtype = reinterpret_steal<object>(PyObject_GetAttr(source.ptr(), names[1]));
    int code = 0;
    while (code < 5 && fastflow::dtype_objects[code] != dtype.ptr()) ++code;
    if (code == 5) throw type_error("the CPU kernels have no dtype " + std::string(str(dtype)));
    value.dtype = static_cast<fastflow::DType>(code);

    const auto shape = reinterpret_steal<object>(PyObject_GetAttr(source.ptr(), names[2]));
    const auto stride = reinterpret_steal<object>(PyObject_CallMethodNoArgs(source.ptr(), names[3]));
    const auto pointer = reinterpret_steal<object>(PyObject_CallMethodNoArgs(source.ptr(), names[0]));
    if (!shape || !stride || !pointer) throw error_already_set();
    value.data = reinterpret_cast<char*>(PyLong_AsSize_t(pointer.ptr()));

    const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
    const auto at = [](const object& tuple, Py_ssize_t i) {
      return static_cast<int64_t>(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i)));
    };
    bool empty = false;
    for (Py_ssize_t i = 0; i < dims; ++i) empty |= at(shape, i) == 0;
    for (Py_ssize_t i = 0; i < dims && i < 2; ++i) {
      value.size[i] = at(shape, i);
      value.stride[i] = at(stride, i);
    }
    // positions collapse into one dimension from the last to the third
    for (Py_ssize_t i = dims - 1; i >= 2; --i) {
      const int64_t n = at(shape, i), step = at(stride, i);
      if (n == 1) continue;
      if (value.size[2] == 1)
        value.stride[2] = step;
      else if (step != value.stride[2] * value.size[2] && !empty)
        throw value_error("the positions of this tensor do not collapse into one dimension");
      value.size[2] *= n;
    }
    // an empty or never-read tensor has no address: give it one so that it differs from None
    static char nothing;
    if (value.data == nullptr) {
      if (!empty) throw value_error("a tensor without storage");
      value.data = &nothing;
    }
    return true;
  }
};

}  // namespace pybind11::detail
