// Element types as Python numbers them (zipformer_kernels/core/launch.py), their storage, and conversions to and from
// the types that arithmetic is done in.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "common/macros.h"

namespace zk {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

template <class To, class From>
ZK_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Half-precision storage. Arithmetic is done in float. On the host the conversions are branch-free integer code, which
// compilers vectorise without hardware support for either format. Rounding is to nearest, ties to even.
struct bfloat16 {
  uint16_t bits;
};

struct half {
  uint16_t bits;
};

ZK_HD float widen(float x) { return x; }
ZK_HD double widen(double x) { return x; }

ZK_HD float widen(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

ZK_HD float widen(half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // Shifts the half's exponent and mantissa into a float's place; the product with 2^112 repairs the exponent's bias
  // and normalises subnormals. Infinity and NaN, which then stand at 2^16 or above, get the float's full exponent.
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float scaled = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(239) << 23);
  uint32_t bits = bit_cast<uint32_t>(scaled) | (scaled >= 65536.0f ? 0x7f800000u : 0u);
  return bit_cast<float>(bits | (uint32_t(x.bits & 0x8000) << 16));
#endif
}

template <class T>
ZK_HD T narrow(float x);

template <>
ZK_HD float narrow<float>(float x) {
  return x;
}

template <>
ZK_HD bfloat16 narrow<bfloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return bfloat16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  uint32_t bits = bit_cast<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return bfloat16{uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
#endif
}

template <>
ZK_HD half narrow<half>(float x) {
#if defined(__CUDA_ARCH__)
  return half{__half_as_ushort(__float2half_rn(x))};
#else
  uint32_t bits = bit_cast<uint32_t>(x);
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  // Normal halves: rebias the exponent and round. Values below 2^-14: the addition of 0.5 aligns the mantissa so that
  // float rounding does the work.
  uint32_t normal = (magnitude - (uint32_t(112) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t finite = magnitude < (uint32_t(113) << 23) ? small : normal;
  uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return half{uint16_t(sign | (magnitude >= 0x477ff000u ? special : finite))};
#endif
}

template <class T>
ZK_HD T narrow(double x);

template <>
ZK_HD double narrow<double>(double x) {
  return x;
}

// The type of the arithmetic on elements of type T: double for double, float for everything else.
template <class T>
using Wide = decltype(widen(T{}));

// Calls f with a value of the element type that `dtype` names: one of the three that GPU kernels are built for ...
template <class F>
void dispatch_gpu(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f16: return f(half{});
    case DType::bf16: return f(bfloat16{});
    default: throw std::invalid_argument("dtype must be float32, float16 or bfloat16");
  }
}

// ... or one of the four of the CPU's.
template <class F>
void dispatch_cpu(DType dtype, F&& f) {
  if (dtype == DType::f64) return f(double{});
  dispatch_gpu(dtype, f);
}

}  // namespace zk
