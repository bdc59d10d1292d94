// Marks for code that is compiled for both host and device.
#pragma once

#if defined(__CUDACC__)
#define ZK_HD __host__ __device__ __forceinline__
#else
#define ZK_HD inline __attribute__((always_inline))
#endif
