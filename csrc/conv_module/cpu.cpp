// The convolution module on the CPU. A thread takes a tile of frames of one sequence and a block of channels: the gate
// is computed once into a strip that stays in cache, together with the frames that the kernel reaches on either side.
#include <algorithm>

#include "common/parallel.h"
#include "common/strip.h"
#include "common/transpose.h"
#include "conv_module/conv_module.h"
#include "conv_module/math.h"
#include "swoosh/math.h"

namespace zk::ZK_ISA {

namespace {

constexpr int64_t tile = 128;           // frames
constexpr int64_t most_channels = 256;  // of a block

// Channels of a block: few where `tiles` alone would leave threads without work, as in a stream.
int64_t block_width(const ConvModuleShape& n, int64_t tiles, int threads) {
  int64_t blocks = std::max((n.channels + most_channels - 1) / most_channels, (threads + tiles - 1) / tiles);
  return round_up((n.channels + blocks - 1) / blocks, 64);
}

// Tiles are not inlined: compiled once, they give the same bits on one thread and on several.
#define ZK_TILE __attribute__((noinline))

// One thread's view of the inputs: a block of channels at a time, its parameters laid out in panels.
template <class X, class W = Wide<X>>
class Block {
 public:
  Block(const ConvModuleInputs& in, int64_t width) : in(in), n(in.shape), half(n.half()), width_(width) {}

  // Turns to a block of channels.
  void select(int64_t block) {
    if (block * width_ == first && channels > 0) return;
    first = block * width_;
    channels = std::min(width_, n.channels - first);
    panels = (channels + lanes<W> - 1) / lanes<W>;
    read_taps(in.weight, n.kernel, weight);
    read_row(in.bias, bias);
    if (!in.chunked()) return;
    read_taps(in.causal_weight, half + 1, causal_weight);
    read_row(in.causal_bias, causal_bias);
    read_taps(in.edge_scale, n.kernel, left);
    read_taps(static_cast<const W*>(in.edge_scale) + n.channels * n.kernel, n.kernel, right);
  }

  // Rows of x: the gated input of frames t0 - H .. t0 + count + H - 1 of sequence b.
  void load_gated(int64_t b, int64_t t0, int64_t count, Strip<W>& x) const {
    for (int64_t r = 0; r < count + 2 * half; ++r) {
      int64_t t = t0 - half + r;
      if (t < 0 && in.left) {
        const X* from = context(in.left, b) + half + t;
        x.each_channel(r, channels, [&](int64_t c, W& to) { to = widen(from[c * half]); });
        continue;
      }
      if (t < 0 || t >= n.frames || padded(b, t)) {
        x.clear_row(r);
        continue;
      }
      const X *a = row(in.a, b, t), *s = row(in.s, b, t);
      if (in.projection_bias) {
        const X *da = static_cast<const X*>(in.projection_bias) + first, *ds = da + n.channels;
        x.each_channel(r, channels,
                       [&](int64_t c, W& to) { to = gated(widen(a[c]) + widen(da[c]), widen(s[c]) + widen(ds[c])); });
      } else {
        x.each_channel(r, channels, [&](int64_t c, W& to) { to = gated(widen(a[c]), widen(s[c])); });
      }
    }
  }

  bool padded(int64_t b, int64_t t) const { return in.padding && in.padding[b * n.frames + t]; }

  const X* row(const void* x, int64_t b, int64_t t) const {
    return static_cast<const X*>(x) + t * n.frame_stride + b * n.batch_stride + first;
  }

  // The block's channels in a sequence's gated input before its first frame, (channels, H).
  const X* context(const void* x, int64_t b) const {
    return static_cast<const X*>(x) + (b * n.channels + first) * half;
  }

  // Where the block's channels of a frame begin in a dense tensor.
  int64_t dense(int64_t b, int64_t t) const { return (t * n.batch + b) * n.channels + first; }

  // e_p of frame t and a panel.
  Register<W> factor(int64_t p, int64_t t) {
    Register<W> result{};
    int64_t at = t % n.chunk;
    result += W(1);
    if (at < n.kernel) result += left.panel(p)[at];
    if (at >= n.chunk - n.kernel) result += right.panel(p)[at - n.chunk + n.kernel];
    return result;
  }

  // Calls f(from, to) with the parts of frames t0 .. t0 + count - 1 that lie in one chunk each.
  template <class F>
  void each_chunk(int64_t t0, int64_t count, F f) const {
    for (int64_t from = t0; from < t0 + count;) {
      int64_t to = std::min(from / n.chunk * n.chunk + n.chunk, t0 + count);
      f(from, to);
      from = to;
    }
  }

