"""Runs icefall's and ZipVoice's own files before and after `convert`, compares and times them, and prints a table.

    ICEFALL=~/icefall ZIPVOICE=~/ZipVoice python tests/real_clients.py --help

Every version of a recipe's files is built very small and in published sizes. Outputs, gradients, training steps and
streams are compared in float64; evaluation and training are timed in float32, before and after each in a process of its
own, by turns. pytest does not collect this file; it needs the checkouts.
"""

import copy
import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated

import parity
import recipes
import torch
import typer
from draws import seed_all
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from tolerances import relative_error

from benchmarks.harness import machine, rates, results
from benchmarks.harness.clients import BENCHMARK, table
from benchmarks.harness.job import Job, Measured, off_by
from benchmarks.harness.peers import Prepared
from zipformer_kernels import convert, modules

LAYERS = ("ZipformerEncoderLayer", "Zipformer2EncoderLayer", "TimedEncoderLayer")
SECONDS = {"S": (4, 16), "M": (4, 16), "L": (4, 16), "XL": (1, 16), recipes.OWN_SIZE: (2, 16)}
STEPS = 3
CHECKED_TO = 1e-4

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def layers_of(model):
    """How many layers of Zipformer a model has, and how many of them are ours."""
    layers = [module for module in model.modules() if type(module).__name__ in LAYERS]
    return len(layers), sum(isinstance(layer, modules.ZipformerEncoderLayer) for layer in layers)


def compare(recipe, size, causal):
    """What converting a recipe's model does to its results, in float64.

    Returns:
        ``recipe``, ``folders`` (how many have these files), ``size``, ``causal``, ``layers``, ``swapped``
        (layers), ``modules`` (swapped), ``kept`` (reasons, and how often), and the largest differences, each over the
        RMS of what it is of: ``outputs``, ``gradients``, ``steps`` (parameters after training steps), ``stream``; None
        for what the model has not, and in ``errors`` why it could not be compared.
    """
    row = {"recipe": recipe.name, "folders": 1 + len(recipe.others), "size": size, "causal": causal}
    row["errors"] = {}
    with recipe.loaded() as loaded:
        theirs = recipe.build(loaded, size, causal, torch.float64)
        ours = copy.deepcopy(theirs)
        report = convert(ours)
        row["layers"], row["swapped"] = layers_of(ours)
        row["modules"] = len(report.swapped)
        row["kept"] = Counter(f"{name}: {reason}" for _, name, reason in report.not_swapped)
        tests = {"outputs": evaluated}
        if size != "XL":  # whose gradients take much memory
            tests |= {"gradients": trained}
        if size == "tiny":
            tests |= {"steps": stepped}
        if causal:
            tests |= {"stream": streamed}
        with recipes.wide(loaded.scaling):
            for name, run in tests.items():
                row[name] = difference(name, run, theirs, ours, row["errors"])
    return row


def difference(name, run, theirs, ours, errors):
    """The largest difference between what `run` gives for two models; None, and a word in `errors`, if one raises."""
    found = {}
    for side, model in (("theirs", theirs), ("ours", ours)):
        try:
            found[side] = run(model)
        except Exception as error:
            errors[name] = f"{side}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return None
    (expected, drawn), (actual, redrawn) = found["theirs"], found["ours"]
    if drawn != redrawn:
        errors[name] = "random numbers were drawn differently"
    if actual.keys() != expected.keys():
        missing, more = expected.keys() - actual.keys(), actual.keys() - expected.keys()
        errors[name] = f"{len(missing)} are missing, such as {min(missing, default=None)}; {len(more)} are new"
        return None
    both = [(actual[key], expected[key]) for key in expected if expected[key] is not None]
    shapes = [(tuple(a.shape), tuple(e.shape)) for a, e in both if a.shape != e.shape]
    if shapes:
        errors[name] = f"got shape {shapes[0][0]}, wanted {shapes[0][1]}"
        return None
    return max(relative_error(a, e) for a, e in both)


def batch(model):
    """Two short sequences, one of them padded."""
    seed_all(1)
    return model.inputs(2, 91, next(model.parameters()).dtype)


def drawn():
    """A number from each generator, that tells whether two runs drew the same ones."""
    return random.random(), torch.rand(()).item()


def evaluated(model):
    """Outputs in eval mode, without gradients."""
    model.eval()
    with torch.no_grad():
        outputs = model(*batch(model))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {str(i): output for i, output in enumerate(outputs) if torch.is_tensor(output)}, drawn()


def trained(model):
    """Outputs and gradients in training, under a seed."""
    model.train()
    found, *_ = parity.run(model, 2, batch(model))
    return {name: value for name, value in found.items() if value is not None}, drawn()


