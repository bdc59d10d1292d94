"""What the README and the pages for users show works as it stands there."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import upstream_models
from tiny import tiny, weights_of

ROOT = Path(__file__).parent.parent
PAGES = ("README", *(f"docs/{name}" for name in ("install", "convert", "infer", "stream", "train", "export")))
TEXTS = {page: (ROOT / f"{page}.md").read_text() for page in PAGES}
BLOCKS = [
    pytest.param(block, id=f"{page}-{i}")
    for page, text in TEXTS.items()
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
ALL_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("block", BLOCKS)
def test_examples_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "optim",
        "scaling",
        "subsampling",
        "zipformer",
    ):  # one block puts ours in the place of a recipe's files
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name))
    (tmp_path / "exp").mkdir()
    torch.save({"model": weights_of(*tiny())}, tmp_path / "exp" / "pretrained.pt")
    exec(block, what_a_reader_has())


def what_a_reader_has():
    """A model built from upstream's classes, and a batch for it."""
    model = upstream_models.build(dtype=torch.float32)
    return {"model": model, "batch": tuple(upstream_models.batch(torch.float32))}


def test_the_first_example_converts_everything(capsys):
    block = re.search(r"```python\n(.*?)```", TEXTS["README"], re.DOTALL)[1]
    exec(block, what_a_reader_has())
    printed = capsys.readouterr().out
    assert "not swapped: 0" in printed
    assert "check: outputs agree to" in printed


def test_links_lead_somewhere():
    for page in ALL_PAGES:
        text = page.read_text()
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
        for link in links:
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_page_and_every_example_is_named_on_the_first_screen():
    for path in (*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")):
        assert f"]({path.relative_to(ROOT).as_posix()})" in TEXTS["README"], path.name


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ALL_PAGES:
        named = re.findall(r"^    make ([a-z]+)|`make ([a-z]+)`", page.read_text(), re.MULTILINE)
        assert {a or b for a, b in named} <= targets


def test_the_first_screen_is_small():
    """A sentence, a picture, three numbers; and a table of six rows, none of more than 120 characters."""
    written = re.findall(r"<!-- written by .*?-->\n(.*?)<!-- end -->", TEXTS["README"], re.DOTALL)
    numbers, table = (part.splitlines() for part in written)
    assert sum(line.startswith("- **") for line in numbers) == 3
    rows = [line for line in table if line.startswith("| [")]
    assert len(rows) == 6
    assert max(map(len, TEXTS["README"].splitlines())) <= 120
    assert len(TEXTS["README"].splitlines()) <= 110


def test_the_picture_shows_the_committed_results(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import image

    spec = importlib.util.spec_from_file_location("headlines", ROOT / "benchmarks" / "headlines.py")
    headlines = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(headlines)
    headlines.draw(tmp_path / "length.png")
    committed, drawn = (image.imread(path) for path in (headlines.PICTURE, tmp_path / "length.png"))
    assert committed.shape == drawn.shape
    assert abs(committed - drawn).mean() < 0.02, "docs/length.png: run make docs"  # fonts may differ
