// Diagonal Gaussians, elementwise:   energy = log s + e^2 / 2,   e = (z - m) / s,   so that
// log N(z; m, s) = -energy - log(2 pi) / 2; the constant is added once per sample.
#pragma once

#include "scale_map.h"

namespace fastflow {

template <class T>
struct GaussianConstants {
  T sign;  // log s = sign * log of the map: -1 for a reciprocal map
  MapConstants<T> map;
};

template <class T>
struct Deviation {
  T log_s, s, inverse;  // 1 / s
  T dlog_s;             // d log s / d h
};

// What of it is not used costs nothing: the compiler drops it.
template <int kind, class T>
FF_HD Deviation<T> deviation(T h, const GaussianConstants<T>& c) {
  const ScaleSlope<T> scale = scale_slope<kind>(h, c.map.amplitude, c.map);
  return {c.sign * scale.log_s, multiplier<kind>(scale, c.sign), multiplier<kind>(scale, -c.sign),
          c.sign * scale.dlog_s};
}

// --- log-likelihood -----------------------------------------------------------------------------------

template <int kind, class T>
FF_HD T gaussian_energy(T z, T m, T h, const GaussianConstants<T>& c) {
  const auto d = deviation<kind>(h, c);
  const T e = (z - m) * d.inverse;
  return d.log_s + T(0.5) * e * e;
}

template <class T>
struct GaussianGrad {
  T gz, gm, gh;
};

template <int kind, class T>
FF_HD GaussianGrad<T> gaussian_grad(T z, T m, T h, T glogp, const GaussianConstants<T>& c) {
  const auto d = deviation<kind>(h, c);
  const T e = (z - m) * d.inverse;
  const T gm = glogp * e * d.inverse;
  return {-gm, gm, glogp * (e * e - T(1)) * d.dlog_s};
}

// --- sample -------------------------------------------------------------------------------------------

template <class T>
struct GaussianSample {
  T z, energy;
};

// z = m + t s e; its energy is that of the untempered Gaussian
template <int kind, class T>
FF_HD GaussianSample<T> gaussian_sample(T noise, T m, T h, T temperature, const GaussianConstants<T>& c) {
  const auto d = deviation<kind>(h, c);
  const T e = temperature * noise;
  return {m + d.s * e, d.log_s + T(0.5) * e * e};
}

template <int kind, class T>
FF_HD GaussianGrad<T> gaussian_sample_grad(T noise, T h, T temperature, T gz, T glogp, const GaussianConstants<T>& c) {
  const auto d = deviation<kind>(h, c);
  const T e = temperature * noise;
  return {temperature * (gz * d.s - glogp * e), gz, (gz * d.s * e - glogp) * d.dlog_s};
}

// --- Kullback-Leibler divergence ------------------------------------------------------------------------

// KL(q || p) = (e^{2 r} - 1) / 2 - r + u^2 / 2,   r = log s_q - log s_p,   u = (m_q - m_p) / s_p;
// prior_kind is kind, or kNone for a standard normal
template <int kind, int prior_kind, class T>
FF_HD T gaussian_kl(T m, T h, T prior_m, T prior_h, const GaussianConstants<T>& c) {
  const auto q = deviation<kind>(h, c), p = deviation<prior_kind>(prior_h, c);
  const T r = q.log_s - p.log_s, u = (m - prior_m) * p.inverse;
  return T(0.5) * (expm1(r + r) + u * u) - r;
}

template <class T>
struct GaussianKlGrad {
  T gm, gh, gprior_m, gprior_h;
};

template <int kind, int prior_kind, class T>
FF_HD GaussianKlGrad<T> gaussian_kl_grad(T m, T h, T prior_m, T prior_h, T g, const GaussianConstants<T>& c) {
  const auto q = deviation<kind>(h, c), p = deviation<prior_kind>(prior_h, c);
  const T r = q.log_s - p.log_s, u = (m - prior_m) * p.inverse;
  const T excess = g * expm1(r + r), gm = g * u * p.inverse;
  return {gm, excess * q.dlog_s, -gm, -(excess + g * u * u) * p.dlog_s};
}

}  // namespace fastflow
