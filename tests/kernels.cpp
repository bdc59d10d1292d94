// Checks CPU kernels against plain loops in double, without Python: for machines that have a compiler or an emulator
// but no PyTorch. tests/test_portable.py compiles and runs it. Prints one line for each check; exits 1 if one fails.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "attention/attention.h"
#include "bias_norm/bias_norm.h"
#include "conv_module/conv_module.h"
#include "linear/linear.h"
#include "swoosh/swoosh.h"

namespace {

using zk::DType;
using Doubles = std::vector<double>;

int failures = 0;

// The error as a multiple of the RMS of what is expected.
void check(const char* name, const Doubles& actual, const Doubles& expected, double tolerance) {
  double worst = 0, squares = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    double error = std::fabs(actual[i] - expected[i]);
    if (!(error <= worst)) worst = error;  // also if it is NaN
    squares += expected[i] * expected[i];
  }
  double error = worst / std::sqrt(squares / double(expected.size()));
  bool good = error <= tolerance;
  failures += !good;
  std::printf("%-28s error %.1e, allowed %.0e: %s\n", name, error, tolerance, good ? "good" : "WRONG");
}

template <class T>
struct Type;
template <>
struct Type<float> {
  static constexpr DType dtype = DType::f32;
  static constexpr double tolerance = 2e-5;
  static constexpr const char* name = "float32";
};
template <>
struct Type<double> {
  static constexpr DType dtype = DType::f64;
  static constexpr double tolerance = 1e-12;
  static constexpr const char* name = "float64";
};
template <>
struct Type<zk::half> {
  static constexpr DType dtype = DType::f16;
  static constexpr double tolerance = 8e-3;
  static constexpr const char* name = "float16";
};
template <>
struct Type<zk::bfloat16> {
  static constexpr DType dtype = DType::bf16;
  static constexpr double tolerance = 6e-2;
  static constexpr const char* name = "bfloat16";
};

std::mt19937 generator;

template <class T>
std::vector<T> random(int64_t n, double scale = 1) {
  std::normal_distribution<double> normal(0, scale);
  std::vector<T> x(n);
  for (T& value : x) value = zk::narrow<T>(zk::Wide<T>(normal(generator)));
  return x;
}

template <class T>
Doubles doubles(const std::vector<T>& x) {
  Doubles wide;
  for (T value : x) wide.push_back(double(zk::widen(value)));
  return wide;
}

template <class T>
void check(const char* name, const std::vector<T>& actual, const Doubles& expected) {
  char full[64];
  std::snprintf(full, sizeof full, "%s, %s", name, Type<T>::name);
  check(full, doubles(actual), expected, Type<T>::tolerance);
}

template <class T>
void swoosh(int threads) {
  constexpr int64_t n = 100003;
  auto x = random<T>(n, 6), dy = random<T>(n);
  std::vector<T> y(n), dx(n);
  zk::swoosh_forward_cpu({x.data(), y.data(), n, Type<T>::dtype, zk::SwooshKind::r, threads});
  zk::swoosh_backward_cpu({dy.data(), x.data(), dx.data(), n, Type<T>::dtype, zk::SwooshKind::r, threads});
  Doubles wide = doubles(x), value, derivative;
  for (int64_t i = 0; i < n; ++i) {
    double z = std::exp(wide[i] - 1);
    value.push_back(std::log1p(z) - 0.08 * wide[i] - 0.313261687);
    derivative.push_back(double(zk::widen(dy[i])) * (z / (1 + z) - 0.08));
  }
  check("swoosh", y, value);
  check("swoosh backward", dx, derivative);
}

template <class T>
void bias_norm(int threads) {
  using W = zk::Wide<T>;
  constexpr int64_t rows = 301, channels = 91;
  auto x = random<T>(rows * channels, 2);
  auto bias = random<W>(channels);
  W log_scale = W(0.3);
  std::vector<T> y(rows * channels);
  std::vector<W> r(rows);
  zk::bias_norm_forward_cpu(
      {x.data(), bias.data(), &log_scale, y.data(), r.data(), rows, channels, Type<T>::dtype, Type<T>::dtype, threads});
  Doubles wide = doubles(x), expected;
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0;
    for (int64_t c = 0; c < channels; ++c) squares += std::pow(wide[row * channels + c] - double(bias[c]), 2);
    double gain = std::exp(double(log_scale)) / std::sqrt(squares / channels);
    for (int64_t c = 0; c < channels; ++c) expected.push_back(wide[row * channels + c] * gain);
  }
  check("bias_norm", y, expected);
}

