"""The backend of torch.compile: its options, how PyTorch finds it, and what it refuses."""

from __future__ import annotations

import copy
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import skipstone
from skipstone import (
    CompressKV,
    LayerParallel,
    Plan,
    QuantizeKV,
    QuantizeWeights,
    Segment,
    SkipByPrompt,
    SkipSublayers,
)
from skipstone.errors import InvalidPlan, Unsupported, UserError
from skipstone.ir.capture.exported import source_of
from tests.backend_cases import Block, Blocks, close, compiled
from tests.backend_cases import uncompiled as uncompiled
from tests.tiny_models import tiny_model, tokens

ROOT = Path(__file__).resolve().parents[1]
SKIP = Plan([SkipSublayers(layers=(1,))])

pytestmark = pytest.mark.usefixtures("one_thread", "uncompiled")


def refusal(kind: type[Exception], model: Any, *args: Any, grad: bool = False, **settings: Any) -> str:
    """What the backend says when it refuses; Dynamo's error names it in full."""
    with pytest.raises(BackendCompilerFailed) as caught, torch.set_grad_enabled(grad):
        torch.compile(model, backend="skipstone", **settings)(*args)
    reason = caught.value.inner_exception
    assert type(reason) is kind
    assert str(reason) in str(caught.value)
    return str(reason)


def x(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8)


# Options


@pytest.mark.parametrize("form", ["plan", "dictionary", "path", "string"])
@torch.no_grad()
def test_a_plan_comes_in_any_form(form: str, tmp_path: Path) -> None:
    SKIP.save(tmp_path / "plan.json")
    plan: Any = {
        "plan": SKIP,
        "dictionary": SKIP.to_dict(),
        "path": tmp_path / "plan.json",
        "string": str(tmp_path / "plan.json"),
    }[form]
    model, given = Blocks(), x()
    fast, _ = compiled(model, plan)
    close(fast(given), model.blocks[2](model.blocks[0](given)))


def test_unknown_options_and_modes_are_refused() -> None:
    assert refusal(UserError, Blocks(), x(), options={"plna": SKIP}) == (
        "unknown option 'plna' of the backend 'skipstone'. The nearest is 'plan'."
    )
    assert refusal(UserError, Blocks(), x(), options={"max_autotun": True}) == (
        "unknown option 'max_autotun' of the backend 'skipstone'. The nearest is 'max_autotune'."
    )
    assert refusal(UserError, Blocks(), x(), options={"plan": 3}) == (
        "option 'plan' is int. Pass a skipstone.Plan, its dictionary, or the path of its file."
    )
    assert refusal(UserError, Blocks(), x(), options={"plan": SKIP, "report": []}) == (
        "option 'report' is list, expected a function. Pass the append of a list."
    )
    assert "Inductor's modes are 'default'" in refusal(UserError, Blocks(), x(), mode="fast")
    assert "Cannot read the plan none.json" in refusal(InvalidPlan, Blocks(), x(), options={"plan": "none.json"})


@torch.no_grad()
def test_modes_and_options_of_inductor_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def compile_fx(graph: Any, inputs: Any, config_patches: Any) -> Any:
        seen.append(config_patches)
        return graph

    monkeypatch.setattr(sys.modules["skipstone.backend"], "compile_fx", compile_fx)
    options = {"plan": SKIP, "triton.cudagraphs": False, "epilogue-fusion": True}
    skip = skipstone.backend
    torch.compile(Blocks(), backend=lambda *args: skip(*args, mode="max-autotune", options=options))(x())
    assert seen[0].items() >= {"max_autotune": True, "triton.cudagraphs": False, "epilogue_fusion": True}.items()
    assert not {"plan", "report"} & seen[0].keys()


# Rewrites that a call does not show


@pytest.mark.parametrize(
    ("entry", "unseen"),
    [
        (QuantizeKV(), "the cache between two calls, whose format would change"),
        (CompressKV(), "the cache between two calls, whose size would change"),
        (SkipByPrompt(), "which tokens are a prompt, and which program read it"),
    ],
)
def test_what_a_call_does_not_show_is_refused(entry: Any, unseen: str) -> None:
    assert refusal(Unsupported, Blocks(), x(), options={"plan": Plan([entry])}) == (
        f"unsupported: {entry.name} in a torch.compile backend, which does not see {unseen}. "
        "Use skipstone.optimize(model, plan)."
    )


