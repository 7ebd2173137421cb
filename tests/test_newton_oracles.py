"""The table of oracles names tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests import newton_oracles


def test_every_oracle_names_tests_that_there_are() -> None:
    rows = re.split(r"^\d+\. ", newton_oracles.__doc__ or "", flags=re.MULTILINE)[1:]
    assert len(rows) == 14
    for row in rows:
        named = re.findall(r"(test_\w+)::(test_\w+)", row)
        assert named, row
        for file, test in named:
            tree = ast.parse((Path(__file__).parent / f"{file}.py").read_text())
            assert test in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], f"{file}::{test}"