// Without chunks; the last frame of each sequence is padding.
template <class T>
void conv_module(int threads) {
  using W = zk::Wide<T>;
  constexpr int64_t frames = 211, batch = 2, channels = 45, kernel = 15, half = kernel / 2;
  auto a = random<T>(frames * batch * channels), s = random<T>(frames * batch * channels);
  auto weight = random<W>(channels * kernel, 0.3), bias = random<W>(channels);
  std::vector<uint8_t> padding(batch * frames);
  for (int64_t b = 0; b < batch; ++b) padding[b * frames + frames - 1] = 1;
  std::vector<T> y(a.size());
  zk::ConvModuleForward args{};
  args.a = a.data();
  args.s = s.data();
  args.padding = padding.data();
  args.weight = weight.data();
  args.bias = bias.data();
  args.shape = {frames, batch, channels, batch * channels, channels, kernel, frames};
  args.x_dtype = args.y_dtype = Type<T>::dtype;
  args.threads = threads;
  args.y = y.data();
  zk::conv_module_forward_cpu(args);
  Doubles value = doubles(a), gate = doubles(s), expected;
  for (int64_t t = 0; t < frames; ++t) {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t c = 0; c < channels; ++c) {
        double sum = double(bias[c]);
        for (int64_t k = 0; k < kernel; ++k) {
          int64_t from = t + k - half;
          if (from < 0 || from >= frames - 1) continue;
          int64_t i = (from * batch + b) * channels + c;
          sum += double(weight[c * kernel + k]) * value[i] / (1 + std::exp(-gate[i]));
        }
        expected.push_back(sum);
      }
    }
  }
  check("conv_module", y, expected);
}

// Rows, columns and depth end in the middle of a block; the activation is SwooshR.
template <class T>
void linear(int threads) {
  constexpr int64_t rows = 15, depth = 77, columns = 203;
  auto x = random<T>(rows * depth), weight = random<T>(columns * depth, 0.2);
  auto bias = random<T>(columns), residual = random<T>(rows * columns);
  std::vector<T> y(rows * columns);
  zk::linear_cpu({x.data(), weight.data(), bias.data(), residual.data(), y.data(), rows, depth, columns, Type<T>::dtype,
                  zk::Activation::swoosh_r, threads});
  Doubles a = doubles(x), b = doubles(weight), expected;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) {
      double sum = double(bias[n]);
      for (int64_t k = 0; k < depth; ++k) sum += a[m * depth + k] * b[n * depth + k];
      double activated = std::log1p(std::exp(sum - 1)) - 0.08 * sum - 0.313261687;
      expected.push_back(activated + double(residual[m * columns + n]));
    }
  }
  check("linear", y, expected);
}

