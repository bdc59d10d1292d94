// A stand-in for CUDA's header of the same name: runs kernels on the CPU so that tests can execute the .cu sources
// where there is no GPU. A test tool, not a backend.
//
// The threads of a block are cooperative fibres of one OS thread; blocks run one after another. A fibre runs until it
// finishes or waits at a barrier or a warp exchange. Fibres take turns in an order that changes from barrier to
// barrier, so that code which lacks a barrier reads stale or poisoned values. Barriers that not all threads reach are
// an error.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fibre that is running

namespace emulator {

void run(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel);
void* dynamic_shared();

void block_barrier();
// Exchanges up to 8 bytes among the lanes of `mask`: hands in `mine`, returns what lane `source` handed in.
uint64_t warp_exchange(unsigned mask, uint64_t mine, int source);
int lane();

// Hands in up to 64 bytes, and waits until all lanes of the warp have done so ...
void publish(const void* mine, size_t bytes);
// ... what a lane has handed in, readable until the next call of `publish` or of an exchange returns.
const void* published(int lane);

// Ends the run with an error.
[[noreturn]] void fail(const char* what);

template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "shuffles carry up to 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = warp_exchange(mask, word, source);
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

}  // namespace emulator

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::warp_exchange(mask, 0, emulator::lane()); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulator::shuffle(mask, value, source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulator::shuffle(mask, value, emulator::lane() ^ lanes);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  int source = emulator::lane() + int(delta);
  return emulator::shuffle(mask, value, source < 32 ? source : emulator::lane());
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  emulator::publish(&predicate, sizeof(predicate));
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    bits |= unsigned(*static_cast<const int*>(emulator::published(lane)) != 0) << lane;
  }
  return bits;
}

template <class T>
T atomicAdd(T* address, T value) {
  T old = *address;
  *address = old + value;
  return old;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "invalid configuration";
}

template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Args... args) {
  dim3 block = config->blockDim;
  if (block.x * block.y * block.z > 1024 || config->gridDim.y > 65535 || config->gridDim.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  emulator::run(config->gridDim, block, config->dynamicSmemBytes, [&] { kernel(args...); });
  return cudaSuccess;
}
