"""The backend of torch.compile: what it does to the graphs of Dynamo, run without Inductor."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache, ViTConfig, ViTModel

import skipstone
from skipstone import FuseParallel, LayerParallel, Plan, Segment, SkipSublayers
from tests.backend_cases import Blocks, close, compare_steps, compiled, side_by_side, without
from tests.backend_cases import uncompiled as uncompiled
from tests.tiny_models import tiny_model, tokens

PAD = 0

pytestmark = pytest.mark.usefixtures("one_thread", "uncompiled")


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


# Plans


PLANS: dict[str, tuple[Plan, Callable[[PreTrainedModel], PreTrainedModel]]] = {
    "empty": (Plan([]), lambda model: model),
    "skip": (
        Plan([SkipSublayers(attention=(1,), ffn=(2,), layers=(3,))]),
        lambda model: without(model, (1, 3), (2, 3)),
    ),
    "parallel": (Plan([LayerParallel((Segment(1, 4),))]), lambda model: side_by_side(model, 1, 4)),
    "all": (
        Plan([SkipSublayers(layers=(0,)), LayerParallel((Segment(1, 3),)), FuseParallel()]),
        lambda model: side_by_side(without(model, (0,), (0,)), 1, 3),
    ),
}
"""Plans, and models of transformers that compute the same."""


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("empty", "static"),
        ("all", "dynamic"),
        *(
            pytest.param(case, kind, marks=pytest.mark.slow)
            for case, kind in product(PLANS, ("dynamic", "static"))
            if (case, kind) not in (("empty", "static"), ("all", "dynamic"))
        ),
    ],
)
def test_a_prompt_and_steps_with_a_cache(llama: PreTrainedModel, case: str, kind: str) -> None:
    plan, change = PLANS[case]
    fast, reports = compiled(llama, plan)
    caches = {"dynamic": DynamicCache, "static": lambda: StaticCache(llama.config, max_cache_len=16)}
    cache, own = compare_steps(fast, change(llama), caches[kind])
    skipped = {layer for entry in plan if isinstance(entry, SkipSublayers) for layer in entry.attention + entry.layers}
    for number, (mine, theirs) in enumerate(zip(cache.layers, own.layers, strict=True)):
        if number in skipped:  # nothing was projected, and nothing was written but zeros
            assert not mine.keys.any() and not mine.values.any()
        else:
            close(mine.keys, theirs.keys)
            close(mine.values, theirs.values)
    # A prompt, a step, and once more for open lengths of a growing cache. Without a plan, nothing is reported.
    assert len(reports) == (0 if not len(plan) else 3 if kind == "dynamic" else 2)


@torch.no_grad()
def test_static_caches_stay_where_they_are(llama: PreTrainedModel) -> None:
    fast, _ = compiled(llama, Plan([SkipSublayers(attention=(1,))]))
    cache = StaticCache(llama.config, max_cache_len=16)
    lengths = [layer.cumulative_length.data_ptr() for layer in cache.layers]
    fast(input_ids=tokens(2, 3), past_key_values=cache)
    assert [layer.cumulative_length.data_ptr() for layer in cache.layers] == lengths
    places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    fast(input_ids=tokens(2, 1), past_key_values=cache)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == places
    assert [int(layer.cumulative_length) for layer in cache.layers] == [4] * 4


@torch.no_grad()
def test_rows_that_a_cache_has_stay_where_an_attention_is_skipped(llama: PreTrainedModel) -> None:
    fast, _ = compiled(llama, Plan([SkipSublayers(attention=(1,))]))
    for cache in (DynamicCache(), StaticCache(llama.config, max_cache_len=9)):
        llama(input_ids=tokens(2, 5), past_key_values=cache)
        before = cache.layers[1].keys[:, :, :5].clone()
        assert before.any()
        fast(input_ids=tokens(2, 2), past_key_values=cache)
        assert torch.equal(cache.layers[1].keys[:, :, :5], before)
        assert not cache.layers[1].keys[:, :, 5:].any()


@torch.no_grad()
def test_the_skipped_is_not_computed(llama: PreTrainedModel) -> None:
    fast, reports = compiled(llama, Plan([SkipSublayers(attention=(1,), ffn=(2,))]))
    fast(input_ids=tokens(2, 5), use_cache=True)
    (report,) = reports
    read = {f"model.layers.{layer}.{name}" for layer, name in ((1, "self_attn"), (2, "mlp"))}
    assert not any(f"aten.linear({path}" in report.code or f'"{path}.' in report.code for path in read)
    assert report.nodes_after < report.nodes_before
    assert "skip_sublayers: applied | model.layers.1.self_attn | attention of layer 1 skipped" in str(report)


@torch.no_grad()
@pytest.mark.parametrize(
    ("entries", "change"),
    [
        ([FuseParallel()], lambda model: model),
        pytest.param(
            [LayerParallel((Segment(1, 4),)), FuseParallel()],
            lambda model: side_by_side(model, 1, 4),
            marks=pytest.mark.slow,
        ),
        pytest.param([LayerParallel((Segment(0, 4, iterations=4),))], lambda model: model, marks=pytest.mark.slow),
        ([LayerParallel((Segment(1, 3, iterations=2),)), FuseParallel()], lambda model: model),
    ],
    ids=["siblings", "lanes", "iterations", "both"],
)
def test_without_a_cache(llama: PreTrainedModel, entries: list[Any], change: Any) -> None:
    fast, reports = compiled(llama, Plan(entries))
    close(fast(input_ids=tokens(3, 5), use_cache=False).logits, change(llama)(tokens(3, 5)).logits)
    assert not any(remark.status == "refused" for remark in reports[0].remarks)


@torch.no_grad()
def test_lanes_are_left_side_by_side_where_a_cache_is_kept(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    fast, reports = compiled(llama, Plan([LayerParallel((Segment(1, 3),)), FuseParallel()]))
    close(fast(input_ids=tokens(2, 5), use_cache=True).logits, side_by_side(llama, 1, 3)(tokens(2, 5)).logits)
    why = "left side by side: a cache of Hugging Face holds the keys and values of each layer apart"
    assert [remark.why for remark in reports[0].remarks if remark.status == "refused"] == [why]
    assert why in caplog.text  # nothing is refused silently


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.slow) for each in ("gpt2", "gpt_neox", "gemma2", "qwen3:sliding")]
)
def test_other_architectures(name: str) -> None:
    """Fused projections of two-dimensional products, parallel residuals, soft caps, and caches with a window."""
    model = tiny_model(name)
    fast, _ = compiled(model, Plan([SkipSublayers(attention=(1,), ffn=(2,))]))
    compare_steps(fast, without(model, (1,), (2,)), lambda: DynamicCache(config=model.config))


@pytest.mark.slow
@torch.no_grad()
def test_layers_in_parallel_whose_caches_have_a_window() -> None:
    """A cache keeps a part of what it returns; that part is taken behind layers that moved."""
    model = tiny_model("qwen3:sliding")
    fast, _ = compiled(model, Plan([LayerParallel((Segment(1, 4),))]))
    compare_steps(fast, side_by_side(model, 1, 4), lambda: DynamicCache(config=model.config))


@pytest.mark.slow
@torch.no_grad()
def test_attention_in_plain_operators(llama: PreTrainedModel) -> None:
    model = copy.deepcopy(llama)
    model.set_attn_implementation("eager")
    fast, _ = compiled(model, Plan([SkipSublayers(attention=(1,))]))
    compare_steps(fast, without(llama, (1,)), DynamicCache)


# Generation


@torch.no_grad()
@pytest.mark.parametrize("cache", [pytest.param(None, marks=pytest.mark.slow), "static"])
def test_generate(llama: PreTrainedModel, cache: str | None) -> None:
    reports: list[Any] = []
    options = {"plan": Plan([SkipSublayers(attention=(1,), ffn=(2,))]), "report": reports.append}
    model, reference = copy.deepcopy(llama), without(llama, (1,), (2,))
    model.forward = torch.compile(model.forward, backend="skipstone", options=options, fullgraph=True)
    prompt = tokens(2, 5)
    prompt[0, :2] = PAD
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    torch._dynamo.utils.counters.clear()
    for mask in (torch.ones_like(prompt), (prompt != PAD).long()):  # without padding, and padded on the left
        ours = model.generate(prompt, attention_mask=mask, cache_implementation=cache, **settings)
        assert torch.equal(ours, reference.generate(prompt, attention_mask=mask, **settings))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(reports) == torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        longer = torch.cat([tokens(2, 2, seed=1), prompt], 1) if cache is None else prompt
        mask = (longer != PAD).long()
        if cache is None:  # a prompt of another length: sizes are open from the second one on
            with pytest.raises(RuntimeError, match="fail_on_recompile"):
                model.generate(longer, attention_mask=mask, **settings)
        else:
            again = model.generate(longer, attention_mask=mask, cache_implementation=cache, **settings)
            assert torch.equal(again, reference.generate(longer, attention_mask=mask, **settings))


@torch.no_grad()
def test_open_sizes_are_compiled_once(llama: PreTrainedModel) -> None:
    plan = Plan([SkipSublayers(ffn=(1,)), LayerParallel((Segment(2, 4),)), FuseParallel()])
    fast, reports = compiled(llama, plan, dynamic=True)
    reference = side_by_side(without(llama, ffn=(1,)), 2, 4)
    for batch, length in ((2, 5), (3, 9)):
        new = tokens(batch, length)
        close(fast(input_ids=new, use_cache=False).logits, reference(new).logits)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, length in ((4, 6), (2, 13)):
            new = tokens(batch, length)
            close(fast(input_ids=new, use_cache=False).logits, reference(new).logits)
    assert len(reports) == 1


@pytest.mark.slow
@torch.no_grad()
def test_prompts_of_any_length_then_steps(llama: PreTrainedModel) -> None:
    fast, reports = compiled(llama, Plan([SkipSublayers(attention=(1,))]))
    reference = without(llama, (1,))

    def call(length: int) -> None:
        prompt = tokens(2, length + 3)
        out = fast(input_ids=prompt[:, :length], use_cache=True)
        for step in range(length, length + 3):
            out = fast(input_ids=prompt[:, step : step + 1], past_key_values=out.past_key_values)
        close(out.logits[:, -1], reference(prompt).logits[:, -1])

    call(5)
    call(8)  # prompts of another length: from here on, all sizes are open
    compiled_frames = len(reports)
    with torch.compiler.set_stance("fail_on_recompile"):
        call(11)
        call(6)
    assert len(reports) == compiled_frames == 4


# Modules


@torch.no_grad()
@pytest.mark.parametrize("kind", [pytest.param("dynamic", marks=pytest.mark.slow), "static"])
def test_nested_compile_regions(llama: PreTrainedModel, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = type(llama.model.layers[0])
    monkeypatch.setattr(layer, "forward", torch.compiler.nested_compile_region(layer.forward))
    # Of calls that share a region, each has its own module path.
    paths = ("model.layers.1.self_attn", "model.layers.2.mlp")
    fast, reports = compiled(llama, Plan([SkipSublayers(paths=paths)]))

    def static() -> StaticCache:
        cache = StaticCache(llama.config, max_cache_len=16)
        # Dynamo does not take a cache that is made inside of a region.
        heads, width = llama.config.num_key_value_heads, llama.config.head_dim
        cache.early_initialization(2, heads, width, torch.float32, torch.device("cpu"))
        return cache

    compare_steps(fast, without(llama, (1,), (2,)), DynamicCache if kind == "dynamic" else static)
    assert reports and "model.layers.2.mlp | ffn of layer 2 skipped" in str(reports[0])


@torch.no_grad()
def test_embeddings_instead_of_tokens(llama: PreTrainedModel) -> None:
    fast, _ = compiled(llama, Plan([SkipSublayers(layers=(0, 2))]))
    hidden = llama.model.embed_tokens(tokens(2, 5))
    close(fast(inputs_embeds=hidden).logits, without(llama, (0, 2), (0, 2))(inputs_embeds=hidden).logits)


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_images(dynamic: bool | None) -> None:
    """Neither tokens nor embeddings: activations come from the one input of numbers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4, initializer_range=0.2)).eval()
    plan = Plan([SkipSublayers(layers=(1,)), FuseParallel()])
    fast, reports = compiled(model, plan, dynamic=dynamic)
    shorter = copy.deepcopy(model)
    del next(each for each in shorter.modules() if isinstance(each, nn.ModuleList))[1]
    for batch in (2, 3):
        pixels = torch.randn(batch, 3, 16, 16)
        close(fast(pixel_values=pixels).last_hidden_state, shorter(pixel_values=pixels).last_hidden_state)
    assert "ffn of layer 1 skipped" in str(reports[0])


