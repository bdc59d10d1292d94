"""Numbers in the documentation are those of the committed results."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_op_stands_in_the_table_with_the_backends_it_has():
    from zipformer_kernels import ops

    text = (ROOT / "docs/kernels.md").read_text()
    for name in ops.names():
        cells = re.search(rf"^\| `{name}` \|(.*)\|$", text, re.MULTILINE)[1].split("|")
        offered = {
            backend
            for backend, cell in zip(("eager", "cpu", "triton", "cuda"), cells, strict=False)
            if "F B" in cell or "step" in cell
        }
        assert offered | {"triton"} == set(ops.get(name).backends) | {"triton"}, name
