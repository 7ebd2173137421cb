"""Hyper-connections: several streams are found in the graph, and their mixing is what corrections go along (HCN)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from skipstone import LayerParallel, Plan, Segment, SkipByPrompt, SkipFFNAdaptive, SkipSublayers, optimize
from skipstone.calibrate import token_batches
from skipstone.errors import Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.program import Program
from skipstone.ir.stream import SublayerKind, find_stream
from skipstone.ir.surrogate import Coefficient
from skipstone.passes.base import run_pass
from skipstone.passes.skip_by_prompt import CENTROIDS
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from skipstone.similarity import measure_similarity
from tests import hyper_models
from tests.hyper_models import LAYERS, STREAMS, WIDTH, Hyper, example, language, positions, program_of, stack, states
from tests.newton_oracles import assert_close

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("static", "dynamic")
FORMS = (
    ("static", "by_matmul"), ("static", "by_einsum"), ("static", "by_sums"), ("static", "by_rows"),
    ("dynamic", "by_matmul"), ("dynamic", "by_transposed_matmul"), ("dynamic", "by_einsum"),
)  # fmt: skip
SURROGATE: dict[str, Any] = {"static": "auto", "dynamic": "at_iterate"}
"""What the matrices of each kind need."""


@torch.no_grad()
def at_once(model: Hyper, iterations: int, surrogate: Any) -> dict[str, Tensor]:
    """The outputs of a captured stack whose layers all run at the same time."""
    segment = Segment(0, len(model.layers), iterations, surrogate=surrogate)
    inputs = example(next(model.parameters()).dtype)
    return run_pass(LayerParallel((segment,)), program_of(model), strict=False).run(x=inputs)


@contextmanager
def changed(model: nn.Module, values: dict[str, float | Tensor]) -> Iterator[None]:
    """A model, and the program captured from it, with all parameters whose names end in these set to other values."""
    own = [
        (each, value) for name, each in model.named_parameters() for end, value in values.items() if name.endswith(end)
    ]
    before = [each.detach().clone() for each, _ in own]
    with torch.no_grad():
        for each, value in own:
            each.copy_(torch.as_tensor(value))
    yield
    with torch.no_grad():
        for (each, _), value in zip(own, before, strict=True):
            each.copy_(value)


# The stream


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_streams_are_found_however_they_are_mixed(kind: str, form: str) -> None:
    model = stack(kind) if form == "by_matmul" else stack(kind, form, layers=3)
    stream = find_stream(program_of(model))
    assert [(each.layer, each.kind, each.path) for each in stream.sublayers] == [
        (number, SublayerKind.FFN, f"layers.{number}.ffn") for number in range(len(model.layers))
    ]
    wanted = Coefficient.DEPENDENT if kind == "dynamic" else Coefficient.CONSTANT
    assert all((each.skip.kind, each.skip.coefficient) == ("mixing", wanted) for each in stream.sublayers)
    assert not any(each.parallel or each.post_norm for each in stream.sublayers)
    # The matrices are not the branch's own: without it, those that mix are still there.
    assert stream.sublayers[0].parameters[-4:] == tuple(
        f"layers.0.{name}" for name in ("ffn.down.weight", "ffn.norm.weight", "ffn.up.bias", "ffn.up.weight")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_ffn_are_told_apart(kind: str) -> None:
    sublayers = find_stream(program_of(language(kind))).sublayers
    assert [(each.layer, str(each.kind), each.path) for each in sublayers] == [
        (layer, name, f"layers.{layer}.{name}") for layer in range(3) for name in ("attention", "ffn")
    ]


# The iterations


@pytest.mark.parametrize("iterations", range(1, LAYERS + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_every_state_is_that_of_the_update_rule(kind: str, iterations: int) -> None:
    model = stack(kind)
    found = at_once(model, iterations, SURROGATE[kind])
    for number, state in enumerate(states(model, model.expand(example()), iterations), 1):
        assert_close(found[f"state_{number}"], state)


@pytest.mark.parametrize(("kind", "form"), [each for each in FORMS if each[1] != "by_matmul"])
def test_the_rule_is_the_same_however_streams_are_mixed(kind: str, form: str) -> None:
    """Also where states are read in another shape than layers read them in."""
    model = stack(kind, form, layers=3)
    found, start = at_once(model, 1, SURROGATE[kind]), model.expand(example())
    for number, state in enumerate(states(model, start, 1), 1):
        assert_close(found[f"state_{number}"], state)
    with pytest.raises(AssertionError):
        assert_close(states(model, start, 1, identity=True)[-1], found["state_3"])


@pytest.mark.parametrize("kind", KINDS)
def test_k_iterations_make_k_states_exact_to_the_bit_and_no_more(kind: str) -> None:
    model = stack(kind)
    with torch.no_grad():
        exact = program_of(model).run(x=example())
    for k in range(1, LAYERS + 1):
        found = at_once(model, k, SURROGATE[kind])
        same = [torch.equal(found[f"state_{n}"], exact[f"state_{n}"]) for n in range(1, LAYERS + 1)]
        assert same == [n <= k for n in range(1, LAYERS + 1)]
        if k < LAYERS:
            assert float((found[f"state_{k + 1}"] - exact[f"state_{k + 1}"]).abs().max()) > 1e-4
    assert torch.equal(found["out"], exact["out"])


@pytest.mark.parametrize("kind", KINDS)
def test_errors_fall_along_the_mixing_and_grow_along_the_identity(kind: str) -> None:
    model = stack(kind)
    with torch.no_grad():
        exact = model(example())[f"state_{LAYERS}"]
        start = model.expand(example())
        mixed = [float((at_once(model, k, SURROGATE[kind])[f"state_{LAYERS}"] - exact).abs().max()) for k in (1, 3, 5)]
        alone = [float((states(model, start, k, identity=True)[-1] - exact).abs().max()) for k in (1, 3)]
    assert mixed[0] > 2 * mixed[1] > 8 * mixed[2] > 0
    assert alone[1] > 2 * alone[0] > 2 * mixed[0]


def test_the_identity_is_one_where_streams_are_mixed_too() -> None:
    model = stack("static")
    for k in (1, 3):
        wanted = states(model, model.expand(example()), k, identity=True)[-1]
        assert_close(at_once(model, k, "identity")[f"state_{LAYERS}"], wanted)


def test_matrices_of_one_make_it_the_identity() -> None:
    model = stack("static")
    with changed(model, {"res": 10 * torch.eye(STREAMS)}), torch.no_grad():
        for k in (1, 2):
            mixed, alone = (at_once(model, k, surrogate) for surrogate in ("auto", "identity"))
            for name in mixed:
                assert_close(mixed[name], alone[name])
        assert not torch.equal(mixed["out"], model(example())["out"])


def test_a_single_stream_is_a_residual_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hyper_models, "STREAMS", 1)
    torch.manual_seed(0)
    model = hyper_models.Stack("static", "by_einsum", 3, attention=False).double().eval()
    with torch.no_grad():
        mixed, alone = (at_once(model, 1, surrogate)["state_3"] for surrogate in ("auto", "identity"))
        x = example()
        plain = x + sum(layer.ffn(x) for layer in model.layers)  # type: ignore[operator, misc]
    assert_close(mixed, alone)
    assert_close(mixed.squeeze(-2), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_branches_need_one_iteration(kind: str) -> None:
    """Where the matrices do not depend on the streams."""
    model = stack(kind)
    with changed(model, {"down.weight": 0.0, "project.weight": 0.0}), torch.no_grad():
        exact = model(example())
        assert_close(at_once(model, 1, SURROGATE[kind])[f"state_{LAYERS}"], exact[f"state_{LAYERS}"])
        along_identity = states(model, model.expand(example()), 1, identity=True)[-1]
        assert float((along_identity - exact[f"state_{LAYERS}"]).abs().max()) > 1e-2


def test_corrections_of_half_precision_streams_are_mixed_in_single() -> None:
    model = stack("static", "by_matmul", 2, torch.bfloat16)
    program = run_pass(LayerParallel((Segment(0, 2),)), program_of(model))
    (change,) = (each for each in program.nodes(aten.sub.Tensor) if "layer_parallel" in each.meta.get("made_by", ()))
    assert {each.meta["val"].dtype for each in (change, *change.users)} == {torch.float32}
    double = hyper_models.Stack("static", "by_matmul", 2, attention=False).double().eval()
    double.load_state_dict(model.state_dict())
    x = example().bfloat16()
    wanted = states(double, double.expand(x.double()), 1)[-1]
    with torch.no_grad():
        found = program.run(x=x)["state_2"].double()
        sequential = model(x)["state_2"].double() - double(x.double())["state_2"]
    assert 0 < float((found - wanted).square().mean()) <= 1.5**2 * float(sequential.square().mean())


# Whole plans


@torch.no_grad()
def expected(model: hyper_models.Language, ids: Tensor, iterations: int) -> Tensor:
    """Logits [B, S, V] of a language model whose layers all run at the same time."""
    return model.collapse(states(model, model.start(ids, positions(ids)), iterations)[-1])


def token_by_token(opt: Executable, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the prompt's last token and of all behind it, in steps of one and of three tokens."""
    prompt = mask.shape[1]
    last, cache = opt.prefill(ids[:, :prompt], mask)
    rest = ids[:, prompt:].split([1, 3, 1], dim=1)
    return torch.cat([last[:, None], *(opt.decode(part, cache) for part in rest)], dim=1)