  // Copies rows from - H .. to + H - 1 of a panel whose first row is frame t0 - H; zero outside of the chunk of `from`.
  void isolate(const Register<W>* rows, int64_t t0, int64_t from, int64_t to, Register<W>* copy) const {
    int64_t begin = from / n.chunk * n.chunk, end = begin + n.chunk;
    for (int64_t u = from - half; u < to + half; ++u) {
      *copy++ = u >= begin && u < end ? rows[u - t0 + half] : Register<W>{};
    }
  }

  const ConvModuleInputs& in;
  const ConvModuleShape& n;
  int64_t half, first = 0, channels = 0, panels = 0;
  Strip<W> weight, bias, causal_weight, causal_bias, left, right;

 private:
  // Parameters of (channels, count).
  void read_taps(const void* from, int64_t count, Strip<W>& taps) {
    constexpr int64_t size = lanes<W>;
    taps.resize(panels, count);
    const W* values = static_cast<const W*>(from) + first * count;
    for (int64_t p = 0; p < panels; ++p) {
      int64_t rows = std::min(size, channels - p * size);
      transpose(values + p * size * count, count, rows, count, elements<W>(taps.panel(p)), size);
    }
  }

  void read_row(const void* from, Strip<W>& row) {
    row.resize(panels, 1);
    const W* values = static_cast<const W*>(from);
    if (values) row.each_channel(0, channels, [&](int64_t c, W& to) { to = values[first + c]; });
  }

  int64_t width_;
};

template <class X, class Y, class W = Wide<X>>
class Forward {
 public:
  Forward(const ConvModuleForward& args, int64_t width)
      : block_(args, width), y_(static_cast<Y*>(args.y)), next_(args.next), swoosh_(args.swoosh) {}

  ZK_TILE void run(int64_t block, int64_t b, int64_t t0) {
    block_.select(block);
    const ConvModuleShape& n = block_.n;
    int64_t count = std::min(tile, n.frames - t0), most = round_up(std::min(tile, n.frames), group);
    if (sized_ != block_.panels) {
      sized_ = block_.panels;
      x_.resize(sized_, most + 2 * block_.half + group);
      result_.resize(sized_, most);
      isolated_.resize(2, most + 2 * block_.half + group);
    }
    block_.load_gated(b, t0, count, x_);
    if (next_ && t0 + count == n.frames) write_context(b, count);
    for (int64_t p = 0; p < block_.panels; ++p) convolve(p, t0, count);
    for (int64_t i = 0; i < count; ++i) {
      Y* y = y_ + block_.dense(b, t0 + i);
      if (swoosh_) {
        using R = Swoosh<SwooshKind::r, W>;
        result_.each_channel(i, block_.channels, [&](int64_t c, W& value) { y[c] = narrow<Y>(R::value(value)); });
      } else {
        result_.each_channel(i, block_.channels, [&](int64_t c, W& value) { y[c] = narrow<Y>(value); });
      }
    }
  }

 private:
  void convolve(int64_t p, int64_t t0, int64_t count) {
    const Register<W>*x = x_.panel(p), *weight = block_.weight.panel(p);
    Register<W>* result = result_.panel(p);
    int64_t kernel = block_.n.kernel;
    Register<W> bias = *block_.bias.panel(p);
    if (!block_.in.chunked()) return correlate_rows<W>(x, weight, kernel, count, bias, result);
    correlate_rows<W>(x, block_.causal_weight.panel(p), block_.half + 1, count, *block_.causal_bias.panel(p), result);
    Register<W>*rows = isolated_.panel(0), *within = isolated_.panel(1);
    block_.each_chunk(t0, count, [&](int64_t from, int64_t to) {
      block_.isolate(x, t0, from, to, rows);
      correlate_rows<W>(rows, weight, kernel, to - from, bias, within);
      for (int64_t t = from; t < to; ++t) result[t - t0] += block_.factor(p, t) * within[t - from];
    });
  }

  // The last H frames of the gated input.
  void write_context(int64_t b, int64_t count) {
    int64_t half = block_.half;
    X* to = const_cast<X*>(block_.context(next_, b));
    for (int64_t h = 0; h < half; ++h) {
      x_.each_channel(count + h, block_.channels, [&](int64_t c, W& from) { to[c * half + h] = narrow<X>(from); });
    }
  }

  Block<X> block_;
  Y* y_;
  void* next_;
  bool swoosh_;
  int64_t sized_ = 0;
  Strip<W> x_, result_, isolated_;
};

template <class X, class Y, class W = Wide<X>>
class Backward {
 public:
  Backward(const ConvModuleBackward& args, int64_t width)
      : args_(args), block_(args, width), offsets_(args.shape, args.chunked()) {}

