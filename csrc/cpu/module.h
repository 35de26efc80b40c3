// Every kernel file binds itself to Python at its foot:  FASTFLOW_BIND(coupling) { m.def("coupling_fwd", ...); }
#pragma once

#include <pybind11/pybind11.h>

namespace fastflow {

struct Binding {
  using Bind = void (*)(pybind11::module_&);
  Bind bind;
  Binding* next;
  inline static Binding* first = nullptr;
  explicit Binding(Bind f) : bind(f), next(first) { first = this; }
};

}  // namespace fastflow

#define FASTFLOW_BIND(family)                                      \
  static void bind_##family(pybind11::module_& m);                 \
  static const fastflow::Binding register_##family{bind_##family}; \
  static void bind_##family([[maybe_unused]] pybind11::module_& m)