@pytest.mark.parametrize("iterations", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_equals_all_at_once(kind: str, iterations: int) -> None:
    """Also for a row that is shorter, padded on its left."""
    model, segment = language(kind), Segment(0, 3, iterations, surrogate=SURROGATE[kind])
    program, refusal = rewrite(program_of(model), Plan([LayerParallel((segment,))]), target="eager")
    assert refusal is None
    assert len(program.slots()) == iterations * (3 - iterations + 1)
    ids, mask = hyper_models.tokens(2, 10), torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    found = token_by_token(Executable(EagerSession(program)), ids, mask)
    assert_close(found[0], expected(model, ids[:1], iterations)[0, 4:])
    assert_close(found[1], expected(model, ids[1:, 2:], iterations)[0, 2:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_it_runs_on_onnx_runtime(kind: str) -> None:
    """Streams are found, mixed and reported where a user calls for it."""
    model, ids = copy.deepcopy(language(kind)).float(), hyper_models.tokens(2, 10)
    model.layers = model.layers[:2].eval()
    plan = Plan([LayerParallel((Segment(0, 2, surrogate=SURROGATE[kind]),))])
    inputs = {"input_ids": ids, "position_ids": positions(ids)}
    opt = optimize(model, plan, target="onnxruntime", example_inputs=inputs, threads=1, progress=False)
    assert opt.cache_refusal is None
    assert_close(token_by_token(opt, ids, torch.ones_like(ids[:, :5])), expected(model, ids, 1)[:, 4:], 1e-4)
    (remark,) = (each for each in opt.report.remarks if each.pass_name == "layer_parallel")
    assert {"static": "surrogate mixing,", "dynamic": "surrogate mixing at the iterate,"}[kind] in remark.why


@torch.no_grad()
def without(kind: str, ids: Tensor, gone: dict[int, str]) -> Tensor:
    """Logits of the language model without some branches; the streams are mixed where they were."""
    model = language(kind)
    x = model.start(ids, positions(ids))
    for number, layer in enumerate(model.layers):
        for name, (connection, branch) in zip(("attention", "ffn"), layer.sublayers(), strict=True):
            pre, post, res = connection(x)
            keep = gone.get(number) != name
            x = hyper_models.FORMS[layer.form](pre, post, res, x, branch if keep else torch.zeros_like)
    return model.collapse(x)


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_mixed_where_a_sublayer_is_skipped(kind: str) -> None:
    program, ids = program_of(language(kind)), hyper_models.tokens(2, 7)
    skip = SkipSublayers(attention=(1,), ffn=(0,))
    skipped = run_pass(skip, program)
    with torch.no_grad():
        found = skipped.run(input_ids=ids, position_ids=positions(ids))["logits"]
    assert_close(found, without(kind, ids, {1: "attention", 0: "ffn"}))
    stream = find_stream(skipped)
    assert [each.path for each in stream.sublayers] == [
        "layers.0.attention", "layers.1.ffn", "layers.2.attention", "layers.2.ffn",
    ]  # fmt: skip
    # Behind it, layers have the numbers and the ways past their branches that they had.
    plan = Plan([skip, LayerParallel((Segment(1, 3, 2, surrogate=SURROGATE[kind]),))])
    parallel, _ = rewrite(program, plan, target="eager", cache=False)
    with torch.no_grad():
        assert_close(parallel.run(input_ids=ids, position_ids=positions(ids))["logits"], found)


# Others


class Broadcast(nn.Module):
    """The branch reads the mean of the streams, and the addition itself spreads its result."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.res = nn.Parameter(torch.rand(STREAMS, STREAMS))

    def layer(self, number: int, x: Tensor) -> Tensor:
        return self.res @ x + torch.tanh(self.layers[number](x.mean(dim=-2))).unsqueeze(-2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([x, 2 * x, x.neg()], dim=-2)
        return self.layer(1, self.layer(0, x)).sum(dim=-2)


def test_branches_that_the_addition_spreads_are_found() -> None:
    torch.manual_seed(0)
    model, x = Broadcast().double().eval(), example()
    program = capture_module(model, {"x": x})
    assert [each.path for each in find_stream(program).sublayers] == ["layers.0", "layers.1"]
    with torch.no_grad():
        (found,) = run_pass(LayerParallel((Segment(0, 2),)), program).run(x=x).values()
        start = torch.stack([x, 2 * x, x.neg()], dim=-2)
        change = torch.einsum("ij,bsjd->bsid", model.res, model.layer(0, start) - start)
        assert_close(found, (model.layer(1, start) + change).sum(-2))


@pytest.mark.slow
def test_streams_of_deepseek_v4() -> None:
    """The model of transformers, with plain attention; experts that are chosen by token are no way past the stream."""
    config = DeepseekV4Config(
        vocab_size=29, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8, qk_rope_head_dim=4,
        q_lora_rank=8, o_lora_rank=8, o_groups=1, moe_intermediate_size=8, n_routed_experts=2, num_experts_per_tok=1,
        n_shared_experts=1, sliding_window=8, max_position_embeddings=64, initializer_range=0.3,
        layer_types=["sliding_attention"] * 2, mlp_layer_types=["moe", "hash_moe"],
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids, calls = DeepseekV4ForCausalLM(config).eval(), hyper_models.tokens(2, 7), []
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "hc" in name:
                each.normal_()
    program = capture_huggingface(model)
    stream = find_stream(program)
    assert [(each.layer, str(each.kind), each.path.split(".")[-1]) for each in stream.sublayers] == [
        (layer, kind, name) for layer in range(2) for kind, name in (("attention", "self_attn"), ("ffn", "mlp"))
    ]
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args, options: calls.append((args, options)), with_kwargs=True)

    def layer(number: int, x: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """The state behind a layer, and what a change before it becomes on its way past the branches."""
        own, options = model.model.layers[number], dict(calls[number][1])
        options.pop("input_ids", None)
        for connection, branch in (
            (own.attn_hc, lambda u: own.self_attn(own.input_layernorm(u), **options)[0]),
            (own.ffn_hc, lambda u: own.mlp(own.post_attention_layernorm(u), input_ids=ids)),
        ):
            post, comb, collapsed = connection(x)
            change = torch.einsum("...ij,...id->...jd", comb, change)
            x = post.unsqueeze(-1) * branch(collapsed).unsqueeze(-2) + torch.einsum("...ij,...id->...jd", comb, x)
        return x, change

    with torch.no_grad():
        exact = model(input_ids=ids, use_cache=False).logits
        start = calls[0][0][0]
        change = layer(0, start, start)[0] - start
        second, change = layer(1, start, change)
        wanted = model.lm_head(model.model.norm(model.model.hc_head(second + change)))
        inputs = {"input_ids": ids, "position_ids": positions(ids)}
        found = [
            run_pass(LayerParallel((Segment(0, 2, k, surrogate="at_iterate"),)), program, strict=False).run(**inputs)
            for k in (1, 2)
        ]
        assert torch.equal(found[1]["logits"], program.run(**inputs)["logits"])
    assert_close(found[0]["logits"], wanted, 1e-5)
    assert_close(found[1]["logits"], exact, 1e-5)
    assert float((wanted - exact).abs().max()) > 1e-2


# Refusals


def refused(program: Program, segment: Segment) -> str:
    with pytest.raises(Unsupported) as refusal:
        run_pass(LayerParallel((segment,)), program)
    assert refusal.value.where
    return str(refusal.value)


@pytest.mark.parametrize("surrogate", ["auto", "identity", "zero"])
def test_matrices_of_the_streams_themselves_must_be_asked_for(surrogate: Any) -> None:
    message = refused(program_of(stack("dynamic")), Segment(0, 2, surrogate=surrogate))
    assert "multiplied by a function of itself" in message
    assert "'at_iterate'" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["sublayer", "two_stage"])
def test_streams_that_are_mixed_have_no_smaller_units(kind: str, unit: Any) -> None:
    message = refused(program_of(language(kind)), Segment(0, 2, unit=unit, surrogate=SURROGATE[kind]))
    assert "streams that are mixed" in message


@pytest.mark.parametrize("kind", KINDS)
def test_other_rewrites_refuse_several_streams(kind: str) -> None:
    program = program_of(language(kind))
    batches = token_batches([hyper_models.tokens(2, 7)], program.source)
    with pytest.raises(Unsupported, match="residual stream of shape"):
        measure_similarity(program, batches)
    adaptive = SkipFFNAdaptive(threshold=0.5, cold_start=0, cold_end=0, max_share=1.0)
    with pytest.raises(Unsupported, match="its result is not one row a token"):
        rewrite(program, Plan([adaptive]), target="eager")
    sets = SkipByPrompt((SkipSublayers(), SkipSublayers(ffn=(1,))))
    with pytest.raises(Unsupported, match="residual stream of shape"):
        rewrite(program, Plan([sets], tensors={CENTROIDS: torch.zeros(2, 6)}), target="eager")
