// Invertible 1x1 convolution on a GPU for C <= 64: y[b, :, s] = M x[b, :, s] + c for every position. A block holds M in
// shared memory and takes tile after tile of positions: [C][P] is read in the order in which it lies, whatever that is,
// multiplied by register tiles of R rows and Q positions, and written back the same way. Backward makes gx and the
// block's share of gM and gc from one reading of x and gy; the shares are added up in a fixed order.
// Bound by memory bandwidth up to C = 24 or so, by the rate of multiply-adds above.
// The arguments are packed by fastflow/ops/cuda/conv1x1.py.
#include "launch.cuh"

namespace fastflow {

// [samples, channels, positions]; strides in elements
struct Image {
  char* data;
  int64_t sample, channel, position;
};

struct Conv {
  int64_t samples, channels_, positions;
  int64_t channels_inner;
  int64_t tile_, tiles;  // positions of a tile, a power of two; how many tiles
  char* weight;          // [C, C] of the accumulator's type
  int64_t weight_row, weight_column;

  // what is counted within a tile fits 32 bits
  FF_HD int channels() const { return int(channels_); }
  FF_HD int tile() const { return int(tile_); }
};

constexpr int kRows = 4;  // R: output channels of a thread; it also has 16 bytes of positions

template <class T>
FF_HD constexpr int positions_of_thread() {
  return 16 / int(sizeof(T));
}

// rows of a tile in shared memory are padded by one 16-byte access: its columns then lie in different banks
template <class T>
FF_HD int row_of_tile(int tile) {
  return tile + positions_of_thread<T>();
}

FF_HD int padded_channels(int channels) { return (channels + kRows - 1) / kRows * kRows; }

// f(channel, position within the tile, offset) for V elements at a time of tile k, by all threads
template <int V, class F>
FF_D void each_of_tile(const Conv& a, const Image& image, int64_t k, const F& f) {
  const unsigned across = a.channels_inner ? a.channels() : a.tile(), steps = a.tile() * a.channels() / V;
#pragma unroll 4
  for (unsigned n = threadIdx.x; n < steps; n += kThreads) {
    const unsigned row = n * V / across, column = n * V - row * across;
    const int c = a.channels_inner ? column : row, p = a.channels_inner ? row : column;
    const int64_t at = k * a.tile() + p, b = quotient(at, a.positions);
    if (b < a.samples) f(c, p, b * image.sample + c * image.channel + (at - b * a.positions) * image.position);
  }
}

template <class X, int V, class T>
FF_D void load_tile(const Conv& a, const Image& image, int64_t k, T* tile) {
  const int row = row_of_tile<T>(a.tile()), step = a.channels_inner ? row : 1;
  each_of_tile<V>(a, image, k, [&](int c, int p, int64_t offset) {
    T values[V];
    load<V>(reinterpret_cast<const X*>(image.data) + offset, true, 1, values);
#pragma unroll
    for (int v = 0; v < V; ++v) tile[c * row + p + v * step] = values[v];
  });
}

template <class X, int V, class T>
FF_D void store_tile(const Conv& a, const Image& image, int64_t k, const T* tile) {
  const int row = row_of_tile<T>(a.tile()), step = a.channels_inner ? row : 1;
  each_of_tile<V>(a, image, k, [&](int c, int p, int64_t offset) {
    T values[V];
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] = tile[c * row + p + v * step];
    store<V>(reinterpret_cast<X*>(image.data) + offset, true, 1, values);
  });
}

// from[j][i], zero beyond the channels: column i of the padded matrix is contiguous
template <class T>
FF_D void load_weight(const Conv& a, bool transposed, T* matrix) {
  const int width = padded_channels(a.channels());
  const T* weight = reinterpret_cast<const T*>(a.weight);
  for (int n = threadIdx.x; n < a.channels() * width; n += kThreads) {
    const int j = n / width, i = n - j * width;
    const int row = transposed ? j : i, column = transposed ? i : j;
    matrix[n] = i < a.channels() ? weight[row * a.weight_row + column * a.weight_column] : T(0);
  }
}

// R rows and Q positions of the product of the matrix with a tile
template <class T>
struct RegisterTile {
  static constexpr int R = kRows, Q = positions_of_thread<T>();
  T sum[R][Q];
  int first_row, first_position;

