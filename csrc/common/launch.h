// The one way to launch a kernel, and what kernels share. Compiled by nvcc, or by the host compiler with
// csrc/emulator first on the include path, which brings its own cuda_runtime.h.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace zk {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Launches kernel(args...) on `stream` (a cudaStream_t); an empty grid launches nothing.
template <class... Parameters, class... Args>
void launch(const char* name, void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes,
            void* stream, Args... args) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared_bytes)),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(args)...), name);
}

// N neighbouring elements that one instruction loads or stores: 16 bytes at most, and as aligned as they are long.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0, "a pack is 1, 2, 4, 8 or 16 bytes");
  T element[N];
};

// Elements of type T in 16 bytes.
template <class T>
constexpr int pack_size = 16 / int(sizeof(T));

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Grid dimension x holds 2^31 - 1 blocks.
inline unsigned grid_size(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::runtime_error("more blocks than a grid holds");
  return unsigned(blocks);
}

#if defined(__CUDACC__)
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char zk_dynamic_shared[];
  return reinterpret_cast<T*>(zk_dynamic_shared);
}
#else
template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::dynamic_shared());
}
#endif

}  // namespace zk