def test_weights_of_few_bits_are_refused() -> None:
    assert refusal(Unsupported, Blocks(), x(), options={"plan": Plan([QuantizeWeights()])}) == (
        "unsupported: quantize_weights in a torch.compile backend, whose compiler has no product with such weights. "
        "Use skipstone.optimize(model, plan) or skipstone.export_onnx(model, directory, plan)."
    )


@pytest.mark.parametrize("kv", ["last", "final"])
def test_a_cache_that_skipstone_lays_out_is_refused(kv: Any) -> None:
    plan = Plan([LayerParallel((Segment(0, 2),), kv=kv)])
    assert refusal(Unsupported, Blocks(), x(), options={"plan": plan}) == (
        f"unsupported: layer_parallel with kv='{kv}' in a torch.compile backend, where the model keeps its cache. "
        "Use kv='iterate', or skipstone.optimize(model, plan)."
    )


@torch.no_grad()
def test_several_iterations_over_a_cache_are_refused() -> None:
    model = tiny_model("llama")
    plan = Plan([LayerParallel((Segment(1, 4, iterations=2),))])
    fast, _ = compiled(model, plan)
    fast(input_ids=tokens(2, 5), use_cache=False)
    with pytest.raises(BackendCompilerFailed) as caught:
        fast(input_ids=tokens(2, 5), use_cache=True)
    assert str(caught.value.inner_exception) == (
        "unsupported: layer_parallel with several iterations over layers whose keys and values go to a cache of "
        "Hugging Face, which has room for those of one at model.layers.2.self_attn. Take one iteration, or use "
        "skipstone.optimize(model, plan), whose cache has room for each."
    )


# Plans that do not fit


