// Random signs that need no memory: element i has bit i mod 128 of Philox-4x32-10 at the counter i / 128 (Salmon et
// al., https://doi.org/10.1145/2063384.2063405). fastflow/ops/trace.py has the same in PyTorch.
#pragma once

#include "math.h"

namespace fastflow {

struct Philox {
  uint32_t word[4];
};

FF_HD Philox philox(uint64_t seed, uint64_t counter) {
  Philox x = {{uint32_t(counter), uint32_t(counter >> 32), 0u, 0u}};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * x.word[0], b = uint64_t(0xCD9E8D57u) * x.word[2];
    x = {{uint32_t(b >> 32) ^ x.word[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ x.word[3] ^ k1, uint32_t(a)}};
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return x;
}

// 1 or -1
template <class T>
FF_HD T sign(uint64_t seed, uint64_t i) {
  const Philox x = philox(seed, i >> 7);
  const uint32_t which = uint32_t(i >> 5) & 3u;  // selected without an array that would have to live in memory
  const uint32_t low = which & 1u ? x.word[1] : x.word[0], high = which & 1u ? x.word[3] : x.word[2];
  return ((which & 2u ? high : low) >> (i & 31u)) & 1u ? T(-1) : T(1);
}

}  // namespace fastflow
