// Device code: products of small matrices by a warp, and what brings their operands into registers. For sm_80 and
// later.
//
// A product is c += a b with a of 16 x 16, b of 16 x 8 and c of 16 x 8 elements. Lane l holds, with g = l / 4, t = l %
// 4:
//
//   c[0], c[1]  row g, columns 2 t, 2 t + 1;  c[2], c[3]  the same of row g + 8
//   a[0]  row g, columns 2 t, 2 t + 1;  a[1]  row g + 8;  a[2], a[3]  the same of columns 8 more
//   b0    rows 2 t, 2 t + 1 of column g;  b1  of rows 8 more
//
// so two neighbouring columns of sums, rounded, are a pair of a. Half precision goes to the matrix instruction, and
// sums are float. For float there is none that does not round its operands: lanes exchange them, and each multiplies.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/dtypes.h"
#include "common/launch.h"

namespace zk {

// Two neighbouring elements, the lower first.
template <class T>
struct PairOf {
  using type = uint32_t;
};
template <>
struct PairOf<float> {
  struct alignas(8) type {
    float lower, upper;
  };
};
template <class T>
using Pair = typename PairOf<T>::type;

#if defined(__CUDACC__) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define ZK_SM_80(...) __trap()  // a build for older devices; Python never launches such a kernel there
#else
#define ZK_SM_80(...) __VA_ARGS__
#endif

template <class T>
__device__ __forceinline__ Pair<T> make_pair(float lower, float upper) {
  if constexpr (sizeof(T) == 4) {
    return Pair<T>{lower, upper};
  } else {
#if defined(__CUDACC__)
    uint32_t pair = 0;
    if constexpr (std::is_same_v<T, bfloat16>) {
      ZK_SM_80(asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower)));
    } else {
      ZK_SM_80(asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower)));
    }
    return pair;
#else
    return narrow<T>(lower).bits | uint32_t(narrow<T>(upper).bits) << 16;
#endif
  }
}

// Has the compiler hold a pair in its register, where it would rather compute it again at every use.
template <class T>
__device__ __forceinline__ void hold(Pair<T>& pair) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 2) asm volatile("" : "+r"(pair));
#endif
}

// The same of a number, such as where a thread reads in every step of a loop.
__device__ __forceinline__ int held(int x) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// 2^x, 0 for -infinity; within 2 ulp on the device.
__device__ __forceinline__ float exp2_of(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

#if defined(__CUDACC__)

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ int lane_of_warp() { return threadIdx.x % 32; }

// c += a b.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const Pair<T> (&a)[4], Pair<T> b0, Pair<T> b1) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    ZK_SM_80(
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};" : "+f"(c[0]),
            "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
  } else if constexpr (std::is_same_v<T, half>) {
    ZK_SM_80(
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};" : "+f"(c[0]),
            "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
  } else {
    int lane = lane_of_warp(), row = lane & ~3, column = lane % 4 * 8;  // lanes that hold the row, and both columns
    float sums[4] = {};  // first: added to c one by one they would be rounded as often
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      Pair<T> b = high ? b1 : b0;
#pragma unroll 2  // all at once would take registers for as many elements on their way
      for (int k = 0; k < 8; ++k) {
        auto element = [&](Pair<T> pair, int from) { return __shfl_sync(~0u, k % 2 ? pair.upper : pair.lower, from); };
        float top = element(a[2 * high], row + k / 2), bottom = element(a[2 * high + 1], row + k / 2);
        float left = element(b, column + k / 2), right = element(b, column + 4 + k / 2);
        sums[0] += top * left, sums[1] += top * right, sums[2] += bottom * left, sums[3] += bottom * right;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += sums[i];
  }
}

// Four matrices of 8 x 8 elements from shared memory, as pairs along their rows: lane l gets of matrix m what a
// operand's lane holds of rows and columns 0 to 7, row l / 4, columns 2 (l % 4) and the next. `row` is row l % 8 of
// matrix l / 8, and aligned to 8 elements.
template <class T>
__device__ __forceinline__ void load_matrices(Pair<T> (&pairs)[4], const T* row) {
  if constexpr (sizeof(T) == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                 : "r"(shared_address(row)));
  } else {
    int lane = lane_of_warp();
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t from = __shfl_sync(~0u, shared_address(row), 8 * m + lane / 4) + lane % 4 * 8;
      asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(pairs[m].lower), "=f"(pairs[m].upper) : "r"(from));
    }
  }
}

