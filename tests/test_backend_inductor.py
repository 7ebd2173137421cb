"""The backend of torch.compile, through Inductor: C++ on the CPU, Triton on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from transformers import DynamicCache, PreTrainedModel, StaticCache

from skipstone import FuseParallel, LayerParallel, Plan, Segment, SkipSublayers
from tests.backend_cases import Blocks, close, compare_steps, compiled, side_by_side, without
from tests.ffn_oracles import ALWAYS
from tests.tiny_models import tiny_config, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread", "fresh")


@pytest.fixture
def fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """Three layers: compiling takes its time."""
    model = tiny_model("llama")
    model.model.layers = model.model.layers[:3]
    model.config = copy.deepcopy(tiny_config("llama"))
    model.config.num_hidden_layers = model.model.config.num_hidden_layers = 3
    return model


@torch.no_grad()
def test_a_step_with_a_static_cache(llama: PreTrainedModel) -> None:
    """Inductor writes the caches of all layers in place, that of the skipped attention too."""
    fast, _ = compiled(llama, Plan([SkipSublayers(attention=(1,), ffn=(2,))]))
    reference = without(llama, (1,), (2,))
    prompt, capacity = tokens(2, 6), 13
    cache, own = (StaticCache(llama.config, max_cache_len=capacity) for _ in range(2))
    llama(prompt[:, :5], past_key_values=cache)
    llama(prompt[:, :5], past_key_values=own)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    out, code = run_and_get_code(lambda: fast(input_ids=prompt[:, 5:], past_key_values=cache).logits)
    close(out, reference(prompt[:, 5:], past_key_values=own).logits)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    shape = "(2, 2, 13, 16)"
    assert shape in "".join(code) and f"empty_strided_cpu({shape}" not in "".join(code)
    assert not cache.layers[1].keys[:, :, 5].any() and cache.layers[1].keys[:, :, 4].any()
    assert int(cache.get_seq_length()) == 6


@torch.no_grad()
def test_tokens_that_skip_ffns(llama: PreTrainedModel) -> None:
    """The decision is compiled with everything else; where prompts end is read in each call."""
    begins = torch.tensor([6, 6])
    fast, _ = compiled(llama, Plan([ALWAYS]), decode_start=begins)
    reference = without(llama, ffn=(1, 2))
    ids, place = tokens(2, 6), torch.full((2, 1), 5)

    def step(model: Any) -> Tensor:
        cache = StaticCache(llama.config, max_cache_len=13)
        llama(ids[:, :5], past_key_values=cache)
        return model(input_ids=ids[:, 5:], position_ids=place, past_key_values=cache).logits  # type: ignore[no-any-return]

    close(step(fast), step(llama))
    with torch.compiler.set_stance("fail_on_recompile"):
        begins[1] = 5
        close(step(fast), torch.stack([step(llama)[0], step(reference)[1]]))
        begins[0] = 3
        close(step(fast), step(reference))


@torch.no_grad()
def test_layers_in_parallel_over_stacks() -> None:
    """Stacks are inputs behind those of the frame, with sizes that stay fixed where all others are open."""
    model = Blocks()
    fast, _ = compiled(model, Plan([LayerParallel((Segment(0, 2),)), FuseParallel()]), dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 8)
        out, code = run_and_get_code(lambda x=x: fast(x))
        close(out, model.blocks[2](model.blocks[0](x) + model.blocks[1](x) - x))
        assert batch != 2 or "(24, 8), (8, 1)" in "".join(code)  # the rises of two blocks


@torch.no_grad()
def test_an_empty_plan_is_inductor() -> None:
    model, x = Blocks(), torch.randn(2, 3, 8)
    plain = torch.compile(model)(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="skipstone", options={"plan": Plan([])})(x), plain)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_prompts_and_steps(llama: PreTrainedModel, kind: str) -> None:
    plan = Plan([SkipSublayers(attention=(0,)), LayerParallel((Segment(1, 3),)), FuseParallel()])
    fast, _ = compiled(llama, plan)
    caches: dict[str, Any] = {
        "dynamic": DynamicCache,
        "static": lambda: StaticCache(llama.config, max_cache_len=16),
    }
    compare_steps(fast, side_by_side(without(llama, (0,)), 1, 3), caches[kind])


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("graphs", [False, True])
def test_tokens_that_skip_ffns_on_a_gpu(graphs: bool) -> None:
    model = tiny_model("llama").to("cuda")
    begins = torch.tensor([8], device="cuda")
    fast, _ = compiled(model, Plan([ALWAYS]), decode_start=begins, **{"triton.cudagraphs": graphs})
    reference = without(model, ffn=(1, 2, 3))
    ids = tokens(2, 12).to("cuda")
    cache, own = (StaticCache(model.config, max_cache_len=16) for _ in range(2))
    for start, stop in ((0, 5), *((step, step + 1) for step in range(5, 12))):
        places = torch.arange(start, stop, device="cuda").expand(2, -1)
        out = fast(input_ids=ids[:, start:stop], position_ids=places, past_key_values=cache).logits.clone()
        close(out, (reference if start >= 8 else model)(ids[:, start:stop], past_key_values=own).logits, 2e-3)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("graphs", [False, True])
def test_on_a_gpu(graphs: bool) -> None:
    """Also as CUDA graphs, whose inputs must stay where they are."""
    model = tiny_model("llama").to("cuda")
    plan = Plan([SkipSublayers(attention=(1,)), LayerParallel((Segment(2, 4),)), FuseParallel()])
    fast, _ = compiled(model, plan, **{"triton.cudagraphs": graphs})
    reference = side_by_side(without(model, (1,)), 2, 4)
    prompt = tokens(2, 12).to("cuda")
    cache, own = (StaticCache(model.config, max_cache_len=16) for _ in range(2))
    for start, stop in ((0, 5), *((step, step + 1) for step in range(5, 12))):
        out = fast(input_ids=prompt[:, start:stop], past_key_values=cache).logits.clone()
        close(out, reference(prompt[:, start:stop], past_key_values=own).logits, 2e-3)
    assert int(cache.get_seq_length()) == 12
