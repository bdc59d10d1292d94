// Device code: N neighbouring elements, loaded into the type of arithmetic and stored from it, 16 bytes an access.
#pragma once

#include "common/dtypes.h"
#include "common/launch.h"

namespace zk {

// Elements of T that one access moves, of N in all.
template <class T, int N>
constexpr int access_size = N < pack_size<T> ? N : pack_size<T>;

// One store. By assignment nvcc may store element by element: it takes structs apart, and in branches does not put them
// together again.
template <class T, int N>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
#if defined(__CUDACC__)
  if constexpr (sizeof(pack) == 16) {
    auto w = bit_cast<uint4>(pack);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w)
                 : "memory");
    return;
  } else if constexpr (sizeof(pack) == 8) {
    auto w = bit_cast<uint2>(pack);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(w.x), "r"(w.y) : "memory");
    return;
  }
#endif
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

template <class T, int N>
__device__ __forceinline__ void load(const T* from, Wide<T> (&values)[N]) {
  constexpr int size = access_size<T, N>;
#pragma unroll
  for (int first = 0; first < N; first += size) {
    auto pack = *reinterpret_cast<const Pack<T, size>*>(from + first);
#pragma unroll
    for (int j = 0; j < size; ++j) values[first + j] = widen(pack.element[j]);
  }
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const Wide<T> (&values)[N]) {
  constexpr int size = access_size<T, N>;
#pragma unroll
  for (int first = 0; first < N; first += size) {
    Pack<T, size> pack;
#pragma unroll
    for (int j = 0; j < size; ++j) pack.element[j] = narrow<T>(values[first + j]);
    store_pack(to + first, pack);
  }
}

}  // namespace zk
