"""The pages of results are those that the committed results give."""

import importlib.util
import sys

import pytest

from benchmarks.harness import results
from benchmarks.harness.machine import ROOT


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["report"] = module
    spec.loader.exec_module(module)
    return module


def test_pages_are_up_to_date(report):
    for path, text in report.pages().items():
        assert path.read_text() == text, f"{path.name}: run benchmarks/report.py"


def test_the_readme_has_room_for_the_numbers_and_the_table(report):
    readme = (ROOT / "README.md").read_text()
    assert readme.count(report.BEGIN) == 2
    written = report.rewritten(readme, "three numbers", "a table")
    assert written.index("three numbers") < written.index("a table")


def test_every_results_file_is_whole(report):
    assert report.devices()
    for files in report.devices().values():
        for file in files:
            for row in file["rows"]:
                assert row["samples_s"]
                assert row["peer"]
                assert set(results.KEY) <= set(row)


def test_plots_lie_beside_the_results(report, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import image

    from benchmarks.harness.plots import plot_all

    for folder, files in report.devices().items():
        for path in plot_all(files, tmp_path / folder.name):
            committed, drawn = image.imread(folder / path.name), image.imread(path)
            assert committed.shape == drawn.shape, path.name
            assert abs(committed - drawn).mean() < 0.02, f"{path.name} shows other numbers"  # fonts may differ