// The same of the matrices transposed: rows 2 (l % 4) and the next of column l / 4, as b0 and b1 hold them.
template <class T>
__device__ __forceinline__ void load_transposed(Pair<T> (&pairs)[4], const T* row) {
  if constexpr (sizeof(T) == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                 : "r"(shared_address(row)));
  } else {
    int lane = lane_of_warp();
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t lower = __shfl_sync(~0u, shared_address(row), 8 * m + lane % 4 * 2) + lane / 4 * 4;
      uint32_t upper = __shfl_sync(~0u, shared_address(row), 8 * m + lane % 4 * 2 + 1) + lane / 4 * 4;
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(pairs[m].lower) : "r"(lower));
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(pairs[m].upper) : "r"(upper));
    }
  }
}

// Begins to copy 4, 8 or 16 bytes to shared memory, zeros where not `inside`. Both are aligned to as many; `from` is
// readable nowhere else than inside.
template <int bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  [[maybe_unused]] int read = inside ? bytes : 0;
  if constexpr (bytes == 16) {
    ZK_SM_80(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                          "r"(read) : "memory"));
  } else {
    ZK_SM_80(asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from),
                          "n"(bytes), "r"(read) : "memory"));
  }
}

// Ends a group of copies ...
__device__ __forceinline__ void commit_copies() { ZK_SM_80(asm volatile("cp.async.commit_group;" :: : "memory")); }

// ... and waits until at most the `later` last groups are under way. A barrier must follow: others copied as well.
template <int later>
__device__ __forceinline__ void wait_for_copies() {
  ZK_SM_80(asm volatile("cp.async.wait_group %0;" ::"n"(later) : "memory"));
}

#else  // the emulator: every lane publishes its operands, then computes its own share

inline int lane_of_warp() { return emulator::lane(); }

inline float element_of(uint32_t pair, int upper, bfloat16) { return widen(bfloat16{uint16_t(pair >> 16 * upper)}); }
inline float element_of(uint32_t pair, int upper, half) { return widen(half{uint16_t(pair >> 16 * upper)}); }
inline float element_of(Pair<float> pair, int upper, float) { return upper ? pair.upper : pair.lower; }

template <class T>
void mma(float (&c)[4], const Pair<T> (&a)[4], Pair<T> b0, Pair<T> b1) {
  struct Operands {
    Pair<T> a[4], b[2];
  } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::publish(&mine, sizeof(mine));
  auto of = [](int lane) { return static_cast<const Operands*>(emulator::published(lane)); };
  int lane = emulator::lane();
  const Operands *rows[4], *columns[2][4];  // those of the lanes that hold this lane's rows and columns
  for (int k = 0; k < 4; ++k) {
    rows[k] = of(lane / 4 * 4 + k);
    for (int i = 0; i < 2; ++i) columns[i][k] = of((lane % 4 * 2 + i) * 4 + k);
  }
  for (int i = 0; i < 4; ++i) {
    float sum = 0.0f;  // first, as on a device
    for (int k = 0; k < 16; ++k) {
      float x = element_of(rows[k % 8 / 2]->a[k / 8 * 2 + i / 2], k % 2, T{});
      float y = element_of(columns[i % 2][k % 8 / 2]->b[k / 8], k % 2, T{});
      sum += x * y;
    }
    c[i] += sum;
  }
}

template <class T>
Pair<T> pair_of(T lower, T upper) {
  if constexpr (sizeof(T) == 4) {
    return Pair<T>{lower, upper};
  } else {
    return lower.bits | uint32_t(upper.bits) << 16;
  }
}

template <class T>
void load_matrices(Pair<T> (&pairs)[4], const T* row) {
  emulator::publish(&row, sizeof(row));
  int lane = emulator::lane();
  for (int m = 0; m < 4; ++m) {
    const T* from = *static_cast<const T* const*>(emulator::published(8 * m + lane / 4)) + lane % 4 * 2;
    pairs[m] = pair_of(from[0], from[1]);
  }
}

template <class T>
void load_transposed(Pair<T> (&pairs)[4], const T* row) {
  emulator::publish(&row, sizeof(row));
  int lane = emulator::lane();
  auto of = [&](int m, int r) { return (*static_cast<const T* const*>(emulator::published(8 * m + r)))[lane / 4]; };
  for (int m = 0; m < 4; ++m) pairs[m] = pair_of(of(m, lane % 4 * 2), of(m, lane % 4 * 2 + 1));
}

// A copy is made at once: code that does not wait for it shows on a device alone.
template <int bytes>
void copy_async(void* to, const void* from, bool inside) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || (inside && reinterpret_cast<uintptr_t>(from) % bytes != 0)) {
    emulator::fail("emulator: a copy to shared memory is not aligned");
  }
  if (inside) {
    std::memcpy(to, from, bytes);
  } else {
    std::memset(to, 0, bytes);
  }
}

inline void commit_copies() {}

template <int later>
void wait_for_copies() {}

#endif

}  // namespace zk
