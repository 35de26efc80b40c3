// What a solve and its backward share: the problem, the method, a tile's beginning.
#pragma once

#include "../ode.h"
#include "dynamics.cuh"

namespace fastflow {

struct Cube {
  char* data;
  int64_t plane, row, column;

  template <class T>
  FF_HD T& at(int64_t i, int64_t j, int64_t k) const {
    return reinterpret_cast<T*>(data)[i * plane + j * row + k * column];
  }
};

struct Ode {
  Net net;
  int64_t samples, tile;
  int64_t count;                  // of times to reach
  int64_t energies;               // 0 or 2
  int64_t sum;                    // of the probes, or their mean, in the norm and in the energy of the Jacobian
  int64_t checkpoints, controls;  // controls: 1, or one of every sample
  char *method, *times;           // as Method.pack() has it; [1 + count]
  Cube probes;                    // [S, B, D]
  char *steps, *counts, *states;  // [max_steps, controls, 2], [controls, 4], [checkpoints, B, D]

  FF_HD double time(int64_t i) const { return reinterpret_cast<const double*>(times)[i]; }
  FF_HD double* step(int64_t n, int64_t control) const {
    return reinterpret_cast<double*>(steps) + (n * controls + control) * 2;
  }
  template <class T>
  FF_HD T weight_of_probes() const {
    return sum ? T(1) : T(1) / T(net.tangents);
  }
};

// The probes of a tile, the tangents of the input rows. A barrier follows.
template <class T>
FF_D void load_probes(const Ode& o, const NetTile<T>& t, int64_t begin, T* input) {
  each(t, int(o.net.features * o.net.tangents), [&](int i, int s) {
    const int r = i / int(o.net.features), d = i - r * int(o.net.features);
    t.at(input, d, 1 + r, s) = o.probes.at<T>(r, smaller(begin + s, o.samples - 1), d);
  });
}

}  // namespace fastflow
