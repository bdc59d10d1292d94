"""The workflow for a host of the repository: what it names exists here."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.name)
def workflow(request):
    return yaml.safe_load(request.param.read_text())


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_every_step_does_one_thing(workflow):
    assert workflow[True]  # YAML reads the key `on` as true
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step), step
        assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@v[\d.]+", step["uses"])


def test_scripts_that_are_run_exist(workflow):
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    commands += [value for step in steps(workflow) for key, value in step.get("env", {}).items() if "COMMAND" in key]
    assert ".ci/run" in commands
    for script in re.findall(r"\.ci/\w+|(?<=\{project\}/)\S+", " ".join(commands)):
        assert (ROOT / script).is_file(), script


def test_wheels_are_built_for_pythons_and_kernels_that_are_supported(workflow):
    pyproject, setup = ((ROOT / name).read_text() for name in ("pyproject.toml", "setup.py"))
    least = int(re.search(r'requires-python = ">=3\.(\d+)"', pyproject)[1])
    modes = re.search(r"^MODES = \((.*)\)$", setup, re.MULTILINE)[1]
    (environment,) = [step["env"] for step in steps(workflow) if "cibuildwheel" in step.get("uses", "")]
    assert all(int(minor) >= least for minor in re.findall(r"cp3(\d+)-", environment["CIBW_BUILD"]))
    for mode in workflow[True]["workflow_dispatch"]["inputs"]["wheels"]["options"]:
        assert f'"{mode}"' in modes
    assert "ZIPFORMER_KERNELS_BUILD=" in environment["CIBW_ENVIRONMENT"]
    assert re.search(rf"^{environment['CIBW_TEST_EXTRAS']} = \[", pyproject, re.MULTILINE)
