// Diagonal Gaussians on the CPU: log-likelihood, tempered sample and KL divergence, each in one pass over its tensors.
// Mean and raw scale are read where the network wrote them. Bound by memory bandwidth.
#include "../gaussian.h"

#include <pybind11/stl.h>

#include <tuple>

#include "module.h"
#include "packing.h"
#include "rows.h"
#include "scale_map.h"

namespace fastflow {
namespace {

// fastflow/ops/gaussian.py: Options
using Packed = std::tuple<int, int, bool, PackedMap>;

struct Options {
  int packing, kind;
  bool reciprocal;
  PackedMap map;

  explicit Options(const Packed& p) {
    std::tie(packing, kind, reciprocal, map) = p;
    kind = resolve(kind, map[3]);
  }

  template <class T>
  GaussianConstants<T> constants() const {
    return {T(reciprocal ? -1 : 1), map_constants<T>(map)};
  }
};

struct Moments {
  View mean, raw;  // [B, C, S]; both null: mean 0, scale 1

  int kind(const Options& o) const { return mean ? o.kind : int(kNone); }
};

Moments moments(const View& params, const View& raw, const View& like, const Options& o) {
  if (!params) return {};
  const Unpacked p = unpack(params, raw, o.packing);
  if (!p.second) throw std::invalid_argument("a mean without a raw scale");
  return {p.first.expand(like.size), p.second.expand(like.size)};
}

// zeros where there is nothing to load
template <class T>
const T* load_or_zero(const View& v, const Walk& walk, const Box& box, T* buffer) {
  static const T zeros[kTile] = {};
  return v ? load(v, walk, box, buffer) : zeros;
}

// log p [B] = start - the energies of a sample - C S log(2 pi) / 2
void finish_log_prob(const SampleSums& energies, const View& z, const View& logp, const View& start) {
  constexpr double half_log_2pi = 0.91893853320467274178;
  energies.finish(logp, start, -1, -half_log_2pi * double(z.size[1] * z.size[2]));
}

// --- the loops proper: contiguous arrays, constants by value ------------------------------------------

template <int kind, class T>
void energy_loop(const T* z, const T* m, const T* h, T* energy, int64_t n, const GaussianConstants<T> c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) energy[i] = gaussian_energy<kind>(z[i], m[i], h[i], c);
}

template <int kind, class T>
void energy_grad_loop(const T* z, const T* m, const T* h, const T* glogp, T* gz, T* gm, T* gh, int64_t n,
                      const GaussianConstants<T> c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const auto g = gaussian_grad<kind>(z[i], m[i], h[i], glogp[i], c);
    gz[i] = g.gz;
    gm[i] = g.gm;
    gh[i] = g.gh;
  }
}

template <int kind, class T>
void sample_loop(const T* noise, const T* m, const T* h, T* z, T* energy, int64_t n, T temperature,
                 const GaussianConstants<T> c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const auto s = gaussian_sample<kind>(noise[i], m[i], h[i], temperature, c);
    z[i] = s.z;
    energy[i] = s.energy;
  }
}

template <int kind, class T>
void sample_grad_loop(const T* noise, const T* h, const T* gz, const T* glogp, T* gnoise, T* gm, T* gh, int64_t n,
                      T temperature, const GaussianConstants<T> c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const auto g = gaussian_sample_grad<kind>(noise[i], h[i], temperature, gz[i], glogp[i], c);
    gnoise[i] = g.gz;
    gm[i] = g.gm;
    gh[i] = g.gh;
  }
}

template <int kind, int prior_kind, class T>
void kl_loop(const T* m, const T* h, const T* pm, const T* ph, T* kl, int64_t n, const GaussianConstants<T> c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) kl[i] = gaussian_kl<kind, prior_kind>(m[i], h[i], pm[i], ph[i], c);
}

template <int kind, int prior_kind, class T>
void kl_grad_loop(const T* m, const T* h, const T* pm, const T* ph, const T* gkl, T* gm, T* gh, T* gpm, T* gph,
                  int64_t n, const GaussianConstants<T> c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const auto g = gaussian_kl_grad<kind, prior_kind>(m[i], h[i], pm[i], ph[i], gkl[i], c);
    gm[i] = g.gm;
    gh[i] = g.gh;
    gpm[i] = g.gprior_m;
    gph[i] = g.gprior_h;
  }
}

// --- the walks ----------------------------------------------------------------------------------------

template <class T>
void log_prob(const View& z, const Moments& p, const View& running, const View& logp, const Options& o) {
  const Walk walk(z.size[0], z.size[1], z.size[2], z);
  SampleSums energies(walk, z.size[0]);
  const auto c = o.constants<T>();
  const auto loop = with_kind(p.kind(o), [](auto kind) { return &energy_loop<kind(), T>; });
  for_boxes(walk, [&](const Box& box, int64_t k) {
    T bz[kTile], bm[kTile], bh[kTile], energy[kTile];
    const T* value = load(z, walk, box, bz);
    const T* m = load_or_zero(p.mean, walk, box, bm);
    const T* h = load_or_zero(p.raw, walk, box, bh);
    loop(value, m, h, energy, box.size(), c);
    energies.add(box, k, energy);
  });
  finish_log_prob(energies, z, logp, running);
}

