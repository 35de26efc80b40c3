// Scalar math that vectorises: branch-free polynomials for float and double, host and device, no libm call.
// Every function is accurate to a few units in the last place over its whole range and passes NaN on.
#pragma once

#if defined(__CUDACC_RTC__)  // has no headers
using int32_t = int;
using int64_t = long long;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#else
#include <stdint.h>
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define FF_HD __host__ __device__ __forceinline__
#define FF_D __device__ __forceinline__
#define FF_MEMCPY memcpy
#else
#define FF_MEMCPY __builtin_memcpy
#endif

#if !defined(FF_HD)
#define FF_HD inline __attribute__((always_inline))
#endif

namespace fastflow {

// --- bits -----------------------------------------------------------------------------------------

template <class To, class From>
FF_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  FF_MEMCPY(&to, &from, sizeof(to));
  return to;
}

template <class T>
struct Float;

template <>
struct Float<float> {
  using Int = int32_t;
  using Bits = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr int bias = 127;
  static constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  static constexpr float exp_low = -87.33654f, exp_high = 88.72283f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};

template <>
struct Float<double> {
  using Int = int64_t;
  using Bits = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr int bias = 1023;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double exp_low = -708.39641853226408, exp_high = 709.782712893384;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
};

template <class T>
FF_HD T abs(T x) {
  return x < T(0) ? -x : x;
}

template <class T>
FF_HD T infinity() {
  return bit_cast<T>(typename Float<T>::Int(2 * Float<T>::bias + 1) << Float<T>::mantissa);
}

template <class T>
FF_HD T not_a_number() {
  return bit_cast<T>(~typename Float<T>::Int(0));
}

// --- exp ------------------------------------------------------------------------------------------

// 2^k; of a NaN's k whatever it is: unsigned, because bits that leave a signed number are undefined
template <class T>
FF_HD T power_of_two(typename Float<T>::Int k) {
  using Bits = typename Float<T>::Bits;
  return bit_cast<T>(Bits(Bits(k + Float<T>::bias) << Float<T>::mantissa));
}

// e^r - 1 on |r| <= ln2 / 2
FF_HD float expm1_reduced(float r) {
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r) * r + r;
}

FF_HD double expm1_reduced(double r) {
  const double r2 = r * r;
  const double p = r * ((1.26177193074810590878e-4 * r2 + 3.02994407707441961300e-2) * r2 + 9.99999999999999999910e-1);
  const double q =
      ((3.00198505138664455042e-6 * r2 + 2.52448340349684104192e-3) * r2 + 2.27265548208155028766e-1) * r2 + 2.0;
  return 2.0 * (p / (q - p));
}

// e^x; 0 below the smallest normal result, inf above the largest. A GPU has an instruction for 2^x.
template <class T>
FF_HD T exp(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) return ::expf(x);
#endif
  using F = Float<T>;
  using Int = typename F::Int;
  T v = x < F::exp_low ? F::exp_low : x;
  v = v > F::exp_high ? F::exp_high : v;
  const T shifted = v * T(1.44269504088896340736) + F::round;
  const T n = shifted - F::round;
  const T r = (v - n * F::ln2_high) - n * F::ln2_low;
  // n reaches bias + 1 near the top: scale in two halves so that neither overflows
  const Int k = bit_cast<Int>(shifted) - bit_cast<Int>(F::round);
  const Int half = k >> 1;
  const T low = power_of_two<T>(half);
  const T high = power_of_two<T>(k - half);
  T y = (expm1_reduced(r) + T(1)) * low * high;
  y = x < F::exp_low ? T(0) : y;
  return x > F::exp_high ? infinity<T>() : y;
}

// e^x for x <= 0: one scaling and one bound fewer
template <class T>
FF_HD T exp_nonpositive(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) return ::expf(x);
#endif
  using F = Float<T>;
  using Int = typename F::Int;
  const T v = x < F::exp_low ? F::exp_low : x;
  const T shifted = v * T(1.44269504088896340736) + F::round;
  const T n = shifted - F::round;
  const T r = (v - n * F::ln2_high) - n * F::ln2_low;
  const Int k = bit_cast<Int>(shifted) - bit_cast<Int>(F::round);
  const T y = (expm1_reduced(r) + T(1)) * power_of_two<T>(k);
  return x < F::exp_low ? T(0) : y;
}

