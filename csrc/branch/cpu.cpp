// One template for every branch of few rows, and its three middles.
//
// A middle has `input` for `wide` columns of W1 src + b1, which go through `activation` first, and leaves `hidden`
// columns for W2 in `output` when it is run.
#include <memory>

#include "branch/average.h"
#include "branch/branch.h"
#include "conv_module/conv_module.h"
#include "linear/linear.h"

namespace zk::ZK_ISA {

namespace {

template <class Middle>
void run_branch(const Branch& args, int64_t rows, Middle middle) {
  linear({args.src, args.in_weight, args.in_bias, nullptr, middle.input, rows, args.channels, middle.wide, args.dtype,
          middle.activation, args.threads});
  middle.run();
  linear({middle.output, args.out_weight, args.out_bias, args.src, args.y, rows, middle.hidden, args.channels,
          args.dtype, Activation::none, args.threads});
}

// All of it is in the first product.
template <class W>
struct FeedForwardMiddle {
  explicit FeedForwardMiddle(const FeedForwardBranch& args)
      : wide(args.hidden), hidden(args.hidden), activation(Activation(args.kind)), room(new W[args.rows * hidden]) {}

  void run() {}

  int64_t wide, hidden;
  Activation activation;
  std::unique_ptr<W[]> room;
  W *input = room.get(), *output = input;
};

template <class W>
struct ConvolutionMiddle {
  explicit ConvolutionMiddle(const ConvolutionBranch& args)
      : args(args),
        wide(2 * args.channels),
        hidden(args.channels),
        room(new W[args.frames * args.sequences * 3 * hidden]) {}

  void run() {
    ConvModuleForward conv{};
    conv.a = input;
    conv.s = input + hidden;
    conv.padding = args.padding;
    conv.weight = args.weight;
    conv.bias = args.bias;
    conv.causal_weight = args.causal_weight;
    conv.causal_bias = args.causal_bias;
    conv.edge_scale = args.edge_scale;
    conv.shape = {args.frames, args.sequences, hidden, args.sequences * wide, wide, args.kernel, args.frames};
    conv.x_dtype = conv.y_dtype = args.dtype;
    conv.threads = args.threads;
    conv.left = args.left;
    conv.next = args.next;
    conv.swoosh = true;
    conv.y = output;
    conv_module_forward(conv);
  }

  const ConvolutionBranch& args;
  int64_t wide, hidden;
  Activation activation = Activation::none;
  std::unique_ptr<W[]> room;
  W *input = room.get(), *output = input + args.frames * args.sequences * wide;
};

template <class W>
struct AverageMiddle {
  explicit AverageMiddle(const AverageBranch& args)
      : average(args),
        wide((args.gated ? 3 : 1) * args.values),
        hidden(args.values),
        projected(args.gated ? new W[average.rows * wide] : nullptr),
        averages(new W[average.rows * hidden]),
        input(args.gated ? projected.get() : average.fresh()),
        output(averages.get()) {}

  void run() {
    if (projected) average.gate(projected.get());
    average.join();
    average.run(projected ? projected.get() + 2 * hidden : nullptr, output);
  }

  Average<W> average;
  int64_t wide, hidden;
  Activation activation = Activation::none;
  std::unique_ptr<W[]> projected, averages;
  W *input, *output;
};

template <template <class> class Middle, class Args>
void run_in_dtype(const Args& args, int64_t rows) {
  args.dtype == DType::f64 ? run_branch(args, rows, Middle<double>(args)) : run_branch(args, rows, Middle<float>(args));
}

}  // namespace

void feed_forward_branch(const FeedForwardBranch& args) { run_in_dtype<FeedForwardMiddle>(args, args.rows); }

void convolution_branch(const ConvolutionBranch& args) {
  run_in_dtype<ConvolutionMiddle>(args, args.frames * args.sequences);
}

void average_branch(const AverageBranch& args) { run_in_dtype<AverageMiddle>(args, args.targets * args.sequences); }

}  // namespace zk::ZK_ISA
