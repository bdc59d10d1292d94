"""How often the loops of each kernel run, which the binary does not say.

A rule is ``(numbers, body, depth)`` -> how often a loop runs each time that it is reached: `numbers` are the launch's
arguments (`recording.Launch.numbers`), with its grid under ``grid``; `body` counts the opcodes of the loop, with and
without modifiers; `depth` loops lie around it. A kernel with loops and no rule is an error: whoever writes a kernel
writes its rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.sass import Instruction, Kernel

Body = Counter[str]
Rule = Callable[[dict[str, Any], Body, int], float]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---- Triton: the kernels' own constants say it ----


def walk(over: str, step: str) -> Rule:
    """A walk over all that there is of `over`, `step` at a time."""
    return lambda n, body, depth: ceil_div(n[over], n[step])


def score_gradient(n: dict[str, Any], body: Body, depth: int) -> float:
    """A walk with the penalty compares each score twice, another is without; inside are blocks of channels."""
    if depth > 0:
        return ceil_div(n["packed"], n["BC"])
    compares = body["FSETP"] >= 2 * n["BM"] * n["BN"] / (32 * n["num_warps"])
    return ceil_div(n["S"], n["BN"]) if compares == (n["penalty"] != 0) else 0


def block_of_targets(n: dict[str, Any]) -> int:
    """How many targets a launch of attention's backward kernels has: of all, those of its block."""
    return min(n["targets"], n["T"] - 16 * n["first"])


def position_gradient(n: dict[str, Any], body: Body, depth: int) -> float:
    """Each program walks over the targets of the block that its offsets meet: the mean over all programs."""
    rows, sources, walked = block_of_targets(n), n["S"], 0
    starts = [n0 - (n["targets"] - 1) for n0 in range(0, sources + n["targets"] - 1, n["BN"])]
    for start in starts:
        begin = max(-start - (n["BN"] - 1), 0) // n["BM"] * n["BM"]
        walked += max(0, ceil_div(min(sources - start, rows) - begin, n["BM"]))
    return walked / len(starts)


def pack_use(n: dict[str, Any], body: Body, depth: int) -> float:
    """Programs of targets, whose loop multiplies, and of sources walk over the channels."""
    rows = n["T"] + n["S"]
    share = n["T"] if body["FFMA"] or body["FMUL"] or not n["S"] else n["S"]
    return share / rows * ceil_div(n["CHANNELS"], n["BC"])


def chunk_loop(n: dict[str, Any], body: Body, depth: int) -> float:
    """The search for a chunk's tensor, then the chunk."""
    return n["tensors"].bit_length() if sum(body.values()) < 30 else n["CHUNK"] // n["BLOCK"]


def conv_module_kernel(n: dict[str, Any], body: Body, depth: int) -> float:
    """A program writes what its convolution reads, then takes one tap after another."""
    return n["ROWS"] / n["FILL"] if body["STG"] else n["K"]


def add_parts_kernel(n: dict[str, Any], body: Body, depth: int) -> float:
    """The mean of the programs for parameters and those for the inputs."""
    others = n["grid"][0] - n["blocks"]
    both = n["blocks"] * ceil_div(n["parts"], n["PARTS"]) + others * ceil_div(n["tiles"], n["PARTS"])
    return both / n["grid"][0]


# ---- CUDA: numbers of the call, and what a loop holds tells loops apart ----


def attention_by_targets(n: dict[str, Any], body: Body, depth: int) -> float:
    """A block looks for padding, 128 sources a time, four times at once; then it walks over tiles of 64 sources.

    A tile is taken in halves, where that is a loop; masks, with loops of their own, are rare.
    """
    weights = n["weights"]
    if not body["HMMA"]:
        return weights.sources // 512 if depth == 0 and weights.padding and body["LDG"] >= 4 else 0
    return ceil_div(weights.sources, 64) if depth == 0 else 2


