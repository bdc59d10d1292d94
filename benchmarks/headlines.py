"""What the README's first screen shows of the committed results: three numbers, six rows and one picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "intel-xeon-avx-512-amx-2-threads"
FOLDER = ROOT / "benchmarks" / "results" / DEVICE
PICTURE = ROOT / "docs" / "length.png"
# What stands in the table: the benchmark, the case, who of ours, and how the work is called.
WORK = (
    ("encoder-forward", "S, 4 x 16 s", "ours", "Encoder S, 4 x 16 s"),
    ("encoder-forward", "M, 4 x 16 s", "ours", "Encoder M, 4 x 16 s"),
    ("training-step", "S, 4 x 16 s", "ours", "Training step S, 4 x 16 s"),
    ("streaming-chunk", "causal S, 320 ms", "ours", "One chunk of a stream, S, 320 ms"),
    ("scaled_adam", "all parameters of S", "cpu", "Optimizer step, all of S"),
    ("length", "S, 1 x 3 min", "ours", "One recording of 3 minutes, S"),
)
PEERS = ("upstream", "upstream as shipped", "upstream compiled")
COLORS = {"upstream": "#c44e52", "upstream compiled": "#dd8452", "ours": "#2a7f62"}


def rows(benchmark: str) -> list[dict[str, Any]]:
    """The rows of one results file."""
    return json.loads((FOLDER / f"{benchmark}.json").read_text())["rows"]


def row(benchmark: str, case: str, peer: str) -> dict[str, Any]:
    """The row of one peer at one case."""
    (found,) = (r for r in rows(benchmark) if r["case"] == case and r["peer"] == peer)
    return found


def numbers() -> str:
    """Three numbers, each with its file, and where they were measured."""
    gigabytes = {
        (minutes, peer): f"{row('length', f'S, 1 x {minutes} min', peer)['peak_bytes'] / 1e9:.1f}"
        for minutes, peer in ((3, "upstream"), (3, "ours"), (60, "ours"))
    }
    encoder = row("encoder-forward", "S, 4 x 16 s", "ours")["times_as_long"]
    training = row("training-step", "S, 4 x 16 s", "ours")["times_as_long"]
    lines = [
        f"- **{gigabytes[60, 'ours']} GB** encodes an hour of audio in one piece. Three minutes take "
        f"{gigabytes[3, 'ours']} GB, and upstream's model {gigabytes[3, 'upstream']} GB\n  ([length.json][length]).",
        f"- **{encoder['upstream']:.1f} times** as fast a forward pass of the encoder, "
        f"{encoder['upstream compiled']:.1f} times where `torch.compile` compiles upstream whole\n"
        "  ([encoder-forward.json][encoder-forward]).",
        f"- **{training['upstream']:.1f} times** as fast a training step, {training['upstream as shipped']:.1f} times "
        "where upstream's activations are compiled\n  ([training-step.json][training-step]).",
    ]
    environment = json.loads((FOLDER / "length.json").read_text())["environment"]
    lines += ["", f"Model S in float32 on {environment['device']}, beside PyPI's `zipformer` "]
    lines[-1] += f"{environment['versions']['zipformer']}."
    return "\n".join(lines)


def table() -> str:
    """Six rows, and the links to their files."""
    lines = [
        "| work | ours, ms | upstream | as shipped | compiled | peak MB, ours / upstream |",
        "|---|---|---|---|---|---|",
    ]
    for benchmark, case, peer, name in WORK:
        ours = row(benchmark, case, peer)
        ratios = [f"{ours['times_as_long'][p]:.2f}x" if p in ours["times_as_long"] else "" for p in PEERS]
        peaks = [f"{r['peak_bytes'] / 1e6:.0f}" for r in (ours, row(benchmark, case, "upstream"))]
        time = 1000 * ours["median_s"]
        cells = [f"[{name}][{benchmark}]", f"{time:.1f}" if time < 100 else f"{time:.0f}", *ratios, " / ".join(peaks)]
        lines.append(f"| {' | '.join(cells)} |")
    files = dict.fromkeys(benchmark for benchmark, *_ in WORK)
    links = [f"[{name}]: {(FOLDER / f'{name}.json').relative_to(ROOT).as_posix()}" for name in files]
    return "\n".join([*lines, "", *links])


def draw(path: Path = PICTURE) -> None:
    """Draws time and peak memory of one recording against its length."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    found = rows("length")
    minutes = sorted({r["minutes"] for r in found})
    for axes, name, value in (
        (panels[0], "seconds to encode it", lambda r: r["median_s"]),
        (panels[1], "peak memory, GB", lambda r: r["peak_bytes"] / 1e9),
    ):
        for peer, color in COLORS.items():
            own = sorted((r for r in found if r["peer"] == peer), key=lambda r: r["minutes"])
            axes.plot([r["minutes"] for r in own], list(map(value, own)), "o-", ms=4, lw=2, color=color, label=peer)
        axes.set(xlabel="minutes of audio in one recording", title=name)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(xscale="log", yscale="log")
    panels[0].set_xticks(minutes, [f"{m:g}" for m in minutes])
    panels[0].xaxis.set_minor_locator(NullLocator())
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[1].set_ylim(bottom=0.0)
    panels[1].legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