  FF_D explicit RegisterTile(const Conv& a) {
    const int groups = a.tile() / Q;
    const int group = threadIdx.x / groups;
    first_row = group * R, first_position = (threadIdx.x - group * groups) * Q;
  }

  FF_D void multiply(const Conv& a, const T* matrix, const T* tile, const T* start) {
    const int width = padded_channels(a.channels()), row = row_of_tile<T>(a.tile());
    if (first_row >= a.channels()) return;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int q = 0; q < Q; ++q) sum[r][q] = start ? start[first_row + r] : T(0);
#pragma unroll 2
    for (int j = 0; j < a.channels(); ++j) {
      T m[R / Q][Q], x[Q];
      load<Q>(tile + j * row + first_position, true, 1, x);
#pragma unroll
      for (int r = 0; r < R / Q; ++r) load<Q>(matrix + j * width + first_row + r * Q, true, 1, m[r]);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int q = 0; q < Q; ++q) sum[r][q] += m[r / Q][r % Q] * x[q];
    }
  }

  FF_D void put(const Conv& a, T* tile) const {
    const int row = row_of_tile<T>(a.tile());
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (first_row + r < a.channels()) store<Q>(tile + (first_row + r) * row + first_position, true, 1, sum[r]);
  }
};

// --- forward ----------------------------------------------------------------------------------------

struct ConvForward {
  Conv in;
  Image x, y;
  char *bias, *weight_logdet, *running, *logdet;
  int64_t running_stride, logdet_stride;
};

template <class X, int V>
FF_D void conv1x1_fwd(const ConvForward& a) {
  using T = Accumulator<X>;
  const Conv& in = a.in;
  FF_SHARED(T, shared);  // M [C][padded C], c [padded C], a tile [C][P + pad]
  const int width = padded_channels(in.channels());
  T *matrix = shared, *start = matrix + in.channels() * width, *tile = start + width;
  load_weight(in, false, matrix);
  for (int i = threadIdx.x; i < width; i += kThreads)
    start[i] = a.bias && i < in.channels() ? reinterpret_cast<const T*>(a.bias)[i] : T(0);
  for (int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x; b < in.samples; b += int64_t(gridDim.x) * kThreads) {
    const T before = a.running ? reinterpret_cast<const T*>(a.running)[b * a.running_stride] : T(0);
    reinterpret_cast<T*>(a.logdet)[b * a.logdet_stride] =
        before + T(in.positions) * *reinterpret_cast<const T*>(a.weight_logdet);
  }
  RegisterTile<T> product(in);
  for (int64_t k = blockIdx.x; k < in.tiles; k += gridDim.x) {
    load_tile<X, V>(in, a.x, k, tile);
    __syncthreads();
    product.multiply(in, matrix, tile, start);
    __syncthreads();
    product.put(in, tile);
    __syncthreads();
    store_tile<X, V>(in, a.y, k, tile);
    __syncthreads();
  }
}

// --- backward: gx = M^T gy, gM = sum gy x^T, gc = sum gy ---------------------------------------------

struct ConvBackward {
  Conv in;
  Image x, gy, gx;
  char* partial;        // [blocks, C C + C]: gM and gc of every block
  int64_t n4_, teams_;  // ceil(C / 4), and how many teams of threads share the positions of a tile for gM

  FF_HD int n4() const { return int(n4_); }
  FF_HD int teams() const { return int(teams_); }
};

// A thread's 4 x 4 entries of gM, of rows i + n4 r and columns j + n4 s, and the sums of its rows where j is 0. What
// one tile adds is summed up by itself first: a sum of sums rounds less than one long sum.
template <class T>
struct GradientTile {
  static constexpr int Q = positions_of_thread<T>();
  T weight[4][4] = {}, bias[4] = {};
  int i, j, team;

  FF_D explicit GradientTile(const ConvBackward& a) {
    const int threads = kThreads / a.teams();
    team = threadIdx.x / threads;
    const int n = threadIdx.x - team * threads;
    i = n / a.n4(), j = n - i * a.n4();
  }

  FF_D bool active(const ConvBackward& a) const { return i < a.n4(); }

