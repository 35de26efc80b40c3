// What surrounds the layers of a trace: rows [B, 1 + S, D], every sample's value and then its S tangents, from x and
// the probes, and value and trace from the last layer's rows. Without probes the signs are made where they are used.
#include <cstdint>
#include <stdexcept>

#include "../philox.h"
#include "module.h"
#include "parallel.h"
#include "rows.h"
#include "view.h"

namespace fastflow {
namespace {

// e[s, b, d]: given, or a sign
template <class T>
struct Probes {
  View given;
  uint64_t seed;
  int64_t samples, width;

  T operator()(int64_t s, int64_t b, int64_t d) const {
    return given ? at<T>(given, s, b, d) : sign<T>(seed, uint64_t((s * samples + b) * width + d));
  }
};

// f(probes, sample b) in parallel; rows [B, 1 + S, D]
template <class T, class F>
void each_sample(const View& rows, const View& probes, int64_t seed, const F& f) {
  const Probes<T> e = {probes, uint64_t(seed), rows.size[0], rows.size[2]};
  const int64_t elements = rows.size[0] * rows.size[1] * rows.size[2];
  parallel_for(rows.size[0], elements >= kParallelElements, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(e, b);
  });
}

// rows[b] = x[b], then e[:, b]
void trace_rows(const View& x, const View& probes, int64_t seed, const View& rows) {
  with_accumulator(x.dtype, [&](auto type) {
    using T = decltype(type);
    each_sample<T>(rows, probes, seed, [&](const Probes<T>& e, int64_t b) {
      for (int64_t d = 0; d < rows.size[2]; ++d) at<T>(rows, b, 0, d) = at<T>(x, b, d);
      for (int64_t s = 0; s + 1 < rows.size[1]; ++s)
        for (int64_t d = 0; d < rows.size[2]; ++d) at<T>(rows, b, 1 + s, d) = e(s, b, d);
    });
  });
}

// g[b] = gvalue[b], then gtrace[:, b] e[:, b]
void trace_rows_bwd(const View& gvalue, const View& gtrace, const View& probes, int64_t seed, const View& g) {
  with_accumulator(g.dtype, [&](auto type) {
    using T = decltype(type);
    each_sample<T>(g, probes, seed, [&](const Probes<T>& e, int64_t b) {
      for (int64_t d = 0; d < g.size[2]; ++d) at<T>(g, b, 0, d) = at<T>(gvalue, b, d);
      for (int64_t s = 0; s + 1 < g.size[1]; ++s)
        for (int64_t d = 0; d < g.size[2]; ++d) at<T>(g, b, 1 + s, d) = at<T>(gtrace, s, b) * e(s, b, d);
    });
  });
}

// value = last[:, 0] + bias, trace[s, b] = last[b, 1 + s] . e[s, b]
void trace_contract(const View& last, const View& bias, const View& probes, int64_t seed, const View& value,
                    const View& trace) {
  with_accumulator(last.dtype, [&](auto type) {
    using T = decltype(type);
    each_sample<T>(last, probes, seed, [&](const Probes<T>& e, int64_t b) {
      for (int64_t d = 0; d < last.size[2]; ++d) at<T>(value, b, d) = at<T>(last, b, 0, d) + at<T>(bias, d);
      for (int64_t s = 0; s + 1 < last.size[1]; ++s) {
        double sum = 0;
        for (int64_t d = 0; d < last.size[2]; ++d) sum += double(at<T>(last, b, 1 + s, d)) * e(s, b, d);
        at<T>(trace, s, b) = T(sum);
      }
    });
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(trace_rows) {
  using namespace fastflow;
  const auto release = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("trace_rows", &trace_rows, release);
  m.def("trace_rows_bwd", &trace_rows_bwd, release);
  m.def("trace_contract", &trace_contract, release);
}
