"""The demonstration that `make demo` runs, on one recording and with one run of each backend."""

import importlib.util
from pathlib import Path

DEMO = Path(__file__).parent.parent / "demo" / "demo.py"


def test_the_demo_runs_and_its_backends_agree(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    assert len(demo.RECORDINGS) > 1
    monkeypatch.setattr(demo, "RECORDINGS", demo.RECORDINGS[:1])
    monkeypatch.setattr(demo, "RUNS", 1)
    demo.main()  # exits with an error where backends disagree
    printed = capsys.readouterr().out
    assert demo.RECORDINGS[0].stem in printed
    assert "speed-up" in printed
