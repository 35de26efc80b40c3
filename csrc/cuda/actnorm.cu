// ActNorm on a GPU: y = (x + b) e^a or x = y e^-a - b, one scale and one shift for every channel, in one pass. Backward
// makes gx and, in shares of the samples that are added up in a fixed order, the sums of gy and of gy (x + b) of every
// channel. Bound by memory bandwidth.
// The arguments are packed by fastflow/ops/cuda/actnorm.py.
#include "walk.cuh"

namespace fastflow {

struct ActNorm {
  Walk walk;
  char *log_scale, *bias;  // [C], of the accumulator's type
  double gain;             // with the sign of the direction
  int64_t add_first;       // (x + b) m; or x m - b
};

struct ActNormForward {
  ActNorm in;
  Operand x, y;
  char *running, *logdet;
  int64_t running_stride, logdet_stride;
};

// The first part of a sample adds up its log-determinant: C numbers that all samples share.
template <class X, int V>
FF_D void actnorm_fwd(const ActNormForward& a) {
  using T = Accumulator<X>;
  const Walk& w = a.in.walk;
  const Team team(w);
  const T *log_scale = reinterpret_cast<const T*>(a.in.log_scale), *bias = reinterpret_cast<const T*>(a.in.bias);
  const T gain = T(a.in.gain);
  each_step<V>(w, team, [&](const Position<false>& p) {
    T x[V], y[V];
    load<X>(a.x, p, x);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t c = w.channels_inner ? p.i + v : p.o;
      const T m = exp(gain * log_scale[c]);
      y[v] = a.in.add_first ? (x[v] + bias[c]) * m : x[v] * m - bias[c];
    }
    store<X>(a.y, p, y);
  });
  const int64_t channels = w.channels_inner ? w.inner : w.outer;
  double sum = 0;
  if (team.active && team.part == 0)
    for (int64_t c = team.lane; c < channels; c += w.lanes) sum += a.in.gain * double(log_scale[c]);
  FF_SHARED(double, shared);
  sum = team_sum(sum, int(w.lanes), shared);
  if (!team.active || team.part != 0 || team.lane != 0) return;
  const double before = a.running ? double(reinterpret_cast<const T*>(a.running)[team.b * a.running_stride]) : 0;
  const double positions = double(w.channels_inner ? w.outer : w.inner);
  reinterpret_cast<T*>(a.logdet)[team.b * a.logdet_stride] = T(before + positions * sum);
}

// A block serves `columns` neighbouring channels and one share of the rows: of (sample, position) pairs.
struct ActNormBackward {
  Operand x, gy, gx;  // [samples, channels, positions] as sample, outer, inner
  int64_t samples, channels, positions;
  int64_t columns;  // channels of a block, a power of two up to 32: 1 where positions are closer than channels
  int64_t shares, share;
  char *log_scale, *bias;
  double gain;
  int64_t add_first;
  double* partial;  // [shares, 2, C]
};

template <class X>
FF_D void actnorm_bwd(const ActNormBackward& a) {
  using T = Accumulator<X>;
  FF_SHARED(double, shared);  // two numbers of every thread
  const int64_t share = blockIdx.x % a.shares;
  const int64_t c = int64_t(blockIdx.x / a.shares) * a.columns + threadIdx.x % a.columns;
  const int64_t lane = threadIdx.x / a.columns, lanes = kThreads / a.columns;
  double sum = 0, product = 0;
  if (c < a.channels) {
    const T shift = a.add_first ? reinterpret_cast<const T*>(a.bias)[c] : T(0);
    const T m = exp(T(a.gain) * reinterpret_cast<const T*>(a.log_scale)[c]);
    const int64_t last = smaller((share + 1) * a.share, a.samples * a.positions);
    for (int64_t n = share * a.share + lane; n < last; n += lanes) {
      Position<false> p;
      p.b = quotient(n, a.positions), p.o = c, p.i = n - p.b * a.positions;
      T x[1], g[1];
      load<X>(a.x, p, x);
      load<X>(a.gy, p, g);
      const T gx[1] = {g[0] * m};
      store<X>(a.gx, p, gx);
      sum += double(g[0]);
      product += double(g[0] * (x[0] + shift));
    }
  }
  double *sums = shared, *products = shared + kThreads;
  sums[threadIdx.x] = sum, products[threadIdx.x] = product;
  for (int64_t half = lanes / 2; half > 0; half /= 2) {  // the lanes of a channel, as a tree
    __syncthreads();
    if (lane >= half) continue;
    sums[threadIdx.x] += sums[threadIdx.x + half * a.columns];
    products[threadIdx.x] += products[threadIdx.x + half * a.columns];
  }
  if (lane != 0 || c >= a.channels) return;
  a.partial[share * 2 * a.channels + c] = sums[threadIdx.x];
  a.partial[(share * 2 + 1) * a.channels + c] = products[threadIdx.x];
}

struct ActNormFinish {
  double* partial;
  char *log_scale, *glogdet, *glog_scale, *gbias;
  int64_t shares, channels, samples, positions, glogdet_stride, add_first;
  double gain;
};

template <class T>
FF_D void actnorm_finish(const ActNormFinish& a) {
  FF_SHARED(double, shared);  // a number for every warp
  double total = 0;
  for (int64_t b = threadIdx.x; b < a.samples; b += kThreads)
    total += double(reinterpret_cast<const T*>(a.glogdet)[b * a.glogdet_stride]);
  total = team_sum(total, kThreads, shared) * double(a.positions);
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= a.channels) return;
  double sum = 0, product = 0;
  for (int64_t k = 0; k < a.shares; ++k) {
    sum += a.partial[k * 2 * a.channels + c];
    product += a.partial[(k * 2 + 1) * a.channels + c];
  }
  const double m = double(exp(T(a.gain) * reinterpret_cast<const T*>(a.log_scale)[c]));
  reinterpret_cast<T*>(a.glog_scale)[c] = T(a.gain * (m * product + total));
  reinterpret_cast<T*>(a.gbias)[c] = T(a.add_first ? m * sum : -sum);
}

}  // namespace fastflow
