// What the passes of a WaveNet share: its layers as packed matrices, one layer over a few rows.
// All channel counts are multiples of kPad (fastflow/ops/wavenet.py pads with zeros), so no row is ragged.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "../wavenet.h"
#include "tile.h"
#include "view.h"

namespace fastflow {

// A dense tensor of up to three dimensions; nothing where it is not given.
template <class T>
T* dense(const View& v, int64_t a, int64_t b, int64_t c, const char* name) {
  if (!v) return nullptr;
  const int64_t size[3] = {a, b, c};
  int64_t step = 1;
  for (int d = 2; d >= 0; --d) {
    if (v.size[d] != size[d] || (size[d] > 1 && v.stride[d] != step && a * b * c > 0))
      throw std::invalid_argument(std::string(name) + ": expected a dense tensor of the sizes that go with the others");
    step *= size[d];
  }
  return reinterpret_cast<T*>(v.data);
}

template <class T>
struct Layers {
  int64_t batch, depth, width, residual, gated, skipped, context, past;  // channels; past: rows of all histories
  const T *gate, *bias, *to_residual, *to_skip;                          // [L, K, 2D], [L, B, 2D], [L, D + 1, R or S]
  int64_t bias_layer, bias_sample;                                       // strides: a bias may be the same for all
  std::vector<int64_t> dilation, start;                                  // first row of every history within `past`

  Layers(int64_t samples, int64_t channels, int64_t features, const View& g, const View& b, const View& r,
         const View& s, const std::vector<int64_t>& dilations)
      : batch(samples), depth(int64_t(dilations.size())), residual(channels), context(features), dilation(dilations) {
    gated = r.size[1] - 1, skipped = s.size[2];
    width = (g.size[1] - context) / residual;
    for (const int64_t n : {residual, gated, skipped, context})
      if (n % kPad != 0) throw std::invalid_argument("the channels of a WaveNet must be padded");
    gate = dense<T>(g, depth, width * residual + context, 2 * gated, "gate");
    to_residual = dense<T>(r, depth, gated + 1, residual, "residual");
    to_skip = dense<T>(s, depth, gated + 1, skipped, "skip");
    if (b.size[0] != depth || b.size[1] != batch || b.size[2] != 2 * gated || b.stride[2] != 1)
      throw std::invalid_argument("bias: expected [L, B, 2D] with dense rows");
    bias = reinterpret_cast<const T*>(b.data), bias_layer = b.stride[0], bias_sample = b.stride[1];
    past = 0;
    for (const int64_t d : dilation) {
      if (d < 1) throw std::invalid_argument("dilations: expected positive numbers");
      start.push_back(past);
      past += history(d);
    }
  }
  int64_t history(int64_t d) const { return (width - 1) * d; }
  int64_t z_row() const { return gated + kPad; }  // a gated row ends in a one, which meets the bias
  const T* gate_of(int64_t l, int64_t tap) const {
    return gate + (l * (width * residual + context) + tap * residual) * 2 * gated;
  }
  const T* bias_of(int64_t l, int64_t b) const { return bias + l * bias_layer + b * bias_sample; }
  const T* residual_of(int64_t l) const { return to_residual + l * (gated + 1) * residual; }
  const T* skip_of(int64_t l) const { return to_skip + l * (gated + 1) * skipped; }
  // multiply-adds of a step
  int64_t work() const {
    return depth * (2 * gated * (width * residual + context) + (gated + 1) * (residual + skipped));
  }
};

// c += a b for matrices with whole vectors in every row of b and c; a(i, k) = a[i a_row + k a_depth]
template <class T>
void add_product(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_depth, const T* b,
                 int64_t b_row, T* c, int64_t c_row) {
  multiply(Product<T>{rows, columns, depth, a, a_row, a_depth, b, b_row, c, c_row, true});
}

}  // namespace fastflow
