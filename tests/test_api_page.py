"""The API page says what the docstrings say, and everything public has one."""

import importlib.util
from pathlib import Path

import pytest

import zipformer_kernels

SCRIPT = Path(__file__).parent.parent / "docs" / "make_api.py"


@pytest.fixture(scope="module")
def make_api():
    spec = importlib.util.spec_from_file_location("make_api", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(make_api):
    assert make_api.PAGE.read_text() == make_api.page(), "docs/api.md: run make docs"


def test_everything_public_has_a_docstring(make_api):
    public = [getattr(zipformer_kernels, name) for name in zipformer_kernels.__all__]
    assert not [one for one in public if make_api.ours(one) and not (one.__doc__ or "").strip()]


def test_sections_become_lists_and_stars_stay_stars(make_api):
    docstring = """y = a * b, as in ``a * b``.

    Args:
        a: one,
            and more.

    Returns:
        Their product.
    """
    assert make_api.text(docstring) == (
        "y = a \\* b, as in ``a * b``.\n\n**Args**\n\n- a: one,\n  and more.\n\n**Returns**\n\nTheir product."
    )


def test_a_signature_has_one_argument_a_line_where_it_is_long(make_api):
    def call(first: "int", *, second: "str" = "something", **others: "int") -> "None": ...

    assert make_api.signature("call", call) == (
        "```python\ncall(first: int, *, second: str = 'something', **others: int) -> None\n```"
    )
    name = "long" * 20
    lines = make_api.signature(name, call).splitlines()
    assert lines[1:-1] == [
        f"{name}(",
        "    first: int,",
        "    *,",
        "    second: str = 'something',",
        "    **others: int,",
        ") -> None",
    ]
