// Rows of observations: are they as they should be, and which steps lead from one to the next. One pass each over what
// fastflow/nn/observations.py and fastflow/nn/clock.py say in a few dozen small operations.
#include <cmath>
#include <cstdint>

#include "module.h"
#include "rows.h"
#include "view.h"

namespace fastflow {
namespace {

template <class T>
const T* read(const View& v) {
  return reinterpret_cast<const T*>(v.data);
}

template <class T>
T* made(const View& v) {
  return reinterpret_cast<T*>(v.data);
}

template <class T>
bool all_finite(const T* p, int64_t n) {
  T sum = T(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += p[i] - p[i];  // 0 or NaN
  return sum == T(0);
}

// offsets [B + 1] rise from 0 to the number of rows
bool rise(const int64_t* offsets, int64_t series, int64_t rows) {
  for (int64_t b = 0; b < series; ++b)
    if (offsets[b] > offsets[b + 1]) return false;
  return offsets[0] == 0 && offsets[series] == rows;
}

// True where all is well; then `clean` [N, D] has the values, and zeros for what is missing.
bool observations_check(const View& offsets, const View& times, const View& values, const View& masks,
                        const View& covariates, const View& clean) {
  const int64_t series = offsets.size[0] - 1, rows = values.size[0], channels = values.size[1];
  const int64_t* first = read<int64_t>(offsets);
  const double* at = read<double>(times);
  if (!rise(first, series, rows) || !all_finite(at, rows)) return false;
  for (int64_t b = 0; b < series; ++b)
    for (int64_t r = first[b]; r < first[b + 1]; ++r)
      if (!(r == first[b] ? at[r] >= 0 : at[r] > at[r - 1])) return false;
  bool good = true;
  with_accumulator(values.dtype, [&](auto type) {
    using T = decltype(type);
    const T *from = read<T>(values), *mask = read<T>(masks);
    T *to = made<T>(clean), sum = T(0);
    int64_t strange = 0;
#pragma omp simd reduction(+ : sum, strange)
    for (int64_t i = 0; i < rows * channels; ++i) {
      const T v = mask[i] == T(0) ? T(0) : from[i];
      strange += !(mask[i] == T(0) || mask[i] == T(1) || mask[i] == T(2));
      sum += v - v;
      to[i] = v;
    }
    good = strange == 0 && sum == T(0) && all_finite(read<T>(covariates), series * covariates.size[1]);
  });
  return good;
}

// Of rows that have been checked: counts and sizes [N + B] of the steps before each and, for every series, from its
// last to the horizon, where every gap is cut into equal steps (step 0: is one interval); does the row jump [N], and
// which channels are seen there [N, D].
bool observations_steps(const View& offsets, const View& times, const View& masks, double step, double horizon,
                        double tolerance, const View& counts, const View& sizes, const View& jumps, const View& seen) {
  const int64_t series = offsets.size[0] - 1, rows = masks.size[0], channels = masks.size[1];
  const int64_t* first = read<int64_t>(offsets);
  const double* at = read<double>(times);
  int64_t* count = made<int64_t>(counts);
  double* size = made<double>(sizes);
  double most = 0;
  const auto cut = [=, &most](double gap, int64_t segment) {
    const double wanted = gap > 0 ? step > 0 ? std::fmax(1.0, std::ceil(gap / step - tolerance)) : 1.0 : 0.0;
    most = std::fmax(most, wanted);
    count[segment] = int64_t(wanted), size[segment] = gap / std::fmax(1.0, wanted);
  };
  for (int64_t b = 0; b < series; ++b) {
    double last = 0;
    for (int64_t r = first[b]; r < first[b + 1]; last = at[r++]) cut(at[r] - last, r);
    cut(std::fmax(0.0, horizon - last), rows + b);
  }
  if (most >= 2147483648.0) return false;
  with_accumulator(masks.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t r = 0; r < rows; ++r) {
      const T* mask = read<T>(masks) + r * channels;
      T* to = made<T>(seen) + r * channels;
      bool observed = false, target = false;
      for (int64_t d = 0; d < channels; ++d) {
        observed |= mask[d] == T(1), target |= mask[d] == T(2);
        to[d] = T(mask[d] == T(1));
      }
      made<int64_t>(jumps)[r] = observed || !target;
    }
  });
  return true;
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(observations) {
  m.def("observations_check", &fastflow::observations_check);
  m.def("observations_steps", &fastflow::observations_steps);
}
