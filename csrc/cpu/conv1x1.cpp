// Invertible 1x1 convolution on the CPU: y[b, :, s] = M x[b, :, s] + c for every position.
// All positions of all samples are dealt out in tiles of 64. A tile is a small matrix product: planar tiles
// [C][64] (positions contiguous, as in NCHW) are multiplied by M from the left, rows [64][C] (channels contiguous, as
// in channels_last and in vectors) by its transpose from the right. A tile is computed where it lies if it lies so,
// and in a copy in L1 otherwise. Bound by memory bandwidth for small C, by arithmetic from C = 48 on.
// Saved for backward: the inputs.
#include <algorithm>
#include <vector>

#include "module.h"
#include "product.h"
#include "rows.h"

namespace fastflow {
namespace {

constexpr int64_t kPositions = 64;    // positions of a tile
constexpr int64_t kMinTiles = 4;      // tiles summed into one partial gradient of M, at least
constexpr int64_t kMaxPartials = 64;  // partial gradients of M, at most

struct Tile {
  int64_t first, count;  // positions b * S + s
};

Tile tile_at(int64_t k, int64_t positions) {
  return {k * kPositions, std::min(kPositions, positions - k * kPositions)};
}

// How far it is from one position to the next, across samples; 0 if that differs.
int64_t step(const View& v) {
  if (v.size[2] == 1) return v.stride[0];
  return v.size[0] == 1 || v.stride[0] == v.size[2] * v.stride[2] ? v.stride[2] : 0;
}

bool rows_of_channels(const View& v) { return v.size[2] == 1 || (v.stride[1] < v.stride[2] && v.size[1] > 1); }

// f(offset of the first, step, count, number within the tile) for stretches of positions that are a step apart
template <class F>
void each_stretch(const View& v, const Tile& tile, const F& f) {
  if (const int64_t across = step(v)) return f(tile.first * across, across, tile.count, int64_t(0));
  const int64_t size = v.size[2];
  for (int64_t k = 0; k < tile.count;) {
    const int64_t b = (tile.first + k) / size, s = (tile.first + k) % size;
    const int64_t n = std::min(size - s, tile.count - k);
    f(b * v.stride[0] + s * v.stride[2], v.stride[2], n, k);
    k += n;
  }
}

// copy(element, place in the buffer) over a tile, the buffer being [C][64] or, by rows, [64][C]
template <bool by_rows, class S, class Copy>
void each_element(const View& v, const Tile& tile, const Copy& copy) {
  const int64_t channels = v.size[1], between = v.stride[1];
  S* data = reinterpret_cast<S*>(v.data);
  each_stretch(v, tile, [&](int64_t offset, int64_t step, int64_t n, int64_t k) {
    const auto some = [&](int64_t from, int64_t stride, int64_t count, int64_t to) {
      run(data + offset + from, stride, to, count, copy);
    };
    if (!by_rows)
      for (int64_t c = 0; c < channels; ++c) some(c * between, step, n, c * kPositions + k);
    else if (between == 1 && step == channels)
      some(0, 1, n * channels, k * channels);
    else
      for (int64_t i = 0; i < n; ++i) some(i * step, between, channels, (k + i) * channels);
  });
}

template <bool by_rows, class T>
void load(const View& v, const Tile& tile, T* buffer) {
  with_type(v.dtype, [&](auto type) {
    using S = decltype(type);
    each_element<by_rows, const S>(v, tile, [=](const S& element, int64_t k) { buffer[k] = T(widen(element)); });
  });
}

template <bool by_rows, class T>
void store(const View& v, const Tile& tile, const T* buffer) {
  with_type(v.dtype, [&](auto type) {
    using S = decltype(type);
    if constexpr ((sizeof(S) == 8) == (sizeof(T) == 8))
      each_element<by_rows, S>(v, tile, [=](S& element, int64_t k) { narrow(buffer[k], element); });
    else
      throw std::invalid_argument("float64 outputs belong to float64 computations, and only to them");
  });
}

// M (or its transpose) and c, laid out for the product.
template <bool by_rows, class T>
struct Map {
  int64_t channels;
  std::vector<T> matrix, bias;  // planar: M [C][C]; by rows: its transpose [C][padded C]

  Map(const View& weight, const View& c, bool transpose) : channels(weight.size[0]) {
    const int64_t width = by_rows ? padded(channels) : channels;
    matrix.resize(channels * width);
    with_type(weight.dtype, [&](auto type) {
      const auto* data = reinterpret_cast<const decltype(type)*>(weight.data);
      for (int64_t i = 0; i < channels; ++i)
        for (int64_t j = 0; j < channels; ++j) {
          const T value = T(widen(data[transpose ? weight.offset(j, i, 0) : weight.offset(i, j, 0)]));
          matrix[by_rows ? j * width + i : i * width + j] = value;
        }
    });
    if (!c) return;
    bias.resize(padded(channels));
    with_type(c.dtype, [&](auto type) {
      const auto* data = reinterpret_cast<const decltype(type)*>(c.data);
      for (int64_t i = 0; i < channels; ++i) bias[i] = T(widen(data[i * c.stride[0]]));
    });
  }

