// Diagonal Gaussians on a GPU: log-likelihood, tempered sample and KL divergence, each in one pass over its tensors.
// Mean and raw scale are read where the network wrote them. Bound by memory bandwidth. The arguments are packed by
// fastflow/ops/cuda/gaussian.py.
#include "../gaussian.h"
#include "walk.cuh"

namespace fastflow {

// What every kernel here is told; kind is kNone, and mean and raw are absent, for a standard normal.
struct Gaussian {
  Walk walk;
  int64_t kind;
  double sign;
  Map map;

  template <class T>
  FF_HD GaussianConstants<T> constants() const {
    return {T(sign), map.constants<T>()};
  }
};

// --- log-likelihood -----------------------------------------------------------------------------------

struct LogProbForward {
  Gaussian in;
  Operand z, mean, raw;
  Sums sums;
};

template <class Z, class P, class H, int V>
FF_D void gaussian_log_prob_fwd(const LogProbForward& a) {
  using T = Accumulator<Z>;
  const Team team(a.in.walk);
  const auto c = a.in.constants<T>();
  T sum = 0;
  with_kind(a.in.kind, [&](auto kind) {
    each_step<V>(a.in.walk, team, [&](const Position<false>& p) {
      T z[V], m[V], h[V];
      load<Z>(a.z, p, z);
      load<P>(a.mean, p, m);
      load<H>(a.raw, p, h);
#pragma unroll
      for (int v = 0; v < V; ++v) sum += gaussian_energy<decltype(kind)::value>(z[v], m[v], h[v], c);
    });
  });
  add_up<T>(a.in.walk, team, a.sums, double(sum));
}

struct LogProbBackward {
  Gaussian in;
  Operand z, mean, raw, gz, gmean, graw;
  char* glogp;
  int64_t glogp_stride;
};

template <class Z, class P, class H, int V>
FF_D void gaussian_log_prob_bwd(const LogProbBackward& a) {
  using T = Accumulator<Z>;
  const Team team(a.in.walk);
  if (!team.active) return;
  const auto c = a.in.constants<T>();
  const T glogp = reinterpret_cast<const T*>(a.glogp)[team.b * a.glogp_stride];
  with_kind(a.in.kind, [&](auto kind) {
    each_step<V>(a.in.walk, team, [&](const Position<false>& p) {
      T z[V], m[V], h[V], gz[V], gm[V], gh[V];
      load<Z>(a.z, p, z);
      load<P>(a.mean, p, m);
      load<H>(a.raw, p, h);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const auto g = gaussian_grad<decltype(kind)::value>(z[v], m[v], h[v], glogp, c);
        gz[v] = g.gz, gm[v] = g.gm, gh[v] = g.gh;
      }
      store<Z>(a.gz, p, gz);
      store<P>(a.gmean, p, gm);
      store<H>(a.graw, p, gh);
    });
  });
}

// --- sample -------------------------------------------------------------------------------------------

struct SampleForward {
  Gaussian in;
  Operand noise, mean, raw, z;
  double temperature;
  Sums sums;
};

template <class Z, class P, class H, int V>
FF_D void gaussian_sample_fwd(const SampleForward& a) {
  using T = Accumulator<Z>;
  const Team team(a.in.walk);
  const auto c = a.in.constants<T>();
  const T temperature = T(a.temperature);
  T sum = 0;
  with_kind(a.in.kind, [&](auto kind) {
    each_step<V>(a.in.walk, team, [&](const Position<false>& p) {
      T noise[V], m[V], h[V], z[V];
      load<Z>(a.noise, p, noise);
      load<P>(a.mean, p, m);
      load<H>(a.raw, p, h);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const auto s = gaussian_sample<decltype(kind)::value>(noise[v], m[v], h[v], temperature, c);
        z[v] = s.z;
        sum += s.energy;
      }
      store<Z>(a.z, p, z);
    });
  });
  add_up<T>(a.in.walk, team, a.sums, double(sum));
}

struct SampleBackward {
  Gaussian in;
  Operand noise, raw, gz, gnoise, gmean, graw;
  double temperature;
  char* glogp;
  int64_t glogp_stride;
};

