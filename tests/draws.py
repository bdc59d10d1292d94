"""Random draws of modules in training: seeds, schedules, and the states of all generators."""

import random

import torch


def seed_all(seed):
    random.seed(seed)
    torch.manual_seed(seed)


def set_batch_count(model, batch_count):
    """What icefall's training loop does before every batch."""
    for name, module in model.named_modules():
        if hasattr(module, "batch_count"):
            module.batch_count = batch_count
        if hasattr(module, "name"):
            module.name = name


def generators():
    """The states of all random generators: Python's, torch's, and each GPU's."""
    states = {"Python's random": random.getstate(), "torch's generator": torch.get_rng_state().tolist()}
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return states | {f"GPU {i}'s generator": state.tolist() for i, state in enumerate(gpus)}