  Start<T> start() const { return {bias.empty() ? nullptr : bias.data(), by_rows ? 0 : 1, by_rows ? 1 : 0}; }
};

template <class T>
std::vector<T> tile_buffer(int64_t channels) {
  return std::vector<T>(channels * kPositions + kPad);
}

// y = M x + c over one tile
template <bool by_rows, class T>
void apply(const Map<by_rows, T>& map, const View& x, const View& y, const Tile& tile, T* from, T* to) {
  const int64_t channels = map.channels;
  const T* data = reinterpret_cast<const T*>(x.data);
  const bool same_type = x.dtype == dtype_of<T>();
  if constexpr (by_rows) {
    Left<T> left = {from, channels, 1};
    if (same_type && step(x))
      left = {data + tile.first * step(x), step(x), x.stride[1]};
    else
      load<true>(x, tile, from);
    product<false>(tile.count, channels, channels, left, map.matrix.data(), padded(channels), map.start(), to,
                   channels);
    store<true>(y, tile, to);
  } else {
    // one whole tile inside of a sample is read and written where it lies
    const int64_t b = tile.first / x.size[2], s = tile.first % x.size[2];
    const bool inside = tile.count == kPositions && s + kPositions <= x.size[2];
    const bool direct_x = inside && same_type && x.stride[2] == 1;
    const bool direct_y = inside && y.dtype == dtype_of<T>() && y.stride[2] == 1;
    if (!direct_x) load<false>(x, tile, from);
    product<false>(channels, kPositions, channels, Left<T>{map.matrix.data(), channels, 1},
                   direct_x ? data + x.offset(b, 0, s) : from, direct_x ? x.stride[1] : kPositions, map.start(),
                   direct_y ? reinterpret_cast<T*>(y.data) + y.offset(b, 0, s) : to,
                   direct_y ? y.stride[1] : kPositions);
    if (!direct_y) store<false>(y, tile, to);
  }
}

int64_t tiles_of(const View& x) { return (x.size[0] * x.size[2] + kPositions - 1) / kPositions; }

template <bool by_rows, class T>
void forward(const View& x, const View& weight, const View& bias, const View& y) {
  const Map<by_rows, T> map(weight, bias, false);
  const int64_t positions = x.size[0] * x.size[2];
  parallel_for(tiles_of(x), positions * x.size[1] >= kParallelElements, [&](int64_t begin, int64_t end) {
    std::vector<T> from = tile_buffer<T>(x.size[1]), to = tile_buffer<T>(x.size[1]);
    for (int64_t k = begin; k < end; ++k) apply(map, x, y, tile_at(k, positions), from.data(), to.data());
  });
}

// --- backward: gx = M^T gy, gM = sum gy x^T, gc = sum gy ---------------------------------------------

// Sums over some tiles: gM [C][padded C] and gc [C].
template <class T>
struct Partial {
  std::vector<T> weight;
  std::vector<double> bias;
  void resize(int64_t channels) {
    weight.resize(channels * padded(channels));
    bias.resize(channels);
  }
};

// sum += the rows of a tile, in groups of eight: a sum of groups rounds less than one long sum
template <class T>
void add_rows(const T* rows, int64_t n, int64_t count, double* sum) {
  constexpr int64_t some = 64, group = 8;
  for (int64_t c = 0; c < n; c += some) {
    const int64_t width = std::min(some, n - c);
    T tile[some] = {};
    for (int64_t k = 0; k < count; k += group) {
      T part[some] = {};
      for (int64_t r = k; r < std::min(count, k + group); ++r)
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) part[i] += rows[r * n + c + i];
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) tile[i] += part[i];
    }
    for (int64_t i = 0; i < width; ++i) sum[c + i] += double(tile[i]);
  }
}

template <bool by_rows, class T>
void add_tile(Partial<T>& sum, int64_t channels, int64_t count, const T* gy, const T* x) {
  const Left<T> left = by_rows ? Left<T>{gy, 1, channels} : Left<T>{gy, kPositions, 1};
  product<true>(channels, channels, count, left, x, channels, Start<T>(), sum.weight.data(), padded(channels));
  double* bias = sum.bias.data();
  if constexpr (by_rows)
    add_rows(gy, channels, count, bias);
  else
    for (int64_t c = 0; c < channels; ++c) bias[c] += ordered_sum(gy + c * kPositions, count);
}

