// Loops over [B, C, S] tensors of any strides and types.
// A tensor is walked in boxes of up to kTile elements. load() gives a box as contiguous accumulator values: the
// tensor's own memory where it already lies so, a copy in L1 otherwise. The arithmetic therefore always runs over
// contiguous float or double arrays and vectorises, whatever the layout: split channels, interleaved parameters,
// channels_last, half precision, broadcast.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../half.h"
#include "../math.h"
#include "parallel.h"
#include "view.h"

namespace fastflow {

constexpr int64_t kTile = 1024;              // elements of a box
constexpr int64_t kMinRow = 128;             // shorter rows are packed several to a box
constexpr int64_t kParallelElements = 8192;  // below this a second thread costs more than it gives

// --- the walk ---------------------------------------------------------------------------------------

struct Box {
  int64_t b, nb, o, no, i, ni;  // samples, outer and inner positions: first and count
  int64_t size() const { return nb * no * ni; }
};

// The order in which a [B, C, S] tensor is walked: along its positions, or along its channels if those are closer.
class Walk {
 public:
  Walk(int64_t samples, int64_t channels, int64_t positions, const View& leader) : samples_(samples) {
    channels_inner_ = positions == 1 || (leader.stride[1] < leader.stride[2] && channels > 1);
    outer_ = channels_inner_ ? positions : channels;
    inner_ = channels_inner_ ? channels : positions;
    const int64_t n = outer_ * inner_;
    if (inner_ >= kMinRow) {
      rows_ = 1, row_ = std::min(inner_, kTile);
    } else if (n >= kMinRow) {
      rows_ = std::max<int64_t>(1, kTile / std::max<int64_t>(1, inner_)), row_ = inner_;
    } else {
      rows_ = outer_, row_ = inner_, group_ = n > 0 ? std::max<int64_t>(1, kTile / n) : 1;
    }
    pieces_ = n == 0 ? 0 : row_ < inner_ ? (inner_ + row_ - 1) / row_ : 1;
    per_sample_ = n == 0 ? 0 : ((outer_ + rows_ - 1) / rows_) * pieces_;
  }

  int64_t boxes() const { return (samples_ + group_ - 1) / group_ * per_sample_; }
  int64_t per_sample() const { return per_sample_; }  // boxes of one sample (or of one group of samples)
  int64_t elements() const { return samples_ * outer_ * inner_; }
  int64_t group() const { return group_; }  // samples in a box: above 1 only if per_sample() is 1
  bool channels_inner() const { return channels_inner_; }

  Box box(int64_t k) const {
    const int64_t g = k / per_sample_, r = k % per_sample_;
    const int64_t o = r / pieces_ * rows_, i = r % pieces_ * row_;
    return {g * group_, std::min(group_, samples_ - g * group_),
            o,          std::min(rows_, outer_ - o),
            i,          std::min(row_, inner_ - i)};
  }

  struct Strides {
    int64_t b, o, i;
  };
  Strides strides(const View& v) const {
    return channels_inner_ ? Strides{v.stride[0], v.stride[2], v.stride[1]}
                           : Strides{v.stride[0], v.stride[1], v.stride[2]};
  }
  int64_t offset(const View& v, int64_t b, int64_t o, int64_t i) const {
    return channels_inner_ ? v.offset(b, i, o) : v.offset(b, o, i);
  }
  // does the box lie in memory one element after the other?
  bool contiguous(const View& v, const Box& box) const {
    const Strides s = strides(v);
    if (v.index && (channels_inner_ || box.no > 1)) return false;
    return (box.ni == 1 || s.i == 1) && (box.no == 1 || s.o == box.ni) && (box.nb == 1 || s.b == box.no * box.ni);
  }

 private:
  int64_t samples_, outer_, inner_, rows_, row_, group_ = 1, pieces_, per_sample_;
  bool channels_inner_;
};

// --- load and store ---------------------------------------------------------------------------------

// copy(element, position in the box) over one run; long runs of stride 1 or 2 vectorise, short ones go by fours
template <class S, class Copy>
inline void run(S* p, int64_t stride, int64_t k, int64_t n, const Copy& copy) {
  int64_t i = 0;
  if (stride == 1 && n >= 32) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) copy(p[j], k + j);
  } else if (stride == 2 && n >= 32) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) copy(p[2 * j], k + j);
  } else if (stride == 1) {
    for (; i + 4 <= n; i += 4)
#pragma omp simd
      for (int64_t j = 0; j < 4; ++j) copy(p[i + j], k + i + j);
    for (; i < n; ++i) copy(p[i], k + i);
  } else {
    for (; i < n; ++i) copy(p[i * stride], k + i);
  }
}

template <class S, class Copy>
void each_run(const View& v, const Walk& walk, const Box& box, const Copy& copy) {
  S* data = reinterpret_cast<S*>(v.data);
  const auto s = walk.strides(v);
  if (v.index && walk.channels_inner()) {
    int64_t k = 0;
    for (int64_t b = box.b; b < box.b + box.nb; ++b)
      for (int64_t o = box.o; o < box.o + box.no; ++o)
        for (int64_t i = box.i; i < box.i + box.ni; ++i) copy(data[walk.offset(v, b, o, i)], k++);
    return;
  }
  // rows that follow one another at the stride of a row are one run
  const bool rows_join = !v.index && s.o == s.i * box.ni;
  const int64_t rows = rows_join ? 1 : box.no, n = rows_join ? box.no * box.ni : box.ni;
  const bool samples_join = rows_join && s.b == s.i * n;
  const int64_t samples = samples_join ? 1 : box.nb, length = samples_join ? box.nb * n : n;
  for (int64_t b = 0; b < samples; ++b)
    for (int64_t o = 0; o < rows; ++o)
      run(data + walk.offset(v, box.b + b, box.o + o, box.i), s.i, (b * rows + o) * length, length, copy);
}