def test_a_plan_must_fit() -> None:
    assert refusal(InvalidPlan, Blocks(), x(), options={"plan": Plan([SkipSublayers(ffn=(3,))])}) == (
        "skip_sublayers: ffn names layer 3, but the model has layers 0 to 2. The nearest is 2."
    )
    assert "stream" in refusal(Unsupported, nn.Linear(8, 8), x(), options={"plan": SKIP})
    assert "holds no layer" in refusal(
        InvalidPlan, Blocks(), x(), options={"plan": Plan([LayerParallel((Segment(1, 1),))])}
    )
    two = torch.randn(4, 4), torch.randn(4, 4)
    assert refusal(Unsupported, lambda x, y: x + torch.tanh(x @ y.mT), *two, options={"plan": SKIP}) == (
        "unsupported: a compiled frame without token ids [B, S], embeddings [B, S, H], or a single input of numbers. "
        "Compile the model itself: torch.compile(model, backend='skipstone')."
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dropout_is_refused(implementation: str) -> None:
    """Also where an attention would otherwise be recognised, and lose it."""
    model = copy.deepcopy(tiny_model("llama")).train()
    model.set_attn_implementation(implementation)
    model.model.layers[1].self_attn.attention_dropout = 0.5
    assert refusal(Unsupported, model, tokens(2, 5), options={"plan": SKIP}) == (
        "unsupported: dropout in a compiled frame at model.layers.1.self_attn. Call model.eval() first."
    )


@torch.no_grad()
def test_a_plan_for_another_model_is_refused() -> None:
    model, other, given = Blocks(), Blocks(), x()
    found = source_of(model, vocabulary=None, max_positions=None).fingerprint
    options = {"plan": Plan(SKIP.entries, model=found)}
    expected = model.blocks[2](model.blocks[0](given))
    close(torch.compile(model, backend="skipstone", options=options)(given), expected)
    own = copy.deepcopy(model)
    own.forward = torch.compile(own.forward, backend="skipstone", options=options)  # type: ignore[method-assign]
    close(own(given), expected)
    torch._dynamo.reset()
    assert f"the plan was made for another model (fingerprint {found[:12]}..." in refusal(
        InvalidPlan, other, given, options=options
    )
    weight = torch.randn(8, 8)
    assert "whose model cannot be found" in refusal(
        Unsupported, lambda x: x + torch.tanh(x @ weight), given, options=options
    )


# Frames that are refused


def test_gradients_and_autocast_are_refused() -> None:
    options = {"plan": SKIP}
    assert refusal(Unsupported, Blocks(), x(), grad=True, options=options) == (
        "unsupported: training through a plan. Call the compiled model under torch.no_grad()."
    )
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        assert refusal(Unsupported, Blocks(), x(), options=options) == (
            "unsupported: autocast around the model. Cast the model instead."
        )

    class Inside(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    torch._dynamo.reset()
    assert "autocast inside the model" in refusal(Unsupported, Inside(), x(), options=options)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_parts_of_a_model_are_refused(broken: int) -> None:
    """Wherever the graph breaks: the layers of what is left would have the numbers of others."""
    model = Blocks(tuple(place == broken for place in range(3)))
    message = refusal(Unsupported, model, x(), options={"plan": Plan([SkipSublayers(layers=(0,))])})
    assert message.startswith("unsupported: a graph that is only a part of the model, whose layers cannot be numbered")
    assert message.endswith("Find the break with fullgraph=True.")


def test_a_layer_that_is_called_by_what_cannot_be_traced_is_refused() -> None:
    model = Blocks()

    def call(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return model(x)

    assert "only a part of the model" in refusal(Unsupported, call, x(), options={"plan": SKIP})


def test_a_graph_break_behind_all_layers_is_refused() -> None:
    class Broken(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            torch._dynamo.graph_break()
            return x

    assert "only a part of the model" in refusal(Unsupported, Broken(), x(), options={"plan": SKIP})


class Attention(nn.Module):
    """An attention whose weights are scaled behind the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in self.projections(x).chunk(3, -1))
        weights = torch.softmax(q @ k.mT, -1) * torch.sigmoid(q).mean(-1, keepdim=True)
        return x + (weights @ v).transpose(1, 2).flatten(2)


def test_an_attention_that_is_not_known_is_refused() -> None:
    """Without it, the attention and the FFN of one layer would count as two layers."""
    model = nn.Sequential(Attention(), Block(), Attention(), Block())
    message = refusal(Unsupported, model, x(), options={"plan": SKIP})
    assert message == (
        "unsupported: an attention of unknown form (aten.softmax.int) in a compiled frame at 0. "
        "Try attn_implementation='sdpa' or 'eager', or skipstone.optimize(model, plan)."
    )


@torch.no_grad()
def test_without_a_plan_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def compile_fx(graph: Any, inputs: Any, config_patches: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(sys.modules["skipstone.backend"], "compile_fx", compile_fx)
    model, given = Blocks((False, True, False)), x()
    with torch.enable_grad():
        out = torch.compile(model, backend="skipstone", options={"plan": Plan([])})(given)
        assert torch.equal(out, model(given)) and out.requires_grad
    assert len(graphs) > 1


# How PyTorch finds it


FIND = """
import sys
{before}
import skipstone
assert {imported} == ("torch" in sys.modules)
import torch
from skipstone import Plan, SkipSublayers
try:
    torch.compile(torch.nn.Linear(2, 2), backend="skipstone", options={{"plan": Plan([SkipSublayers((0,))])}})(
        torch.ones(1, 2)
    )
except torch._dynamo.exc.BackendCompilerFailed as error:
    print(error)
"""


@pytest.mark.parametrize("before", ["", "import torch\ntorch.compile(torch.neg, backend='eager')(torch.ones(2))"])
def test_pytorch_finds_it_without_an_installation(before: str, tmp_path: Path) -> None:
    code = FIND.format(before=before, imported=bool(before))
    # A package that is only on the path: no entry point of an installed one is seen.
    hidden = "import importlib.metadata as m; m.entry_points = lambda **_: m.EntryPoints()\n"
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", path + hidden + code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "backend='skipstone' raised:\nUnsupported: unsupported: training through a plan" in done.stdout


def test_it_is_an_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["torch_dynamo_backends"]["skipstone"]
    assert importlib.metadata.EntryPoint("skipstone", value, "torch_dynamo_backends").load() is skipstone.backend
