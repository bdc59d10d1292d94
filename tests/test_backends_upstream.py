"""The whole encoder against upstream on every backend that has kernels, training and eval, outputs and gradients.

With a GPU both run on it, where the backend does. An op without kernels on a backend runs on the next.
"""

import pytest
import torch
import upstream
from draws import seed_all, set_batch_count
from lanes import Lane
from parity import build_pair, run
from test_attention import both_ways, storing
from tolerances import relative_error

from zipformer_kernels.core import backend
from zipformer_kernels.modules.encoder import Zipformer

CONFIG = {
    "downsampling_factor": (1, 2),
    "encoder_dim": (32, 48),
    "num_encoder_layers": (1, 1),
    "encoder_unmasked_dim": (24, 32),
    "query_head_dim": 16,
    "pos_head_dim": 4,
    "value_head_dim": 12,
    "num_heads": 4,
    "feedforward_dim": (48, 64),
    "cnn_module_kernel": (7, 5),
    "pos_dim": 16,
    "warmup_batches": 4000.0,
}
CAUSAL = {"causal": True, "chunk_size": (8,), "left_context_frames": (16,)}

# Float32: every layer rounds some thirty times, and gradients add up over the frames.
TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 5e-4


@both_ways
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("options", [{}, CAUSAL], ids=["offline", "chunks"])
@pytest.mark.parametrize("lane", list(map(Lane, backend.BACKENDS)), ids=lambda lane: lane.backend)
def test_encoder(lane, options, mode, stored):
    ours, theirs = build_pair(Zipformer, upstream.zipformer.Zipformer, **CONFIG, **options, dtype=torch.float32)
    lengths = torch.tensor([21, 14], device=lane.device)
    padding = torch.arange(21, device=lane.device) >= lengths.unsqueeze(1)
    seed_all(3)
    x = torch.randn(21, 2, 32).to(lane.device)
    for model in (ours, theirs):
        model.to(lane.device).train(mode == "train")
        set_batch_count(model, 500)
    for seed in (1, 2):
        expected, their_draws = run(theirs, seed, [x, lengths, padding])
        with lane.active(), storing(stored):
            actual, our_draws = run(ours, seed, [x, lengths, padding])
        assert our_draws == their_draws
        valid = ~padding[:, ::2].t()
        assert relative_error(actual["output 0"][valid], expected["output 0"][valid]) < TOLERANCE
        for key, wanted in expected.items():
            if key.startswith("gradient") and wanted is not None and wanted.norm() > 1e-6:
                assert relative_error(actual[key], wanted) < GRADIENT_TOLERANCE, key
