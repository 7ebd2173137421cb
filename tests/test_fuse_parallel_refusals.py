"""What cannot be computed as one stays side by side: a remark says why, and results are what they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipstone import FuseParallel, LayerParallel, Segment
from skipstone.ir.capture.module import capture_module
from skipstone.ir.program import Program
from skipstone.passes.base import Status, run_pass
from skipstone.passes.cleanup import Cleanup
from tests import hyper_models
from tests.newton_oracles import LAYERS, WIDTH, assert_close, example, net, newton

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def both(program: Program, *segments: Segment, **inputs: Tensor) -> tuple[list[Any], dict[str, Tensor]]:
    """The remarks about groups of layers, and the outputs, which are those from before."""
    parallel = run_pass(LayerParallel(segments), program)
    fused = run_pass(FuseParallel(), parallel, strict=False)
    found, wanted = fused.run(**inputs), parallel.run(**inputs)
    for name, value in wanted.items():
        assert_close(found[name], value)
    return [each for each in fused.history[-1].remarks if "iteration" in each.where], found


def assert_refused(remark: Any, why: str) -> None:
    assert remark.status is Status.REFUSED
    assert remark.why.startswith("left side by side: ") and why in remark.why


def test_layers_of_other_sizes() -> None:
    """They alone: of two segments, the other one becomes one."""
    model = copy.deepcopy(net("plain"))
    model.layers[2].up, model.layers[2].down = nn.Linear(WIDTH, 3), nn.Linear(3, WIDTH)
    model = model.double().eval()
    program = run_pass(Cleanup(), capture_module(model, {"x": example()}))
    (alike, unlike), _ = both(program, Segment(0, 2), Segment(2, LAYERS), x=example())
    assert alike.status is Status.APPLIED
    assert_refused(unlike, "has no counterpart in each layer")


@pytest.mark.parametrize("iterations", [1, 2])
def test_norms_with_unlike_eps(iterations: int) -> None:
    """They have no common norm, whose result the gains could be folded into the weights of."""
    model = copy.deepcopy(net("plain"))
    for number, layer in enumerate(model.layers):
        layer.norm.eps = 0.01 * (number + 1)
    program = run_pass(Cleanup(), capture_module(model, {"x": example()}))
    remarks, found = both(program, Segment(1, 4, iterations), x=example())
    assert len(remarks) == iterations
    for number, remark in enumerate(remarks):
        numbers = ", ".join(str(0.01 * (2 + each)) for each in range(number, 4 - iterations + number))
        assert_refused(remark, f"the constants {numbers} in one place")
    with torch.no_grad():
        start = model.layers[0](model.entry(example()), None)
        functions = [lambda h, layer=layer: layer(h, None) for layer in model.layers[1:4]]
        assert_close(found["state_4"], newton(functions, start, iterations, [1.0] * 3)[-1])


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize(
    ("kind", "form"), [("static", "by_matmul"), ("static", "by_rows"), ("static", "by_sums"), ("dynamic", "by_einsum")]
)
def test_streams_that_are_mixed(kind: str, form: str, iterations: int) -> None:
    """A correction that a matrix carries from stream to stream is more than a factor."""
    model = hyper_models.stack(kind, form, layers=3)
    surrogate: Any = "auto" if kind == "static" else "at_iterate"
    segment = Segment(0, 3, iterations, surrogate=surrogate)
    remarks, found = both(hyper_models.program_of(model), segment, x=hyper_models.example())
    assert len(remarks) == iterations
    for remark in remarks:
        assert_refused(remark, "corrections that are more than a factor")
    with torch.no_grad():
        wanted = hyper_models.states(model, model.expand(hyper_models.example()), iterations)
    for number, state in enumerate(wanted, 1):
        assert_close(found[f"state_{number}"], state)


class Scaled(nn.Module):
    """Layers that read ``a h + b h0`` with an a of their own, as nanochat has it, or all with none."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(3))
        self.up, self.down = (
            nn.ModuleList(nn.Linear(*sizes, bias=False) for _ in range(3)) for sizes in ((WIDTH, 12), (12, WIDTH))
        )
        self.scales = nn.ParameterList(torch.tensor(1.2 - 0.3 * number) for number in range(3)) if scaled else [1] * 3

    def forward(self, x: Tensor) -> Tensor:
        x = x0 = self.entry(x)
        for scale, norm, up, down in zip(self.scales, self.norms, self.up, self.down, strict=True):
            x = scale * x + 0.1 * x0
            x = x + down(torch.tanh(up(norm(x))))
        return x


def test_inputs_that_are_scaled_apart_are_neither_averaged_nor_one() -> None:
    """Each layer then has its own input, and products are grouped; where all read the same, one wide product does."""
    grouped = []
    for scaled in (False, True):
        program = run_pass(Cleanup(), capture_module(Scaled(scaled).double().eval(), {"x": example()}))
        remarks, _ = both(program, Segment(1, 3), x=example())
        assert [each.status for each in remarks] == [Status.APPLIED]
        fused = run_pass(FuseParallel(), run_pass(LayerParallel((Segment(1, 3),)), program))
        grouped.append(sum(1 for _ in fused.nodes(torch.ops.aten.matmul.default)))
    assert grouped == [0, 2]  # up and down


class Gated(nn.Module):
    """Layers whose stream passes a gate that is a function of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.gates, self.layers = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for number in range(4):
            x = self.layer(number, x)
        return x

    def gate(self, number: int, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(self.gates[number](x))

    def layer(self, number: int, x: Tensor) -> Tensor:
        return self.gate(number, x) * x + torch.tanh(self.layers[number](x))


@pytest.mark.parametrize("iterations", [1, 3])
def test_gates_that_are_taken_at_the_iterate(iterations: int) -> None:
    model, x = Gated().double().eval(), example()
    program = run_pass(Cleanup(), capture_module(model, {"x": x}))
    remarks, found = both(program, Segment(0, 4, iterations, surrogate="at_iterate"), x=x)
    assert len(remarks) == iterations
    for remark in remarks:
        assert_refused(remark, "factors that depend on the stream")
    functions = [lambda h, n=n: model.layer(n, h) for n in range(4)]
    slopes: list[Any] = [lambda h, change, n=n: model.gate(n, h) * change for n in range(4)]
    with torch.no_grad():
        (out,) = found.values()
        assert_close(out, newton(functions, model.entry(x), iterations, slopes)[-1])