  // The share of one part of all tiles.
  ZK_TILE void run(int64_t block, int64_t part) {
    block_.select(block);
    const ConvModuleShape& n = block_.n;
    flip(block_.weight, n.kernel, flipped_weight_);
    if (args_.chunked()) flip(block_.causal_weight, block_.half + 1, flipped_causal_);
    int64_t rows = tile + 2 * block_.half + group, taps = round_up(n.kernel, group);
    if (sized_ != block_.panels) {
      sized_ = block_.panels;
      for (Strip<W>* strip : {&x_, &dy_, &scaled_, &dx_}) strip->resize(sized_, rows);
      isolated_.resize(2, rows);
    }
    dweight_.resize(block_.panels, taps);
    dbias_.resize(block_.panels, 1);
    if (args_.chunked()) {
      dcausal_.resize(block_.panels, taps);
      dcausal_bias_.resize(block_.panels, 1);
      dleft_.resize(block_.panels, n.kernel);
      dright_.resize(block_.panels, n.kernel);
    }
    int64_t across = (n.frames + tile - 1) / tile, tiles = n.batch * across;
    for (int64_t i = tiles * part / args_.parts; i < tiles * (part + 1) / args_.parts; ++i) {
      run_tile(i / across, i % across * tile);
    }
    if (args_.partials) write(static_cast<W*>(args_.partials) + part * offsets_.total);
  }

 private:
  // The taps backwards in time.
  void flip(Strip<W>& taps, int64_t count, Strip<W>& flipped) const {
    flipped.resize(block_.panels, count);
    for (int64_t p = 0; p < block_.panels; ++p) {
      std::reverse_copy(taps.panel(p), taps.panel(p) + count, flipped.panel(p));
    }
  }

  ZK_TILE void run_tile(int64_t b, int64_t t0) {
    int64_t count = std::min(tile, block_.n.frames - t0), half = block_.half;
    for (int64_t r = 0; r < count + 2 * half; ++r) {
      int64_t t = t0 - half + r;
      if (t < 0 || t >= block_.n.frames) {
        dy_.clear_row(r);
        continue;
      }
      const Y* dy = static_cast<const Y*>(args_.dy) + block_.dense(b, t);
      dy_.each_channel(r, block_.channels, [&](int64_t c, W& to) { to = widen(dy[c]); });
    }
    if (args_.partials) block_.load_gated(b, t0, count, x_);
    for (int64_t p = 0; p < block_.panels; ++p) {
      if (args_.chunked()) scale(p, t0, count);
      if (args_.da) differentiate(p, t0, count);
      if (args_.partials) add_parameters(p, t0, count);
    }
    for (int64_t i = 0; i < count && args_.da; ++i) write_row(b, t0 + i, i);
  }

  // e dy, on every frame that dy is held of.
  void scale(int64_t p, int64_t t0, int64_t count) {
    int64_t begin = std::max<int64_t>(t0 - block_.half, 0);
    const Register<W>* dy = dy_.panel(p);
    Register<W>* scaled = scaled_.panel(p);
    for (int64_t t = begin; t < t0 + count + block_.half; ++t) {
      int64_t r = t - t0 + block_.half;
      scaled[r] = dy[r] * block_.factor(p, t);
    }
  }

  void differentiate(int64_t p, int64_t t0, int64_t count) {
    const Register<W>*dy = dy_.panel(p), *weight = flipped_weight_.panel(p);
    Register<W>* dx = dx_.panel(p);
    int64_t kernel = block_.n.kernel, half = block_.half;
    if (!args_.chunked()) return correlate_rows<W>(dy, weight, kernel, count, Register<W>{}, dx);
    correlate_rows<W>(dy + half, flipped_causal_.panel(p), half + 1, count, Register<W>{}, dx);
    Register<W>*rows = isolated_.panel(0), *within = isolated_.panel(1);
    block_.each_chunk(t0, count, [&](int64_t from, int64_t to) {
      block_.isolate(scaled_.panel(p), t0, from, to, rows);
      correlate_rows<W>(rows, weight, kernel, to - from, Register<W>{}, within);
      for (int64_t t = from; t < to; ++t) dx[t - t0] += within[t - from];
    });
  }