@torch.no_grad()
def test_a_plain_module_by_itself_and_in_a_function() -> None:
    model, x = Blocks().double(), torch.randn(2, 3, 8, dtype=torch.float64)
    expected = model.blocks[2](model.blocks[0](x))
    options: dict[str, Any] = {"plan": Plan([SkipSublayers(paths=("blocks.1",))])}
    assert torch.equal(torch.compile(model, backend=skipstone.backend, options=options)(x), expected)

    @torch.compile(backend="skipstone", options=options)
    def call(module: nn.Module, x: Tensor) -> Tensor:
        return 2 * module(x)

    assert torch.equal(call(model, x), 2 * expected)


@torch.no_grad()
def test_half_precision(llama: PreTrainedModel) -> None:
    model = copy.deepcopy(llama).bfloat16()
    fast, _ = compiled(model, Plan([SkipSublayers(attention=(1,), ffn=(2,))]))
    out = fast(input_ids=tokens(2, 5)).logits
    assert out.dtype == torch.bfloat16 and torch.equal(out, without(model, (1,), (2,))(tokens(2, 5)).logits)


@torch.no_grad()
def test_weights_may_change_but_not_those_in_stacks() -> None:
    model, x = Blocks(), torch.randn(2, 3, 8)
    fast, _ = compiled(model, Plan([SkipSublayers(layers=(1,))]))
    fast(x)
    model.blocks[0].rise.weight.mul_(-2)
    close(fast(x), model.blocks[2](model.blocks[0](x)))

    model = Blocks()
    fast, _ = compiled(model, Plan([LayerParallel((Segment(0, 2),)), FuseParallel()]))
    close(fast(x), model.blocks[2](model.blocks[0](x) + model.blocks[1](x) - x))
    model.blocks[2].rise.weight.mul_(-2)  # in no stack
    close(fast(x), model.blocks[2](model.blocks[0](x) + model.blocks[1](x) - x))
    model.blocks[0].rise.weight.mul_(-2)
    with pytest.raises(skipstone.errors.UserError, match=r"^blocks\.0\.rise\.weight has changed since fuse_parallel"):
        fast(x)


@torch.no_grad()
def test_frames_share_their_stacks() -> None:
    model = Blocks()
    fast, _ = compiled(model, Plan([LayerParallel((Segment(0, 2),)), FuseParallel()]), dynamic=False)
    fast(torch.randn(2, 3, 8))
    stacks = sys.modules["skipstone.backend"]._STACKS
    before = set(map(id, stacks.values()))
    assert before
    fast(torch.randn(2, 4, 8))
    assert set(map(id, stacks.values())) == before