// One sequence, two heads, no masks; channels end in the middle of a register.
template <class T>
void attention(int threads) {
  using W = zk::Wide<T>;
  constexpr int64_t frames = 421, heads = 2, depth = 19, positions = 5, channels = 13;
  auto q = random<T>(frames * heads * depth, 0.5), k = random<T>(frames * heads * depth, 0.5);
  auto p = random<T>(frames * heads * positions, 0.5), e = random<T>((2 * frames - 1) * heads * positions, 0.5);
  auto v = random<T>(frames * heads * channels), grad = random<T>(frames * heads * channels);
  std::vector<T> out(v.size()), dq(q.size()), dk(k.size()), dp(p.size()), de(e.size()), dv(v.size());
  std::vector<W> softmax(2 * heads * frames);
  auto rows = [](std::vector<T>& x, int64_t width) {
    return zk::AttentionRows{x.data(), heads * width, heads * width, width};
  };
  zk::AttentionWeights weights{};
  weights.q = rows(q, depth);
  weights.k = rows(k, depth);
  weights.p = rows(p, positions);
  weights.e = rows(e, positions);
  weights.e.sequence = 0;
  weights.softmax = softmax.data();
  weights.targets = weights.sources = frames;
  weights.sequences = 1;
  weights.heads = heads;
  weights.query_channels = depth;
  weights.position_channels = positions;
  weights.chunk = weights.left_chunks = -1;
  weights.dtype = Type<T>::dtype;
  zk::attention_softmax_cpu({weights, threads});
  zk::AttentionForward forward{};
  forward.weights = weights;
  forward.v = rows(v, channels);
  forward.out = out.data();
  forward.channels = channels;
  forward.threads = threads;
  zk::attention_forward_cpu(forward);
  zk::AttentionBackward backward{};
  backward.weights = weights;
  backward.threads = threads;
  backward.uses = {{rows(v, channels), rows(out, channels), rows(grad, channels), channels}};
  backward.dq = rows(dq, depth);
  backward.dk = rows(dk, depth);
  backward.dp = rows(dp, positions);
  backward.de = rows(de, positions);
  backward.dv = rows(dv, channels);
  zk::attention_backward_cpu(backward);

  auto at = [](const std::vector<T>& x, int64_t width, int64_t frame, int64_t head, int64_t c) {
    return double(zk::widen(x[(frame * heads + head) * width + c]));
  };
  Doubles o(v.size()), oq(q.size()), ok(k.size()), op(p.size()), oe(e.size()), ov(v.size()), w(frames), dw(frames);
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < frames; ++i) {
      double total = 0, mean = 0;
      for (int64_t j = 0; j < frames; ++j) {
        double s = 0;
        for (int64_t c = 0; c < depth; ++c) s += at(q, depth, i, h, c) * at(k, depth, j, h, c);
        for (int64_t c = 0; c < positions; ++c)
          s += at(p, positions, i, h, c) * at(e, positions, frames - 1 - i + j, h, c);
        total += w[j] = std::exp(s);
      }
      for (int64_t j = 0; j < frames; ++j) {
        w[j] /= total;
        dw[j] = 0;
        for (int64_t c = 0; c < channels; ++c) {
          o[(i * heads + h) * channels + c] += w[j] * at(v, channels, j, h, c);
          ov[(j * heads + h) * channels + c] += w[j] * at(grad, channels, i, h, c);
          dw[j] += at(grad, channels, i, h, c) * at(v, channels, j, h, c);
        }
        mean += w[j] * dw[j];
      }
      for (int64_t j = 0; j < frames; ++j) {
        double ds = w[j] * (dw[j] - mean);
        for (int64_t c = 0; c < depth; ++c) {
          oq[(i * heads + h) * depth + c] += ds * at(k, depth, j, h, c);
          ok[(j * heads + h) * depth + c] += ds * at(q, depth, i, h, c);
        }
        int64_t offset = frames - 1 - i + j;
        for (int64_t c = 0; c < positions; ++c) {
          op[(i * heads + h) * positions + c] += ds * at(e, positions, offset, h, c);
          oe[(offset * heads + h) * positions + c] += ds * at(p, positions, i, h, c);
        }
      }
    }
  }
  check("attention", out, o);
  check("attention, dq", dq, oq);
  check("attention, dk", dk, ok);
  check("attention, dp", dp, op);
  check("attention, de", de, oe);
  check("attention, dv", dv, ov);
}

template <class T>
void check_all(int threads) {
  swoosh<T>(threads);
  bias_norm<T>(threads);
  conv_module<T>(threads);
  attention<T>(threads);
  if constexpr (sizeof(T) >= sizeof(float)) linear<T>(threads);
}

}  // namespace

int main() {
  for (int threads : {1, 3}) {
    std::printf("%d thread%s\n", threads, threads > 1 ? "s" : "");
    check_all<float>(threads);
    check_all<double>(threads);
    check_all<zk::half>(threads);
    check_all<zk::bfloat16>(threads);
  }
  std::printf("%d wrong\n", failures);
  return failures > 0;
}
