"""No test compares floats within a library's default tolerance: it says how far two results may lie apart, and why."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# What compares within a tolerance, and the keywords of which all, or for some any, must be given.
WANTED = {
    "assert_close": {"rtol", "atol"},
    "assert_allclose": {"rtol", "atol"},
    "allclose": {"rtol", "atol"},
    "isclose": {"rtol", "atol"},
    "approx": {"rel", "abs"},
}
ANY = ("approx",)


def comparisons_by_default(source):
    """Lines of calls that leave a library's tolerance to its default; a test's own function of such a name has none."""
    tree = ast.parse(source)
    imported = {
        name.asname or name.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        library = isinstance(node.func, ast.Attribute) or imported.get(name) in ("torch.testing", "math", "pytest")
        if name in WANTED and library:
            given = WANTED[name] & {keyword.arg for keyword in node.keywords}
            if given != WANTED[name] and not (given and name in ANY):
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", sorted(TESTS.glob("*.py")), ids=lambda path: path.stem)
def test_no_comparison_uses_a_default_tolerance(path):
    """Give rtol and atol from tests/tolerances.py (rtol=0, atol=0 for the same bits), or take its assertions."""
    assert comparisons_by_default(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.testing.assert_close(a, b)", [1]),
        ("torch.testing.assert_close(a, b, rtol=0)", [1]),
        ("torch.testing.assert_close(a, b, rtol=0, atol=0)", []),
        ("from torch.testing import assert_close\nassert_close(a, b)", [2]),
        ("from small_layer import assert_close\nassert_close(a, b)", []),
        ("assert not a.allclose(b)", [1]),
        ("np.testing.assert_allclose(a, b, rtol=1e-7)", [1]),
        ("assert a == pytest.approx(1)", [1]),
        ("assert a == pytest.approx(1, rel=1e-6)", []),
    ],
)
def test_the_rule_sees(source, found):
    assert comparisons_by_default(source) == found
