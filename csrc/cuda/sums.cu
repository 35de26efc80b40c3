// Sums per sample whose parts several blocks made.
#include "walk.cuh"

namespace fastflow {

// The parts of a sample, by one warp in a fixed order.
struct Finish {
  Sums sums;
  int64_t samples, parts;
};

template <class T>
FF_D void finish_sums(const Finish& a) {
  const int64_t b = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  double total = 0;
  if (b < a.samples)
    for (int64_t p = threadIdx.x % 32; p < a.parts; p += 32) total += a.sums.partial[b * a.parts + p];
  total = warp_sum(total);
  if (b < a.samples && threadIdx.x % 32 == 0) finish_sum<T>(a.sums, b, total);
}

}  // namespace fastflow
