"""icefall's and ZipVoice's own files, where the environment variables ICEFALL and ZIPVOICE name checkouts."""

import pytest
import real_clients
import recipe_scripts
import recipes
import torch
from tolerances import PARITY

from benchmarks.harness.clients import DIFFERENCES

FOUND = recipes.recipes()


@pytest.mark.parametrize("causal", [False, True], ids=["offline", "causal"])
@pytest.mark.parametrize("recipe", FOUND, ids=lambda recipe: recipe.name)
def test_converting_changes_no_result(recipe, causal):
    if causal and not recipe.streams():
        pytest.skip("there are no causal models")
    row = real_clients.compare(recipe, "tiny", causal)
    assert not [reason for reason in row["errors"].values() if not reason.startswith("theirs")]
    for name in DIFFERENCES:
        assert row.get(name) is None or row[name] < PARITY[torch.float64], name


@pytest.mark.parametrize("script", recipe_scripts.SCRIPTS)
@pytest.mark.parametrize(
    "recipe", [r for r in FOUND if r.name == recipe_scripts.FOLDER], ids=lambda recipe: recipe.name
)
def test_scripts_run_on_ours(recipe, script):
    recipe_scripts.SCRIPTS[script](recipe)
