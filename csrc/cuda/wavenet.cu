// A WaveNet on a GPU. Over whole sequences the products are the library's; here is the gate between them, and its
// backward, which makes the gated rows again. Generation is one block for a stream, which stays for all its codes: the
// weights come from L2, the sums go through shared memory.
// The arguments are packed by fastflow/ops/cuda/wavenet.py.
#include "../wavenet.h"
#include "launch.cuh"

namespace fastflow {

// acts [rows, 2D], z [rows, z_row]: D gated numbers, a one, zeros
struct GateRows {
  char *acts, *gz, *z;  // gz [rows, D], of backward
  int64_t rows, gated, z_row;
};

template <class T>
FF_D void wavenet_gate_fwd(const GateRows& a) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = quotient(n, a.z_row), i = n - row * a.z_row;
  if (row >= a.rows) return;
  T value = T(i == a.gated);
  if (i < a.gated) {
    const T* acts = reinterpret_cast<const T*>(a.acts) + row * 2 * a.gated;
    const Gate<T> f = gate(acts[i], acts[a.gated + i]);
    value = f.tanh * f.sigmoid;
  }
  reinterpret_cast<T*>(a.z)[n] = value;
}

// acts becomes its gradient, z is made again
template <class T>
FF_D void wavenet_gate_bwd(const GateRows& a) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = quotient(n, a.z_row), i = n - row * a.z_row;
  if (row >= a.rows) return;
  T value = T(i == a.gated);
  if (i < a.gated) {
    T* acts = reinterpret_cast<T*>(a.acts) + row * 2 * a.gated;
    const Gate<T> f = gate(acts[i], acts[a.gated + i]);
    value = f.tanh * f.sigmoid;
    T ga, gb;
    gate_backward(f.tanh, f.sigmoid, reinterpret_cast<const T*>(a.gz)[row * a.gated + i], ga, gb);
    acts[i] = ga, acts[a.gated + i] = gb;
  }
  reinterpret_cast<T*>(a.z)[n] = value;
}

// --- generation ---------------------------------------------------------------------------------------

// embedding [w, V, R]; gate [L, K, 2D], bias, residual [L, D + 1, R], skip [L, D + 1, S]; hidden [S + 1, H],
// output [H + 1, padded V]; context [B, n, Cc]; past [B, P, R]; logits [B, n, V] or nothing
struct Generate {
  char *embedding, *gate, *bias, *residual, *skip, *hidden, *output, *context, *past, *logits;
  int64_t *recent, *codes, *dilations;  // [B, taps], [B, n], [L]
  double* uniforms;                     // [B, n]
  int64_t layers, width, channels, gated, skipped, heads, levels, padded_levels, features, taps;
  int64_t steps, position, rows, bias_layer, bias_sample;
  double temperature;
};

// sums[part, column] of x[k] w[k, column] over the part's share of the depth; the parts fill the block
template <class T>
FF_D int64_t partial_sums(const T* x, int64_t depth, const T* w, int64_t columns, T* sums) {
  const int64_t parts = columns < kThreads ? kThreads / columns : 1, share = (depth + parts - 1) / parts;
  for (int64_t i = threadIdx.x; i < parts * columns; i += kThreads) {
    const int64_t part = i / columns, column = i - part * columns, end = smaller(depth, (part + 1) * share);
    T sum = T(0);
    for (int64_t k = part * share; k < end; ++k) sum += x[k] * w[k * columns + column];
    sums[i] = sum;
  }
  return parts;
}

template <class T>
FF_D T total(const T* sums, int64_t parts, int64_t columns, int64_t column) {
  T sum = T(0);
  for (int64_t p = 0; p < parts; ++p) sum += sums[p * columns + column];
  return sum;
}

// what a vector of n numbers and the products' partial sums take
FF_D int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The first code at which the sum of e^{(logit - max) / temperature} exceeds u times the total; -1 where one is NaN.
// All threads call it; `weights` [V] and `groups` [kThreads] are shared.
template <class T>
FF_D int64_t draw(const T* logits, int64_t n, double temperature, double u, T* weights, double* groups) {
  double largest = -double(infinity<float>());
  for (int64_t k = threadIdx.x; k < n; k += kThreads) {
    const double v = double(logits[k]);
    largest = v != v || v > largest ? v : largest;
    if (v != v) break;
  }
  groups[threadIdx.x] = largest;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) >= half) continue;
    const double other = groups[threadIdx.x + half], own = groups[threadIdx.x];
    groups[threadIdx.x] = other != other || other > own ? other : own;
  }
  __syncthreads();
  largest = groups[0];
  const bool valid = largest - largest == 0;  // neither NaN nor infinite
  const T inverse = temperature > 0 ? T(1 / temperature) : T(0);
  for (int64_t k = threadIdx.x; k < n; k += kThreads) {
    const T above = logits[k] - T(largest);
    weights[k] = temperature > 0 ? exp_nonpositive(above * inverse) : T(above == T(0));
  }
  __syncthreads();  // weights are there, and all have read groups[0]
  const int64_t group = (n + kThreads - 1) / kThreads * 4, count = (n + group - 1) / group;
  if (int64_t(threadIdx.x) < count) {
    double sum = 0;
    for (int64_t k = threadIdx.x * group; k < smaller(n, (threadIdx.x + 1) * group); ++k) sum += double(weights[k]);
    groups[threadIdx.x] = sum;
  }
  __syncthreads();
  if (!valid) return -1;
  double sum = 0, before = 0;
  for (int64_t g = 0; g < count; ++g) sum += groups[g];
  const double target = temperature > 0 ? u * sum : 0;
  int64_t g = 0;
  for (; g + 1 < count && before + groups[g] <= target; ++g) before += groups[g];
  int64_t last = 0;
  for (int64_t k = g * group; k < n; ++k) {
    before += double(weights[k]);
    if (before > target) return k;
    if (weights[k] > T(0)) last = k;
  }
  return last;  // u times the total was rounded up to the total
}

