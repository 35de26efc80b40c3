// Runs the CUDA kernels as C++, for tests: the threads of a block are fibers, and __syncthreads() and the warp shuffles
// are real meeting points between them. After every meeting point the fibers go on in another order, so that what is
// right only in one order is found; shared memory holds NaN until it is written and ends where it ends.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <functional>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define FF_EMULATE
#define FF_HD inline __attribute__((always_inline))
#define FF_D inline

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr size_t kStack = 256 * 1024;
constexpr int kWarpSize = 32;

enum class State { ready, at_barrier, at_shuffle, done };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  State state = State::done;
  uint64_t given = 0;    // to the other lanes of the warp
  void* kept = nullptr;  // by the address sanitizer
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned char> shared;
  const std::function<void()>* body = nullptr;
  ucontext_t scheduler;
  unsigned current = 0, threads = 0;
  uint64_t random = 1;
};

inline Block block;
inline Index thread_index, block_index, block_size, grid_size;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulation: %s (block %u, thread %u)\n", what, block_index.x, block.current);
  abort();
}

// The address sanitizer must be told of every change of stack: where to, and, there, what was kept of it.
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_size = 0;

inline void leave([[maybe_unused]] void** keep, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(keep, stack, size);
#endif
}

inline void arrive([[maybe_unused]] void* kept, [[maybe_unused]] bool in_fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(kept, in_fiber ? &scheduler_stack : nullptr, in_fiber ? &scheduler_size : nullptr);
#endif
}

inline void wait(State state) {
  Fiber& self = block.fibers[block.current];
  self.state = state;
  leave(&self.kept, scheduler_stack, scheduler_size);
  swapcontext(&self.context, &block.scheduler);
  arrive(self.kept, true);
}

inline void start() {
  arrive(nullptr, true);
  (*block.body)();
  block.fibers[block.current].state = State::done;
  leave(nullptr, scheduler_stack, scheduler_size);
  setcontext(&block.scheduler);
}

inline void resume(unsigned t) {
  Fiber& fiber = block.fibers[t];
  block.current = t;
  thread_index.x = t;
  void* kept = nullptr;
  leave(&kept, fiber.stack.data(), fiber.stack.size());
  swapcontext(&block.scheduler, &fiber.context);
  arrive(kept, false);
}

inline unsigned next_random() {
  block.random = block.random * 6364136223846793005ull + 1442695040888963407ull;
  return unsigned(block.random >> 33);
}

// do all threads of [first, last) that still run wait in this state?
inline bool all(unsigned first, unsigned last, State state, bool exited_may_be_missing) {
  bool any = false;
  for (unsigned t = first; t < last; ++t) {
    const State s = block.fibers[t].state;
    if (s == State::done && exited_may_be_missing) continue;
    if (s != state) return false;
    any = true;
  }
  return any;
}

inline void release(unsigned first, unsigned last) {
  for (unsigned t = first; t < last; ++t)
    if (block.fibers[t].state != State::done) block.fibers[t].state = State::ready;
}

inline void run_block() {
  const unsigned n = block.threads;
  std::vector<unsigned> order(n);
  for (;;) {
    for (unsigned t = 0; t < n; ++t) order[t] = t;
    for (unsigned t = n; t > 1; --t) std::swap(order[t - 1], order[next_random() % t]);
    bool progress = false, running = false;
    for (unsigned t : order) {
      if (block.fibers[t].state == State::ready) resume(t), progress = true;
      running |= block.fibers[t].state != State::done;
    }
    if (!running) return;
    for (unsigned first = 0; first < n; first += kWarpSize) {
      const unsigned last = first + kWarpSize < n ? first + kWarpSize : n;
      if (all(first, last, State::at_shuffle, false)) release(first, last), progress = true;
    }
    if (all(0, n, State::at_barrier, true)) release(0, n), progress = true;
    if (!progress) fail("threads wait for each other at different places");
  }
}

template <class Body>
void launch(unsigned blocks, unsigned threads, size_t shared, const Body& body) {
  const std::function<void()> call = body;
  block.body = &call;
  block.threads = threads;
  block_size.x = threads, grid_size.x = blocks;
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  for (unsigned b = 0; b < blocks; ++b) {
    block_index.x = b;
    block.shared.assign(shared, 0xff);  // NaN, in either precision
    block.shared.shrink_to_fit();
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = block.fibers[t];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      fiber.state = State::ready;
      makecontext(&fiber.context, start, 0);
    }
    run_block();
  }
}

// every lane of the warp gives a value and takes that of another
template <class T>
T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  memcpy(&block.fibers[block.current].given, &value, sizeof(T));
  wait(State::at_shuffle);
  T taken;
  memcpy(&taken, &block.fibers[from].given, sizeof(T));
  wait(State::at_shuffle);
  return taken;
}

}  // namespace emulation

#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)

inline void __syncthreads() { emulation::wait(emulation::State::at_barrier); }

inline void __syncwarp(unsigned = 0xffffffffu) { emulation::exchange(0, emulation::block.current); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return emulation::exchange(value, emulation::block.current ^ unsigned(lanes));
}

#define FF_SHARED(T, name) T* const name = reinterpret_cast<T*>(emulation::block.shared.data())

#define FF_ENTRY(name, kernel, Arguments, threads, resident)                                \
  extern "C" void name(unsigned blocks, unsigned size, size_t shared, const void* packed) { \
    const Arguments& arguments = *static_cast<const Arguments*>(packed);                    \
    emulation::launch(blocks, size, shared, [&] { kernel(arguments); });                    \
  }
