"""What a trace holds for: sizes at which a model goes another way are found, and refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from skipstone.ir.capture.module import capture_module
from skipstone.ir.capture.validate import relative_difference
from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.optimize import Target, optimize

WIDTH = 6
EXAMPLE = {"x": torch.randn(2, 7, WIDTH)}


class Sized(nn.Module):
    """A linear layer whose result is taken further in a way that may depend on its sizes."""

    def __init__(self, behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.behind = nn.Linear(WIDTH, WIDTH), behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.inner(x))


def twice(x: Tensor, condition: bool) -> Tensor:
    return x * 2 if condition else x


BRANCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "a long sequence": lambda x: twice(x, x.shape[1] > 64),
    "a large batch": lambda x: twice(x, x.shape[0] > 64),
    "one length": lambda x: twice(x, x.shape[1] == 16),
    "even lengths": lambda x: twice(x, x.shape[1] % 2 == 0),
    "batch and length": lambda x: twice(x, x.shape[0] > x.shape[1]),
    "tokens altogether": lambda x: twice(x, x.shape[0] * x.shape[1] > 100),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_on_sizes_are_refused(name: str) -> None:
    with pytest.raises(Unsupported, match="the captured graph differs from it in output"):
        capture_module(Sized(BRANCHES[name]).eval(), EXAMPLE)


class Reading(Sized):
    """The same over tokens, of which there may be nine, with logits."""

    def __init__(self, behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__(behind)
        self.table, self.positions = nn.Embedding(5, WIDTH), nn.Parameter(torch.randn(9, WIDTH))

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(self.table(tokens) + self.positions[: tokens.shape[1]])}


def test_branches_behind_the_last_position_are_another_matter() -> None:
    example = {"tokens": torch.arange(14).reshape(2, 7) % 5}
    capture_module(Reading(lambda x: twice(x, x.shape[1] > 64)).eval(), example)
    with pytest.raises(Unsupported, match="the captured graph differs"):
        capture_module(Reading(BRANCHES["a large batch"]).eval(), example)


def test_branches_without_consequence_are_captured() -> None:
    module = Sized(lambda x: x.clone() if x.shape[1] > 64 else x).eval()
    program, x = capture_module(module, EXAMPLE), torch.randn(2, 65, WIDTH)
    torch.testing.assert_close(program.run(x=x)["output"], module(x))


@pytest.mark.parametrize("function", [math.sqrt, math.log, int])
def test_sizes_that_the_model_turns_into_numbers_are_fixed(function: Callable[[int], float]) -> None:
    module = Sized(lambda x: x / function(x.shape[1])).eval()
    opt = optimize(module, example_inputs=EXAMPLE, target="eager", progress=False)
    x = torch.randn(5, 7, WIDTH)
    torch.testing.assert_close(opt(x), module(x))
    with pytest.raises(InvalidInput, match="has size 8 in dimension 1, not 7"):
        opt(torch.randn(5, 8, WIDTH))


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_sizes_that_stay_open_as_numbers(target: Target) -> None:
    module = Sized(lambda x: x * x.shape[1] ** -0.5).eval()
    opt, x = optimize(module, example_inputs=EXAMPLE, target=target, progress=False), torch.randn(5, 8, WIDTH)
    torch.testing.assert_close(opt(x), module(x))


def test_an_axis_without_dynamic_shapes_may_decide() -> None:
    module = Sized(BRANCHES["a long sequence"]).eval()
    program, x = capture_module(module, EXAMPLE, {"x": [0]}), torch.randn(3, 7, WIDTH)
    torch.testing.assert_close(program.run(x=x)["output"], module(x))


class Learned(nn.Module):
    """Positions from a table, which has fewer rows than the sequences that captures are checked with."""

    def __init__(self, sliced: bool) -> None:
        super().__init__()
        self.table, self.sliced = nn.Embedding(9, WIDTH), sliced

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        return x + (self.table.weight[:length] if self.sliced else self.table(torch.arange(length)))


@pytest.mark.parametrize("sliced", [False, True])
def test_a_model_may_have_few_positions(sliced: bool) -> None:
    module = Learned(sliced).eval()
    program, x = capture_module(module, EXAMPLE), torch.randn(4, 9, WIDTH)
    torch.testing.assert_close(program.run(x=x)["output"], module(x))


def test_what_is_not_finite_must_stand_at_the_same_places() -> None:
    values = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 3.0])
    assert relative_difference(values + torch.tensor([0.5, 0, 0, 0, 0]), values) == 0.25
    for place in range(1, 5):
        changed = values.clone()
        changed[place] = 7.0 if place < 4 else torch.nan
        assert relative_difference(changed, values) == torch.inf
    assert relative_difference(-values, values) == torch.inf


def test_one_number_is_compared_by_its_size() -> None:
    assert relative_difference(torch.tensor([[4.0]]), torch.tensor([[5.0]])) == pytest.approx(0.2)
