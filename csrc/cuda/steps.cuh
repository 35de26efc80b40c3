// A chain of K steps on vectors [B, D] in one launch, for planar and radial flows. A team of threads has a sample: each
// of its lanes every `lanes`-th variable, in shared memory that nobody else touches; what all of a step depends on are
// sums over the team. The parameters come ready for use (fastflow/ops/_steps.py), [K, P] or [B, K, P] in the
// accumulator's type, and their gradients leave in the same form.
//
// Backward runs the chain again and keeps all states of the sample at hand, in memory that a team has for all of its
// samples: it is bounded, whatever the batch is, and mostly in the cache. Undoing the steps instead would lose what is
// small beside them. Gradients of shared parameters are summed by team, in an order that shapes decide, and then over
// the teams by finish_columns.
//
// A family is a class with
//   apply<inverse>(step, z, logdet)                    one step; the number of it that is kept
//   gradient<inverse>(step, kept, z, g, gl, put)       z: before the step, which is after its inverse; g: the gradient
//                                                      of its output, then of its input; put(i, value): of parameter i
// The arguments are packed by fastflow/ops/cuda/steps.py.
#pragma once

#include "launch.cuh"

namespace fastflow {

static_assert(kThreads % 32 == 0, "a team lies within a warp");

struct Rows {
  char* data;
  int64_t sample, variable;  // strides; no data stands for zeros
};

struct Steps {
  Rows z;
  char* parameters;
  int64_t samples, width, count, size;  // B, D, K, P
  int64_t each;                         // has each sample its own?
  int64_t lanes, teams;                 // of a team, a power of two up to 32; of a block
};

struct StepsForward {
  Steps in;
  Rows y;
  char *running, *logdet;
  int64_t running_stride, logdet_stride;
};

struct StepsBackward {
  Steps in;
  Rows gy, gz;
  char* glogdet;
  int64_t glogdet_stride;
  char* gradient;         // [teams of all, K, P], or [B, K, P]
  int64_t total, rounds;  // teams of all, and samples of each
  char* states;           // [teams of all, K, D + 1]: before every step, and what is kept of it
};

// One step as a lane of a team sees it.
template <class T>
struct Step {
  const T* p;
  int width, lane, lanes;

  // f(d) for the variables of this lane
  template <class F>
  FF_D void variables(const F& f) const {
    for (int d = lane; d < width; d += lanes) f(d);
  }
  template <class F>
  FF_D double sum(const F& f) const {
    double total = 0;
    for (int d = lane; d < width; d += lanes) total += f(d);
    return warp_sum(total, lanes);
  }
};

struct Place {
  int64_t team;  // among all
  int lane, lanes, in_block;

