"""What is tuned: thresholds and tile sizes, each with the device that it is for and where it comes from.

This is the table alone; `zipformer_kernels.core.tuning` reads and overrides it. Sizes that are compiled into C++ and
CUDA kernels stand in ``csrc``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Value = int | tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One threshold or size. Read `value` at every use: `zipformer_kernels.core.tuning.override` changes it.

    Attributes:
        name: ``<op or module>.<what>``.
        default: the value unless it is overridden: a number, or several.
        unit: of what it is a number.
        what: what it decides.
        device: what it is chosen for.
        source: why it has this value: the path of a file with results, or one of these words and an explanation.
            ``counted:`` chosen from machine code. ``reasoned:`` nobody measured other values. ``unrecorded:`` measured
            when it was written, but the samples were not committed.
        least: no value may be lower.
        power_of_two: whether every value must be one.
        value: the value that holds now.
    """

    name: str
    default: Value
    unit: str
    what: str
    device: str
    source: str
    least: int = 1
    power_of_two: bool = False
    value: Value = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", self.default)


CPU = "CPU, x86-64"
GPU = "GPU"
SM_90 = "GPU, counted for sm_90"

_EVENLY = "reasoned: so many that any number of threads shares them out evenly, so few that adding them up costs little"
_LONG = "reasoned: so long that adding up the groups costs little beside them"
_PER_MULTIPROCESSOR = "reasoned: so many that some compute while others load"
_WARPS = "reasoned: Triton's usual number; no kernel spills, benchmarks/results/instructions.json"
_NO_SPILL = "reasoned: no kernel spills; what it costs is counted in benchmarks/results/instructions.json"
_PRODUCT = "rows, channels, operand's channels, warps, stages"
_TILES = "counted: docs/kernels.md, by registers, spills and instructions"


def _warps(name: str, count: int = 4) -> Entry:
    return Entry(name, count, "warps", "of a program", SM_90, _WARPS, power_of_two=True)


def _tile(name: str, size: int, unit: str, what: str) -> Entry:
    return Entry(name, size, unit, what, SM_90, _NO_SPILL, power_of_two=True)


_ON_CPU = [
    Entry(
        "linear.few_rows", 16, "rows", "frames times sequences of a chunk up to which modules run as one kernel each",
        CPU, "unrecorded: with more rows torch's products were as fast or faster (commit aa2145e)", least=0,
    ),
    Entry(
        "attention.least_scores", 64 * 64, "scores",
        "targets times sources from which on kernels run, but for inference",
        CPU, "unrecorded: faster than eager from here on in a layer with three uses (commit 43d9a5d)", least=0,
    ),
    Entry(
        "attention.least_scores_float64", 100 * 100, "scores",
        "targets times sources from which on kernels run in float64, but for inference",
        CPU, "unrecorded: as attention.least_scores", least=0,
    ),
    Entry(
        "attention.least_weights_bfloat16", 1 << 24, "weights",
        "of all heads and sequences from which on kernels run in bfloat16",
        CPU, "unrecorded: below, eager has the processor's bfloat16 instructions (commit 43d9a5d)", least=0,
    ),
    Entry(
        "attention.stored_bytes", 32 << 20, "bytes",
        "of attention weights, less those of the first head, below which they are stored",
        CPU, "unrecorded: three uses are 1.3 to 1.6 times faster, but not in memory that allocators hand back to the "
        "system, as glibc's does from this size on (commit a68b8f3)", least=0,
    ),
    Entry(
        "conv_embed.frames", 256, "frames", "of the result that are embedded at a time without gradients",
        CPU, "unrecorded: what lies between stays in cache; with channels last 82 ms, not 195, preset S, 4 x 16 s "
        "(commit 055b5c7); nothing is written of other lengths",
    ),
    Entry(
        "convnext.rows", 4096, "rows", "frames times frequencies whose hidden channels are computed at a time",
        CPU, "reasoned: they stay in cache; not to store them saves four tensors of 93 MB, preset S, 4 x 16 s "
        "(commit 3d2a70e)",
    ),
    Entry("conv_module.parts", 64, "groups", "of frames at most that are summed apart", CPU, _EVENLY),
    Entry(
        "conv_module.part_frames", 128, "frames", "of such a group at least",
        CPU, "reasoned: the tile of csrc/conv_module/cpu.cpp",
    ),
    Entry("depthwise_conv2d.parts", 64, "groups", "of frames at most that are summed apart", CPU, _EVENLY),
    Entry(
        "depthwise_conv2d.part_frames", 16, "frames", "of such a group at least",
        CPU, "reasoned: the tile of csrc/depthwise_conv2d/cpu.cpp",
    ),
    Entry("bias_norm.parts", 128, "groups", "of rows at most that are summed apart", CPU, _EVENLY),
    Entry("bias_norm.part_rows", 64, "rows", "of such a group at least", CPU, _LONG),
    Entry("bypass.parts", 64, "groups", "of rows at most that are summed apart", CPU, _EVENLY),
    Entry("bypass.part_rows", 16, "rows", "of such a group at least", CPU, _LONG),
    Entry("balancer.parts", 64, "groups", "of rows at most that are summed apart", CPU, _EVENLY),
    Entry("balancer.part_rows", 64, "rows", "of such a group at least", CPU, _LONG),
    Entry(
        "scaled_adam.eager_chunk", 1 << 18, "elements", "that eager updates at a time",
        CPU, "reasoned: it bounds the temporaries, which stay in cache",
    ),
    Entry(
        "scaled_adam.chunk", 1 << 14, "elements", "of a block's or thread's share, in CUDA too",
        "CPU and GPU", "reasoned: long enough to pay, short enough to share out small models",
    ),
]  # fmt: skip