// e^x - 1, accurate near 0
template <class T>
FF_HD T expm1(T x) {
  const bool small = abs(x) < T(0.34);
  return small ? expm1_reduced(small ? x : T(0)) : exp(x) - T(1);
}

// --- log ------------------------------------------------------------------------------------------

// log(1 + f) - f + f^2 / 2 on sqrt(1/2) <= 1 + f < sqrt(2), by s = f / (2 + f)
FF_HD float log_tail(float s2) {
  return s2 * (0.66666662693f + s2 * (0.40000972152f + s2 * (0.28498786688f + s2 * 0.24279078841f)));
}

FF_HD double log_tail(double s2) {
  return s2 * (6.666666666666735130e-01 +
               s2 * (3.999999999940941908e-01 +
                     s2 * (2.857142874366239149e-01 +
                           s2 * (2.222219843214978396e-01 +
                                 s2 * (1.818357216161805012e-01 +
                                       s2 * (1.531383769920937332e-01 + s2 * 1.479819860511658591e-01))))));
}

// ln x for x >= 0; log(0) = -inf, negative x gives NaN
template <class T>
FF_HD T log(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) return ::logf(x);
#endif
  using F = Float<T>;
  using Int = typename F::Int;
  constexpr T denormal_scale = T(Int(1) << F::mantissa);
  const T smallest = bit_cast<T>(Int(1) << F::mantissa);
  const bool denormal = x < smallest;
  const T v = denormal ? x * denormal_scale : x;
  // split v = 2^k * m with m in [sqrt(1/2), sqrt(2))
  const Int sqrt_half = bit_cast<Int>(T(0.70710678118654752440));
  const Int bits = bit_cast<Int>(v) - sqrt_half;
  const Int k = bits >> F::mantissa;
  const T m = bit_cast<T>(Int((bits & ((Int(1) << F::mantissa) - 1)) + sqrt_half));
  const T f = m - T(1);
  const T s = f / (T(2) + f);
  const T half_square = T(0.5) * f * f;
  const T n = T(int(k)) - (denormal ? T(F::mantissa) : T(0));
  T y = n * F::ln2_high - ((half_square - (s * (half_square + log_tail(s * s)) + n * F::ln2_low)) - f);
  y = x == T(0) ? -infinity<T>() : y;
  y = x == infinity<T>() ? x : y;
  return x >= T(0) ? y : x - x + bit_cast<T>(~Int(0));  // NaN for negative x and for NaN
}

// ln(1 + q) on 0 <= q <= 1. Float: q - q^2 / 2 + q^3 P(q), P minimax, because a division costs more than the
// polynomial.
FF_HD float log1p_unit(float q) {
  float p = -4.420736338943243e-3f;
  p = p * q + 2.524702996015549e-2f;
  p = p * q - 6.722103059291840e-2f;
  p = p * q + 1.164807081222534e-1f;
  p = p * q - 1.591715216636658e-1f;
  p = p * q + 1.988158524036407e-1f;
  p = p * q - 2.499143630266190e-1f;
  p = p * q + 3.333312571048737e-1f;
  return q - q * q * (0.5f - q * p);
}

// Double: with s = q / (2 + q) it is q - (q^2 / 2 - s (q^2 / 2 + R)), R = 2/3 s^2 + 2/5 s^4 + ...
FF_HD double log1p_unit(double q) {
  constexpr int terms = 17;  // s^2 <= 1/9
  const double s = q / (2.0 + q), s2 = s * s;
  double series = 2.0 / (2 * terms + 1);
#if defined(__CUDA_ARCH__)
#pragma unroll
#else
#pragma GCC unroll 32
#endif
  for (int k = terms - 1; k >= 1; --k) series = series * s2 + 2.0 / (2 * k + 1);
  const double half_square = 0.5 * q * q;
  return q - (half_square - s * (half_square + s2 * series));
}

// --- bounded functions ------------------------------------------------------------------------------

// tanh(x) - x for |x| < 0.625
FF_HD float tanh_small(float x) {
  const float z = x * x;
  return x * z *
         ((((-5.70498872745e-3f * z + 2.06390887954e-2f) * z - 5.37397155531e-2f) * z + 1.33314422036e-1f) * z -
          3.33332819422e-1f);
}