  FF_D explicit Place(const Steps& a) {
    lanes = int(a.lanes), in_block = int(threadIdx.x) / lanes, lane = int(threadIdx.x) % lanes;
    team = int64_t(blockIdx.x) * a.teams + in_block;
  }
};

template <class X, class T>
FF_D T read(const Rows& rows, int64_t b, int64_t d) {
  return rows.data ? T(widen(reinterpret_cast<const X*>(rows.data)[b * rows.sample + d * rows.variable])) : T(0);
}

template <class X, class T>
FF_D void write(const Rows& rows, int64_t b, int64_t d, T value) {
  narrow(value, reinterpret_cast<X*>(rows.data)[b * rows.sample + d * rows.variable]);
}

template <class T>
FF_D Step<T> step_of(const Steps& a, const Place& place, int64_t b, int64_t k) {
  const T* p = reinterpret_cast<const T*>(a.parameters) + ((a.each ? b * a.count : 0) + k) * a.size;
  return {p, int(a.width), place.lane, place.lanes};
}

template <class Family, class X, bool inverse>
FF_D void steps_fwd(const StepsForward& a) {
  using T = Accumulator<X>;
  FF_SHARED(T, shared);
  const Place place(a.in);
  const bool active = place.team < a.in.samples;
  const int64_t b = active ? place.team : 0;  // the others of a warp go along
  T* z = shared + int64_t(place.in_block) * a.in.width;
  for (int64_t d = place.lane; d < a.in.width; d += place.lanes) z[d] = read<X, T>(a.in.z, b, d);
  double logdet = 0;
  for (int64_t i = 0; i < a.in.count; ++i)
    Family::template apply<inverse>(step_of<T>(a.in, place, b, inverse ? a.in.count - 1 - i : i), z, logdet);
  if (!active) return;
  for (int64_t d = place.lane; d < a.in.width; d += place.lanes) write<X, T>(a.y, b, d, z[d]);
  if (place.lane) return;
  const double start = a.running ? double(reinterpret_cast<const T*>(a.running)[b * a.running_stride]) : 0;
  reinterpret_cast<T*>(a.logdet)[b * a.logdet_stride] = T(start + logdet);
}

template <class Family, class X, bool inverse>
FF_D void steps_bwd(const StepsBackward& a) {
  using T = Accumulator<X>;
  FF_SHARED(T, shared);
  const Place place(a.in);
  if (int64_t(blockIdx.x) * a.in.teams + place.in_block / (32 / place.lanes) * (32 / place.lanes) >= a.total) return;
  const int64_t width = a.in.width, count = a.in.count;
  T *z = shared + 2 * place.in_block * width, *g = z + width;
  const int64_t team = smaller(place.team, a.total - 1);  // the others of a warp go along and write nothing
  T* states = reinterpret_cast<T*>(a.states) + team * count * (width + 1);
  for (int64_t round = 0; round < a.rounds; ++round) {
    const int64_t own = round * a.total + place.team;
    const bool exists = place.team < a.total, active = exists && own < a.in.samples;
    const int64_t b = active ? own : 0;
    for (int64_t d = place.lane; d < width; d += place.lanes) {
      z[d] = read<X, T>(a.in.z, b, d);
      g[d] = read<X, T>(a.gy, b, d);
    }
    double unused = 0;
    for (int64_t i = 0; i < count; ++i) {
      T* state = states + i * (width + 1);
      if (exists)
        for (int64_t d = place.lane; d < width; d += place.lanes) state[d] = z[d];
      const T kept =
          Family::template apply<inverse>(step_of<T>(a.in, place, b, inverse ? count - 1 - i : i), z, unused);
      if (exists) state[width] = kept;  // every lane of the team the same, which it reads again itself
    }
    const T gl = reinterpret_cast<const T*>(a.glogdet)[b * a.glogdet_stride];
    for (int64_t i = count - 1; i >= 0; --i) {
      const int64_t k = inverse ? count - 1 - i : i;
      const T* state = states + i * (width + 1);
      T* out = reinterpret_cast<T*>(a.gradient) + ((a.in.each ? b : team) * count + k) * a.in.size;
      const bool first = a.in.each || round == 0;
      if (!inverse)
        for (int64_t d = place.lane; d < width; d += place.lanes) z[d] = state[d];
      Family::template gradient<inverse>(step_of<T>(a.in, place, b, k), state[width], z, g, gl,
                                         [&](int64_t at, T value) {
                                           if (active) out[at] = first ? value : out[at] + value;
                                         });
      if (inverse)
        for (int64_t d = place.lane; d < width; d += place.lanes) z[d] = state[d];
    }
    if (active)
      for (int64_t d = place.lane; d < width; d += place.lanes) write<X, T>(a.gz, b, d, g[d]);
  }
}

// The sums of all teams, [teams, columns] to [columns], in order.
struct StepsFinish {
  char *parts, *sums;
  int64_t teams, columns;
};

template <class T>
FF_D void finish_columns(const StepsFinish& a) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= a.columns) return;
  double total = 0;
  for (int64_t p = 0; p < a.teams; ++p) total += double(reinterpret_cast<const T*>(a.parts)[p * a.columns + c]);
  reinterpret_cast<T*>(a.sums)[c] = T(total);
}

}  // namespace fastflow