def attention_gradients(outer: int) -> Rule:
    """Inside of `outer` loops over a block's own frames, steps of 64. In these, blocks of 64 channels of all uses, and
    in float four pairs of products. What looks for masks, or applies them, is rare. By targets, a block first zeroes
    its sums, four stores of a thread at once.
    """

    def rule(n: dict[str, Any], body: Body, depth: int) -> float:
        weights, channels = n["weights"], n.get("channels", 0)
        if not body["HMMA"] and not body["SHFL"]:
            return offset_rows(n) / 64 / 4 if outer and body["STG.E.128"] == 4 else 0
        if "uses" in n:
            channels = n["uses"].channels + n["uses"].packed
        if depth < outer:
            return ceil_div(weights.targets, 64) / n["parts"]
        if depth == outer:
            return ceil_div(weights.sources if outer else weights.targets, 64)
        if depth == outer + 1:
            return ceil_div(channels, 64) if body["LDGSTS"] else 4
        return 4  # products in float take channels two at a time

    return rule


def offset_rows(n: dict[str, Any]) -> int:
    """Rows of a part's sums for the position projections."""
    return 64 * (n["share"] + 1 + ceil_div(n["weights"].sources, 64))


def pack_uses(n: dict[str, Any], body: Body, depth: int) -> float:
    """The uses; of each eight rows one after the other, of targets or of sources; four lanes share a row's channels,
    four at a time. Of a use that is not packed only targets are read, of its own heads.
    """
    uses = n["uses"]
    if depth == 0:
        return len(uses)
    targets = n["targets"] / (n["targets"] + (n["sources"] if n["width"] else 0))
    spans = (ceil_div(one.end - one.first, 16) for one in uses)
    own = (targets * one.heads / n["heads"] * ceil_div(one.use.channels, 16) for one in uses)
    return sum(span or mine for span, mine in zip(spans, own, strict=True)) / len(uses)


def attention_offsets(n: dict[str, Any], body: Body, depth: int) -> float:
    """Parts whose rows have the offset; eight groups of threads share the sequences, four at once, then the rest."""
    share = n["share"] + 1 + ceil_div(n["sources"], 64)
    parts = n["parts"] * min(1, 64 * share / (n["targets"] + n["sources"] - 1))
    sequences, at_once = ceil_div(n["sequences"], 8), body["LDG"]
    if depth == 0:
        return parts if body["LDG"] else 1
    return sequences // at_once if at_once > 1 else sequences % 4


def bias_norm_backward(n: dict[str, Any], body: Body, depth: int) -> float:
    """The loop over rows that writes dx; the one that does not is another case; then eight warps take turns."""
    if depth > 0:
        return 1
    if body["MUFU"]:
        return ceil_div(n["rows"], 8 * n["parts"]) if any(op.startswith("STG") for op in body) else 0
    return 2 if body["BAR"] else 1


