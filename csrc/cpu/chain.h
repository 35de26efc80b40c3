// A chain of K steps on vectors [B, n] in one call, for families whose step is  z += something of rank one: planar and
// radial flows. The state of a block of samples stays in L1.
//
// Backward keeps no states: it runs the chain again, keeping of a step only the few numbers per sample from which
// `replay` adds the same again (tanh of a planar unit, ...), and every S-th state, S = sqrt(K). From these the states
// of S steps at a time are rebuilt, to the same bits; undoing the steps from the last state would have lost what is
// small beside the step. All of it belongs to a block of samples: memory does not grow with the batch.
//
// A family is a class with
//   Number, kKept                        its type T; how many numbers are kept of a step, per sample
//   steps(), sums()                      K; how many sums over samples the shared parameters' gradients take, per step
//   Step step()                          scratch for the parameters of one step, of a block of samples
//   load(step, k, block)                 fills it
//   apply<inverse>(step, z, logdet, kept)
//   replay<inverse>(step, z, kept)
//   gradient<inverse>(step, in, out, kept, g, glogdet, k, block, sums)
//                                        g: the gradient of the output of the step, then of its input
//   finish(sums)                         from the sums [K, sums()] to the gradients of shared parameters
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "parallel.h"

namespace fastflow {

struct Block {
  int64_t first, count;  // samples
};

template <class T>
Block block_of(int64_t number, int64_t samples) {
  const int64_t first = number * kLanes<T>;
  return {first, std::min(kLanes<T>, samples - first)};
}

template <class T>
int64_t blocks_of(int64_t samples) {
  return (samples + kLanes<T> - 1) / kLanes<T>;
}

// f(T(), each, inverse)
template <class F>
void with_options(const View& z, bool each, bool inverse, const F& f) {
  with_accumulator(z.dtype, [&](auto type) {
    with_bool(each, [&](auto own) { with_bool(inverse, [&](auto back) { f(type, own, back); }); });
  });
}

template <bool inverse, class Family>
void chain_forward(const Family& family, const View& z, const View& running, const View& y, const View& logdet) {
  using T = typename Family::Number;
  constexpr int64_t L = kLanes<T>;
  const int64_t samples = z.size[0], n = z.size[1], steps = family.steps();
  parallel_for(blocks_of<T>(samples), samples * n * steps >= kParallelElements, [&](int64_t begin, int64_t end) {
    auto step = family.step();
    LaneBuffer<T> state(n), kept(Family::kKept);
    double sum[L];
    for (int64_t number = begin; number < end; ++number) {
      const Block block = block_of<T>(number, samples);
      load_lanes(BlockOf(z, block.first), block.count, n, state.data());
      std::fill(sum, sum + L, 0.0);
      for (int64_t i = 0; i < steps; ++i) {
        family.load(step, inverse ? steps - 1 - i : i, block);
        family.template apply<inverse>(step, state.data(), sum, kept.data());
      }
      store_lanes(BlockOf(y, block.first), block.count, n, state.data());
      for (int64_t l = 0; l < block.count; ++l) {
        const double start = running ? double(at<T>(running, block.first + l)) : 0.0;
        at<T>(logdet, block.first + l) = T(start + sum[l]);
      }
    }
  });
}

template <bool inverse, class Family>
void chain_backward(const Family& family, const View& z, const View& gy, const View& glogdet, const View& gz) {
  using T = typename Family::Number;
  constexpr int64_t L = kLanes<T>, kept_size = Family::kKept;
  const int64_t samples = z.size[0], n = z.size[1], steps = family.steps();
  const int64_t blocks = blocks_of<T>(samples), shares = std::min<int64_t>(16, blocks);
  const int64_t size = steps * family.sums();
  int64_t stride = 1;  // of the states that are kept
  while (stride * stride < steps) ++stride;
  // a share of the blocks has its own sums: their order does not depend on the threads
  std::vector<double> sums(std::max<int64_t>(1, shares) * size);
  parallel_for(shares, samples * n * steps >= kParallelElements, [&](int64_t begin, int64_t end) {
    auto step = family.step();
    LaneBuffer<T> state((stride + 1) * n), checkpoints((steps / stride + 1) * n), kept(steps * kept_size), g(n), gl(1);
    double unused[L];
    const auto at_step = [&](int64_t i) { return inverse ? steps - 1 - i : i; };
    const auto run = [&](const Block& block, double* total) {
      load_lanes(BlockOf(z, block.first), block.count, n, state.data());
      std::fill(unused, unused + L, 0.0);
      for (int64_t i = 0; i < steps; ++i) {
        if (i % stride == 0) std::copy(state.data(), state.data() + n * L, checkpoints[i / stride * n]);
        family.load(step, at_step(i), block);
        family.template apply<inverse>(step, state.data(), unused, kept[i * kept_size]);
      }
      load_lanes(BlockOf(gy, block.first), block.count, n, g.data());
      std::fill(gl[0], gl[0] + L, T(0));
      for (int64_t l = 0; l < block.count; ++l) gl[0][l] = at<T>(glogdet, block.first + l);
      for (int64_t first = (steps - 1) / stride * stride; steps > 0 && first >= 0; first -= stride) {
        const int64_t last = std::min(first + stride, steps);
        std::copy(checkpoints[first / stride * n], checkpoints[first / stride * n] + n * L, state.data());
        for (int64_t i = first; i < last; ++i) {
          T *from = state[(i - first) * n], *to = state[(i - first + 1) * n];
          std::copy(from, from + n * L, to);
          family.load(step, at_step(i), block);
          family.template replay<inverse>(step, to, kept[i * kept_size]);
        }
        for (int64_t i = last - 1; i >= first; --i) {
          const int64_t k = at_step(i);
          family.load(step, k, block);
          family.template gradient<inverse>(step, state[(i - first) * n], state[(i - first + 1) * n],
                                            kept[i * kept_size], g.data(), gl[0], k, block, total + k * family.sums());
        }
      }
      store_lanes(BlockOf(gz, block.first), block.count, n, g.data());
    };
    for (int64_t p = begin; p < end; ++p)
      for (int64_t number = blocks * p / shares; number < blocks * (p + 1) / shares; ++number)
        run(block_of<T>(number, samples), sums.data() + p * size);
  });
  for (int64_t p = 1; p < shares; ++p)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[p * size + i];
  family.finish(sums.data());
}

}  // namespace fastflow
