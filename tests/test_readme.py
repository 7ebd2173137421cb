"""The Python of the README runs as it stands there, each section behind the quick start."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import skipstone

ROOT = Path(__file__).parent.parent
FIRST = "Quick start"
LEFT_OUT = {"Diffusion language models": "the repository has no model that fills in masks"}


def sections() -> dict[str, str]:
    """The Python of each section that has some, its blocks joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    blocks = {
        title: "\n".join(re.findall(r"^```python\n(.*?)^```$", body, flags=re.MULTILINE | re.DOTALL))
        for title, body in zip(parts[::2], parts[1::2], strict=True)
    }
    return {title: code for title, code in blocks.items() if code}


SECTIONS = sections()
BEHIND = [title for title in SECTIONS if title not in (FIRST, *LEFT_OUT)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the README's paths lead to what they name, and its files are written to."""
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the quick start leaves behind; filled by its test, or by whoever comes first."""
    return {}


def run(title: str, names: dict[str, Any]) -> None:
    exec(compile(SECTIONS[title], f"README.md, {title}", "exec"), names)


def begin(names: dict[str, Any]) -> None:
    if not names:
        names["__name__"] = "readme"
        run(FIRST, names)


def test_every_block_names_what_there_is() -> None:
    assert {FIRST, *LEFT_OUT} < set(SECTIONS)
    for title, code in SECTIONS.items():
        for node in ast.walk(ast.parse(code, title)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "skipstone":
                assert hasattr(skipstone, node.attr), f"{title}: skipstone.{node.attr}"


def test_the_quick_start_runs(folder: Path, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    begin(names)
    printed = capsys.readouterr().out
    assert "def read_lines(path):" in printed and "skip_sublayers" in printed
    assert skipstone.Plan.load(folder / "plan.json").entries == names["plan"].entries


@pytest.mark.slow
@pytest.mark.parametrize("title", BEHIND)
@pytest.mark.usefixtures("folder")
def test_other_sections_run_behind_it(title: str, names: dict[str, Any]) -> None:
    begin(names)
    run(title, dict(names))
