"""Counts how often a layer asks how it shall run, and how many Python functions a call of it takes.

    python benchmarks/questions.py

A question is a call of a function whose answer decides how something runs: by which way, on which backend, through
which modules. Does anybody look on, are the tensors plain, does a backend serve them, are the modules as written?
Questions that a question asks count as well. To read an answer once more does not.

It prints a line of JSON for a layer without gradients, one for a chunk of a stream and one for a step of training, and
how many functions of `modules/` and `branch/` decide in any of them.
"""

import json
import random
import sys
from collections import Counter
from types import FrameType
from typing import Any

import torch

from zipformer_kernels.modules import ZipformerEncoderLayer

# Some names are of earlier trees, which the script counts as well.
LOOKING_ON = """watcher barred unreadable plain _why being_traced exports_calls autocast_dtype has_values all_ones
    keeps_all only_computes _alike few_rows side_by_side"""
BACKENDS = """requested _innermost unserved_device select _select unsupported _unsupported _unsupported_infer
    unsupported_dtype unsupported_dtypes supports worthwhile asked_for settled_backend"""
MODULES = """plain_module plain_part plain_parts matches _causal_or_not expected _swoosh_r _pointwise _has_global_hooks
    holds takes given_mask _given _given_to check"""
WAYS = "settle keeps_weights stores falls_back must_fall_back _trained wants_gradients serves happens"
QUESTIONS = frozenset(" ".join((LOOKING_ON, BACKENDS, MODULES, WAYS)).split())
SIZES = {
    "embed_dim": 192,
    "pos_dim": 48,
    "num_heads": 4,
    "query_head_dim": 32,
    "pos_head_dim": 4,
    "value_head_dim": 12,
    "feedforward_dim": 512,
}
LEFT, CHUNK, KERNEL = 128, 16, 31


def count(call: Any) -> Counter:
    """How many Python functions of the package a call takes, by room and name; a call before is not counted."""
    found: Counter = Counter()

    def look(frame: FrameType, event: str, _: object) -> None:
        _, package, path = frame.f_code.co_filename.rpartition("zipformer_kernels/")
        if event == "call" and package:
            name = frame.f_code.co_name
            if name == "<lambda>":  # of an op's launchers: whether they serve a call, and whether it is worth while
                name = "supports"
            found[path.split("/")[0], name] += 1

    call()
    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def offline() -> Any:
    """A layer on 100 frames."""
    layer = ZipformerEncoderLayer(**SIZES, cnn_module_kernel=KERNEL).eval()
    x, position = torch.randn(100, 2, SIZES["embed_dim"]), torch.randn(1, 199, SIZES["pos_dim"])
    return lambda: layer(x, position)


def training() -> Any:
    """A layer in training, forward and backward, on 100 frames."""
    layer = ZipformerEncoderLayer(**SIZES, cnn_module_kernel=KERNEL)
    x, position = torch.randn(100, 2, SIZES["embed_dim"]), torch.randn(1, 199, SIZES["pos_dim"])
    return lambda: layer(x, position).sum().backward()


def stream() -> Any:
    """A layer on a chunk of a stream."""
    layer = ZipformerEncoderLayer(**SIZES, cnn_module_kernel=KERNEL, causal=True).eval()
    channels, heads = SIZES["embed_dim"], SIZES["num_heads"]
    x, position = torch.randn(CHUNK, 1, channels), torch.randn(1, LEFT + 2 * CHUNK - 1, SIZES["pos_dim"])
    value, conv = (LEFT, 1, heads * SIZES["value_head_dim"]), (1, channels, KERNEL // 2)
    key = LEFT, 1, heads * SIZES["query_head_dim"]
    states = [torch.zeros(shape) for shape in (key, (1, 1, LEFT, 3 * channels // 4), value, value, conv, conv)]
    padding = torch.zeros(1, LEFT + CHUNK, dtype=torch.bool)
    return lambda: layer.streaming_forward(x, position, *states, LEFT, padding)


def main() -> None:
    """Prints the counts."""
    deciding = set()
    for name, make in (("layer without gradients", offline), ("chunk of a stream", stream), ("training", training)):
        torch.manual_seed(0)
        random.seed(0)
        call = make()
        with torch.set_grad_enabled(name == "training"):
            found = count(call)
        asked: Counter = Counter()
        for (room, function), times in found.items():
            if function in QUESTIONS:
                asked[function] += times
                deciding |= {function} if room in ("modules", "branch") else set()
        row = {"what": name, "questions": asked.total(), "python calls": found.total()}
        print(json.dumps({**row, "asked": dict(asked.most_common())}))
    print(json.dumps({"what": "deciding functions", "count": len(deciding), "names": sorted(deciding)}))


if __name__ == "__main__":
    main()