template <class Z, class P, class H, int V>
FF_D void gaussian_sample_bwd(const SampleBackward& a) {
  using T = Accumulator<Z>;
  const Team team(a.in.walk);
  if (!team.active) return;
  const auto c = a.in.constants<T>();
  const T temperature = T(a.temperature), glogp = reinterpret_cast<const T*>(a.glogp)[team.b * a.glogp_stride];
  with_kind(a.in.kind, [&](auto kind) {
    each_step<V>(a.in.walk, team, [&](const Position<false>& p) {
      T noise[V], h[V], gz[V], gnoise[V], gm[V], gh[V];
      load<Z>(a.noise, p, noise);
      load<H>(a.raw, p, h);
      load<Z>(a.gz, p, gz);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const auto g = gaussian_sample_grad<decltype(kind)::value>(noise[v], h[v], temperature, gz[v], glogp, c);
        gnoise[v] = g.gz, gm[v] = g.gm, gh[v] = g.gh;
      }
      store<Z>(a.gnoise, p, gnoise);
      store<P>(a.gmean, p, gm);
      store<H>(a.graw, p, gh);
    });
  });
}

// --- Kullback-Leibler divergence ------------------------------------------------------------------------
// Both distributions packed alike and of one type; without a prior it is the standard normal.

struct KlForward {
  Gaussian in;
  Operand mean, raw, prior_mean, prior_raw;
  Sums sums;
};

// f(kind of the prior)
template <int kind, class F>
FF_HD void with_prior(const Operand& prior, const F& f) {
  if (prior.data)
    f(Constant<kind>());
  else
    f(Constant<kNone>());
}

template <class P, class H, int V>
FF_D void gaussian_kl_fwd(const KlForward& a) {
  using T = Accumulator<P>;
  const Team team(a.in.walk);
  const auto c = a.in.constants<T>();
  T sum = 0;
  with_kind(a.in.kind, [&](auto kind) {
    with_prior<decltype(kind)::value>(a.prior_mean, [&](auto prior_kind) {
      each_step<V>(a.in.walk, team, [&](const Position<false>& p) {
        T m[V], h[V], pm[V], ph[V];
        load<P>(a.mean, p, m);
        load<H>(a.raw, p, h);
        load<P>(a.prior_mean, p, pm);
        load<H>(a.prior_raw, p, ph);
#pragma unroll
        for (int v = 0; v < V; ++v)
          sum += gaussian_kl<decltype(kind)::value, decltype(prior_kind)::value>(m[v], h[v], pm[v], ph[v], c);
      });
    });
  });
  add_up<T>(a.in.walk, team, a.sums, double(sum));
}

struct KlBackward {
  Gaussian in;
  Operand mean, raw, prior_mean, prior_raw, gmean, graw, gprior_mean, gprior_raw;
  char* gkl;
  int64_t gkl_stride;
};

template <class P, class H, int V>
FF_D void gaussian_kl_bwd(const KlBackward& a) {
  using T = Accumulator<P>;
  const Team team(a.in.walk);
  if (!team.active) return;
  const auto c = a.in.constants<T>();
  const T gkl = reinterpret_cast<const T*>(a.gkl)[team.b * a.gkl_stride];
  with_kind(a.in.kind, [&](auto kind) {
    with_prior<decltype(kind)::value>(a.prior_mean, [&](auto prior_kind) {
      each_step<V>(a.in.walk, team, [&](const Position<false>& p) {
        T m[V], h[V], pm[V], ph[V], gm[V], gh[V], gpm[V], gph[V];
        load<P>(a.mean, p, m);
        load<H>(a.raw, p, h);
        load<P>(a.prior_mean, p, pm);
        load<H>(a.prior_raw, p, ph);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const auto g =
              gaussian_kl_grad<decltype(kind)::value, decltype(prior_kind)::value>(m[v], h[v], pm[v], ph[v], gkl, c);
          gm[v] = g.gm, gh[v] = g.gh, gpm[v] = g.gprior_m, gph[v] = g.gprior_h;
        }
        store<P>(a.gmean, p, gm);
        store<H>(a.graw, p, gh);
        store<P>(a.gprior_mean, p, gpm);
        store<H>(a.gprior_raw, p, gph);
      });
    });
  });
}

}  // namespace fastflow