template <class T>
void log_prob_backward(const View& z, const Moments& p, const View& glogp, const View& gz, const Moments& gp,
                       const Options& o) {
  const Walk walk(z.size[0], z.size[1], z.size[2], z);
  const auto c = o.constants<T>();
  const auto loop = with_kind(p.kind(o), [](auto kind) { return &energy_grad_loop<kind(), T>; });
  for_boxes(walk, [&](const Box& box, int64_t) {
    T bz[kTile], bm[kTile], bh[kTile], bl[kTile], oz[kTile], om[kTile], oh[kTile];
    const T* value = load(z, walk, box, bz);
    const T* m = load_or_zero(p.mean, walk, box, bm);
    const T* h = load_or_zero(p.raw, walk, box, bh);
    const T* g = load(glogp, walk, box, bl);
    T* to_z = target(gz, walk, box, oz);
    T* to_m = target(gp.mean, walk, box, om);
    T* to_h = target(gp.raw, walk, box, oh);
    loop(value, m, h, g, to_z, to_m, to_h, box.size(), c);
    commit(gz, walk, box, to_z, oz);
    commit(gp.mean, walk, box, to_m, om);
    commit(gp.raw, walk, box, to_h, oh);
  });
}

template <class T>
void sample(const View& noise, const Moments& p, const View& z, const View& logp, T temperature, const Options& o) {
  const Walk walk(z.size[0], z.size[1], z.size[2], z);
  SampleSums energies(walk, z.size[0]);
  const auto c = o.constants<T>();
  const auto loop = with_kind(p.kind(o), [](auto kind) { return &sample_loop<kind(), T>; });
  for_boxes(walk, [&](const Box& box, int64_t k) {
    T bn[kTile], bm[kTile], bh[kTile], bz[kTile], energy[kTile];
    const T* e = load(noise, walk, box, bn);
    const T* m = load_or_zero(p.mean, walk, box, bm);
    const T* h = load_or_zero(p.raw, walk, box, bh);
    T* out = target(z, walk, box, bz);
    loop(e, m, h, out, energy, box.size(), temperature, c);
    commit(z, walk, box, out, bz);
    energies.add(box, k, energy);
  });
  finish_log_prob(energies, z, logp, View());
}

template <class T>
void sample_backward(const View& noise, const Moments& p, const View& gz, const View& glogp, const View& gnoise,
                     const Moments& gp, T temperature, const Options& o) {
  const Walk walk(noise.size[0], noise.size[1], noise.size[2], noise);
  const auto c = o.constants<T>();
  const auto loop = with_kind(p.kind(o), [](auto kind) { return &sample_grad_loop<kind(), T>; });
  for_boxes(walk, [&](const Box& box, int64_t) {
    T bn[kTile], bh[kTile], bg[kTile], bl[kTile], on[kTile], om[kTile], oh[kTile];
    const T* e = load(noise, walk, box, bn);
    const T* h = load_or_zero(p.raw, walk, box, bh);
    const T* g = load(gz, walk, box, bg);
    const T* l = load(glogp, walk, box, bl);
    T* to_noise = target(gnoise, walk, box, on);
    T* to_m = target(gp.mean, walk, box, om);
    T* to_h = target(gp.raw, walk, box, oh);
    loop(e, h, g, l, to_noise, to_m, to_h, box.size(), temperature, c);
    commit(gnoise, walk, box, to_noise, on);
    commit(gp.mean, walk, box, to_m, om);
    commit(gp.raw, walk, box, to_h, oh);
  });
}

template <class T>
void kl(const Moments& q, const Moments& p, const View& out, const Options& o) {
  const View& m = q.mean;
  const Walk walk(m.size[0], m.size[1], m.size[2], m);
  SampleSums sums(walk, m.size[0]);
  const auto c = o.constants<T>();
  const auto loop =
      with_kind(o.kind, [&](auto kind) { return p.mean ? &kl_loop<kind(), kind(), T> : &kl_loop<kind(), kNone, T>; });
  for_boxes(walk, [&](const Box& box, int64_t k) {
    T bm[kTile], bh[kTile], bpm[kTile], bph[kTile], value[kTile];
    const T* qm = load(q.mean, walk, box, bm);
    const T* qh = load(q.raw, walk, box, bh);
    const T* pm = load_or_zero(p.mean, walk, box, bpm);
    const T* ph = load_or_zero(p.raw, walk, box, bph);
    loop(qm, qh, pm, ph, value, box.size(), c);
    sums.add(box, k, value);
  });
  sums.finish(out, View());
}

