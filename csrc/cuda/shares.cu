// Gradients of parameters that all samples share: every block of a backward kernel has its own sums, and a second
// launch adds up these shares in the order of the blocks. The arguments are packed by fastflow/ops/cuda/shares.py.
#include "launch.cuh"

namespace fastflow {

// out [parameters] from partial [blocks, parameters]
struct Shares {
  char *partial, *out;
  int64_t parameters, blocks;
};

template <class T>
FF_D void add_shares(const Shares& a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.parameters) return;
  double sum = 0;
  for (int64_t k = 0; k < a.blocks; ++k) sum += double(reinterpret_cast<const T*>(a.partial)[k * a.parameters + i]);
  reinterpret_cast<T*>(a.out)[i] = T(sum);
}

}  // namespace fastflow