// The partial sums in their order.
template <class T>
void finish(const std::vector<Partial<T>>& partials, int64_t channels, const View& gweight, const View& gbias) {
  for (int64_t i = 0; i < channels; ++i) {
    for (int64_t j = 0; j < channels; ++j) {
      double total = 0;
      for (const Partial<T>& p : partials) total += p.weight[i * padded(channels) + j];
      reinterpret_cast<T*>(gweight.data)[gweight.offset(i, j, 0)] = T(total);
    }
    double total = 0;
    for (const Partial<T>& p : partials) total += p.bias[i];
    reinterpret_cast<T*>(gbias.data)[i * gbias.stride[0]] = T(total);
  }
}

template <bool by_rows, class T>
void backward(const View& x, const View& weight, const View& gy, const View& gx, const View& gweight,
              const View& gbias) {
  const Map<by_rows, T> map(weight, View(), true);
  const int64_t channels = x.size[1], positions = x.size[0] * x.size[2], tiles = tiles_of(x);
  const int64_t each = std::max(kMinTiles, (tiles + kMaxPartials - 1) / kMaxPartials);
  std::vector<Partial<T>> partials((tiles + each - 1) / each);
  parallel_for(partials.size(), positions * channels >= kParallelElements, [&](int64_t begin, int64_t end) {
    std::vector<T> g = tile_buffer<T>(channels), rows = tile_buffer<T>(channels), to = tile_buffer<T>(channels);
    for (int64_t p = begin; p < end; ++p) {
      partials[p].resize(channels);
      for (int64_t k = p * each; k < std::min(tiles, (p + 1) * each); ++k) {
        const Tile tile = tile_at(k, positions);
        load<by_rows>(gy, tile, g.data());
        load<true>(x, tile, rows.data());
        if constexpr (by_rows)
          product<false>(tile.count, channels, channels, Left<T>{g.data(), channels, 1}, map.matrix.data(),
                         padded(channels), Start<T>(), to.data(), channels);
        else
          product<false>(channels, kPositions, channels, Left<T>{map.matrix.data(), channels, 1}, g.data(), kPositions,
                         Start<T>(), to.data(), kPositions);
        store<by_rows>(gx, tile, to.data());
        add_tile<by_rows>(partials[p], channels, tile.count, g.data(), rows.data());
      }
    }
  });
  finish(partials, channels, gweight, gbias);
}

template <class T>
T scalar(const View& v) {
  T value = 0;
  with_type(v.dtype, [&](auto type) { value = T(widen(*reinterpret_cast<const decltype(type)*>(v.data))); });
  return value;
}

void check(const View& x, const View& weight) {
  if (weight.size[0] != x.size[1] || weight.size[1] != x.size[1])
    throw std::invalid_argument("the weight does not have as many rows and columns as x has channels");
}

template <class F>
void with_layout(const View& x, const F& f) {
  with_accumulator(x.dtype, [&](auto type) { with_bool(rows_of_channels(x), [&](auto rows) { f(rows, type); }); });
}

// --- what Python sees -------------------------------------------------------------------------------

void conv1x1_fwd(const View& x, const View& weight, const View& bias, const View& weight_logdet, const View& running,
                 const View& y, const View& logdet) {
  check(x, weight);
  with_layout(x, [&](auto rows, auto type) {
    using T = decltype(type);
    forward<rows(), T>(x, weight, bias, y);
    const T each = T(x.size[2]) * scalar<T>(weight_logdet);
    for (int64_t b = 0; b < x.size[0]; ++b) {
      const T start = running ? reinterpret_cast<const T*>(running.data)[b * running.stride[0]] : T(0);
      reinterpret_cast<T*>(logdet.data)[b * logdet.stride[0]] = start + each;
    }
  });
}

void conv1x1_bwd(const View& x, const View& weight, const View& gy, const View& glogdet, const View& gx,
                 const View& gweight, const View& gbias, const View& gweight_logdet) {
  check(x, weight);
  with_layout(x, [&](auto rows, auto type) {
    using T = decltype(type);
    backward<rows(), T>(x, weight, gy, gx, gweight, gbias);
    double total = 0;
    for (int64_t b = 0; b < x.size[0]; ++b)
      total += double(reinterpret_cast<const T*>(glogdet.data)[b * glogdet.stride[0]]);
    *reinterpret_cast<T*>(gweight_logdet.data) = T(total * double(x.size[2]));
  });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(conv1x1) {
  using namespace fastflow;
  namespace py = pybind11;
  m.def("conv1x1_fwd", &conv1x1_fwd, py::call_guard<py::gil_scoped_release>());
  m.def("conv1x1_bwd", &conv1x1_bwd, py::call_guard<py::gil_scoped_release>());
}