template <class T>
void kl_backward(const Moments& q, const Moments& p, const View& gkl, const Moments& gq, const Moments& gp,
                 const Options& o) {
  const View& m = q.mean;
  const Walk walk(m.size[0], m.size[1], m.size[2], m);
  const auto c = o.constants<T>();
  const auto loop = with_kind(
      o.kind, [&](auto kind) { return p.mean ? &kl_grad_loop<kind(), kind(), T> : &kl_grad_loop<kind(), kNone, T>; });
  for_boxes(walk, [&](const Box& box, int64_t) {
    T bm[kTile], bh[kTile], bpm[kTile], bph[kTile], bl[kTile], om[kTile], oh[kTile], opm[kTile], oph[kTile];
    const T* qm = load(q.mean, walk, box, bm);
    const T* qh = load(q.raw, walk, box, bh);
    const T* pm = load_or_zero(p.mean, walk, box, bpm);
    const T* ph = load_or_zero(p.raw, walk, box, bph);
    const T* g = load(gkl, walk, box, bl);
    T* to_m = target(gq.mean, walk, box, om);
    T* to_h = target(gq.raw, walk, box, oh);
    T* to_pm = target(gp.mean, walk, box, opm);
    T* to_ph = target(gp.raw, walk, box, oph);
    loop(qm, qh, pm, ph, g, to_m, to_h, to_pm, to_ph, box.size(), c);
    commit(gq.mean, walk, box, to_m, om);
    commit(gq.raw, walk, box, to_h, oh);
    commit(gp.mean, walk, box, to_pm, opm);
    commit(gp.raw, walk, box, to_ph, oph);
  });
}

// --- what Python sees: every view is [B, C, S], None where an argument is not used --------------------

void gaussian_log_prob_fwd(const View& z, const View& params, const View& raw, const View& running, const View& logp,
                           const Packed& packed) {
  const Options o(packed);
  const Moments p = moments(params, raw, z, o);
  with_accumulator(z.dtype, [&](auto type) { log_prob<decltype(type)>(z, p, running, logp, o); });
}

void gaussian_log_prob_bwd(const View& z, const View& params, const View& raw, const View& glogp, const View& gz,
                           const View& gparams, const View& graw, const Packed& packed) {
  const Options o(packed);
  const Moments p = moments(params, raw, z, o), gp = moments(gparams, graw, z, o);
  with_accumulator(z.dtype,
                   [&](auto type) { log_prob_backward<decltype(type)>(z, p, glogp.expand(z.size), gz, gp, o); });
}

void gaussian_sample_fwd(const View& noise, const View& params, const View& raw, const View& z, const View& logp,
                         double temperature, const Packed& packed) {
  const Options o(packed);
  const Moments p = moments(params, raw, noise, o);
  with_accumulator(z.dtype, [&](auto type) {
    using T = decltype(type);
    sample<T>(noise, p, z, logp, T(temperature), o);
  });
}

void gaussian_sample_bwd(const View& noise, const View& params, const View& raw, const View& gz, const View& glogp,
                         const View& gnoise, const View& gparams, const View& graw, double temperature,
                         const Packed& packed) {
  const Options o(packed);
  const Moments p = moments(params, raw, noise, o), gp = moments(gparams, graw, noise, o);
  with_accumulator(noise.dtype, [&](auto type) {
    using T = decltype(type);
    sample_backward<T>(noise, p, gz, glogp.expand(noise.size), gnoise, gp, T(temperature), o);
  });
}

void gaussian_kl_fwd(const View& params, const View& raw, const View& prior, const View& prior_raw, const View& kl_,
                     const Packed& packed) {
  const Options o(packed);
  const Unpacked q = unpack(params, raw, o.packing);
  const Moments m = moments(params, raw, q.first, o), p = moments(prior, prior_raw, q.first, o);
  with_accumulator(params.dtype, [&](auto type) { kl<decltype(type)>(m, p, kl_, o); });
}

void gaussian_kl_bwd(const View& params, const View& raw, const View& prior, const View& prior_raw, const View& gkl,
                     const View& gparams, const View& graw, const View& gprior, const View& gprior_raw,
                     const Packed& packed) {
  const Options o(packed);
  const View like = unpack(params, raw, o.packing).first;
  const Moments m = moments(params, raw, like, o), p = moments(prior, prior_raw, like, o);
  const Moments gm = moments(gparams, graw, like, o), gp = moments(gprior, gprior_raw, like, o);
  with_accumulator(params.dtype,
                   [&](auto type) { kl_backward<decltype(type)>(m, p, gkl.expand(like.size), gm, gp, o); });
}

}  // namespace
}  // namespace fastflow

FASTFLOW_BIND(gaussian) {
  using namespace fastflow;
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("gaussian_log_prob_fwd", &gaussian_log_prob_fwd, release());
  m.def("gaussian_log_prob_bwd", &gaussian_log_prob_bwd, release());
  m.def("gaussian_sample_fwd", &gaussian_sample_fwd, release());
  m.def("gaussian_sample_bwd", &gaussian_sample_bwd, release());
  m.def("gaussian_kl_fwd", &gaussian_kl_fwd, release());
  m.def("gaussian_kl_bwd", &gaussian_kl_bwd, release());
}
