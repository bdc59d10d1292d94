"""The versions of upstream's classes that are known, each method by a digest of its source.

Looked through: icefall @36e0420 (every ``zipformer*.py``, ``scaling.py`` and ``subsampling.py`` under ``egs``),
ZipVoice @2f7326f, and ``zipformer`` 0.1.3 on PyPI. ``python -m zipformer_kernels.convert FILE`` prints the
digests of a file. Between versions that need no settings only texts, checks, dtypes under autocast and the way in which
something is written differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Version:
    """What a version of a method asks for.

    Attributes:
        settings: attributes that our module needs in order to do as it does.
        needs: functions in attributes of the object that it calls, and that must be known too.
        refuses: why an object cannot become ours, or None if it can.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    refuses: Callable[[Any], str | None] = lambda module: None


PLAIN = Version()


def _any(digests: str, version: Version = PLAIN) -> dict[str, Version]:
    return dict.fromkeys(digests.split(), version)


# Recipes copied before March 2024 draw constant attention in evaluation, where its rate is 0, and never in training.
OLD_RULE = Version({"const_attention_in_training": False})
# icefall's SSL/zipformer gives its output at the rate of its input.
FULL_RATE = Version({"downsamples_output": False})
# icefall's hent_srt can give the output of a stack beside its own.
THREE_RESULTS = Version(
    refuses=lambda m: "it returns three values, for st_output_layer is set" if m.st_output_layer else None
)

# For each class of ours: the digests of each method, newest first: icefall, its older copies, ZipVoice, PyPI.
KNOWN: dict[str, dict[str, dict[str, Version]]] = {
    "SwooshL": {
        "forward": _any("e5a642a52436 fe4103df6b3e 04c44d9e4170") | _any("ab05698be892", Version(needs=("func",))),
        "func": _any("c73bf56b624f"),
    },
    "SwooshR": {
        "forward": _any("b414ed1b5017 57e9d699e60c 7f4649a0f448") | _any("ab05698be892", Version(needs=("func",))),
        "func": _any("b92e757a5b93"),
    },
    "BiasNorm": {"forward": _any("5100a22c8d6b")},
    "ActivationDropoutAndLinear": {
        "forward": _any("cc5ea33ed2e6 96cfc54806b1 badd1665f795")
        | _any("fe31e88ec4ba", Version(needs=("forward_func", "backward_func"))),
        "forward_func": _any("c73bf56b624f b92e757a5b93"),
        "backward_func": _any("ecd52530a198 b75c514e1212"),
    },
    "RelPositionMultiheadAttentionWeights": {
        "forward": _any("75447e6c038a 36891b66e554 885cea415570 ed05b8c85ff1 b36da4179a29"),
        "streaming_forward": _any("8cc0fec6bf12 6052cd52575a"),
    },
    "SelfAttention": {"forward": _any("bcb73ec21201"), "streaming_forward": _any("eb3b22fb400b")},
    "NonlinAttention": {
        "forward": _any("2c32fa47c33f 53413049617a"),
        "streaming_forward": _any("f695b5a0c737 0e65ad648db2"),
    },
    "ZipformerEncoderLayer": {
        "get_sequence_dropout_mask": _any("c863afb3c2d0"),
        "sequence_dropout": _any("f5e772efa6a7"),
        "forward": _any("8fa58a2fa484") | _any("6d17f95a5317", OLD_RULE),
        "streaming_forward": _any("584b9f3cf4cf"),
    },
    "ZipformerEncoder": {"forward": _any("aecc0c17ed7d"), "streaming_forward": _any("5fed2ef125f6")},
    "DownsampledZipformerEncoder": {"forward": _any("cdab4159abc3"), "streaming_forward": _any("1f4a3a930ba8")},
    "Zipformer": {
        "get_feature_masks": _any("f8b56cc4facf"),
        "get_chunk_info": _any("58959825e833"),
        "forward": _any("23478fe08dd6 f4b9e78a5933")
        | _any("33ce4460f1fc", FULL_RATE)
        | _any("0783e0f6874c", THREE_RESULTS),
        "streaming_forward": _any("3cca1c2130ac"),
        "get_init_states": _any("509e9ea93a0d"),
    },
    "TimedEncoderLayer": {
        "get_sequence_dropout_mask": _any("c863afb3c2d0"),
        "sequence_dropout": _any("f5e772efa6a7"),
        "forward": _any("201eb407d713"),
    },
    "TimedEncoder": {"forward": _any("700fb1ba0848")},
    "TimedDownsampledEncoder": {"forward": _any("f0c165430893")},
    "BypassModule": {"forward": _any("060620d7b3da")},
    "SimpleDownsample": {"forward": _any("1e3c2f5c01e6 0f5b7ef74ec8 17109de0f92a")},
    "SimpleUpsample": {"forward": _any("9b40f136c5e8")},
    "CompactRelPositionalEncoding": {
        "extend_pe": _any("2eb075060d5c 55919ab2756a"),
        "forward": _any("d9aaecfe5dde 46cceac24270 d4cfeaa1d969"),
    },
    "ConvolutionModule": {
        "forward": _any("bb10c276202a 23b742e3de37 327ad4d9e334 e0ddcb752b49"),
        "streaming_forward": _any("f2e0bcbe4025 abb55196631b"),
    },
    "ChunkCausalDepthwiseConv1d": {
        "forward": _any("7879a9e54d06 717b1c2a9720"),
        "streaming_forward": _any("0790e84b34e9"),
    },
    "FeedforwardModule": {"forward": _any("8399ec53be31")},
    "ConvNeXt": {
        "forward": _any("1dc017d15cc6"),
        "forward_internal": _any("3524733b0bc7 0424ecd72800"),
        "streaming_forward": _any("652faee3b7e7"),
    },
    "Conv2dSubsampling": {
        "forward": _any("3f5524a7a1fb"),
        "streaming_forward": _any("df37ee27edad"),
        "get_init_states": _any("154957b8852e"),
    },
    "Balancer": {
        "forward": _any("a8f19559ba29 da5c63b4ed25 24a1266ac021 c1a350288252"),
        "mem_cutoff": _any("f13bf2ef28f5"),
    },
    "Whiten": {"forward": _any("2116e7129576 c0ea24989740 3ed0b6c3f36c b7592ee30d86")},
    "Dropout2": {"forward": _any("2f25a3f9b7d3")},
    "Dropout3": {"forward": _any("205c33e57356")},
    "ScaleGrad": {"forward": _any("568d4a1d6f5c")},
    "ScheduledFloat": {
        "__float__": _any("bbe30b5b48f3"),
        "__add__": _any("a2ed8b48a3d2"),
        "max": _any("bab73422a965"),
        "schedule": _any("556cde97cfd4 f3ddc0e50417 5f990612bc8d"),
    },
    "Identity": {"forward": _any("0681e1c4fdaa")},
}