def convolved(n: dict[str, Any], body: Body) -> float:
    """Taps are taken sixteen at a time; those that see the past alone are half as many, and compare no positions."""
    taps = n["shape"].kernel
    past = n["causal_weight"] != 0 and body["ISETP"] < 100
    return ceil_div(taps // 2 + 1 if past else taps, 16)


def conv_module_forward(n: dict[str, Any], body: Body, depth: int) -> float:
    """Taps are written 32 at a time; the strip is filled two rows a warp; a warp sums two groups."""
    padded = 16 * ceil_div(n["shape"].kernel, 16)
    passes = ceil_div(192 + padded, 256)
    if body["FFMA"] >= 190:
        return convolved(n, body) if depth > 0 else 2
    if body["MUFU"]:
        biased = body["FADD"] > body["MUFU"] / 2  # beside 1 + exp(-s)
        return ((192 + padded) / 16 / passes if depth > 0 else passes) if biased == (n["projection_bias"] != 0) else 0
    return ceil_div(padded, 32)


def conv_module_backward(n: dict[str, Any], body: Body, depth: int) -> float:
    """The tiles of a block; in each the gradient of y, dx and the taps' gradients; then what warps have is added up."""
    shape, padded = n["shape"], 16 * ceil_div(n["shape"].kernel, 16)
    taps, own = padded // 16, 39  # rows that the taps' gradients load: 12 of x, 27 of the gradient
    shares = next(parts for most, parts in ((1, 8), (2, 4), (4, 2), (8, 1)) if taps <= most)
    if body["BAR"]:
        return shape.batch * ceil_div(shape.frames, 96) / n["grid"][0]
    if body["FFMA"] >= 190:
        return 8 / shares if body["LDS"] == own else convolved(n, body)
    if depth > 0 and body["LDG"]:
        tile = body["STG"] or (body["FADD"] and not body["MUFU"])
        return 2 if tile else padded / 16 if body["STS"] == 2 else (96 + padded) / 8
    if body["LDS"]:
        return ceil_div(shape.kernel, 8) if depth == 0 else shares
    return ceil_div(padded, 32)


def bias_norm_bypass_backward(n: dict[str, Any], body: Body, depth: int) -> float:
    """The loop over frames that writes both gradients; then eight warps take turns, twice."""
    if depth > 0:
        return 1
    if body["MUFU"] or body["SHFL"]:
        return ceil_div(n["frames"], 8 * n["parts"])
    return 2 if body["BAR"] else 1


def bias_norm_bypass_sums(n: dict[str, Any], body: Body, depth: int) -> float:
    """One row of programs adds up all parts, the others each sequence's: the mean over all, of two loops."""
    parts, sequences = n["parts"], n["sequences"]
    one, other = ceil_div(parts, n["PARTS"]) * sequences, ceil_div(parts * sequences, n["PARTS"])
    return (one + other) / (sequences + 1) / 2


def parts_of_columns(parts: float, body: Body) -> float:
    """Groups of threads share the parts, eight at once; then groups are added up, sixteen at once, four, and one."""
    groups, terms = sum_groups(parts), body["LDS"]
    if body["LDG"]:
        return parts / groups // 8
    return (groups - 1) // 16 if terms >= 16 else (groups - 1) % 16 // 4 if terms >= 4 else (groups - 1) % 4


def sum_groups(parts: float) -> int:
    """As csrc/common/parts.h has them."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if groups == 1 or groups * 8 <= parts)


def bias_norm_bypass_parts(n: dict[str, Any], body: Body, depth: int) -> float:
    """Blocks for the norm's sums, over all parts, and for each sequence's, over its own: the mean over all."""
    parts, sequences, blocks = n["parts"], n["sequences"], n["grid"][0]
    of_all = ceil_div(n["channels"] + 1, 1024 // sum_groups(parts * sequences)) / blocks
    return of_all * parts_of_columns(parts * sequences, body) + (1 - of_all) * parts_of_columns(parts, body)


def bypass_backward(n: dict[str, Any], body: Body, depth: int) -> float:
    """A block's 256 threads have packs of 4 channels in float32, of 8 elsewhere, and two rows at once each."""
    packs = n["channels"] // (4 if n["a_dtype"] == n["b_dtype"] == 0 else 8)
    rows = 256 // min(packs, 256)
    return ceil_div(n["rows"], 2 * rows * n["parts"]) if body["STG"] else rows - 1


def conv_module_parameters(n: dict[str, Any], body: Body, depth: int) -> float:
    """Of chunks. The tiles of a block; in each strips are filled, and all taps' gradients added up."""
    shape = n["shape"]
    if depth == 0 and body["BAR"]:
        return shape.batch * ceil_div(shape.frames, 96) / n["grid"][0]
    if body["FFMA"] >= 190:
        return convolved(n, body)
    return (96 + 16 * ceil_div(shape.kernel, 16)) / 8 if body["MUFU"] else 1


def conv_module_add_parts(n: dict[str, Any], body: Body, depth: int) -> float:
    """Eight warps share the parts, four at a time; then what is left."""
    parts = ceil_div(n["parts"], 8)
    return parts // 4 if body["LDG"] >= 4 else parts % 4


def scaled_adam(loads: int, stores: int) -> Rule:
    """Of the loops for every pair of dtypes, those for float32, which take packs of four: so many accesses a pack."""

    def rule(n: dict[str, Any], body: Body, depth: int) -> float:
        packs, rest = divmod(body["LD.E.128"], loads)
        alike = body["LD"] == packs * loads and body["STG"] == body["STG.E.128"] == packs * stores
        no_gradient = stores == 0 and body["FFMA"] > 6 * body["LD"]
        whole = packs > 0 and rest == 0 and alike and not no_gradient
        return n["chunk_elements"] / 1024 / packs if whole and packs == WHOLE_PACKS[stores] else 0

    return rule


WHOLE_PACKS = {0: 4, 3: 1}
"""How many packs the unrolled loop of each kernel takes, by its stores; the loop for what is left takes fewer."""


def scaled_adam_plan(lanes: int | str, tensors: str) -> Rule:
    """One group; tensors are planned `lanes` at a time; scales move every fourth step, from four gradients each."""

    def rule(n: dict[str, Any], body: Body, depth: int) -> float:
        return ceil_div(n[tensors], n.get(lanes, lanes)) if depth == 1 else 1

    return rule


def balancer_change(n: dict[str, Any], body: Body, depth: int) -> float:
    """Parts are merged, in two walks; then the rows of a program are changed."""
    changes = any(op.startswith("STG") for op in body)
    return ceil_div(n["part_rows"], n["R"]) if changes else parts_merged(n, body, depth)


parts_merged = walk("parts", "PARTS")


RULES: dict[str, Rule] = {
    "balancer.moments_kernel": walk("part_rows", "R"),
    "balancer.merge_kernel": parts_merged,
    "balancer.change_kernel": balancer_change,
    "downsample.bias_kernel": parts_merged,
    "upsample_bypass.sum_parts": parts_merged,
    "bias_norm.backward_tiles": lambda n, body, depth: ceil_div(n["rows"], n["R"] * n["grid"][0]),
    "bias_norm.sum_parts": lambda n, body, depth: ceil_div(n["parts"], n["PARTS"]),
    "conv_module.forward_kernel": conv_module_kernel,
    "conv_module.backward_kernel": conv_module_kernel,
    "conv_module.add_parts_kernel": add_parts_kernel,
    "bias_norm.bypass_backward": lambda n, body, depth: ceil_div(n["frames"] * n["sequences"], n["R"] * n["grid"][0]),
    "bias_norm.bypass_sum_parts": bias_norm_bypass_sums,
    "bias_norm.bypass_add_parts": bias_norm_bypass_parts,
    "bias_norm.bypass_forward": lambda n, body, depth: 1,
    "bypass.backward_kernel": lambda n, body, depth: ceil_div(n["rows"], n["R"] * n["parts"]),
    "bypass.sum_parts": lambda n, body, depth: ceil_div(n["parts"], n["PARTS"]),
    "bypass.scale_gradient_kernel": lambda n, body, depth: ceil_div(n["B"], n["SEQUENCES"]),
    "bypass.backward": bypass_backward,
    "bypass.add_parts": lambda n, body, depth: parts_of_columns(n["parts"], body),
    "conv_module.taps_kernel": lambda n, body, depth: n["tiles"] / n["parts"],
    "products.activated_kernel": walk("K", "BK"),
    "products.activated_gradient_kernel": walk("K", "BK"),
    "products.added_kernel": walk("K", "BK"),
    "products.totals_kernel": lambda n, body, depth: ceil_div(n["parts"], n["PARTS"]),
    "attention.softmax_kernel": walk("S", "BN"),
    "attention.weights_kernel": walk("w_st", "BN"),
    "attention.aggregate_kernel": walk("S", "BN"),
    "attention.value_gradient_kernel": walk("T", "BM"),
    "attention.score_gradient_kernel": score_gradient,
    "attention.key_gradient_kernel": lambda n, body, depth: ceil_div(block_of_targets(n), n["BM"]),
    "attention.position_query_gradient_kernel": lambda n, body, depth: ceil_div(n["S"] + n["BM"] - 1, n["BN"]),
    "attention.position_gradient_kernel": position_gradient,
    "attention.pack_kernel": pack_use,
    "scaled_adam.partials_kernel": chunk_loop,
    "scaled_adam.update_kernel": chunk_loop,
    "scaled_adam.plan_kernel": scaled_adam_plan("LANES", "tensors"),
    "scaled_adam.sums_kernel": lambda n, body, depth: 1,  # 32 parts at a time: 45 of 863 tensors of L have more
    "bias_norm.forward_in_registers": lambda n, body, depth: 1,  # a second time only where squares leave the range
    "bias_norm.backward_in_registers": bias_norm_backward,
    "bias_norm.add_parts": lambda n, body, depth: parts_of_columns(n["parts"], body),
    "attention.softmax_rows": attention_by_targets,
    "attention.average": attention_by_targets,
    "attention.values_gradient": attention_gradients(0),
    "attention.by_sources": attention_gradients(0),
    "attention.by_targets": attention_gradients(1),
    "attention.offsets_kernel": attention_offsets,
    "nonlin_attention.map_rows": lambda n, body, depth: ceil_div(n["channels"], 256 * 8),
    "conv_module.forward": conv_module_forward,
    "conv_module.backward": conv_module_backward,
    "conv_module.backward_parameters": conv_module_parameters,
    "conv_module.add_parts": conv_module_add_parts,
}

CUDA_RULES: dict[str, Rule] = {
    "attention.pack_kernel": pack_uses,
    "bias_norm.bypass_backward": bias_norm_bypass_backward,
    "scaled_adam.partials_kernel": scaled_adam(2, 0),
    "scaled_adam.update_kernel": scaled_adam(4, 3),
    "scaled_adam.plan_kernel": scaled_adam_plan(512, "tensor_count"),
}
"""Of kernels whose names Triton's have as well."""


OF_TILES = tuple(
    f"attention.{kernel}" for kernel in ("softmax_rows", "average", "values_gradient", "by_sources", "by_targets")
)
"""CUDA kernels that walk over tiles of scores, and branch around masks and the penalty where a tile has none."""


def masked_or_penalized(skipped: Body) -> bool:
    """Whether it is that: votes on a mask, which a tile of its own may follow; or mask bytes, or many comparisons, and
    no product.
    """
    if any(skipped[opcode] for opcode in ("LDGSTS", "BAR", "STG", "EXIT")):
        return False
    many = skipped["LDG.E.U8"] or skipped["FSETP"] >= 16 or skipped["FSEL"] >= 16
    return bool(skipped["VOTE"] or (many and not skipped["HMMA"] and not skipped["MUFU"]))


OF_EVERY_DTYPE = ("scaled_adam.partials_kernel", "scaled_adam.update_kernel")
"""CUDA kernels that hold code for every pair of dtypes: outside of their loops next to nothing runs."""


class NoRule(Exception):
    """A kernel has loops, and `RULES` does not say how often they run."""


def executed(name: str, cuda: bool, kernel: Kernel, numbers: dict[str, Any]) -> Counter[Instruction]:
    """How often a warp executes each instruction of a launch.

    Args:
        name: the op's and the kernel's, such as ``swoosh.forward``.
        cuda: whether it is CUDA's, not Triton's.
        kernel: as compiled.
        numbers: of the launch, and its grid.
    Raises:
        NoRule: nobody has said how often its loops run.
    """
    rule = (CUDA_RULES.get(name) if cuda else None) or RULES.get(name)
    if kernel.loops and rule is None:
        raise NoRule(f"{name} has {len(kernel.loops)} loops: say in {__file__} how often they run")

    def trips(number: int) -> float:
        loop = kernel.loops[number]
        return rule(numbers, kernel.body(range(loop.first, loop.last + 1)), loop.depth)

    often = kernel.executed(trips, masked_or_penalized if cuda and name in OF_TILES else lambda _: False)
    if cuda and name in OF_EVERY_DTYPE:
        inside = {one for loop in kernel.loops for one in kernel.main[loop.first : loop.last + 1]}
        often = Counter({one: count for one, count in often.items() if one in inside})
        if sum(often.values()) == 0:
            raise NoRule(f"{name}: no loop looks like that for float32: see {__file__}")
    return often
