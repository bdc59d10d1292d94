"""icefall's own scripts on our modules in place of the recipe's: what a user gets who replaces imports."""

import contextlib
import importlib
import os
import sys
import tempfile
from unittest import mock

import pytest
import recipes
import torch
from tolerances import PARITY, assert_parity

import zipformer_kernels
from zipformer_kernels import convert, optim, revert, scaling

FOLDER = "egs/librispeech/ASR/zipformer"
CAUSAL = {"causal": True, "chunk_size": "16", "left_context_frames": "64"}
OURS = {"scaling": scaling, "subsampling": zipformer_kernels, "zipformer": zipformer_kernels, "optim": optim}


@contextlib.contextmanager
def on_ours(recipe, **replaced):
    """Within the block the recipe's files import ours in place of the modules named, in a folder they may write to."""
    before = os.getcwd()
    once = mock.patch.object(torch, "set_num_interop_threads")  # train.py's call, of which a process may have only one
    with once, recipes.importing(recipe.folder, recipe.checkout), tempfile.TemporaryDirectory() as folder:
        sys.modules.update(replaced or OURS)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def parameters(train, **changes):
    """What the recipe's train.py makes of its command line, for a very small model."""
    tiny = recipes.TINY
    args = train.get_parser().parse_args([])
    for name in ("downsampling_factor", "encoder_dim", "num_encoder_layers", "encoder_unmasked_dim", "feedforward_dim"):
        setattr(args, name, ",".join(map(str, tiny[name])))
    args.cnn_module_kernel = ",".join(map(str, tiny["cnn_module_kernel"]))
    for name in ("query_head_dim", "pos_head_dim", "value_head_dim", "num_heads"):
        setattr(args, name, str(tiny[name]))
    args.pos_dim = tiny["pos_dim"]
    args.use_ctc, args.use_transducer = True, False
    train.get_env_info = dict  # it would ask k2 for its version and git for the commit
    params = train.get_params()
    params.update(vars(args))
    params.update({"vocab_size": 11, "blank_id": 0, **changes})
    return params


def own_tests(recipe):
    """test_scaling.py and test_subsampling.py pass on ours."""
    with on_ours(recipe):
        for name in ("test_scaling", "test_subsampling"):
            importlib.import_module(name).main()


def model(recipe):
    """train.py builds its model, which asserts that the encoder is an ``EncoderInterface``, and takes a step."""
    with on_ours(recipe):
        train = importlib.import_module("train")
        built = train.get_model(parameters(train))
        assert type(built.encoder) is zipformer_kernels.Zipformer
        optimizer = train.ScaledAdam(
            train.get_parameter_groups_with_lrs(built, lr=0.01, include_names=True), lr=0.01, clipping_scale=2.0
        )
        y, _ = built.forward_encoder(torch.randn(2, 60, 80), torch.tensor([60, 50]))
        y.square().mean().backward()
        optimizer.step()


def converted(recipe):
    """A converted encoder is an ``EncoderInterface`` still."""
    with on_ours(recipe, optim=optim):
        train = importlib.import_module("train")
        params = parameters(train)
        encoder = train.get_encoder_model(params)
        convert(encoder)
        assert isinstance(encoder, zipformer_kernels.Zipformer)
        ctc_only = {"use_transducer": False, "use_ctc": True, "encoder_dim": max(recipes.TINY["encoder_dim"])}
        train.AsrModel(encoder_embed=train.get_encoder_embed(params), encoder=encoder, **ctc_only)


def agree(recipe, run):
    """What a function makes of train.py's models, an offline and a causal one, agrees on ours and theirs."""
    outputs = {}
    for side, replaced in (("theirs", {"optim": optim}), ("ours", OURS)):
        with on_ours(recipe, **replaced):
            train = importlib.import_module("train")
            models = [train.get_model(parameters(train, **kind)).eval() for kind in ({}, CAUSAL)]
            for built in models:
                torch.manual_seed(0)
                for parameter in built.parameters():
                    parameter.data = 0.1 * torch.randn_like(parameter)
            torch.manual_seed(1)
            with torch.no_grad():
                outputs[side] = run(*models)
    for name, expected in outputs["theirs"].items():
        assert_parity(outputs["ours"][name], expected, PARITY[torch.float32], name)


def export(recipe):
    """export.py's encoders, which pass padding masks of int32, offline and streaming."""

    def run(offline, causal):
        script = importlib.import_module("export")
        whole = script.EncoderModel(offline.encoder, offline.encoder_embed)
        stream = script.StreamingEncoderModel(causal.encoder, causal.encoder_embed)
        y, _ = whole(torch.randn(2, 60, 80), torch.tensor([60, 50]))
        part, *_ = stream(torch.randn(1, 45, 80), torch.tensor([45]), stream.get_init_states(1))
        return {"offline": y, "stream": part}

    agree(recipe, run)


def export_jit(recipe):
    """export.py --jit 1 on models that were converted: torch.jit.script is refused until they are reverted."""
    with on_ours(recipe, optim=optim):
        train, script = (importlib.import_module(name) for name in ("train", "export"))
        wrappers = {script.EncoderModel: {}, script.StreamingEncoderModel: CAUSAL}
        for wrapper, kind in wrappers.items():
            model = train.get_model(parameters(train, **kind)).eval()
            x, lengths = torch.randn(2, 45, 80), torch.tensor([45, 45])
            states = []
            if kind:
                states = [wrapper(model.encoder, model.encoder_embed).get_init_states(2)]
            convert(model)
            script.convert_scaled_to_non_scaled(model, inplace=True)
            forward = type(model).forward
            type(model).forward = torch.jit.ignore(forward)
            try:
                model.encoder = wrapper(model.encoder, model.encoder_embed)
                with pytest.raises(NotImplementedError, match="revert"):
                    torch.jit.script(model)
                with torch.no_grad():
                    expected = model.encoder(x, lengths, *states)[0]
                    revert(model)
                    script.convert_scaled_to_non_scaled(model, inplace=True)  # it knows the recipe's classes only
                    actual = torch.jit.script(model).encoder(x, lengths, *states)[0]
            finally:
                type(model).forward = forward
            assert_parity(actual, expected, PARITY[torch.float32], wrapper.__name__)


def streaming_decode(recipe):
    """streaming_decode.py's batches of streams that began apart: their states stacked, and taken apart again."""

    def run(_, causal):
        script = importlib.import_module("streaming_decode")
        chunk, left, lengths = 16, 64, torch.tensor([45])
        streams = [script.get_init_states(causal) for _ in range(2)]
        found = {}
        *_, streams[0] = script.streaming_forward(torch.randn(1, 45, 80), lengths, causal, streams[0], chunk, left)
        for step in range(2):
            states = script.stack_states(streams)
            x = torch.randn(2, 45, 80)
            found[f"step {step}"], _, states = script.streaming_forward(
                x, lengths.repeat(2), causal, states, chunk, left
            )
            streams = script.unstack_states(states)
        return found

    agree(recipe, run)


SCRIPTS = {
    "its own tests": own_tests,
    "train.py, model.py": model,
    "converted": converted,
    "export.py": export,
    "export.py --jit 1": export_jit,
    "streaming_decode.py": streaming_decode,
}