_ON_GPU = [
    Entry(
        "attention.stored_share", 16, "thousandths of the device's memory",
        "of one layer's attention weights, below which they are stored; 0: never",
        GPU, "reasoned: at 80 GB all layers of preset L store theirs for 30 x 30 s, 2 GB; no layer takes more than 1.3",
        least=0,
    ),
    Entry("attention.cuda_blocks", 8, "blocks a multiprocessor", "that sum gradients of position projections", GPU,
          _PER_MULTIPROCESSOR),
    Entry("attention.cuda_parts", 8, "parts", "of a sequence and head at most, each with sums of its own for e", GPU,
          "reasoned: their memory is linear in the frames; more blocks run at once where sequences are few"),
    Entry("bias_norm.cuda_blocks", 4, "blocks a multiprocessor", "at most in backward", GPU, _PER_MULTIPROCESSOR),
    Entry("bias_norm.cuda_part_frames", 16, "frames", "of a sequence whose sums a block takes, at least", GPU, _LONG),
    Entry("bypass.cuda_blocks", 8, "blocks a multiprocessor", "at most in backward", GPU, _PER_MULTIPROCESSOR),
    Entry("bypass.cuda_columns", 1024, "channels", "of which a block takes sums, at most", GPU,
          "reasoned: csrc/bypass/cuda.cu, in float32"),
    Entry("bypass.cuda_part_rows", 16, "rows", "of which a block takes sums, at least", GPU, _LONG),
    Entry("conv_module.cuda_blocks", 2, "blocks a multiprocessor", "that sum gradients", GPU, _PER_MULTIPROCESSOR),
    Entry(
        "attention.triton_scratch_bytes", 256 << 20, "bytes",
        "of the scores' gradient that backward stores at most at a time, or 128 targets",
        GPU, "reasoned: so many targets that there are programs for all multiprocessors", least=0,
    ),
    _tile("attention.triton_table_rows", 128, "rows", "of a table of e that a program writes"),
    _tile("nonlin_attention.triton_tile", 2048, "elements", "of a program that gates"),
    _tile("nonlin_attention.triton_channels", 256, "channels", "of such a tile at most"),
    _warps("nonlin_attention.triton_warps"),
    _tile("balancer.triton_rows", 128, "rows", "of a program at a time"),
    _tile("balancer.triton_channels", 32, "channels", "of a program: few, so that parts of the moments are few"),
    _tile("balancer.triton_parts", 16, "groups of rows", "whose moments are merged at a time"),
    Entry("balancer.triton_programs", 2, "programs a multiprocessor", "each with moments of its own", GPU,
          "reasoned: every program of the second pass merges the parts of the first"),
    _warps("balancer.triton_warps", 8),
    _tile("downsample.triton_frames", 16, "frames", "of the result, of a program"),
    _tile("downsample.triton_channels", 64, "channels", "of a program"),
    _tile("downsample.triton_parts", 512, "programs", "whose shares of the weights' gradients are added up at a time"),
    _warps("downsample.triton_warps"),
    _tile("upsample_bypass.triton_frames", 16, "frames", "of the slower stack, of a program"),
    _tile("upsample_bypass.triton_channels", 64, "channels", "of a program"),
    _tile("upsample_bypass.triton_parts", 64, "programs", "whose shares of sums are added up at a time"),
    _tile("upsample_bypass.triton_columns", 32, "columns", "that are added up by a program"),
    _warps("upsample_bypass.triton_warps", 8),
    _tile("swoosh.triton_block", 1024, "elements", "of a program"),
    _warps("swoosh.triton_warps"),
    _tile("swoosh_linear.triton_forward", 4096, "elements", "of a program, forward"),
    _tile("swoosh_linear.triton_backward", 2048, "elements", "of a program, backward"),
    _tile("swoosh_linear.triton_columns", 1024, "columns", "of a tile at most"),
    _warps("swoosh_linear.triton_warps"),
    _tile("bias_norm.triton_tile", 2048, "elements", "of a program at a time"),
    _tile("bias_norm.triton_rows", 32, "rows", "of a tile at most"),
    Entry("bias_norm.triton_programs", 4, "programs a multiprocessor", "at most in backward", GPU, _PER_MULTIPROCESSOR),
    _tile("bias_norm.triton_sum_columns", 16, "columns", "that are added up by a program"),
    _tile("bias_norm.triton_sum_parts", 256, "groups of rows", "that are added up at a time"),
    _warps("bias_norm.triton_warps"),
    _tile("bypass.triton_tile", 2048, "elements", "of a program at a time"),
    _tile("bypass.triton_columns", 64, "channels", "of such a tile at most"),
    Entry("bypass.triton_programs", 8, "programs a multiprocessor", "at most in backward", GPU, _PER_MULTIPROCESSOR),
    Entry("bypass.triton_part_rows", 64, "rows", "of which a program takes sums, at least", GPU, _LONG),
    _tile("bypass.triton_sum_columns", 16, "columns", "that are added up by a program"),
    _tile("bypass.triton_sum_parts", 256, "groups of rows", "that are added up at a time"),
    _tile("bypass.triton_sequences", 32, "sequences", "whose gradients of scales are added up at a time"),
    _tile("bypass.triton_block", 256, "elements", "of a program that draws scales or limits a parameter"),
    _warps("bypass.triton_warps"),
    _tile("conv_module.triton_frames", 64, "frames", "of a tile"),
    _tile("conv_module.triton_channels", 64, "channels", "of a tile"),
    _tile("conv_module.triton_fill", 16, "frames", "of a tile and around it that are prepared at a time"),
    _tile("conv_module.triton_sum_frames", 16, "frames", "of a tile of sums over frames"),
    _tile("conv_module.triton_sum_taps", 8, "taps", "of a tile of sums over frames"),
    _tile("conv_module.triton_sum_channels", 32, "channels", "of a tile of sums over frames"),
    _tile("conv_module.triton_sum_parts", 32, "partial sums", "that are added up at a time"),
    Entry("conv_module.triton_part_frames", 128, "frames", "of which a program takes sums, at least", GPU, _LONG),
    Entry("conv_module.triton_parts", 4, "groups a multiprocessor", "of frames summed apart", GPU, _PER_MULTIPROCESSOR),
    _warps("conv_module.triton_warps"),
    _warps("conv_module.triton_backward_warps", 8),
    Entry("products.triton_tile", (128, 128, 64, 8, 3), _PRODUCT, "of a product", SM_90, _TILES),
    Entry("products.triton_ragged_tile", (128, 128, 32, 8, 4), _PRODUCT,
          "of a product whose channels are no whole tiles", SM_90, _TILES),
    Entry("products.triton_narrow_tile", (128, 64, 64, 8, 3), _PRODUCT,
          "of a product where wide ones would lie idle by a quarter", SM_90, _TILES),
    Entry("products.triton_totals_tile", (32, 64, 4), "channels, parts, warps", "of sums that are added up", SM_90,
          _TILES),
    Entry("products.triton_lowered_tile", (128, 64, 8), "rows, channels, warps", "of a cast with sums", SM_90, _TILES),
    Entry(
        "scaled_adam.triton_chunk", 1 << 15, "elements", "of a program's share",
        GPU, "reasoned: as scaled_adam.chunk, with twice as much for each program",
    ),
    _tile("scaled_adam.triton_block", 1024, "elements", "of such a share at a time"),
    _tile("scaled_adam.triton_lanes", 512, "tensors", "that are planned at a time"),
    _tile("scaled_adam.triton_sum_lanes", 32, "partial sums", "that are added up at a time"),
    _warps("scaled_adam.triton_warps"),
    _warps("scaled_adam.triton_plan_warps", 8),
]  # fmt: skip

