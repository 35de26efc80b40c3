// The Python module of one CPU library. The sources are built once for every instruction set; FASTFLOW_MODULE
// names the build.
#include "module.h"

#include "parallel.h"
#include "view.h"

namespace py = pybind11;

PYBIND11_MODULE(FASTFLOW_MODULE, m, py::mod_gil_not_used()) {
  m.def("set_dtypes", [](py::args dtypes) {
    if (dtypes.size() != 5) throw py::value_error("expected float32, float64, bfloat16, float16, int64");
    for (int i = 0; i < 5; ++i) fastflow::dtype_objects[i] = py::object(dtypes[i]).release().ptr();
  });
  m.def("threads", [] { return fastflow::openmp().found() ? fastflow::openmp().max_threads() : 1; });
  m.def("has_openmp", [] { return fastflow::openmp().found(); });
  for (auto* binding = fastflow::Binding::first; binding; binding = binding->next) binding->bind(m);
}
