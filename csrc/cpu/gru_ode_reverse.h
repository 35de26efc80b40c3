// The parts of the gradient of GRU-ODE-Bayes: where those of the parameters lie, an evaluation and a jump backwards.
#pragma once

#include "gru_ode.h"

namespace fastflow {
namespace gru {

// --- gradients of the parameters ------------------------------------------------------------------------

// Where the gradients of all parameters lie: a Linear's as [out, padded in] and [padded out].
struct Layout {
  struct Part {
    int64_t weight, bias;
  };
  std::vector<Part> cell, input;
  Part hidden, predict, prep, ih[3], hh[3];
  int64_t size = 0;

  template <class T>
  explicit Layout(const Network<T>& net) {
    for (const auto& l : net.cell) cell.push_back(linear(l));
    for (const auto& l : net.input) input.push_back(linear(l));
    hidden = linear(net.hidden), predict = linear(net.predict);
    prep = {take(net.D * 4 * net.Q), take(net.D * net.Q)};
    for (int i = 0; i < 3; ++i) ih[i] = linear(net.ih[i]), hh[i] = linear(net.hh[i]);
  }

 private:
  int64_t take(int64_t n) { return size += padded(n), size - padded(n); }
  template <class T>
  Part linear(const Linear<T>& l) {
    const int64_t weight = take(l.out * padded(l.in));
    return {weight, take(l.out)};
  }
};

// of a Linear, for n rows: gy [n, padded out] and x [n, padded in]
template <class T>
void gather(const Linear<T>& l, int64_t n, const T* gy, const T* x, T* sums, const Layout::Part& part) {
  if (n == 0) return;
  const int64_t in = padded(l.in), out = padded(l.out);
  multiply(Product<T>{l.out, in, n, gy, 1, out, x, in, sums + part.weight, in, true});
  if (!l.bias.data()) return;
  T* b = sums + part.bias;
  for (int64_t first = 0; first < n; first += kRun)  // a sum of sums rounds less than one long sum
    for (int64_t j = 0; j < out; j += kPad) {
      T sum[kPad] = {};
      for (int64_t i = first; i < std::min(n, first + kRun); ++i)
#pragma omp simd
        for (int64_t c = 0; c < kPad; ++c) sum[c] += gy[i * out + j + c];
#pragma omp simd
      for (int64_t c = 0; c < kPad; ++c) b[j + c] += sum[c];
    }
}

// --- backward of an evaluation, in place ------------------------------------------------------------------

template <class T>
void rate_backward(int64_t n, const T* gk, const T* h, T* u, T* rest, T* gh) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T ga, gb, g;
    full_rate_backward(gk[i], u[i], rest[i], h[i], ga, gb, g);
    u[i] = ga, rest[i] = gb, gh[i] = g;
  }
}

template <class T>
void minimal_backward(int64_t n, const T* gk, const T* h, const T* gate, T* u, T* rest, T* gh) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T ga, gz, g;
    minimal_rate_backward(gk[i], u[i], gate[i], h[i], ga, gz, g);
    u[i] = ga, rest[i] = gz, gh[i] = g;
  }
}

// through g = gate h; the gate's gradient may have another part
template <bool more, class T>
void enter_backward(int64_t n, const T* gg, const T* h, const T* rest, T* gate, T* gh) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T r = gate[i];
    gh[i] += gg[i] * r;
    gate[i] = (gg[i] * h[i] + (more ? rest[i] : T(0))) * r * (T(1) - r);
  }
}

// gh from gk; e.gate, e.rest and e.u (and e.x, e.gq) become gradients. `scratch` [n, H].
template <class T>
void pull(const Network<T>& net, int64_t n, const Evaluation<T>& e, const T* gk, T* scratch, T* gh) {
  const int64_t size = n * net.h_row();
  const bool full = net.kind == CellKind::full;
  if (full)
    rate_backward(size, gk, e.y, e.u, e.rest, gh);
  else
    minimal_backward(size, gk, e.y, e.gate, e.u, e.rest, gh);
  net.cell.back().pull(n, e.u, scratch, false);
  if (full)
    enter_backward<false>(size, scratch, e.y, e.rest, e.gate, gh);
  else
    enter_backward<true>(size, scratch, e.y, e.rest, e.gate, gh);
  net.cell[0].pull(n, e.gate, gh, true);
  if (full) net.cell[1].pull(n, e.rest, gh, true);
  if (!net.imputes) return;
  net.input[0].pull(n, e.gate, e.x, false);
  if (full) net.input[1].pull(n, e.rest, e.x, true);
  net.input.back().pull(n, e.u, e.x, true);
  net.observe_backward(n, e.x, e.q, nullptr, nullptr, e.gq, gh);
}

// n evaluations after pull(). x has become its gradient, of which the input's weights need the value: see `inputs`
template <class T>
void gather(const Network<T>& net, int64_t n, const Evaluation<T>& e, const T* inputs, T* sums, const Layout& at) {
  const size_t last = net.cell.size() - 1;
  gather(net.cell[0], n, e.gate, e.y, sums, at.cell[0]);
  if (last == 2) gather(net.cell[1], n, e.rest, e.y, sums, at.cell[1]);
  gather(net.cell[last], n, e.u, e.g, sums, at.cell[last]);
  if (!net.imputes) return;
  gather(net.input[0], n, e.gate, inputs, sums, at.input[0]);
  if (last == 2) gather(net.input[1], n, e.rest, inputs, sums, at.input[1]);
  gather(net.input[last], n, e.u, inputs, sums, at.input[last]);
  gather(net.predict, n, e.x, e.q, sums, at.predict);
  gather(net.hidden, n, e.gq, e.y, sums, at.hidden);
}

// --- backward of a jump -----------------------------------------------------------------------------------

template <class T>
void land_backward(int64_t n, const T* g, const T* h, T* r, T* z, T* m, T* hn, T* gh) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T a = r[i], b = z[i], c = m[i], d = hn[i];
    gh[i] = jump_backward(g[i], a, b, c, d, h[i]);
    r[i] = a, z[i] = b, m[i] = c, hn[i] = d;
  }
}

// From the gradient of a row's x, behind its ReLU: adds to that of the prediction and to the weights', makes gvalues.
template <class T>
void prepare_backward(const Network<T>& net, const T* p, const T* values, const T* masks, const T* x, T* gx, T* gp,
                      T* gvalues, T* gweight, T* gbias) {
  const int64_t D = net.D, Q = net.Q;
  for (int64_t d = 0; d < D; ++d) {
    gvalues[d] = T(0);
    if (masks[d] == T(0)) continue;
    const Features<T> f = features(values[d], p[d], p[D + d]);
    const T* w = net.prep + d * 4 * Q;
    T *g = gx + d * Q, *gw = gweight + d * 4 * Q, *gb = gbias + d * Q;
    T sum[4] = {};
    for (int64_t i = 0; i < Q; ++i) {
      const T a = x[d * Q + i] == T(0) ? T(0) : g[i];
      gb[i] += a;
      gw[i] += a * f.value, gw[Q + i] += a * f.mean, gw[2 * Q + i] += a * f.logvar, gw[3 * Q + i] += a * f.error;
      for (int64_t k = 0; k < 4; ++k) sum[k] += a * w[k * Q + i];
    }
    const T through = sum[3] * f.inverse;
    gvalues[d] = sum[0] + through;
    gp[d] += sum[1] - through;
    gp[D + d] += sum[2] - T(0.5) * sum[3] * f.error;
  }
}

}  // namespace gru
}  // namespace fastflow