def stepped(model):
    """Parameters after a few training steps."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    args = batch(model)
    for step in range(STEPS):
        seed_all(step)
        optimizer.zero_grad()
        outputs = model(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(y.square().mean() for y in outputs if torch.is_tensor(y) and y.is_floating_point()).backward()
        optimizer.step()
    return dict(model.named_parameters()), drawn()


def streamed(model, chunks=4):
    """Outputs of a batch of streams, chunk by chunk, and the states after the last."""
    encoder = model.encoder.eval()
    size, left = encoder.chunk_size[0], encoder.left_context_frames[0]
    dtype = next(encoder.parameters()).dtype
    seed_all(3)
    states = [state.to(dtype) for state in encoder.get_init_states(2)]
    found = {}
    with torch.no_grad():
        for chunk in range(chunks):
            x = torch.randn(size, 2, encoder.encoder_dim[0], dtype=dtype)
            missing = torch.arange(left).expand(2, left) < left - chunk * size
            padding = torch.cat([missing, torch.zeros(2, size, dtype=torch.bool)], dim=1)
            found[f"chunk {chunk}"], _, states = encoder.streaming_forward(x, torch.full((2,), size), states, padding)
    return found | {f"state {i}": state for i, state in enumerate(states)}, drawn()


def prepare(name, size, causal, direction, wanted):
    """Functions that run a recipe's model: "upstream" with our kernel for k2's Swoosh, and "ours", converted.

    In the direction "forward" they evaluate it, "both" is a training step.
    """
    recipe = recipes.by_name(name)
    prepared, expected = Prepared(), None
    for peer in wanted:
        with recipe.loaded(fused=True) as loaded:
            model = recipe.build(loaded, size, causal).train(direction == "both")
            if peer == "ours":
                convert(model)
        seed_all(1)
        sequences, seconds = SECONDS[size]
        args = model.inputs(sequences, 100 * seconds if getattr(model, "encoder_embed", None) else 50 * seconds)
        prepared.runs[peer] = partial(RUNS[direction], model, args)
        result = prepared.runs[peer]()
        result = result[0] if isinstance(result, tuple) else result
        expected = result if expected is None else expected
        error = off_by(result, expected)
        if not error <= CHECKED_TO:
            prepared.wrong[peer] = f"it is off by {error:.1e}"
            del prepared.runs[peer]
    return prepared


def _evaluate(model, args):
    seed_all(4)  # a causal model picks its chunk size
    with torch.no_grad():
        return model(*args)


def _step(model, args):
    seed_all(4)
    model.zero_grad()
    outputs = model(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs[0].square().mean().backward()
    return tuple(y.detach() for y in outputs)


RUNS = {"forward": _evaluate, "both": _step}


def jobs(recipe, size, causal, rounds):
    """The timings of one model before and after: evaluation, and a training step where that is quick."""
    sequences, seconds = SECONDS[size]
    case = f"{recipe.name}, {'causal ' if causal else ''}{size}, {sequences} x {seconds} s"
    for direction in ("forward", "both") if size == "S" and not causal else ("forward",):
        run = partial(prepare, recipe.name, size, causal, direction)
        least = rounds if direction == "forward" else max(rounds // 2, 1)
        yield Job(BENCHMARK, case, direction, torch.float32, ("upstream", "ours"), run, rounds=least, apart=True)


def plan(found, sizes):
    """Every recipe, size and kind that is compared."""
    for recipe in found:
        for size in recipe.sizes():
            if size in sizes and (size in ("tiny", "S", recipes.OWN_SIZE) or recipe == found[0]):
                for causal in (False, True) if recipe.streams() and size in ("tiny", "S") else (False,):
                    yield recipe, size, causal


@app.command()
def main(
    recipe: Annotated[list[str] | None, typer.Option(help="only recipes whose folder has this in its name")] = None,
    size: Annotated[list[str] | None, typer.Option(help="only these sizes: tiny, S, M, L, XL, own")] = None,
    timing: Annotated[bool, typer.Option(help="also time evaluation before and after")] = True,
    rounds: Annotated[int, typer.Option(help="how many times each model is timed")] = 15,
    icefall_commit: Annotated[str | None, typer.Option(help="of a checkout without git")] = None,
    zipvoice_commit: Annotated[str | None, typer.Option(help="of a checkout without git")] = None,
    output: Annotated[Path | None, typer.Option(help="write a results file (JSON) to this folder")] = None,
) -> None:
    """Converts icefall's and ZipVoice's own models, and compares and times them before and after.

    The environment variables ICEFALL and ZIPVOICE name the checkouts; either may be missing.
    """
    console = Console()
    found = [r for r in recipes.recipes() if not recipe or any(part in r.name for part in recipe)]
    if not found:
        console.print("no recipe found: ICEFALL and ZIPVOICE must name checkouts, and --recipe a folder in one")
        raise typer.Exit(2)
    planned = list(plan(found, size or ("tiny", *SECONDS)))
    environment = machine.environment()
    reached = rates.measure() if timing else {}
    rows, measured = [], Measured()
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(planned))
        for client, its_size, causal in planned:
            progress.update(task, description=f"{client.name} {'causal ' if causal else ''}{its_size}")
            row = compare(client, its_size, causal)
            rows.append(row)
            if timing and its_size != "tiny":
                for job in jobs(client, its_size, causal, rounds):
                    measured.add(job.measure(reached))
            progress.advance(task)
            for name, reason in row["errors"].items():
                console.print(f"{client.name}, {its_size}, {name}: {escape(reason)}")
    console.print(table(rows, measured.rows), soft_wrap=True, highlight=False, markup=False)
    for row in (*measured.wrong, *measured.failed):
        console.print(f"{row['case']}: {row['peer']}: {row['reason']}, so it is not timed", style="red")
    if output:
        content = results.content(BENCHMARK, environment, reached, measured)
        given = {"icefall": icefall_commit, "ZipVoice": zipvoice_commit}
        folders = {name: recipes.checkout(name.upper()) for name in given}
        content["commits"] = {name: given[name] or recipes.commit(folder) for name, folder in folders.items() if folder}
        results.write(output / f"{BENCHMARK}.json", content | {"clients": rows})
    errors = [reason for row in rows for reason in row["errors"].values()]
    if measured.wrong or measured.failed or any(not reason.startswith("theirs") for reason in errors):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
