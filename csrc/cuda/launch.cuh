// What the kernels share: how one is entered, 16-byte accesses, reductions in a fixed order. Plain CUDA C++ that nvcc
// and NVRTC compile alike; tests compile it as C++ (FF_EMULATE) and run it without a GPU.
#pragma once

#include "../half.h"

#if !defined(FF_EMULATE)
// One instance of a kernel template as a function that can be found by its name. Arguments come as one struct of 8-byte
// fields.
#define FF_ENTRY(name, kernel, Arguments, threads, resident)                                                          \
  extern "C" __global__ void __launch_bounds__(threads, resident) name(const __grid_constant__ Arguments arguments) { \
    kernel(arguments);                                                                                                \
  }
// the dynamic shared memory of a block
#define FF_SHARED(T, name)                                    \
  extern __shared__ __align__(16) unsigned char ff_shared_[]; \
  T* const name = reinterpret_cast<T*>(ff_shared_)
#endif

namespace fastflow {

constexpr int kThreads = 256;  // of a block, unless a kernel says otherwise
constexpr unsigned kWarp = 0xffffffffu;

// a tensor of two dimensions in any strides
struct Matrix {
  char* data;
  int64_t row, column;

  template <class T>
  FF_HD T& at(int64_t i, int64_t j) const {
    return reinterpret_cast<T*>(data)[i * row + j * column];
  }
};

// --- types ------------------------------------------------------------------------------------------

template <class S>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class S>
using Accumulator = typename AccumulatorOf<S>::type;

template <int number>
struct Constant {
  static constexpr int value = number;
};

// f(Constant<number>()) where it is one of those listed
template <int first, int... rest, class F>
FF_HD void with_number(int number, const F& f) {
  if (number == first)
    f(Constant<first>());
  else if constexpr (sizeof...(rest) > 0)
    with_number<rest...>(number, f);
}

FF_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// a / b for a >= 0, b > 0: most sizes fit 32 bits, and a division of 64 bits takes five times as long
FF_HD int64_t quotient(int64_t a, int64_t b) { return (a | b) >> 32 ? a / b : int64_t(uint32_t(a) / uint32_t(b)); }

// --- memory -----------------------------------------------------------------------------------------

// what one access moves: 4, 8 or 16 bytes; more are several of 16
template <int bytes>
struct alignas(bytes < 16 ? bytes : 16) Words {
  uint32_t word[bytes / 4];
};

// A tensor as [samples, outer, inner]; strides in elements. No data stands for zeros.
struct Operand {
  char* data;
  int64_t sample, outer, inner;
  int64_t wide;      // may V elements be accessed at once?
  int64_t gathered;  // does channel c lie at index[c] of the walk?
};

// V elements of stride `step`, V at once where they lie so
template <int V, class S, class T>
FF_HD void load(const S* from, bool wide, int64_t step, T (&to)[V]) {
  if constexpr (V > 1) {
    if (wide) {
      using Access = Words<V* int(sizeof(S))>;
      S part[V];
      const Access words = *reinterpret_cast<const Access*>(from);
      FF_MEMCPY(part, &words, sizeof(words));
#pragma unroll
      for (int v = 0; v < V; ++v) to[v] = T(widen(part[v]));
      return;
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = T(widen(from[v * step]));
}

template <int V, class S, class T>
FF_HD void store(S* to, bool wide, int64_t step, const T (&from)[V]) {
  if constexpr (V > 1) {
    if (wide) {
      using Access = Words<V* int(sizeof(S))>;
      S part[V];
      Access words;
#pragma unroll
      for (int v = 0; v < V; ++v) narrow(from[v], part[v]);
      FF_MEMCPY(&words, part, sizeof(words));
      *reinterpret_cast<Access*>(to) = words;
      return;
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) narrow(from[v], to[v * step]);
}

// --- reductions -------------------------------------------------------------------------------------

// The sum over `lanes` neighbouring threads, a power of two up to 32, for all of them.
FF_D double warp_sum(double value, int lanes = 32) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kWarp, value, distance);
  return value;
}

// The sum over `lanes` neighbouring threads, a power of two up to the whole block, for all of them. Every thread of the
// block must call it. `shared` holds a number for every warp.
FF_D double team_sum(double value, int lanes, double* shared) {
  value = warp_sum(value, lanes < 32 ? lanes : 32);
  if (lanes <= 32) return value;
  __syncthreads();  // of an earlier sum all have read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  const int first = threadIdx.x / lanes * (lanes / 32);
  double total = 0;
  for (int w = 0; w < lanes / 32; ++w) total += shared[first + w];
  return total;
}

}  // namespace fastflow
