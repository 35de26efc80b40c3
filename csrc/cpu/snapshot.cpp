// A copy of some tensors that tells whether they still hold the same bits: the key of a cache that cannot be stale.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "module.h"
#include "view.h"

namespace fastflow {
namespace {

class Snapshot {
 public:
  explicit Snapshot(const std::vector<View>& tensors) : shapes_(tensors) {
    size_t total = 0;
    for (const View& v : tensors) total += bytes_of(v);
    bytes_.reserve(total);
    for (const View& v : tensors) {
      const size_t start = bytes_.size();
      bytes_.resize(start + bytes_of(v));
      each_piece(v, [&](const char* data, size_t place, size_t n) { std::memcpy(&bytes_[start + place], data, n); });
    }
  }

  bool matches(const std::vector<View>& tensors) const {
    if (tensors.size() != shapes_.size()) return false;
    size_t start = 0;
    for (size_t k = 0; k < tensors.size(); ++k) {
      const View& v = tensors[k];
      const View& saved = shapes_[k];
      if (v.dtype != saved.dtype || !std::equal(v.size, v.size + 3, saved.size)) return false;
      bool same = true;
      each_piece(v, [&](const char* data, size_t place, size_t n) {
        same = same && std::memcmp(&bytes_[start + place], data, n) == 0;
      });
      if (!same) return false;
      start += bytes_of(v);
    }
    return true;
  }

 private:
  static size_t bytes_of(const View& v) { return v.size[0] * v.size[1] * v.size[2] * v.itemsize(); }

  // f(address, place in the copy, bytes) over the contiguous pieces of a tensor
  template <class F>
  static void each_piece(const View& v, const F& f) {
    const int64_t item = v.itemsize();
    const bool row = v.size[2] == 1 || v.stride[2] == 1;
    const bool block = row && (v.size[1] == 1 || (v.size[2] == 1 ? v.stride[1] == 1 : v.stride[1] == v.size[2]));
    const int64_t inner = v.size[1] * v.size[2];
    if (inner == 0 || v.size[0] == 0) return;
    if (block && (v.size[0] == 1 || v.stride[0] == inner)) return f(v.data, 0, bytes_of(v));
    for (int64_t i = 0; i < v.size[0]; ++i) {
      if (block) {
        f(v.data + v.offset(i, 0, 0) * item, i * inner * item, inner * item);
        continue;
      }
      for (int64_t j = 0; j < v.size[1]; ++j)
        for (int64_t k = 0; k < v.size[2]; ++k)
          f(v.data + v.offset(i, j, k) * item, ((i * v.size[1] + j) * v.size[2] + k) * item, item);
    }
  }

  std::vector<View> shapes_;  // only type and size are looked at
  std::vector<char> bytes_;
};

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(snapshot) {
  using namespace fastflow;
  namespace py = pybind11;
  py::class_<Snapshot>(m, "Snapshot", py::module_local())
      .def(py::init<const std::vector<View>&>())
      .def("matches", &Snapshot::matches, py::call_guard<py::gil_scoped_release>());
}