FF_HD double tanh_small(double x) {
  const double z = x * x;
  const double p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3;
  const double q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3;
  return x * z * (p / q);
}

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
// fewer registers than below: kernels of half precision would spill
FF_HD float tanh(float x) {
  const float a = abs(x);
  const float large = 1.f - 2.f / (exp(a + a) + 1.f);
  const float signed_large = x < 0.f ? -large : large;
  return a < 0.625f ? x + tanh_small(x) : signed_large;
}
#else
// With h = (e^2a - 1) / 2, a = |x|, it is h / (h + 1). Float: a = n ln2 / 2 + f, so that e^2a = 2^n e^2f; near 0, where
// n = 0, h and with it tanh is x itself. One division, at most 2 ulp, never above 1.
FF_HD float tanh(float x) {
  constexpr uint32_t sign_bit = 0x80000000u;
  const uint32_t bits = bit_cast<uint32_t>(x);
  float a = bit_cast<float>(bits & ~sign_bit);
  a = a > 10.f ? 10.f : a;  // from 9.01 on it is 1
  constexpr float round = Float<float>::round + Float<float>::bias;
  const float shifted = a * 2.885390043f + round, n = shifted - round;
  const float f = a - n * 0.3465735912f;
  // (e^2f - 1) / 2 = f + f^2 P, P minimax
  float p = 4.442431778e-2f;
  p = p * f + 1.338663101e-1f;
  p = p * f + 3.333387673e-1f;
  p = p * f + 6.666617393e-1f;
  p = p * f + 9.999999404e-1f;
  p = (p * f) * f + f;
  const float scale = bit_cast<float>(bit_cast<uint32_t>(shifted) << Float<float>::mantissa);  // 2^n
  const float h = p * scale + (0.5f * scale - 0.5f);
  const float m = h > 1.f ? 1.f : h;  // h - h h / (h + 1), or 1 - 1 / (h + 1): the quotient's rounding counts less
  return bit_cast<float>(bit_cast<uint32_t>(m - m * (m / (h + 1.f))) | (bits & sign_bit));
}
#endif

FF_HD double tanh(double x) {
  const double a = abs(x);
  const double large = 1.0 - 2.0 / (exp(a + a) + 1.0);
  const double signed_large = x < 0 ? -large : large;
  return a < 0.625 ? x + tanh_small(x) : signed_large;
}

FF_HD float atan_reduced(float y) {
  const float z = y * y;
  return y + y * z * (((8.05374449538e-2f * z - 1.38776856032e-1f) * z + 1.99777106478e-1f) * z - 3.33329491539e-1f);
}

FF_HD double atan_reduced(double y) {
  const double z = y * y;
  const double p =
      (((-8.750608600031904122785e-1 * z - 1.615753718733365076637e1) * z - 7.500855792314704667340e1) * z -
       1.228866684490136173410e2) *
          z -
      6.485021904942025371773e1;
  const double q =
      ((((z + 2.485846490142306297962e1) * z + 1.650270098316988542046e2) * z + 4.328810604912902668951e2) * z +
       4.853903996359136964868e2) *
          z +
      1.945506571482613964425e2;
  return y + y * z * (p / q);
}

template <class T>
FF_HD T atan(T x) {
  const T a = abs(x);
  const bool steep = a > T(2.41421356237309504880);   // tan(3 pi / 8)
  const bool middle = a > T(0.41421356237309504880);  // tan(pi / 8)
  const T reduced = steep ? T(-1) / a : (middle ? (a - T(1)) / (a + T(1)) : a);
  const T offset = steep ? T(1.57079632679489661923) : (middle ? T(0.78539816339744830962) : T(0));
  const T y = offset + atan_reduced(reduced);
  return x < T(0) ? -y : y;
}

// sigmoid(v), sigmoid(-v) and softplus(v) share q = e^{-|v|}
template <class T>
struct Logistic {
  T sigmoid, complement, softplus, q;
};

template <class T>
FF_HD Logistic<T> logistic(T v) {
  const T q = exp_nonpositive(-abs(v));
  const T big = T(1) / (T(1) + q), small = q * big;
  return {v < T(0) ? small : big, v < T(0) ? big : small, (v > T(0) ? v : T(0)) + log1p_unit(q), q};
}

}  // namespace fastflow
