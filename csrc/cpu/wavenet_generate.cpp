// Generation by a WaveNet, sample by sample: codes -> embedding -> all layers -> head -> the next code, many samples of
// many streams in one call. A layer's past inputs lie in a ring of (w - 1) d rows, so a sample costs the same at any
// time. One stream is bound by reading the weights from L2; the streams of a thread share them.
// What a stream gets depends neither on the streams beside it nor on the number of threads.
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "module.h"
#include "parallel.h"
#include "rows.h"
#include "wavenet.h"

namespace fastflow {
namespace {

constexpr int64_t kStreams = 24;               // that go through a layer together
constexpr int64_t kParallelWork = 256 * 1024;  // multiply-adds below which a second thread costs more than it gives

// c += a b for few rows: columns in wider tiles, so that enough multiply-adds are under way. Same sums as multiply().
template <int rows, class T>
void wide_tiles(const Product<T>& p) {
  constexpr int64_t width = 8 * Vector<T>::lanes;
  int64_t j = 0;
  for (; j + width <= p.columns; j += width)
    tile<rows, 8>(p.depth, p.a, p.a_row, p.a_depth, p.b + j, p.b_row, p.c + j, p.c_row, true);
  columns<kTileVectors>(p, j);
}

template <class T>
void add_rows(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, const T* b, T* c) {
  const Product<T> p = {rows, columns, depth, a, a_row, 1, b, columns, c, columns, true};
  if (rows == 1)
    wide_tiles<1>(p);
  else if (rows == 2)
    wide_tiles<2>(p);
  else
    multiply(p);
}

// The first code k with weight(0) + ... + weight(k) > u * total, weight = e^{(logit - max) / temperature}; at
// temperature 0 the first of the largest logits. -1 where there is a NaN. `weights` is scratch.
template <class T>
int64_t draw(const T* logits, int64_t n, double temperature, double u, T* weights) {
  constexpr int64_t group = 16;
  T most = -infinity<T>();
  bool valid = true;
  for (int64_t k = 0; k < n; ++k) most = logits[k] > most ? logits[k] : most, valid = valid && logits[k] == logits[k];
  if (!valid || most == infinity<T>() || most == -infinity<T>()) return -1;
  if (temperature == 0) return std::find(logits, logits + n, most) - logits;
  const T inverse = T(1 / temperature);
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) weights[k] = exp_nonpositive((logits[k] - most) * inverse);
  const auto sum = [&](int64_t first) {
    double s = 0;
    for (int64_t k = first; k < std::min(n, first + group); ++k) s += double(weights[k]);
    return s;
  };
  double total = 0;
  for (int64_t first = 0; first < n; first += group) total += sum(first);
  const double target = u * total;
  double before = 0;
  int64_t first = 0;
  for (double s; first + group < n && before + (s = sum(first)) <= target; first += group) before += s;
  for (int64_t k = first; k < n; ++k)
    if ((before += double(weights[k])) > target) return k;
  for (int64_t k = n - 1; k > 0; --k)  // u * total was rounded up to the total
    if (weights[k] > T(0)) return k;
  return 0;
}

template <class T>
struct Generator {
  const Layers<T>& net;
  const T *embedding, *hidden, *output,
      *context;  // [w, V, R]; [S + 1, H], [H + 1, V'], last rows are biases; [B, n, Cc]
  int64_t levels, taps, heads, padded_levels;
  const double* uniforms;   // [B, n]
  T *past, *logits;         // [B, P, R]; [B, n, V] or nothing
  int64_t *recent, *codes;  // [B, w] the last inputs, -1 before the first; [B, n]
  int64_t steps, position;
  double temperature;

  // samples [begin, end): all their steps
  bool run(int64_t begin, int64_t end) const {
    const int64_t m = end - begin, r = net.residual, d = net.gated, z_row = net.z_row(), c = net.context;
    const int64_t s_row = net.skipped + kPad, h_row = heads + kPad;
    std::vector<T> memory(m * (r + 2 * d + z_row + net.skipped + s_row + heads + h_row + 2 * padded_levels));
    T *h = memory.data(), *acts = h + m * r, *z = acts + m * 2 * d, *skip = z + m * z_row;
    T *s = skip + m * net.skipped, *sum = s + m * s_row, *a = sum + m * heads, *out = a + m * h_row;
    T* weights = out + m * padded_levels;
    for (int64_t j = 0; j < m; ++j) z[j * z_row + d] = s[j * s_row + net.skipped] = a[j * h_row + heads] = T(1);
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t now = position + step;
      for (int64_t j = 0; j < m; ++j) {
        std::fill_n(h + j * r, r, T(0));
        for (int64_t i = 0; i < taps; ++i) {
          const int64_t code = recent[(begin + j) * taps + i];
          if (code < 0) continue;
          const T* row = embedding + (i * levels + code) * r;
#pragma omp simd
          for (int64_t k = 0; k < r; ++k) h[j * r + k] += row[k];
        }
      }
      std::fill_n(skip, m * net.skipped, T(0));
      for (int64_t l = 0; l < net.depth; ++l) {
        const int64_t rows = net.history(net.dilation[l]), ring_row = net.past * r;
        T* ring = past + (begin * net.past + net.start[l]) * r;
        if (l + 1 < net.depth) prefetch(begin, m, l + 1, now);
        for (int64_t j = 0; j < m; ++j) std::copy_n(net.bias_of(l, begin + j), 2 * d, acts + j * 2 * d);
        for (int64_t i = 0; i + 1 < net.width; ++i)
          add_rows(m, 2 * d, r, ring + (now + i * net.dilation[l]) % rows * r, ring_row, net.gate_of(l, i), acts);
        add_rows(m, 2 * d, r, h, r, net.gate_of(l, net.width - 1), acts);
        if (context)
          add_rows(m, 2 * d, c, context + (begin * steps + step) * c, steps * c, net.gate_of(l, net.width), acts);
        for (int64_t j = 0; j < m; ++j) {
          if (rows > 0) std::copy_n(h + j * r, r, ring + j * ring_row + now % rows * r);
          const T* from = acts + j * 2 * d;
          T* to = z + j * z_row;
#pragma omp simd
          for (int64_t i = 0; i < d; ++i) {
            const Gate<T> f = gate(from[i], from[d + i]);
            to[i] = f.tanh * f.sigmoid;
          }
        }
        add_rows(m, r, d + 1, z, z_row, net.residual_of(l), h);
        add_rows(m, net.skipped, d + 1, z, z_row, net.skip_of(l), skip);
      }
      rectify(skip, m, net.skipped, s, s_row);
      std::fill_n(sum, m * heads, T(0));
      add_rows(m, heads, net.skipped + 1, s, s_row, hidden, sum);
      rectify(sum, m, heads, a, h_row);
      std::fill_n(out, m * padded_levels, T(0));
      add_rows(m, padded_levels, heads + 1, a, h_row, output, out);
      for (int64_t j = 0; j < m; ++j) {
        const int64_t b = begin + j, at = b * steps + step;
        const T* from = out + j * padded_levels;
        if (logits) std::copy_n(from, levels, logits + at * levels);
        codes[at] = draw(from, levels, temperature, uniforms[at], weights);
        if (codes[at] < 0) return false;
        int64_t* last = recent + b * taps;
        std::copy(last + 1, last + taps, last);
        last[taps - 1] = codes[at];
      }
    }
    return true;
  }

