// The exact gradient of a solve, its steps held fixed: a block takes tiles of samples back through their steps. From a
// state that was kept it goes forward again to the next one, values alone, and then back step by step: the slopes of a
// step's stages once more, then of the stages from the last to the first the sweep with its tangents and its reverse.
// The gradients of the parameters are added up per block, and a second launch adds up the blocks in their order.
// The arguments are packed by fastflow/ops/cuda/ode.py.
#include "ode.cuh"

namespace fastflow {

// Where a sample of the tile is.
struct Track {
  double t, h;            // of the step in hand; h = 0: none
  int64_t steps;          // that are still to be undone
  int64_t first, length;  // the step of the state that was kept before them, and how many they are from there on
  int64_t spacing;
  int64_t last, before;  // the times (before, last] lie in the step in hand
};

struct BackwardPlaces {  // in shared memory, bytes
  int64_t params, times, input, kept, g, other, of_units, y, slopes, gstages, gstate, seeds, table, tracks, most;
};

struct OdeBackward {
  Ode ode;
  BackwardPlaces places;
  char *gvalues, *gtraces, *genergies;  // [T, B, D], [T, S, B], [T, 2, B]
  Matrix gx;
  char* partial;   // [blocks, parameters] of double
  char* replayed;  // [blocks, length, D, tile]: the states between two that were kept
  int64_t length, blocks, tiles;
};

template <class T>
struct Undo {
  const OdeBackward& a;
  NetTile<T> net;
  Tableau method;
  T *input, *kept, *g, *other, *of_units, *y, *slopes, *gstages, *gstate, *seeds, *table, *replayed;
  double* sums;
  Track* tracks;
  int64_t* most;
  int features, tangents, rows, samples;
  int64_t begin;
  double sign;  // of time

