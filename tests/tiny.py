"""A Zipformer of a few thousand weights, and its checkpoint."""

import torch

from zipformer_kernels.modules.encoder import Zipformer
from zipformer_kernels.modules.subsampling import Conv2dSubsampling

TINY = {
    "downsampling_factor": (1, 2),
    "encoder_dim": (16, 24),
    "num_encoder_layers": (1, 2),
    "encoder_unmasked_dim": (16, 16),
    "query_head_dim": (32, 32),
    "value_head_dim": (12, 12),
    "num_heads": (2, 3),
    "feedforward_dim": (32, 40),
    "cnn_module_kernel": (7, 5),
    "pos_dim": 12,
}


def tiny(causal=False, seed=0):
    """A conv embed and an encoder in eval mode, their symmetries broken."""
    torch.manual_seed(seed)
    embed = Conv2dSubsampling(80, 16, layer1_channels=4, layer2_channels=6, layer3_channels=8)
    chunks = {"chunk_size": (32,), "left_context_frames": (256,)} if causal else {}
    encoder = Zipformer(**TINY, causal=causal, **chunks)
    for parameter in (*embed.parameters(), *encoder.parameters()):
        parameter.data += 0.05 * torch.randn_like(parameter)
    return embed.eval(), encoder.eval()


def weights_of(embed, encoder, prefix=""):
    """A state_dict as icefall writes it, with a weight of a decoder in it."""
    parts = {"encoder_embed": embed, "encoder": encoder}
    state = {f"{prefix}{n}.{k}": v for n, part in parts.items() for k, v in part.state_dict().items()}
    return state | {f"{prefix}decoder.embedding.weight": torch.zeros(5, 3)}
