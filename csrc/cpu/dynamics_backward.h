// The reverse of dynamics.h: from the gradients of a block's values and tangents to those of x and of the parameters,
// which add up over the blocks of a chunk in the chunk's own memory, in a fixed order.
#pragma once

#include "dynamics.h"

namespace fastflow {

// Gradients of a chunk: for every layer W, [out, padded in] ([in, padded out] of the first layer: its input may be
// narrow), then vectors [padded out] of v, drift and, with gates, of what the gate is the sigmoid of: its bias, its
// weight.
template <class T>
struct Partials {
  std::vector<int64_t> offset;
  int64_t size = 0, chunks, blocks, vectors;  // blocks of a chunk
  std::vector<T> memory;

  Partials(const Dynamics<T>& net, int64_t all_blocks) : vectors(net.gated ? 4 : 2) {
    for (int64_t l = 0; l < net.depth(); ++l) {
      const Layer<T>& layer = net.layers[l];
      offset.push_back(size);
      size += l == 0 ? layer.in * padded(layer.out) : layer.out * padded(layer.in);
      offset.push_back(size);
      size += vectors * padded(layer.out);
    }
    const Groups groups(all_blocks);
    blocks = groups.size, chunks = groups.count;
    memory.assign(chunks * size, T(0));
  }
  T* of(int64_t chunk) { return memory.data() + chunk * size; }
  const T* of(int64_t chunk) const { return memory.data() + chunk * size; }
  int64_t weight(int64_t l) const { return offset[2 * l]; }
  int64_t vector(int64_t l) const { return offset[2 * l + 1]; }

  // the chunks of unit i of layer l added up: its row of W to `row`, its vectors to v[4]
  void total(const Layer<T>& layer, int64_t l, int64_t i, T* row, double* v) const {
    const int64_t unit = l == 0 ? 1 : padded(layer.in), input = l == 0 ? padded(layer.out) : 1;
    std::fill(row, row + layer.in, T(0));
    std::fill(v, v + 4, 0.0);
    for (int64_t c = 0; c < chunks; ++c) {
      const T* from = of(c) + weight(l) + i * unit;
      for (int64_t k = 0; k < layer.in; ++k) row[k] += from[k * input];
      for (int64_t j = 0; j < vectors; ++j) v[j] += double(of(c)[vector(l) + j * padded(layer.out) + i]);
    }
  }
};

// C += A B, threads sharing out the panels of C's columns and strips of its rows
template <class T>
void multiply_add(Product<T> p, bool parallel) {
  p.add = true;
  if (!parallel) return multiply(p);
  const int64_t panels = (p.columns + kPanel - 1) / kPanel, strips = (p.rows + kStripRows - 1) / kStripRows;
  parallel_for(panels * strips, true, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / strips * kPanel, row = task % strips * kStripRows;
      for (int64_t k = 0; k < p.depth; k += kDepth)
        multiply(Product<T>{std::min(kStripRows, p.rows - row), std::min(kPanel, p.columns - first),
                            std::min(kDepth, p.depth - k), p.a + row * p.a_row + k * p.a_depth, p.a_row, p.a_depth,
                            p.b + first + k * p.b_row, p.b_row, p.c + row * p.c_row + first, p.c_row, true});
    }
  });
}

// backward_rows of the last layer, gate (W y + v) + drift without an activation
template <class T>
void backward_last(const T* kept, const T* u, const T* gate, T* g, int64_t tangents, int64_t n, int64_t step, T* ga,
                   T* gi) {
  for_vectors(n, [&](int64_t first, auto count) {
    T total[kPad];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = first + i;
      ga[at] += g[at];
      total[i] = g[at] * u[at];
      g[at] *= gate[at];
    }
    for (int64_t s = 1; s <= tangents; ++s) {
      const T* k = kept + s * step + first;
      T* gs = g + s * step + first;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        total[i] += gs[i] * k[i];
        gs[i] *= gate[first + i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) gi[first + i] += (T(1) - gate[first + i]) * total[i];
  });
}

