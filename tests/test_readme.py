"""What the README shows works as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from tiny import tiny, weights_of

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_examples_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exp").mkdir()
    torch.save({"model": weights_of(*tiny())}, tmp_path / "exp" / "pretrained.pt")
    exec(BLOCKS[block], {})


def test_links_lead_somewhere():
    for page in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            assert link.startswith("https://") or (ROOT / link).exists(), link


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        named = re.findall(r"^    make ([a-z]+)|`make ([a-z]+)`", (ROOT / page).read_text(), re.MULTILINE)
        assert {a or b for a, b in named} <= targets