template <class T>
FF_D void wavenet_generate(const Generate& a) {
  FF_SHARED(double, shared);
  const int64_t r = a.channels, d = a.gated, s = a.skipped, depth = a.width * r + a.features;
  double* groups = shared;
  T* h = reinterpret_cast<T*>(groups + kThreads);
  T *in = h + r, *z = in + depth, *skip = z + d + 1, *hidden = skip + s + 1, *out = hidden + a.heads + 1;
  T *weights = out + a.padded_levels, *sums = weights + a.padded_levels;
  T* more = sums + most(kThreads, most(2 * d, r));  // and then as many as the widest product has columns
  const int64_t b = blockIdx.x, thread = threadIdx.x;
  T* past = reinterpret_cast<T*>(a.past) + b * a.rows * r;
  int64_t* recent = a.recent + b * a.taps;
  if (thread == 0) z[d] = skip[s] = hidden[a.heads] = T(1);
  for (int64_t step = 0; step < a.steps; ++step) {
    const int64_t now = a.position + step, at = b * a.steps + step;
    for (int64_t i = thread; i < r; i += kThreads) {
      T sum = T(0);
      for (int64_t k = 0; k < a.taps; ++k)
        if (recent[k] >= 0) sum += reinterpret_cast<const T*>(a.embedding)[(k * a.levels + recent[k]) * r + i];
      h[i] = sum;
    }
    for (int64_t i = thread; i < s; i += kThreads) skip[i] = T(0);
    T* ring = past;
    for (int64_t l = 0; l < a.layers; ++l) {
      const int64_t dilation = a.dilations[l], rows = (a.width - 1) * dilation;
      __syncthreads();
      for (int64_t i = thread; i < depth; i += kThreads) {
        const int64_t tap = quotient(i, r), channel = i - tap * r;
        if (tap < a.width - 1)
          in[i] = ring[(now + tap * dilation) % rows * r + channel];
        else if (tap < a.width)
          in[i] = h[channel];
        else
          in[i] = reinterpret_cast<const T*>(a.context)[at * a.features + (i - a.width * r)];
      }
      __syncthreads();
      const int64_t parts =
          partial_sums(in, depth, reinterpret_cast<const T*>(a.gate) + l * depth * 2 * d, 2 * d, sums);
      if (rows > 0)
        for (int64_t i = thread; i < r; i += kThreads) ring[now % rows * r + i] = h[i];
      ring += rows * r;
      __syncthreads();
      const T* bias = reinterpret_cast<const T*>(a.bias) + l * a.bias_layer + b * a.bias_sample;
      for (int64_t i = thread; i < d; i += kThreads) {
        const Gate<T> f = gate(bias[i] + total(sums, parts, 2 * d, i), bias[d + i] + total(sums, parts, 2 * d, d + i));
        z[i] = f.tanh * f.sigmoid;
      }
      __syncthreads();
      const T* to_residual = reinterpret_cast<const T*>(a.residual) + l * (d + 1) * r;
      const T* to_skip = reinterpret_cast<const T*>(a.skip) + l * (d + 1) * s;
      const int64_t first = partial_sums(z, d + 1, to_residual, r, sums);
      const int64_t second = partial_sums(z, d + 1, to_skip, s, more);
      __syncthreads();
      for (int64_t i = thread; i < r; i += kThreads) h[i] += total(sums, first, r, i);
      for (int64_t i = thread; i < s; i += kThreads) skip[i] += total(more, second, s, i);
    }
    __syncthreads();
    for (int64_t i = thread; i < s; i += kThreads) skip[i] = skip[i] < T(0) ? T(0) : skip[i];
    __syncthreads();
    int64_t parts = partial_sums(skip, s + 1, reinterpret_cast<const T*>(a.hidden), a.heads, more);
    __syncthreads();
    for (int64_t i = thread; i < a.heads; i += kThreads) {
      const T value = total(more, parts, a.heads, i);
      hidden[i] = value < T(0) ? T(0) : value;
    }
    __syncthreads();
    parts = partial_sums(hidden, a.heads + 1, reinterpret_cast<const T*>(a.output), a.padded_levels, more);
    __syncthreads();
    for (int64_t i = thread; i < a.levels; i += kThreads) {
      out[i] = total(more, parts, a.padded_levels, i);
      if (a.logits) reinterpret_cast<T*>(a.logits)[at * a.levels + i] = out[i];
    }
    __syncthreads();
    const int64_t code = draw(out, a.levels, a.temperature, a.uniforms[at], weights, groups);
    __syncthreads();  // all have read what the next step overwrites
    if (thread == 0) {
      a.codes[at] = code;
      for (int64_t k = 0; k + 1 < a.taps; ++k) recent[k] = recent[k + 1];
      recent[a.taps - 1] = code;
    }
    __syncthreads();
  }
}

}  // namespace fastflow