_ATTENTION_TILES = {  # by bytes of an element
    2: {
        "softmax": (64, 64, 4, 16, 1),
        "masked_softmax": (64, 32, 4, 16, 1),
        "weights": (64, 64, 4, 16, 1),
        "aggregate": (64, 64, 4, 64, 1),
        "wide_aggregate": (32, 32, 4, 192, 1),
        "value": (64, 64, 4, 128, 1),
        "masked_value": (32, 64, 4, 128, 1),
        "score": (64, 32, 4, 64, 1),
        "gather": (32, 32, 4, 64, 1),
        "key": (64, 64, 4, 16, 1),
        "position": (64, 64, 4, 16, 1),
        "pack": (32, 0, 4, 32, 1),
    },
    4: {
        "softmax": (32, 32, 4, 16, 1),
        "masked_softmax": (32, 32, 4, 16, 1),
        "weights": (32, 32, 4, 16, 1),
        "aggregate": (32, 32, 4, 32, 1),
        "wide_aggregate": (32, 32, 4, 32, 1),
        "value": (16, 32, 4, 32, 1),
        "masked_value": (16, 32, 4, 32, 1),
        "score": (32, 16, 4, 32, 1),
        "gather": (32, 32, 4, 32, 1),
        "key": (16, 32, 4, 16, 1),
        "position": (32, 32, 4, 16, 1),
        "pack": (32, 0, 4, 32, 1),
    },
}

ENTRIES = [
    *_ON_CPU,
    *_ON_GPU,
    *(
        Entry(
            f"attention.triton_{kernel}_{size}_bytes",
            tile,
            "targets, sources, warps, channels, stages",
            f"of the kernel {kernel} for elements of {size} bytes (ops/attention/tiles.py)",
            SM_90,
            _TILES,
            least=0,
        )
        for size, kernels in _ATTENTION_TILES.items()
        for kernel, tile in kernels.items()
    ),
]
"""The table."""
