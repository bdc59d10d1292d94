"""Who may know whom: the import rules of CONTRIBUTING, read from the source."""

import ast
import re
from pathlib import Path

import pytest

import zipformer_kernels

PACKAGE = Path(zipformer_kernels.__file__).parent
NAME = PACKAGE.name
FILES = {path: path.relative_to(PACKAGE.parent).with_suffix("") for path in sorted(PACKAGE.rglob("*.py"))}

ROOMS = {
    "core": set(),
    "ops": {"core", "presets"},
    "training": {"ops", "core"},
    "branch": {"training", "ops", "core"},
    "modules": {"branch", "training", "ops", "core", "presets"},
}
"""What the files of a room may import of the package, besides their own room. What is not named here (convert,
checkpoint, optim, commands, ...) sits on top, and may import all of these; none of these may import it."""

BACKEND_FILES = ("eager", "cpu", "cuda", "triton")
REFERENCE_MAY_IMPORT = ("ops.sizes", "ops.shapes", "ops.attention.scores")  # plain PyTorch themselves, or named tuples


def dotted(path: Path) -> str:
    """The module's name within the package: ``ops.swoosh``, ``core.op``."""
    parts = FILES[path].parts[1:]
    return ".".join(parts[:-1] if parts and parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in FILES}


def imports(tree: ast.AST, top_only: bool = False) -> set[str]:
    """The modules of the package that a file imports, by their names within the package."""
    found = set()
    for node in walked(tree, top_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = whole.removeprefix(NAME).lstrip(".") in MODULES
                found.add(whole if is_module else node.module)
    inside = {name for name in found if name == NAME or name.startswith(NAME + ".")}
    return {name.removeprefix(NAME).lstrip(".") for name in inside}


def walked(tree: ast.AST, top_only: bool):
    """All nodes, or those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if top_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from walked(node, top_only)


TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def test_rooms_know_only_those_below():
    wrong = set()
    for name, tree in TREES.items():
        room = name.split(".")[0]
        if room not in ROOMS:
            continue
        for other in imports(tree):
            allowed = ROOMS[room] | {room}
            if not any(other == known or other.startswith(known + ".") for known in allowed):
                wrong.add(f"{name} imports {other or NAME}")
    assert sorted(wrong) == []


def test_references_import_torch_and_each_other():
    wrong = {
        f"{name} imports {other}"
        for name, tree in TREES.items()
        if name.startswith("ops.") and name.endswith(".reference")
        for other in imports(tree)
        if other not in REFERENCE_MAY_IMPORT and not other.endswith(".reference")
    }
    assert sorted(wrong) == []


def test_backends_do_not_import_each_other():
    wrong = {
        f"{name} imports {other}"
        for name, tree in TREES.items()
        if name.startswith("ops.") and name.split(".")[-1] in BACKEND_FILES
        for other in imports(tree)
        if other.startswith("ops.") and other.split(".")[-1] in BACKEND_FILES
        if other.split(".")[-1] != name.split(".")[-1]
    }
    assert sorted(wrong) == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan, 1972)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_import_goes_in_a_circle():
    """A package's ``__init__`` counts only where it is named: importing a file of a package runs it, too."""
    graph = {name: {other for other in imports(tree, top_only=True) if other in TREES} for name, tree in TREES.items()}
    assert circles(graph) == []


@pytest.mark.skipif(not (PACKAGE.parent / "csrc").is_dir(), reason="no sources of the compiled module here")
def test_csrc_includes_nothing_of_torch():
    sources = [p for p in (PACKAGE.parent / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    of_torch = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2)/', re.MULTILINE)
    assert [str(p) for p in sources if of_torch.search(p.read_text())] == []


@pytest.mark.parametrize("room", ["core", "branch"])
def test_the_tree_of_contributing_lists_what_there_is(room):
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    lines = iter(re.search(r"```\n(csrc/.*?)```", text, re.S)[1].splitlines())
    next(line for line in lines if line.startswith(f"  {room}/ ") and not line.startswith("  branch/  linear/"))
    listed = set()
    for line in lines:
        if not (found := re.match(r"    (\w+\.py) ", line)):
            break
        listed.add(found[1])
    assert listed == {path.name for path in (PACKAGE / room).glob("*.py")} - {"__init__.py"}
