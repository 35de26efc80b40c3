// Parallel loops on the OpenMP runtime that torch has already loaded, so that torch.set_num_threads governs them.
// We never link a runtime of our own: two of them in one process fight over the cores. Where none is found the
// loops run on the calling thread.
#pragma once

#include <cstdint>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace fastflow {

struct OpenMP {
  using Max = int (*)();
  using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);                  // GNU
  using ForkCall = void (*)(void*, int32_t, void (*)(int32_t*, int32_t*, ...), ...);  // LLVM

  Max max_threads = nullptr, num_threads = nullptr, thread_num = nullptr;
  Fork fork = nullptr;
  ForkCall fork_call = nullptr;

  OpenMP() {
#if !defined(_WIN32)
    max_threads = find<Max>("omp_get_max_threads");
    num_threads = find<Max>("omp_get_num_threads");
    thread_num = find<Max>("omp_get_thread_num");
    fork = find<Fork>("GOMP_parallel");
    fork_call = find<ForkCall>("__kmpc_fork_call");
#endif
  }

  bool found() const { return max_threads && num_threads && thread_num && (fork || fork_call); }

  void run(void (*body)(void*), void* argument) const {
    if (fork) return fork(body, argument, 0, 0);
    static struct {
      int32_t reserved, flags, more[2];
      const char* source;
    } where = {0, 2, {0, 0}, ";fastflow;;0;0;;"};
    fork_call(&where, 2, reinterpret_cast<void (*)(int32_t*, int32_t*, ...)>(&microtask), body, argument);
  }

 private:
  static void microtask(int32_t*, int32_t*, void (*body)(void*), void* argument) { body(argument); }

  template <class F>
  static F find(const char* name) {
#if defined(_WIN32)
    return nullptr;
#else
    return reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
#endif
  }
};

inline const OpenMP& openmp() {
  static const OpenMP runtime;
  return runtime;
}

// body(begin, end) over disjoint ranges of [0, n). What a task computes may not depend on how they are dealt out.
template <class Body>
void parallel_for(int64_t n, bool worth_it, const Body& body) {
  const OpenMP& omp = openmp();
  if (!worth_it || n < 2 || !omp.found() || omp.max_threads() == 1) return body(int64_t(0), n);
  struct Call {
    const Body& body;
    int64_t n;
  } call{body, n};
  omp.run(
      [](void* argument) {
        const Call& c = *static_cast<Call*>(argument);
        const int64_t threads = openmp().num_threads(), t = openmp().thread_num();
        const int64_t begin = c.n * t / threads, end = c.n * (t + 1) / threads;
        if (begin < end) c.body(begin, end);
      },
      &call);
}

}  // namespace fastflow
