// Where the two halves of a network's output lie. The names are those of fastflow/ops/packing.py.
#pragma once

#include "view.h"

namespace fastflow {

enum Packing { kInterleaved, kInterleavedSwapped, kChunked, kChunkedSwapped, kSeparate };

struct Unpacked {
  View first, second;  // (shift, raw scale) of a coupling, (mean, raw scale) of a Gaussian
};

// `first` and `second` as strided views of the packed tensor: nothing is copied.
inline Unpacked unpack(const View& packed, const View& separate, int packing) {
  if (packing == kSeparate || !packed) return {packed, separate};
  if (packed.size[1] % 2) throw std::invalid_argument("packed parameters need an even number of channels");
  const int64_t n = packed.size[1] / 2;
  const bool interleaved = packing == kInterleaved || packing == kInterleavedSwapped;
  const View even = interleaved ? packed.channels(0, n, 2) : packed.channels(0, n);
  const View odd = interleaved ? packed.channels(n > 0 ? 1 : 0, n, 2) : packed.channels(n, n);
  const bool swapped = packing == kInterleavedSwapped || packing == kChunkedSwapped;
  return swapped ? Unpacked{odd, even} : Unpacked{even, odd};
}

}  // namespace fastflow
