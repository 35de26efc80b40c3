// ActNorm on the CPU: y = (x + b) e^a or x = y e^-a - b, one scale and one shift for every channel, in one pass.
// Bound by memory bandwidth. Saved for backward: the inputs.
#include <algorithm>
#include <vector>

#include "module.h"
#include "rows.h"

namespace fastflow {
namespace {

constexpr int64_t kPartials = 16;  // partial sums of the parameters' gradients

// One number for every channel, as a view that repeats it at every position.
template <class T>
struct PerChannel {
  std::vector<T> values;

  PerChannel(const View& v, int64_t channels) : values(channels) {
    with_type(v.dtype, [&](auto type) {
      const auto* data = reinterpret_cast<const decltype(type)*>(v.data);
      for (int64_t c = 0; c < channels; ++c) values[c] = T(widen(data[c * v.stride[0]]));
    });
  }

  View view(const View& like) {
    View v;
    v.data = reinterpret_cast<char*>(values.data());
    v.dtype = dtype_of<T>();
    std::copy(like.size, like.size + 3, v.size);
    v.stride[1] = 1;
    return v;
  }
};

template <class T>
PerChannel<T> factors(const View& log_scale, int64_t channels, T gain) {
  PerChannel<T> made(log_scale, channels);
  for (T& value : made.values) value = exp(gain * value);
  return made;
}

template <bool add_first, class T>
void forward_loop(const T* x, const T* scale, const T* shift, T* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = add_first ? (x[i] + shift[i]) * scale[i] : x[i] * scale[i] - shift[i];
}

template <class T>
void backward_loop(const T* x, const T* scale, const T* shift, const T* gy, T* gx, T* product, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T g = gy[i];
    product[i] = g * (x[i] + shift[i]);
    gx[i] = g * scale[i];
  }
}

// sums[c] += the box's values of channel c
template <class T>
void add_channels(const Walk& walk, const Box& box, const T* values, double* sums) {
  for (int64_t r = 0; r < box.nb * box.no; ++r) {
    const T* row = values + r * box.ni;
    if (walk.channels_inner()) {
#pragma omp simd
      for (int64_t i = 0; i < box.ni; ++i) sums[box.i + i] += double(row[i]);
    } else {
      sums[box.o + r % box.no] += ordered_sum(row, box.ni);
    }
  }
}

template <class T>
void forward(const View& x, const View& log_scale, const View& bias, const View& running, const View& y,
             const View& logdet, double gain, bool inverse) {
  const int64_t channels = x.size[1];
  PerChannel<T> scale = factors(log_scale, channels, T(inverse ? -gain : gain)), shift(bias, channels);
  const View scales = scale.view(x), shifts = shift.view(x);
  const Walk walk(x.size[0], channels, x.size[2], x);
  for_boxes(walk, [&](const Box& box, int64_t) {
    T bx[kTile], bs[kTile], bt[kTile], by[kTile];
    const T *from = load(x, walk, box, bx), *m = load(scales, walk, box, bs), *t = load(shifts, walk, box, bt);
    T* to = target(y, walk, box, by);
    with_bool(!inverse, [&](auto add_first) { forward_loop<add_first()>(from, m, t, to, box.size()); });
    commit(y, walk, box, to, by);
  });
  double total = 0;
  for (const T a : PerChannel<T>(log_scale, channels).values) total += double(a);
  total *= (inverse ? -gain : gain) * double(x.size[2]);
  for (int64_t b = 0; b < x.size[0]; ++b) {
    const T start = running ? reinterpret_cast<const T*>(running.data)[b * running.stride[0]] : T(0);
    reinterpret_cast<T*>(logdet.data)[b * logdet.stride[0]] = T(double(start) + total);
  }
}

template <class T>
void backward(const View& x, const View& log_scale, const View& bias, const View& gy, const View& glogdet,
              const View& gx, const View& glog_scale, const View& gbias, double gain, bool inverse) {
  const int64_t channels = x.size[1];
  PerChannel<T> scale = factors(log_scale, channels, T(inverse ? -gain : gain)), shift(bias, channels);
  if (inverse) std::fill(shift.values.begin(), shift.values.end(), T(0));
  const View scales = scale.view(x), shifts = shift.view(x);
  const Walk walk(x.size[0], channels, x.size[2], x);
  // a share of the boxes has its own sums: their order does not depend on the threads
  const int64_t boxes = walk.boxes(), shares = std::min(kPartials, boxes);
  std::vector<double> sums(shares * 2 * channels);  // of gy and of gy (x + b)
  parallel_for(shares, walk.elements() >= kParallelElements, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t k = boxes * p / shares; k < boxes * (p + 1) / shares; ++k) {
        const Box box = walk.box(k);
        T bx[kTile], bs[kTile], bt[kTile], bg[kTile], bo[kTile], product[kTile];
        const T *from = load(x, walk, box, bx), *m = load(scales, walk, box, bs), *t = load(shifts, walk, box, bt);
        const T* g = load(gy, walk, box, bg);
        T* to = target(gx, walk, box, bo);
        backward_loop(from, m, t, g, to, product, box.size());
        commit(gx, walk, box, to, bo);
        add_channels(walk, box, g, &sums[p * 2 * channels]);
        add_channels(walk, box, product, &sums[(p * 2 + 1) * channels]);
      }
  });
  double total = 0;
  for (int64_t b = 0; b < x.size[0]; ++b)
    total += double(reinterpret_cast<const T*>(glogdet.data)[b * glogdet.stride[0]]);
  total *= double(x.size[2]);
  with_type(glog_scale.dtype, [&](auto type) {
    using S = decltype(type);
    if constexpr (sizeof(S) >= 4)
      for (int64_t c = 0; c < channels; ++c) {
        double g = 0, product = 0;
        for (int64_t p = 0; p < shares; ++p)
          g += sums[p * 2 * channels + c], product += sums[(p * 2 + 1) * channels + c];
        const double m = double(scale.values[c]);
        reinterpret_cast<S*>(glog_scale.data)[c] = S((inverse ? -gain : gain) * (m * product + total));
        reinterpret_cast<S*>(gbias.data)[c] = S(inverse ? -g : m * g);
      }
  });
}

// --- what Python sees -------------------------------------------------------------------------------

void actnorm_fwd(const View& x, const View& log_scale, const View& bias, const View& running, const View& y,
                 const View& logdet, double gain, bool inverse) {
  with_accumulator(x.dtype,
                   [&](auto type) { forward<decltype(type)>(x, log_scale, bias, running, y, logdet, gain, inverse); });
}

void actnorm_bwd(const View& x, const View& log_scale, const View& bias, const View& gy, const View& glogdet,
                 const View& gx, const View& glog_scale, const View& gbias, double gain, bool inverse) {
  with_accumulator(x.dtype, [&](auto type) {
    backward<decltype(type)>(x, log_scale, bias, gy, glogdet, gx, glog_scale, gbias, gain, inverse);
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(actnorm) {
  using namespace fastflow;
  namespace py = pybind11;
  m.def("actnorm_fwd", &actnorm_fwd, py::call_guard<py::gil_scoped_release>());
  m.def("actnorm_bwd", &actnorm_bwd, py::call_guard<py::gil_scoped_release>());
}