  // the rows of the rings that layer l is going to read: each lies in memory of its own
  void prefetch(int64_t begin, int64_t m, int64_t l, int64_t now) const {
    const int64_t rows = net.history(net.dilation[l]);
    for (int64_t b = begin; b < begin + m; ++b)
      for (int64_t i = 0; i + 1 < net.width; ++i) {
        const T* row = past + (b * net.past + net.start[l] + (now + i * net.dilation[l]) % rows) * net.residual;
        for (int64_t k = 0; k < net.residual; k += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + k);
      }
  }

  static void rectify(const T* from, int64_t m, int64_t n, T* to, int64_t to_row) {
    for (int64_t j = 0; j < m; ++j)
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const T x = from[j * n + i];
        to[j * to_row + i] = x < T(0) ? T(0) : x;  // NaN stays
      }
  }
};

// --- what Python sees ---------------------------------------------------------------------------------
// embedding [w, V, R]; the stack as in wavenet.cpp; hidden [S + 1, H], output [H + 1, V padded]; context [B, n, Cc];
// uniforms [B, n] float64. Changed: past [B, P, R] and recent [B, w]. Made: codes [B, n], logits [B, n, V] if given.

void wavenet_generate(const View& embedding, const View& gate, const View& bias, const View& residual, const View& skip,
                      const View& hidden, const View& output, const View& context, const View& past, const View& recent,
                      const View& uniforms, const std::vector<int64_t>& dilations, int64_t position, double temperature,
                      const View& codes, const View& logits) {
  with_accumulator(past.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t samples = codes.size[0], steps = codes.size[1], features = context ? context.size[2] : 0;
    const Layers<T> net(samples, past.size[2], features, gate, bias, residual, skip, dilations);
    const int64_t taps = embedding.size[0], levels = embedding.size[1], heads = hidden.size[1];
    if (heads % kPad != 0 || output.size[1] != padded(levels) || position < 0 || taps < 1)
      throw std::invalid_argument("the head of a WaveNet must be padded");
    if (recent.dtype != DType::i64 || codes.dtype != DType::i64 || uniforms.dtype != DType::f64)
      throw std::invalid_argument("codes: expected int64, and uniforms of float64");
    const Generator<T> of = {net,
                             dense<T>(embedding, taps, levels, net.residual, "embedding"),
                             dense<T>(hidden, net.skipped + 1, heads, 1, "hidden"),
                             dense<T>(output, heads + 1, padded(levels), 1, "output"),
                             dense<T>(context, samples, steps, features, "context"),
                             levels,
                             taps,
                             heads,
                             padded(levels),
                             dense<double>(uniforms, samples, steps, 1, "uniforms"),
                             dense<T>(past, samples, net.past, net.residual, "past"),
                             dense<T>(logits, samples, steps, levels, "logits"),
                             dense<int64_t>(recent, samples, taps, 1, "recent"),
                             dense<int64_t>(codes, samples, steps, 1, "codes"),
                             steps,
                             position,
                             temperature};
    for (int64_t i = 0; i < samples * taps; ++i)
      if (of.recent[i] >= levels) throw std::invalid_argument("recent: a code is beyond the levels");
    std::atomic<bool> valid = true;
    parallel_for(samples, steps * samples * net.work() >= kParallelWork, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b += kStreams)
        if (!of.run(b, std::min(end, b + kStreams))) valid = false;
    });
    if (!valid) throw std::domain_error("the logits of a WaveNet are not finite");
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(wavenet_generate) {
  namespace py = pybind11;
  m.def("wavenet_generate", &fastflow::wavenet_generate, py::call_guard<py::gil_scoped_release>());
}
