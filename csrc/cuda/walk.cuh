// The walk of elementwise kernels over [B, C, S] tensors of any strides, in steps of V elements along the inner
// dimension: positions, or channels where those are closer. A team of `lanes` threads serves one part of one sample, so
// that sums per sample are made in an order that depends on the shapes alone.
#pragma once

#include "../scale_map.h"
#include "launch.cuh"

namespace fastflow {

struct Walk {
  int64_t samples, outer, inner;
  int64_t parts, share;  // of a sample, and steps in each
  int64_t lanes;         // a power of two up to kThreads
  int64_t channels_inner;
  const int64_t* index;  // of gathered operands
  int64_t channels;      // what an index must stay below
};

// Where a step begins. `general` walks also know gathered operands; the others have nothing to carry for them.
template <bool general>
struct Position {
  int64_t b, o, i;

  FF_HD int64_t offset(const Operand& v) const { return b * v.sample + o * v.outer + i * v.inner; }
};

template <>
struct Position<true> {
  int64_t b, o, i;
  int64_t gathered_o, gathered_i;
  bool valid;  // is the index within bounds?

  FF_HD int64_t offset(const Operand& v) const {
    return v.gathered ? b * v.sample + gathered_o * v.outer + gathered_i * v.inner
                      : b * v.sample + o * v.outer + i * v.inner;
  }
};

template <class S, int V, bool general, class T>
FF_HD void load(const Operand& v, const Position<general>& p, T (&to)[V]) {
  if (v.data) return load<V>(reinterpret_cast<const S*>(v.data) + p.offset(v), v.wide, v.inner, to);
#pragma unroll
  for (int k = 0; k < V; ++k) to[k] = T(0);
}

template <class S, int V, bool general, class T>
FF_HD void store(const Operand& v, const Position<general>& p, const T (&from)[V]) {
  if (v.data) store<V>(reinterpret_cast<S*>(v.data) + p.offset(v), v.wide, v.inner, from);
}

struct Team {
  int64_t b, part;
  int lane;
  bool active;

  FF_D explicit Team(const Walk& w) {
    const int lanes = int(w.lanes);
    const int64_t number = int64_t(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
    b = quotient(number, w.parts), part = number - b * w.parts;
    lane = threadIdx.x % lanes;
    active = b < w.samples;
  }
};

// f(position) for the steps of this thread
template <int V, bool general = false, class F>
FF_D void each_step(const Walk& w, const Team& team, const F& f) {
  if (!team.active) return;
  const int64_t first = team.part * w.share, last = smaller(first + w.share, w.outer * w.inner / V);
  for (int64_t k = first + team.lane; k < last; k += w.lanes) {
    Position<general> p;
    p.b = team.b;
    p.o = quotient(k * V, w.inner), p.i = k * V - p.o * w.inner;
    if constexpr (general) {
      p.gathered_o = p.o, p.gathered_i = p.i, p.valid = true;
      if (w.index) {
        const int64_t channel = w.index[w.channels_inner ? p.i : p.o];
        p.valid = uint64_t(channel) < uint64_t(w.channels);
        if (w.channels_inner)
          p.gathered_i = p.valid ? channel : 0;
        else
          p.gathered_o = p.valid ? channel : 0;
      }
    }
    f(p);
  }
}

// out[b] = start[b] + factor * sum + constant, the sum over the parts of sample b
struct Sums {
  double* partial;  // [samples, parts] where there is more than one part
  char *out, *start;
  int64_t out_stride, start_stride;
  double factor, constant;
};

template <class T>
FF_HD void finish_sum(const Sums& s, int64_t b, double total) {
  total = s.factor * total + s.constant;
  if (s.start) total += double(reinterpret_cast<const T*>(s.start)[b * s.start_stride]);
  reinterpret_cast<T*>(s.out)[b * s.out_stride] = T(total);
}

// Every thread of the block must call it; the block has shared memory for a number of every warp.
template <class T>
FF_D void add_up(const Walk& w, const Team& team, const Sums& s, double value) {
  FF_SHARED(double, shared);
  value = team_sum(value, int(w.lanes), shared);
  if (!team.active || team.lane != 0) return;
  if (w.parts > 1)
    s.partial[team.b * w.parts + team.part] = value;
  else
    finish_sum<T>(s, team.b, value);
}

// f(Constant<kind>()) for a scale map
template <class F>
FF_HD void with_kind(int kind, const F& f) {
  with_number<kNone, kExp, kSigmoid, kSigmoidEps, kSoftplus, kTanh, kLinearTanh, kAtan, kSoftClip>(kind, f);
}

// fastflow/ops/scale_map.py: kernel_map
struct Map {
  double gain, offset, amplitude, eps, maximum, log_amplitude;

  template <class T>
  FF_HD MapConstants<T> constants() const {
    return {T(gain), T(offset), T(amplitude), T(eps), T(maximum), T(log_amplitude)};
  }
};

}  // namespace fastflow
