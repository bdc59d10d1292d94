// Elementary functions in float and double, written once for host and device. On the host they are straight-line code
// that compilers vectorise; on the device the hardware's exponential, reciprocal and root take the place of polynomial,
// division and root, each one instruction where IEEE's rounding would take a branch or a call.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtypes.h"
#include "common/macros.h"

namespace zk {

// exp(u) for u <= 0. NaN stays NaN. On the host within 2.1e-7 relative; below -87 it stays at exp(-87) = 1.6e-38. On
// the device within 3e-7 absolute and (2.5 + 0.7 |u|) 1.2e-7 relative; below -87.3 it is 0.
ZK_HD float exp_nonpositive(float u) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(u * 1.44269504f));
  return power;
#else
  u = u < -87.0f ? -87.0f : u;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  float t = u * 1.44269504f + magic;
  float n = t - magic;
  float r = u - n * 0.693147182f;
  // exp(r) = 1 + r e(r) on [-ln2/2, ln2/2], e of degree 4 through Chebyshev nodes
  float e = 8.363173343e-3f;
  e = e * r + 4.187564552e-2f;
  e = e * r + 1.666657776e-1f;
  e = e * r + 4.999937117e-1f;
  e = e * r + 1.0f;
  float p = e * r + 1.0f;
  return bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(t) << 23));  // t may be negative
#endif
}

ZK_HD double exp_nonpositive(double u) { return exp(u); }

// a / b. On the device within 3e-7 relative where both b and 1 / b are normal numbers; a smaller b counts as 0, a
// larger one as infinite.
ZK_HD float ratio(float a, float b) {
#if defined(__CUDA_ARCH__)
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
  return a * reciprocal;
#else
  return a / b;
#endif
}

ZK_HD double ratio(double a, double b) { return a / b; }

// The square root of x >= 0. On the device within 1.2e-7 relative.
ZK_HD float root(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return sqrtf(x);
#endif
}

ZK_HD double root(double x) { return sqrt(x); }

// log(1 + z) for 0 <= z <= 1.
ZK_HD double log1p_unit(double z) { return log1p(z); }

// A polynomial z q(z), q of degree 8 through Chebyshev nodes of log1p(z) / z: within 2.3e-7 relative.
ZK_HD float log1p_unit(float z) {
  float q = 5.126102362e-3f;
  q = q * z - 2.907406539e-2f;
  q = q * z + 7.751608640e-2f;
  q = q * z - 1.360224783e-1f;
  q = q * z + 1.907688081e-1f;
  q = q * z - 2.483539879e-1f;
  q = q * z + 3.331812024e-1f;
  q = q * z - 4.999944568e-1f;
  q = q * z + 0.9999999404f;
  return q * z;
}

ZK_HD float magnitude(float x) { return fabsf(x); }
ZK_HD double magnitude(double x) { return fabs(x); }

// log(1 + exp(u)), finite for every finite u.
template <class T>
ZK_HD T softplus(T u) {
  T z = exp_nonpositive(-magnitude(u));
  return (u > T(0) ? u : T(0)) + log1p_unit(z);
}

// 1 / (1 + exp(-u)). On the device within 2.5e-7 absolute and (6 + 0.7 |u|) 1.2e-7 relative; below -87.3 it is 0.
template <class T>
ZK_HD T sigmoid(T u) {
  T z = exp_nonpositive(-magnitude(u));
  return ratio(u > T(0) ? T(1) : z, T(1) + z);
}

ZK_HD double tanh_of(double x) { return tanh(x); }

// Within 3e-7 relative: a Taylor polynomial where 1 - exp(-2 |x|) would cancel.
ZK_HD float tanh_of(float x) {
  float z = exp_nonpositive(-2.0f * magnitude(x)), s = x * x;
  float far = ratio(1.0f - z, 1.0f + z);
  float near = x + x * s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f)));
  return s < 0.09f ? near : (x > 0.0f ? far : -far);
}

}  // namespace zk
