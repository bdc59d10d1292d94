"""The table of real clients: recipes' own models before and after `convert`, measured by tests/real_clients.py."""

from __future__ import annotations

from typing import Any

BENCHMARK = "clients"
DIFFERENCES = {"outputs": "outputs", "gradients": "gradients", "steps": "3 steps", "stream": "stream"}
SPEEDS = {"forward": "evaluation", "both": "training step"}


def table(clients: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Markdown: one line for each model.

    Args:
        clients: what was compared: ``recipe``, ``folders``, ``size``, ``causal``, ``layers``, ``swapped``, and each of
            `DIFFERENCES` that the model has.
        rows: what was timed, as in a results file.
    """
    ours = {(row["case"].rsplit(",", 1)[0], row["direction"]): row for row in rows if row["peer"] == "ours"}
    columns = ("recipe", "folders", "model", "layers swapped", *DIFFERENCES.values(), *SPEEDS.values())
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for client in clients:
        model = f"{'causal ' if client['causal'] else ''}{client['size']}"
        cells = [f"`{client['recipe']}`", str(client["folders"]), model, f"{client['swapped']} of {client['layers']}"]
        cells += ["" if client.get(name) is None else f"{client[name]:.0e}" for name in DIFFERENCES]
        for direction in SPEEDS:
            timed = ours.get((f"{client['recipe']}, {model}", direction))
            cells.append(f"{timed['times_as_long']['upstream']:.2f}x" if timed else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
