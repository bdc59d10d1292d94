// The weight gradient of a depthwise convolution of images. A thread takes as many channels as a register holds, copies
// a tile of frames of them into cache, and slides rows of dy along rows of x: the sums of a row of taps stay in
// registers.
#include <algorithm>

#include "common/parallel.h"
#include "common/strip.h"
#include "depthwise_conv2d/depthwise_conv2d.h"

namespace zk::ZK_ISA {

namespace {

constexpr int64_t tile = 16;  // frames

template <class X, class W = Wide<X>>
class WeightGradient {
 public:
  explicit WeightGradient(const DepthwiseConv2dWeightGradient& args) : n(args), taps_(round_up(n.kernel_bins, group)) {
    x_.resize(tile + n.kernel_frames - 1, n.bins + taps_);
    dy_.resize(tile, n.bins);
  }

  // Leaves the sums over the frames of a part.
  void run(int64_t part) {
    int64_t tiles_each = (n.frames + tile - 1) / tile, tiles = n.batch * tiles_each;
    for (int64_t first = 0; first < n.channels; first += lanes<W>) {
      count_ = std::min<int64_t>(lanes<W>, n.channels - first);
      sums_.resize(n.kernel_frames, taps_);
      for (int64_t i = tiles * part / n.parts; i < tiles * (part + 1) / n.parts; ++i) {
        add(first, i / tiles_each, i % tiles_each * tile);
      }
      W* to = static_cast<W*>(n.partials) + part * n.kernel_frames * n.kernel_bins * n.channels + first;
      for (int64_t i = 0; i < n.kernel_frames; ++i) {
        for (int64_t j = 0; j < n.kernel_bins; ++j, to += n.channels) {
          std::copy_n(elements<W>(sums_.panel(i) + j), count_, to);
        }
      }
    }
  }

 private:
  // Adds a tile from frame t0 of sequence b on.
  void add(int64_t first, int64_t b, int64_t t0) {
    int64_t half = n.kernel_frames / 2, t1 = std::min(t0 + tile, n.frames);
    int64_t u0 = std::max<int64_t>(t0 - half, 0), u1 = std::min(t1 + half, n.frames);
    for (int64_t u = u0; u < u1; ++u) load(n.x, first, b, u, x_.panel(u - u0) + n.kernel_bins / 2);
    for (int64_t t = t0; t < t1; ++t) load(n.dy, first, b, t, dy_.panel(t - t0));
    for (int64_t t = t0; t < t1; ++t) {
      for (int64_t u = std::max(t - half, u0); u < std::min(t + half + 1, u1); ++u) {
        correlate_taps<W>(x_.panel(u - u0), dy_.panel(t - t0), n.bins, n.kernel_bins, sums_.panel(u - t + half));
      }
    }
  }

  void load(const Image& image, int64_t first, int64_t b, int64_t t, Register<W>* to) const {
    const X* from = static_cast<const X*>(image.data) + b * image.batch_stride + t * image.frame_stride + first;
    for (int64_t f = 0; f < n.bins; ++f, from += image.bin_stride) {
      W* values = elements<W>(to + f);
      if (count_ == lanes<W>) {
#pragma omp simd
        for (int c = 0; c < lanes<W>; ++c) values[c] = widen(from[c]);
      } else {  // lanes beyond hold what they held: their sums are never read
        for (int64_t c = 0; c < count_; ++c) values[c] = widen(from[c]);
      }
    }
  }

  const DepthwiseConv2dWeightGradient& n;
  int64_t taps_;            // of a row, and room for the sums that the inner loop makes beside them
  int64_t count_ = 0;       // channels in this turn
  Strip<W> x_, dy_, sums_;  // frames by bins; frames by bins; taps by taps
};

}  // namespace

void depthwise_conv2d_weight_gradient(const DepthwiseConv2dWeightGradient& args) {
  dispatch_cpu(args.dtype, [&](auto element) {
    parallel_for(args.parts, 1, args.threads, [&](int64_t begin, int64_t end) {
      WeightGradient<decltype(element)> gradient(args);
      for (int64_t part = begin; part < end; ++part) gradient.run(part);
    });
  });
}

}  // namespace zk::ZK_ISA