  FF_D explicit Undo(const OdeBackward& given, unsigned char* shared)
      : a(given),
        net(net_tile<T>(given.ode.net, int(given.ode.tile), shared + given.places.params, shared + given.places.times)),
        method(reinterpret_cast<const double*>(given.ode.method)) {
    const BackwardPlaces& p = a.places;
    input = reinterpret_cast<T*>(shared + p.input), kept = reinterpret_cast<T*>(shared + p.kept);
    g = reinterpret_cast<T*>(shared + p.g), other = reinterpret_cast<T*>(shared + p.other);
    of_units = reinterpret_cast<T*>(shared + p.of_units), y = reinterpret_cast<T*>(shared + p.y);
    slopes = reinterpret_cast<T*>(shared + p.slopes), gstages = reinterpret_cast<T*>(shared + p.gstages);
    gstate = reinterpret_cast<T*>(shared + p.gstate), seeds = reinterpret_cast<T*>(shared + p.seeds);
    table = reinterpret_cast<T*>(shared + p.table);
    tracks = reinterpret_cast<Track*>(shared + p.tracks), most = reinterpret_cast<int64_t*>(shared + p.most);
    features = int(a.ode.net.features), tangents = int(a.ode.net.tangents), samples = int(a.ode.tile);
    rows = features + tangents + int(a.ode.energies);
    begin = 0;
    sign = a.ode.time(a.ode.count) < a.ode.time(0) ? -1 : 1;
    sums = reinterpret_cast<double*>(a.partial) + int64_t(blockIdx.x) * a.ode.net.size;
    replayed = reinterpret_cast<T*>(a.replayed) + int64_t(blockIdx.x) * a.length * features * samples;
    const int n = method.stages * (method.stages + 1);  // a and b
    for (int i = threadIdx.x; i < n; i += kThreads) table[i] = T(method.a[i]);
    for (int64_t i = threadIdx.x; i < a.ode.net.size; i += kThreads) sums[i] = 0;
  }
  FF_D int64_t global(int s) const { return smaller(begin + s, a.ode.samples - 1); }
  FF_D bool valid(int s) const { return begin + s < a.ode.samples; }
  FF_D T& of(T* stages, int stage, int d, int s) const { return stages[(stage * features + d) * samples + s]; }
  FF_D T output_gradient(int64_t i, int row, int s) const {
    const int64_t B = a.ode.samples, b = global(s);
    if (row < features) return reinterpret_cast<const T*>(a.gvalues)[((i - 1) * B + b) * features + row];
    if (row < features + tangents)
      return reinterpret_cast<const T*>(a.gtraces)[((i - 1) * tangents + row - features) * B + b];
    return reinterpret_cast<const T*>(a.genergies)[((i - 1) * 2 + row - features - tangents) * B + b];
  }
};

// The inputs of a stage: y + h sum_j a_ij slope(j), and its time.
template <class T>
FF_D void enter_stage(const Undo<T>& o, int stage) {
  const T* weights = o.table + stage * o.method.stages;
  each(o.net, o.features, [&](int d, int s) {
    const Track& track = o.tracks[s];
    T sum = T(0);
    for (int j = 0; j < stage; ++j) sum += weights[j] * o.of(o.slopes, j, d, s);
    o.net.at(o.input, d, 0, s) = o.y[d * o.samples + s] + T(track.h) * sum;
    if (d == 0) o.net.times[s] = T(track.t + o.method.c[stage] * track.h);
  });
}

// The step `i` of a segment is in hand, of those samples that have one.
template <class T>
FF_D void take_step(const Undo<T>& o, int64_t i) {
  const int s = int(threadIdx.x);
  if (s < o.samples) {
    Track& track = o.tracks[s];
    track.h = 0;
    if (i < track.length) {
      const double* const step = o.a.ode.step(track.first + i, smaller(o.global(s), o.a.ode.controls - 1));
      track.t = step[0], track.h = step[1];
    }
  }
  __syncthreads();
}

// The state that a segment begins with.
template <class T>
FF_D void load_state(const Undo<T>& o) {
  each(o.net, o.features, [&](int d, int s) {
    const Track& track = o.tracks[s];
    const int64_t slot = track.length > 0 ? track.first / track.spacing : 0;
    o.y[d * o.samples + s] =
        reinterpret_cast<const T*>(o.a.ode.states)[(slot * o.a.ode.samples + o.global(s)) * o.features + d];
  });
}

// Where the outputs of the step in hand are; is there one in any sample's?
template <class T>
FF_D bool find_outputs(const Undo<T>& o) {
  if (threadIdx.x == 0) {
    int64_t found = 0;
    for (int s = 0; s < o.samples; ++s) {
      Track& track = o.tracks[s];
      track.last = track.before;
      if (track.h == 0) continue;
      while (track.before > 0 && o.sign * o.a.ode.time(track.before) > o.sign * track.t) --track.before;
      found += track.last - track.before;
    }
    *o.most = found;
  }
  __syncthreads();
  return *o.most > 0;
}

// The gradient of the outputs of a stage, from what follows it, into o.g.
template <class T>
FF_D void seed(const Undo<T>& o, int stage, int stages, const T* out) {
  const Ode& ode = o.a.ode;
  const int D = o.features, S = o.tangents, all = o.method.stages;
  each(o.net, o.rows, [&](int row, int s) {  // of slopes and traces
    const Track& track = o.tracks[s];
    T g = o.table[all * all + stage] * o.gstate[row * o.samples + s];
    if (row < D)
      for (int l = stage + 1; l < stages; ++l) g += o.table[l * all + stage] * o.of(o.gstages, l, row, s);
    g *= T(track.h);
    for (int64_t i = track.before + 1; i <= track.last; ++i) {
      const double theta = (ode.time(i) - track.t) / track.h;
      g += T(track.h * o.method.dense(stage, theta)) * o.output_gradient(i, row, s);
    }
    o.seeds[row * o.samples + s] = row < D + S ? g : T(2 * o.sign) * g;
  });
  each(o.net, D * (1 + S), [&](int i, int s) {
    const int r = i / D, d = i - r * D;
    T g = o.seeds[(r == 0 ? d : D + r - 1) * o.samples + s];
    if (r > 0) g *= o.net.at(o.input, d, r, s);
    if (ode.energies) {
      const T weight = r == 0 ? T(1) : ode.template weight_of_probes<T>();
      g += weight * o.seeds[(D + S + (r > 0)) * o.samples + s] * o.net.at(const_cast<T*>(out), d, r, s);
    }
    o.net.at(o.g, d, r, s) = g;
  });
}

// Through the first `ahead` stages of the step in hand, for their slopes, and back through the last `back`, their
// reverse with it.
template <class T>
FF_D void sweep(const Undo<T>& o, int ahead, int back) {
  for (int i = 0; i < ahead + back; ++i) {
    const bool forward = i < ahead;
    const int stage = forward ? i : ahead + back - 1 - i;
    enter_stage(o, stage);
    const T* found = net_keep(o.net, forward ? 0 : o.tangents, o.input, o.kept);
    if (!forward) {
      seed(o, stage, back, found);
      found = net_bwd(o.net, o.input, o.kept, o.g, o.other, o.of_units, o.sums);
    }
    T* const to = forward ? o.slopes : o.gstages;
    each(o.net, o.features, [&](int d, int s) { o.of(to, stage, d, s) = found[d * o.net.stride + s]; });
  }
}

// The end of the step in hand.
template <class T>
FF_D void advance(const Undo<T>& o, int stages) {
  const T* const weights = o.table + o.method.stages * o.method.stages;
  each(o.net, o.features, [&](int d, int s) {
    T sum = T(0);
    for (int j = 0; j < stages; ++j)
      if (weights[j] != T(0)) sum += weights[j] * o.of(o.slopes, j, d, s);
    o.y[d * o.samples + s] += T(o.tracks[s].h) * sum;
  });
}

// The gradient at the beginning of the step in hand.
template <class T>
FF_D void retreat(const Undo<T>& o, int stages) {
  each(o.net, o.rows, [&](int row, int s) {
    const Track& track = o.tracks[s];
    T g = o.gstate[row * o.samples + s];
    for (int64_t i = track.before + 1; i <= track.last; ++i) g += o.output_gradient(i, row, s);
    if (row < o.features)
      for (int i = 0; i < stages; ++i) g += o.of(o.gstages, i, row, s);
    o.gstate[row * o.samples + s] = g;
  });
}

// A segment of this length: forward to its last step, and back.
template <class T>
FF_D void undo(const Undo<T>& o, int64_t length) {
  const int needed = o.method.stages - (o.method.fsal ? 1 : 0);  // the last one ends the step with a weight of 0
  load_state(o);
  for (int64_t turn = 0; turn < 2 * length - 1; ++turn) {
    const bool forward = turn < length - 1;
    const int64_t i = forward ? turn : 2 * length - 2 - turn;
    each(o.net, o.features, [&](int d, int s) {
      T &y = o.y[d * o.samples + s], &kept = o.replayed[(i * o.features + d) * o.samples + s];
      if (turn < length)
        kept = y;
      else
        y = kept;
    });
    take_step(o, i);
    const int stages = !forward && find_outputs(o) ? o.method.stages : needed;  // which it serves
    sweep(o, forward ? stages : stages - 1, forward ? 0 : stages);
    if (forward)
      advance(o, stages);
    else
      retreat(o, stages);
  }
}

// The length of the longest segment of the tile, and where each begins.
template <class T>
FF_D int64_t next_segment(const Undo<T>& o) {
  if (threadIdx.x == 0) {
    int64_t most = 0;
    for (int s = 0; s < o.samples; ++s) {
      Track& track = o.tracks[s];
      track.first = track.steps > 0 ? (track.steps - 1) / track.spacing * track.spacing : 0;
      track.length = track.steps - track.first, track.steps = track.first;
      most = track.length > most ? track.length : most;
    }
    *o.most = most;
  }
  __syncthreads();
  const int64_t most = *o.most;
  __syncthreads();
  return most;
}

template <class T>
FF_D void ode_bwd(const OdeBackward& a) {
  FF_SHARED(unsigned char, shared);
  Undo<T> o(a, shared);
  const int s = int(threadIdx.x);
  for (int64_t number = blockIdx.x; number < a.tiles; number += a.blocks) {
    o.begin = number * o.samples;
    if (s < o.samples) {
      const int64_t* const counts =
          reinterpret_cast<const int64_t*>(a.ode.counts) + 4 * smaller(o.global(s), a.ode.controls - 1);
      // behind the end there is nothing to undo
      o.tracks[s] = {a.ode.time(0), 0, o.valid(s) ? counts[1] : 0, 0, 0, counts[3], a.ode.count, a.ode.count};
    }
    load_probes(a.ode, o.net, o.begin, o.input);
    each(o.net, o.rows, [&](int row, int of) { o.gstate[row * o.samples + of] = T(0); });
    for (int64_t length; (length = next_segment(o)) > 0;) undo(o, length);
    each(o.net, o.features, [&](int d, int of) {
      T g = o.gstate[d * o.samples + of];
      for (int64_t i = 1; i <= o.tracks[of].before; ++i) g += o.output_gradient(i, d, of);
      if (o.valid(of)) a.gx.at<T>(o.global(of), d) = g;
    });
  }
}

}  // namespace fastflow