template <class F>
inline void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(float());
    case DType::f64:
      return f(double());
    case DType::bf16:
      return f(BFloat16());
    case DType::f16:
      return f(Half());
    default:
      throw std::invalid_argument("the kernels compute on floating point tensors only");
  }
}

// float64 tensors are computed in double, all others in float
template <class F>
inline void with_accumulator(DType dtype, const F& f) {
  dtype == DType::f64 ? f(double()) : f(float());
}

template <class F>
inline void with_bool(bool value, const F& f) {
  value ? f(std::true_type()) : f(std::false_type());
}

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 8 ? DType::f64 : DType::f32;
}

// The box as contiguous values of the accumulator type: its own memory, or `buffer` filled with a copy.
template <class T>
const T* load(const View& v, const Walk& walk, const Box& box, T* buffer) {
  if (v.dtype == dtype_of<T>() && walk.contiguous(v, box))
    return reinterpret_cast<const T*>(v.data) + walk.offset(v, box.b, box.o, box.i);
  with_type(v.dtype, [&](auto type) {
    using S = decltype(type);
    each_run<const S>(v, walk, box, [=](const S& element, int64_t k) { buffer[k] = T(widen(element)); });
  });
  return buffer;
}

// Where to write a box: its own memory, or `buffer`, which commit() then scatters. A null view takes everything
// and keeps nothing.
template <class T>
T* target(const View& v, const Walk& walk, const Box& box, T* buffer) {
  if (v && v.dtype == dtype_of<T>() && walk.contiguous(v, box))
    return reinterpret_cast<T*>(v.data) + walk.offset(v, box.b, box.o, box.i);
  return buffer;
}

template <class T>
void commit(const View& v, const Walk& walk, const Box& box, const T* values, const T* buffer) {
  if (!v || values != buffer) return;
  with_type(v.dtype, [&](auto type) {
    using S = decltype(type);
    if constexpr ((sizeof(S) == 8) == (sizeof(T) == 8))
      each_run<S>(v, walk, box, [=](S& element, int64_t k) { narrow(values[k], element); });
    else
      throw std::invalid_argument("float64 outputs belong to float64 computations, and only to them");
  });
}

// --- whole loops ------------------------------------------------------------------------------------

// body(box, k) for every box
template <class Body>
void for_boxes(const Walk& walk, const Body& body) {
  parallel_for(walk.boxes(), walk.elements() >= kParallelElements, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) body(walk.box(k), k);
  });
}

// The sum of a contiguous array: 32 interleaved running sums, then a tree. The order depends on the length alone.
template <class T>
double ordered_sum(const T* values, int64_t n) {
  T lanes[32] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
#pragma omp simd
    for (int64_t j = 0; j < 32; ++j) lanes[j] += values[i + j];
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += values[i + j];
  double tree[32];
  for (int64_t j = 0; j < 32; ++j) tree[j] = double(lanes[j]);
  for (int64_t width = 16; width > 0; width /= 2)
    for (int64_t j = 0; j < width; ++j) tree[j] += tree[j + width];
  return tree[0];
}

// Sums per sample in a fixed order, whatever the number of threads: one partial sum a box, added up at the end.
class SampleSums {
 public:
  explicit SampleSums(const Walk& walk, int64_t samples)
      : walk_(walk), samples_(samples), partial_(walk.group() > 1 ? samples : walk.boxes()) {}

  template <class T>
  void add(const Box& box, int64_t k, const T* values) {
    if (walk_.group() == 1) {
      partial_[k] = ordered_sum(values, box.size());
    } else {
      const int64_t n = box.no * box.ni;
      for (int64_t b = 0; b < box.nb; ++b) partial_[box.b + b] = ordered_sum(values + b * n, n);
    }
  }

  // out[b] = start[b] + factor * sum of sample b
  void finish(const View& out, const View& start, double factor = 1, double constant = 0) const {
    const int64_t boxes = walk_.group() > 1 ? 1 : walk_.per_sample();
    with_type(out.dtype, [&](auto type) {
      using S = decltype(type);
      if constexpr (sizeof(S) >= 4) {
        for (int64_t b = 0; b < samples_; ++b) {
          double total = 0;
          for (int64_t k = 0; k < boxes; ++k) total += partial_[b * boxes + k];
          total = factor * total + constant;
          if (start) total += double(reinterpret_cast<const S*>(start.data)[b * start.stride[0]]);
          reinterpret_cast<S*>(out.data)[b * out.stride[0]] = S(total);
        }
      }
    });
  }

 private:
  const Walk& walk_;
  int64_t samples_;
  std::vector<double> partial_;
};

// Copies one view onto another of the same shape.
inline void copy(const View& from, const View& to) {
  const int64_t samples = to.size[0], channels = to.size[1], positions = to.size[2];
  if (channels == 0) return;
  const Walk walk(samples, channels, positions, to);
  with_type(to.dtype, [&](auto type) {
    using T = std::conditional_t<sizeof(type) == 8, double, float>;
    for_boxes(walk, [&](const Box& box, int64_t) {
      T buffer[kTile];
      const T* values = load(from, walk, box, buffer);
      T* out = target(to, walk, box, buffer);
      if (out != values) std::memcpy(out, values, box.size() * sizeof(T));
      commit(to, walk, box, out, buffer);
    });
  });
}

}  // namespace fastflow