  void add_parameters(int64_t p, int64_t t0, int64_t count) {
    const Register<W>*x = x_.panel(p), *dy = dy_.panel(p) + block_.half;
    int64_t kernel = block_.n.kernel;
    if (!args_.chunked()) {
      correlate_taps<W>(x, dy, count, kernel, dweight_.panel(p));
      return add_rows<W>(dy, count, *dbias_.panel(p));
    }
    correlate_taps<W>(x, dy, count, block_.half + 1, dcausal_.panel(p));
    add_rows<W>(dy, count, *dcausal_bias_.panel(p));
    const Register<W>* scaled = scaled_.panel(p) + block_.half;
    add_rows<W>(scaled, count, *dbias_.panel(p));
    Register<W>*rows = isolated_.panel(0), *within = isolated_.panel(1);
    block_.each_chunk(t0, count, [&](int64_t from, int64_t to) {
      block_.isolate(x, t0, from, to, rows);
      correlate_taps<W>(rows, scaled + from - t0, to - from, kernel, dweight_.panel(p));
      correlate_rows<W>(rows, block_.weight.panel(p), kernel, to - from, *block_.bias.panel(p), within);
      for (int64_t t = from; t < to; ++t) {
        int64_t at = t % block_.n.chunk, from_right = at - block_.n.chunk + kernel;
        auto product = dy[t - t0] * within[t - from];
        if (at < kernel) dleft_.panel(p)[at] += product;
        if (from_right >= 0) dright_.panel(p)[from_right] += product;
      }
    });
  }

  // da and ds of one frame, from row i of dx.
  void write_row(int64_t b, int64_t t, int64_t i) {
    int64_t offset = (t * block_.n.batch + b) * args_.gradient_step + block_.first;
    X *da = static_cast<X*>(args_.da) + offset, *ds = static_cast<X*>(args_.ds) + offset;
    if (block_.padded(b, t)) {
      std::fill_n(da, block_.channels, X{});
      std::fill_n(ds, block_.channels, X{});
      return;
    }
    const X *a = block_.row(args_.a, b, t), *s = block_.row(args_.s, b, t);
    dx_.each_channel(i, block_.channels, [&](int64_t c, W& dx) {
      W wide_da, wide_ds;
      gate_gradients(widen(a[c]), widen(s[c]), dx, wide_da, wide_ds);
      da[c] = narrow<X>(wide_da);
      ds[c] = narrow<X>(wide_ds);
    });
  }

  void write(W* share) {
    const ConvModuleShape& n = block_.n;
    write_taps(dweight_, n.kernel, share);
    write_taps(dbias_, 1, share + offsets_.bias);
    if (!args_.chunked()) return;
    write_taps(dcausal_, block_.half + 1, share + offsets_.causal_weight);
    write_taps(dcausal_bias_, 1, share + offsets_.causal_bias);
    write_taps(dleft_, n.kernel, share + offsets_.edge_scale);
    write_taps(dright_, n.kernel, share + offsets_.edge_scale + n.channels * n.kernel);
  }

  // To (channels, count).
  void write_taps(Strip<W>& from, int64_t count, W* to) {
    to += block_.first * count;
    for (int64_t c = 0; c < block_.channels; ++c) {
      Register<W>* panel = from.panel(c / lanes<W>);
      for (int64_t k = 0; k < count; ++k) to[c * count + k] = elements<W>(panel + k)[c % lanes<W>];
    }
  }

  const ConvModuleBackward& args_;
  Block<X> block_;
  ParameterOffsets offsets_;
  int64_t sized_ = 0;
  Strip<W> x_, dy_, scaled_, dx_, isolated_, flipped_weight_, flipped_causal_;
  Strip<W> dweight_, dbias_, dcausal_, dcausal_bias_, dleft_, dright_;
};

const auto dispatch = [](DType dtype, auto&& f) { dispatch_cpu(dtype, f); };

}  // namespace

void conv_module_forward(const ConvModuleForward& args) {
  const ConvModuleShape& n = args.shape;
  int64_t across = (n.frames + tile - 1) / tile, tiles = n.batch * across;
  int64_t width = block_width(n, tiles, args.threads), blocks = (n.channels + width - 1) / width;
  dispatch_conv_module(dispatch, args.x_dtype, args.y_dtype, [&](auto x, auto y) {
    parallel_for(blocks * tiles, 1, args.threads, [&](int64_t begin, int64_t end) {
      Forward<decltype(x), decltype(y)> forward(args, width);
      for (int64_t i = begin; i < end; ++i) forward.run(i / tiles, i % tiles / across, i % across * tile);
    });
  });
}

void conv_module_backward(const ConvModuleBackward& args) {
  const ConvModuleShape& n = args.shape;
  int64_t width = block_width(n, args.parts, args.threads), blocks = (n.channels + width - 1) / width;
  dispatch_conv_module(dispatch, args.x_dtype, args.y_dtype, [&](auto x, auto y) {
    parallel_for(blocks * args.parts, 1, args.threads, [&](int64_t begin, int64_t end) {
      Backward<decltype(x), decltype(y)> backward(args, width);
      for (int64_t i = begin; i < end; ++i) backward.run(i / args.parts, i % args.parts);
    });
  });
}

}  // namespace zk::ZK_ISA