// Gradients g [count, 1 + S, padded D] of the last layer's values and tangents become gx [count, D]. Buffers: two of
// count (1 + S) widest, g may be the first; three where inputs are kept. Without sums the parameters have no gradient.
template <Activation kind, class T>
void backward_block(const Dynamics<T>& net, const Moments<T>& now, int64_t count, int64_t tangents, const T* x,
                    const Kept<T>& kept, T* g, T* const* buffers, const Partials<T>& sums, T* sum, T* gx) {
  const int64_t rows = 1 + tangents, last = net.depth() - 1;
  T* next = buffers[g == buffers[0]];
  for (int64_t l = last; l >= 0; --l) {
    const Layer<T>& layer = net.layers[l];
    const int64_t in = padded(layer.in), out = padded(layer.out);

    // through the activation, or through the last layer's gate alone
    for_columns(out, net.wide, [&](int64_t first, int64_t n) {
      T ga[kColumns] = {}, gi[kColumns] = {};
      const auto fold = [&](int64_t b) {
        if (!sum) return;
        const Affine<T> f = now.of(b, net.offset[l] + first);
        const T t = now.t[now.step ? b : 0];
        T* v = sum + sums.vector(l) + first;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          v[i] += net.gated ? f.gate[i] * ga[i] : ga[i];
          v[out + i] += t * ga[i];
          if (net.gated) v[2 * out + i] += gi[i], v[3 * out + i] += t * gi[i];
          ga[i] = T(0), gi[i] = T(0);
        }
      };
      for (int64_t b = 0; b < count; ++b) {
        const int64_t place = b * rows * out + first;
        const T* gate = now.of(b, net.offset[l] + first).gate;
        const T* u = net.gated ? kept.before[l] + b * out + first : nullptr;
        if (l < last && net.gated)
          backward_rows<kind, true>(kept.rows[l] + place, u, gate, g + place, tangents, n, out, out, ga, gi);
        else if (l < last)
          backward_rows<kind, false>(kept.rows[l] + place, u, gate, g + place, tangents, n, out, out, ga, gi);
        else if (net.gated)
          backward_last(kept.rows[l] + place, u, gate, g + place, tangents, n, out, ga, gi);
        else
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) ga[i] += g[place + i];
        if (now.step) fold(b);
      }
      if (!now.step) fold(0);
    });

    if (l == 0) {
      if (sum)
        multiply_add(Product<T>{layer.in, out, rows * count, x, 1, layer.in, g, out, sum + sums.weight(0), out},
                     net.wide);
      multiply(count, g, rows * out, layer.backward, next, net.wide);  // the probes have no gradient
      for (int64_t b = 0; b < count; ++b) std::copy_n(next + b * in, layer.in, gx + b * layer.in);
      return;
    }
    if (sum) {
      const T* y = kept.rows[l - 1];
      if (keeps_input(kind)) {
        y = buffers[2];
        for_columns(in, net.wide, [&](int64_t first, int64_t n) {
          for (int64_t i = first; i < count * rows * in; i += rows * in)
            again_rows<kind>(kept.rows[l - 1] + i, buffers[2] + i, tangents, n, in);
        });
      }
      multiply_add(Product<T>{layer.out, in, rows * count, g, 1, out, y, in, sum + sums.weight(l), in}, net.wide);
    }
    multiply(rows * count, g, out, layer.backward, next, net.wide);
    std::swap(g, next);
  }
}

// The chunks added up and written as gradients of the raw parameters.
template <class T>
void raw_gradients(const Dynamics<T>& net, const Partials<T>& sums, const std::vector<View>& graw) {
  const size_t each = graw.size() / net.layers.size();
  std::vector<T> row(net.widest);
  for (int64_t l = 0; l < net.depth(); ++l) {
    const Parameters g(&graw[l * each], net.parameters[l].kind);
    for (int64_t i = 0; i < g.out; ++i) {
      double v[4];
      sums.total(net.layers[l], l, i, row.data(), v);
      for (int64_t k = 0; k < g.in; ++k) at<T>(g.weight, i, g.skip() + k) = row[k];
      at<T>(g.bias, i) = T(v[0]);
      if (g.kind == Kind::concat) at<T>(g.weight, i) = T(v[1]);
      if (g.kind != Kind::concat_squash) continue;
      at<T>(g.hyper, i) = T(v[1]), at<T>(g.gate_bias, i) = T(v[2]), at<T>(g.gate_weight, i) = T(v[3]);
    }
  }
}

}  // namespace fastflow
