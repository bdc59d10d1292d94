"""Each example runs, on little work, and prints what it promises."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from tiny import tiny, weights_of

EXAMPLES = Path(__file__).parent.parent / "examples"
RECORDING = str(EXAMPLES.parent / "demo" / "recordings" / "demo-thanks.wav")

RUNS = {
    "convert": (["--seconds", "2", "--runs", "1"], r"12 of 12 encoder layers are ours\na pass took \d+ ms"),
    "infer": ([RECORDING], r"demo-thanks\.wav: 5\.52 s, 136 embeddings of 256 channels"),
    "stream": ([RECORDING], r"16 chunks of 320 ms: 128 embeddings\n.*\n.* differs by [1-9]e-0[67] of its RMS"),
    "train": (["--steps", "12"], r"step  11: loss 0\.\d+\nvm-newuser\.wav, which it has not heard: [6-9]\d% of"),
    "rel_pos_attention": (
        ["--frames", "1700"],
        r"plain: keeps 1\d\d\.\d MB .*\nrel_pos_attention: keeps [34]\d\.\d MB, .* has [34]\.\d MB\n"
        r"forward differs by \de-0[67] of its RMS\n11 gradients differ by \de-0[56] of theirs",
    ),
    "export": (["--checkpoint", "tiny.pt"], r"3 x 300 frames: onnxruntime differs by [1-9]e-0[67] of"),
}


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.fixture(autouse=True)
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": weights_of(*tiny())}, "tiny.pt")


@pytest.mark.parametrize("name", RUNS)
def test_example(name, capsys):
    arguments, wanted = RUNS[name]
    with torch.random.fork_rng():
        loaded(name).main(arguments)
    assert re.search(wanted, capsys.readouterr().out)


@pytest.mark.parametrize("name", RUNS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        loaded(name).main(["--help"])
    assert end.value.code == 0
    assert "--" in capsys.readouterr().out


def test_infer_reads_a_checkpoint(capsys):
    loaded("infer").main([RECORDING, "--checkpoint", "tiny.pt"])
    assert "136 embeddings of 24 channels" in capsys.readouterr().out
