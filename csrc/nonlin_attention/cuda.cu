// The gates of NonlinAttention on the GPU: maps over rows, 16 bytes an access where rows are aligned.
#include "common/math.h"
#include "common/vectors.h"
#include "nonlin_attention/nonlin_attention.h"

namespace zk {

namespace {

constexpr int threads = 256;

// What each gate makes of an element of every input: as many of the results `out`, `other` and `values`.
struct Open {
  static constexpr int inputs = 2, results = 1;
  static __device__ __forceinline__ void apply(const float (&in)[3], float (&out)[3]) {
    out[0] = in[1] * tanh_of(in[0]);  // s, x
  }
};

struct Close {
  static constexpr int inputs = 2, results = 1;
  static __device__ __forceinline__ void apply(const float (&in)[3], float (&out)[3]) {
    out[0] = in[0] * in[1];  // average, y
  }
};

struct OpenBackward {
  static constexpr int inputs = 3, results = 3;
  static __device__ __forceinline__ void apply(const float (&in)[3], float (&out)[3]) {
    float gate = tanh_of(in[1]);  // the gradient of the values, s, x
    out[0] = in[0] * in[2] * (1.0f - gate * gate);
    out[1] = in[0] * gate;
    out[2] = in[2] * gate;
  }
};

struct CloseBackward {
  static constexpr int inputs = 3, results = 2;
  static __device__ __forceinline__ void apply(const float (&in)[3], float (&out)[3]) {
    out[0] = in[0] * in[2];  // grad, average, y
    out[1] = in[0] * in[1];
  }
};

template <class T>
__device__ __forceinline__ T* row_of(const NonlinRows& x, int64_t frame, int64_t sequence) {
  return static_cast<T*>(x.data) + frame * x.frame + sequence * x.sequence;
}

// `lanes` threads have a row, N elements each at a time.
template <class Gate, class T, int N>
__global__ void __launch_bounds__(threads) map_rows(const NonlinMap args, int lanes) {
  const unsigned rows = unsigned(args.frames * args.sequences), sequences = unsigned(args.sequences);
  const unsigned row = blockIdx.x * unsigned(threads / lanes) + threadIdx.x / unsigned(lanes);
  if (int(threadIdx.x) >= threads / lanes * lanes || row >= rows) return;
  int64_t frame = row / sequences, sequence = row % sequences;
  const T* from[3] = {row_of<T>(args.first, frame, sequence), row_of<T>(args.second, frame, sequence),
                      row_of<T>(args.third, frame, sequence)};
  T* to[3] = {row_of<T>(args.out, frame, sequence), row_of<T>(args.other, frame, sequence),
              row_of<T>(args.values, frame, sequence)};
  for (int64_t c = threadIdx.x % unsigned(lanes) * N; c < args.channels; c += lanes * N) {
    float in[3][N], results[3][N];
#pragma unroll
    for (int i = 0; i < Gate::inputs; ++i) load(from[i] + c, in[i]);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float element[3] = {in[0][j], in[1][j], Gate::inputs > 2 ? in[2][j] : 0.0f};
      float made[3];
      Gate::apply(element, made);
#pragma unroll
      for (int i = 0; i < Gate::results; ++i) results[i][j] = made[i];
    }
#pragma unroll
    for (int i = 0; i < Gate::results; ++i) {
      if (i < 2 || args.values.data) store(to[i] + c, results[i]);
    }
  }
}

template <class T>
bool aligned(const NonlinMap& args) {
  bool all = args.channels % pack_size<T> == 0;
  for (const NonlinRows* rows : {&args.first, &args.second, &args.third, &args.out, &args.other, &args.values}) {
    all = all && aligned16(rows->data) && rows->frame % pack_size<T> == 0 && rows->sequence % pack_size<T> == 0;
  }
  return all;
}

template <class Gate>
void run(const char* name, const NonlinMap& args, void* stream) {
  if (args.frames * args.sequences > 0x7fffffff) throw std::invalid_argument("more rows than 31 bits count");
  dispatch_gpu(args.dtype, [&](auto element) {
    using T = decltype(element);
    auto run_with = [&](auto width) {
      int64_t packs = ceil_div(args.channels, width.value);
      int lanes = packs < 1 ? 1 : packs < threads ? int(packs) : threads;
      int64_t blocks = ceil_div(args.frames * args.sequences, threads / lanes);
      launch(name, map_rows<Gate, T, width.value>, grid_size(blocks), threads, 0, stream, args, lanes);
    };
    if (aligned<T>(args)) {
      run_with(std::integral_constant<int, pack_size<T>>{});
    } else {
      run_with(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace

void nonlin_attention_open_cuda(const NonlinMap& args, void* stream) { run<Open>("gate", args, stream); }

void nonlin_attention_close_cuda(const NonlinMap& args, void* stream) { run<Close>("gate", args, stream); }

void nonlin_attention_open_backward_cuda(const NonlinMap& args, void* stream) {
  run<OpenBackward>("gate backward", args, stream);
}

void nonlin_attention_close_backward_cuda(const NonlinMap& args, void* stream) {
  run<CloseBackward>("gate backward", args, stream);
}

}  // namespace zk
