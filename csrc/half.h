// Half precision as kernels store it: widened on the way in, rounded to nearest on the way out.
#pragma once

#include "math.h"

namespace fastflow {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

FF_HD float widen(float x) { return x; }
FF_HD double widen(double x) { return x; }
FF_HD float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
FF_HD float widen(Half x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const float scaled = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(254 - 15) << 23);  // * 2^112
  const uint32_t infinite = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | infinite | (uint32_t(x.bits & 0x8000u) << 16));
#endif
}

FF_HD void narrow(float x, float& to) { to = x; }
FF_HD void narrow(double x, double& to) { to = x; }
FF_HD void narrow(float x, BFloat16& to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  to.bits = uint16_t(x == x ? rounded : (bits >> 16) | 0x40u);
#endif
}
FF_HD void narrow(float x, Half& to) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // adding 2^13 ulp rounds to the half grid; below 2^-14 adding 0.5 aligns the denormal grid
  const float denormal = bit_cast<float>(magnitude) + 0.5f;
  const uint32_t small = bit_cast<uint32_t>(denormal) - bit_cast<uint32_t>(0.5f);
  const uint32_t normal = (magnitude + ((magnitude >> 13) & 1u) + 0xfffu - (112u << 23)) >> 13;
  uint32_t half = magnitude < (113u << 23) ? small : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = uint16_t(half | sign);
#endif
}

}  // namespace fastflow
