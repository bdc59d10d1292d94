// Device code: products of weights with tiles of values in shared memory. See cuda_scores.h for weights.
#pragma once

#include "attention/cuda_scores.h"

namespace zk {

// A block of values: 64 sources a step of N times 8 channels. Rows are an odd number of chunks of 8 channels apart, so
// that eight rows of a matrix are in different banks. What is narrow is copied 4 channels a time, which is how values
// of 12 channels a head are aligned, else 16 bytes.
template <class T, int N>
struct ValueShape {
  using Element = T;
  static_assert(N % 2 == 0, "two products share a load");
  static constexpr int columns = N, channels = 8 * N;
  static constexpr int pitch = channels + 8;
  static constexpr int size = score_sources * pitch;  // elements in shared memory of a step
  static constexpr int piece = N == 2 ? 4 : 16 / int(sizeof(T));
};

// Copies values to shared memory, one tile of sources after another. Zeros beyond the sources and channels.
template <class Values>
class ValueLoader {
  using T = typename Values::Element;
  static constexpr int piece = Values::piece;

 public:
  // Rows of one sequence and head; `channels` from the first one of the block on. The first tile begins at `source`.
  __device__ __forceinline__ ValueLoader(const T* rows, int64_t stride, int sources, int channels, int source)
      : stride_(stride), left_(sources - source - int(threadIdx.x) / 2) {
    int row = threadIdx.x / 2, channel = threadIdx.x % 2 * piece;  // a row's pieces by two threads in turn
    from_ = rows + (source + row) * stride + channel;
    to_ = row * Values::pitch + channel;
    channels_ = channels - channel;
  }

  // Begins to copy the next tile to `to`, as `Values::size` elements. The caller commits.
  __device__ __forceinline__ void load(T* to) {
#pragma unroll
    for (int channel = 0; channel < Values::channels; channel += 2 * piece) {
      copy_async<piece * sizeof(T)>(to + to_ + channel, from_ + channel, left_ > 0 && channel < channels_);
    }
    from_ += score_sources * stride_;
    left_ -= score_sources;
  }

 private:
  static_assert(score_threads == 2 * score_sources, "two threads a row");
  const T* from_;
  int64_t stride_;
  int left_, to_, channels_;
};

// sums += w v for 16 sources, with their weights; the first is row `row` of what a ValueLoader has copied to `from`. In
// float the 16 are added up apart: a sum over many sources in one row would round too often.
template <class Values, int M>
__device__ __forceinline__ void add_products(const float (&w)[M][2][4], int row, const typename Values::Element* from,
                                             float (&sums)[M][Values::columns][4]) {
  using T = typename Values::Element;
  int lane = lane_of_warp();
  const T* rows = from + (row + lane % 16) * Values::pitch + lane / 16 * 8;
  Pair<T> a[M][4];
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const float (&pairs)[4] = w[m][part / 2];
      a[m][part] = make_pair<T>(pairs[part % 2 * 2], pairs[part % 2 * 2 + 1]);
    }
  }
#pragma unroll
  for (int n = 0; n < Values::columns; n += 2) {
    Pair<T> v[4];
    load_transposed(v, rows + n * 8);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if constexpr (sizeof(T) == 2) {
        mma<T>(sums[m][n], a[m], v[0], v[1]);
        mma<T>(sums[m][n + 1], a[m], v[2], v[3]);
      } else {
        float parts[2][4] = {};
        mma<T>(parts[0], a[m], v[0], v[1]);
        mma<T>(parts[1], a[m], v[2], v[3]);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[m][n + i / 4][i % 4] += parts[i / 4][i % 4];
      }
    }
  }
}

}  // namespace zk
