"""Readable graphs run, and every node can be explained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipstone.ir.capture.module import capture_module
from skipstone.ir.errors import ArtifactError, UserError
from skipstone.ir.printer import excerpt, explain, readable
from skipstone.ir.program import Program, Record
from skipstone.passes.base import Remark, Status, run_pass
from skipstone.passes.cleanup import Cleanup

aten = torch.ops.aten


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, _ = x.shape
        q, k, v = (part.view(batch, rows, 2, 8).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, rows, 16))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.norm = nn.LayerNorm(16)
        self.attention = Attention()
        self.head = nn.Linear(16, 32, bias=False)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        return {"logits": self.head(x + self.attention(self.norm(x)) * 1.5)}


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    example = {"input_ids": torch.randint(32, (2, 5))}
    return run_pass(Cleanup(), capture_module(Small().eval(), example))


def test_the_text_runs(program: Program) -> None:
    space: dict = {}
    exec(readable(program), space)
    ids = torch.randint(32, (3, 7))
    (actual,) = space["program"](program.tensors(), ids)
    assert torch.equal(actual, program.run(input_ids=ids)["logits"])


def test_types_ports_and_modules_are_shown(program: Program) -> None:
    text = readable(program)
    assert "# Small: " in text
    assert "# input input_ids (tokens): int64[B, S]" in text
    assert "# output logits (logits): float32[B, S, 32]" in text
    assert 'tensors["attention.qkv.weight"]  # float32[48, 16]' in text
    assert "    # attention.qkv\n    linear = aten.linear(" in text
    assert "skipstone.attention(" in text
    assert "  # float32[B, 2, S, 8]" in text


def test_the_passes_that_made_a_node_are_shown(program: Program) -> None:
    changed = program.copy()
    node = next(changed.nodes(aten.linear.default))
    node.meta["made_by"] = ("fuse_parallel", "layer_parallel")
    assert "made by fuse_parallel, layer_parallel" in readable(changed)
    explained = explain(changed, node.name)
    assert "module: attention.qkv" in explained
    assert "made by: fuse_parallel, layer_parallel" in explained
    assert "source: " in explained and "in forward" in explained


def test_infinities_and_slices_are_python(program: Program) -> None:
    changed = program.copy()
    (last,) = changed.output_node().args[0]
    with changed.graph.inserting_before(changed.output_node()):
        clamp = changed.graph.call_function(aten.clamp.default, (last, -float("inf"), float("inf")))
        clamp.meta["val"] = last.meta["val"]
    changed.output_node().replace_input_with(last, clamp)
    space: dict = {}
    exec(readable(changed), space)
    ids = torch.randint(32, (1, 3))
    assert torch.equal(space["program"](changed.tensors(), ids)[0], program.run(input_ids=ids)["logits"])


def test_excerpt_marks_the_node(program: Program) -> None:
    nodes = list(program.graph.nodes)
    lines = excerpt(program, nodes[8], lines=2).splitlines()
    assert len(lines) == 5
    assert [line.startswith(f"> {nodes[8].name} = ") for line in lines] == [False, False, True, False, False]
    assert len(excerpt(program, nodes[0], lines=2).splitlines()) == 3


def test_an_unknown_node_is_refused_with_the_nearest(program: Program) -> None:
    with pytest.raises(UserError, match=r"no node 'linaer'.*linear"):
        explain(program, "linaer")


def _with_history(program: Program) -> Program:
    remarks = [Remark("skip/me", Status.APPLIED), Remark("skip/me", Status.MISSED), Remark("skip/me", Status.APPLIED)]
    records = (
        Record("capture", (), 0, 9, 0.25, "first = 1\n"),
        Record("skip/me", tuple(remarks), 9, 7, 1.5, "second = 2\n"),
    )
    return replace(program, history=list(records))


def test_dump_writes_one_file_a_pass(program: Program, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"
    _with_history(program).dump(target)
    assert sorted(file.name for file in target.iterdir()) == ["000_capture.py", "001_skip_me.py", "002_present.py"]
    assert (target / "000_capture.py").read_text() == "# capture: 0 -> 9 operators, 0.250 s, no remarks\nfirst = 1\n"
    assert "9 -> 7 operators, 1.500 s, 2 applied, 1 missed" in (target / "001_skip_me.py").read_text()
    assert (target / "002_present.py").read_text().endswith(readable(program))
    assert [path.name for path in target.parent.iterdir()] == ["run"], "nothing is left beside the dump"


def test_dump_replaces_a_dump_and_nothing_else(program: Program, tmp_path: Path) -> None:
    target = tmp_path / "run"
    _with_history(program).dump(target)
    program.dump(target)
    assert not (target / "000_capture.py").exists()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not a dump"):
        program.dump(target)
    assert (target / "notes.txt").read_text() == "mine"
