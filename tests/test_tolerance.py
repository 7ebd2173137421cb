"""Iterations that a token goes without once its state has settled."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skipstone import FuseParallel, LayerParallel, Plan, Segment, optimize
from skipstone.errors import InvalidPlan, Unsupported
from skipstone.ir.program import Program
from skipstone.passes.base import run_pass
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from tests import hyper_models, models
from tests.newton_oracles import LAYERS, LENGTH, assert_close, captured, example, hugging_face, net, net_program

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("one_thread")

NEVER, ALWAYS = 1e-300, 1e9
"""Tolerances that no token meets, and that every token meets at once."""


def at_once(program: Program, *segments: Segment, fuse: bool = False) -> Program:
    program = run_pass(LayerParallel(segments), program, strict=False)
    return run_pass(FuseParallel(), program, strict=False) if fuse else program


@cache
@torch.no_grad()
def trace(iterations: int, tolerance: float) -> tuple[Tensor, ...]:
    """The states behind all layers of the plain network, by the update rule, token by token."""
    model = net("plain")
    start = model.entry(example())
    states, before = [start] * (LAYERS + 1), [start] * (LAYERS + 1)
    settled = torch.zeros(start.shape[:2], dtype=torch.bool)
    for iteration in range(iterations):
        new = [start]
        for number, layer in enumerate(model.layers):
            new.append(layer(states[number], None) + new[number] - states[number])
        if iteration > 1:
            step = (states[-1] - before[-1]).norm(dim=-1)
            settled = settled | (step <= tolerance * states[-1].norm(dim=-1))
            new = [torch.where(settled[..., None], old, each) for old, each in zip(states, new, strict=True)]
        before, states = states, new
    return tuple(states[1:])


@cache
def halfway() -> float:
    """A tolerance that some tokens meet before the third iteration."""
    first, second = (trace(k, 0.0)[-1] for k in (1, 2))
    return float(((second - first).norm(dim=-1) / second.norm(dim=-1)).median())


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("iterations", [3, 4, 5])
@pytest.mark.parametrize("share", [NEVER, 0.3, 1.0, ALWAYS])
def test_tokens_settle_one_by_one(share: float, iterations: int, fuse: bool) -> None:
    tolerance = share if share in (NEVER, ALWAYS) else share * halfway()
    program = at_once(net_program("plain"), Segment(0, LAYERS, iterations, tolerance=tolerance), fuse=fuse)
    with torch.no_grad():
        found = program.run(x=example())
    for number, state in enumerate(trace(iterations, tolerance), 1):
        assert_close(found[f"state_{number}"], state)


def test_a_tolerance_can_be_met_by_some_and_not_by_others() -> None:
    """Else the test above would compare nothing."""
    settled = trace(4, halfway())[-1]
    kept = [
        bool(torch.equal(*rows)) for rows in zip(settled.flatten(0, 1), trace(2, 0.0)[-1].flatten(0, 1), strict=True)
    ]
    assert any(kept) and not all(kept)


def test_without_anyone_who_settles_every_bit_is_that_of_all_iterations() -> None:
    with torch.no_grad():
        found, wanted = (
            at_once(net_program("plain"), Segment(0, LAYERS, 4, tolerance=tolerance)).run(x=example())
            for tolerance in (NEVER, 0.0)
        )
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class Products(TorchDispatchMode):
    """Counts the products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            self.count["products"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("fuse", "wanted"), [(False, 2 * (3 + 2)), (True, 2 * 2 + 2)])
def test_what_no_token_needs_is_not_computed(fuse: bool, wanted: int) -> None:
    """Of four iterations the third has three layers and the fourth two, of two products each; as one, each corrects
    its states with another."""
    counts = []
    for tolerance in (NEVER, ALWAYS):
        session = EagerSession(at_once(net_program("plain"), Segment(0, LAYERS, 4, tolerance=tolerance), fuse=fuse))
        with torch.no_grad(), Products() as products:
            session.run({"x": example()})
        counts.append(products.count["products"])
    assert counts[0] - counts[1] == wanted


@pytest.mark.parametrize("fuse", [False, True])
def test_stepwise_equals_one_shot(fuse: bool) -> None:
    ids = models.tokens(2, LENGTH, seed=5)
    segment = Segment(1, 6, 4, tolerance=0.4)
    entries: list[Any] = [LayerParallel((segment,)), *([FuseParallel()] if fuse else [])]
    program, refusal = rewrite(captured("deep"), Plan(entries), target="eager", strict=False)
    assert refusal is None
    model = Executable(EagerSession(program))
    positions = torch.arange(LENGTH).expand(ids.shape)
    with torch.no_grad():
        exact, two, wanted = (
            at_once(captured("deep"), each).run(input_ids=ids, position_ids=positions)["logits"]
            for each in (Segment(1, 6, 4), Segment(1, 6, 2), segment)
        )
    assert not torch.allclose(wanted, exact) and not torch.allclose(wanted, two)  # some settle, some do not
    last, cache = model.prefill(ids[:, :4])
    steps = [last, *(model.decode(column, cache).reshape(2, -1) for column in ids[:, 4:].split(1, dim=1))]
    assert_close(torch.stack(steps, dim=1), wanted[:, 3:])


@pytest.mark.slow
def test_onnx_runtime_leaves_iterations_out() -> None:
    ids = models.tokens(2, 9, seed=6)
    model = copy.deepcopy(hugging_face("deep")).float()
    plan = Plan([LayerParallel((Segment(1, 5, 3, tolerance=0.6),))])
    eager, onnx = (optimize(model, plan, target=target, progress=False) for target in ("eager", "onnxruntime"))
    assert_close(onnx(input_ids=ids).logits, eager(input_ids=ids).logits, 1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 3, "tolerance": -0.1}, "nearest is 0"),
        ({"iterations": 3, "tolerance": float("nan")}, "nearest is 0"),
        ({"iterations": 2, "tolerance": 0.1}, "3 or more"),
    ],
)
def test_tolerances_that_mean_nothing_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(InvalidPlan, match=message):
        LayerParallel((Segment(0, 4, **settings),)).validate()


def test_streams_are_refused() -> None:
    program = hyper_models.program_of(hyper_models.stack("static"))
    with pytest.raises(Unsupported, match="no rows of tokens"):
        run_pass(LayerParallel((Segment(0, 3, 3, tolerance=0.1),)), program)