  // rows beyond the channels hold zeros
  FF_D void add(const ConvBackward& a, const T* gy, const T* x) {
    if (!active(a)) return;
    const int row = row_of_tile<T>(a.in.tile()), share = a.in.tile() / a.teams();
    T part[4][4] = {}, sums[4] = {};
    for (int p = team * share; p < (team + 1) * share; p += Q) {
      T g[4][Q], v[4][Q];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        load<Q>(gy + (i + r * a.n4()) * row + p, true, 1, g[r]);
        load<Q>(x + (j + r * a.n4()) * row + p, true, 1, v[r]);
      }
#pragma unroll
      for (int q = 0; q < Q; ++q)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          sums[r] += g[r][q];
#pragma unroll
          for (int s = 0; s < 4; ++s) part[r][s] += g[r][q] * v[s][q];
        }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      bias[r] += sums[r];
#pragma unroll
      for (int s = 0; s < 4; ++s) weight[r][s] += part[r][s];
    }
  }

  // to [C C + C], one team after the other
  FF_D void finish(const ConvBackward& a, T* total) const {
    const int channels = a.in.channels();
    for (int t = 0; t < a.teams(); ++t) {
      __syncthreads();
      if (team != t || !active(a)) continue;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = i + r * a.n4();
        if (row >= channels) continue;
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const int column = j + s * a.n4();
          if (column >= channels) continue;
          T& to = total[row * channels + column];
          to = t == 0 ? weight[r][s] : to + weight[r][s];
        }
        if (j != 0) continue;
        T& to = total[channels * channels + row];
        to = t == 0 ? bias[r] : to + bias[r];
      }
    }
    __syncthreads();
  }
};

template <class X, int V>
FF_D void conv1x1_bwd(const ConvBackward& a) {
  using T = Accumulator<X>;
  const Conv& in = a.in;
  FF_SHARED(T, shared);  // M [C][padded C], tiles of gy and of x [4 n4][P + pad] each; at the end [C C + C]
  const int size = 4 * a.n4() * row_of_tile<T>(in.tile());
  T *matrix = shared, *g = matrix + in.channels() * padded_channels(in.channels()), *x = g + size;
  load_weight(in, true, matrix);
  RegisterTile<T> product(in);
  GradientTile<T> gradient(a);
  for (int64_t k = blockIdx.x; k < in.tiles; k += gridDim.x) {
    // zeros in the rows beyond the channels, which stay so, and in the positions beyond the last
    if (k == blockIdx.x || (k + 1) * in.tile() > in.samples * in.positions) {
      for (int n = threadIdx.x; n < 2 * size; n += kThreads) g[n] = T(0);
      __syncthreads();
    }
    load_tile<X, V>(in, a.gy, k, g);
    load_tile<X, V>(in, a.x, k, x);
    __syncthreads();
    gradient.add(a, g, x);
    product.multiply(in, matrix, g, static_cast<const T*>(nullptr));
    __syncthreads();
    product.put(in, x);
    __syncthreads();
    store_tile<X, V>(in, a.gx, k, x);
    __syncthreads();
  }
  gradient.finish(a, shared);
  const int count = in.channels() * in.channels() + in.channels();
  T* partial = reinterpret_cast<T*>(a.partial) + int64_t(blockIdx.x) * count;
  for (int n = threadIdx.x; n < count; n += kThreads) partial[n] = shared[n];
}

// The blocks' shares in their order; the last block makes the gradient of log|det M|, S times the sum of glogdet.
struct ConvFinish {
  char *partial, *gweight, *gbias, *glogdet, *gweight_logdet;
  int64_t blocks, channels, samples, positions, glogdet_stride;
};

template <class T>
FF_D void conv1x1_finish(const ConvFinish& a) {
  FF_SHARED(double, shared);  // a number for every warp
  const int64_t matrix = a.channels * a.channels, count = matrix + a.channels;
  double total = 0;
  if (blockIdx.x + 1 == gridDim.x) {
    const T* glogdet = reinterpret_cast<const T*>(a.glogdet);
    for (int64_t b = threadIdx.x; b < a.samples; b += kThreads) total += double(glogdet[b * a.glogdet_stride]);
    total = team_sum(total, kThreads, shared) * double(a.positions);
    if (threadIdx.x == 0) *reinterpret_cast<T*>(a.gweight_logdet) = T(total);
    return;
  }
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= count) return;
  for (int64_t k = 0; k < a.blocks; ++k) total += double(reinterpret_cast<const T*>(a.partial)[k * count + n]);
  if (n < matrix)
    reinterpret_cast<T*>(a.gweight)[n] = T(total);
  else
    reinterpret_cast<T*>(a.gbias)[n - matrix] = T(total);
}

}  // namespace fastflow
