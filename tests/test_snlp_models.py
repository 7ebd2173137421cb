"""The regularizer for layers at the same time: models that it trains, and what it trains them for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedModel,
)

from skipstone import LayerParallel, Segment
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.passes.base import run_pass
from skipstone.training import LayerParallelLoss, ramp
from tests.snlp_oracles import (
    BUILDERS,
    SIZES,
    assert_equal,
    example_ids,
    gradients,
    hugging_face,
    layers_of,
    regularized,
    tokens,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def headless(name: str) -> PreTrainedModel:
    """A model whose logits are the state behind its last layer."""
    model: Any = hugging_face(name)
    model.lm_head = nn.Identity()
    if name == "gpt2":
        model.transformer.ln_f = nn.Identity()
    else:
        model.model.norm = nn.Identity()
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_it_trains_for_what_the_pass_does(name: str) -> None:
    """The error of the last state, by the rewritten program; sequences are longer than Mistral's window."""
    model, ids = headless(name), tokens(2, 11)
    inputs = {"input_ids": ids, "position_ids": torch.arange(11).expand(2, 11)}
    program = capture_huggingface(model)
    exact = program.run(**inputs)["logits"]
    for segment in (Segment(1, 4), Segment(0, 4, 2), Segment(2, 4, surrogate="zero")):
        state = run_pass(LayerParallel((segment,)), program).run(**inputs)["logits"]
        wanted = ((state - exact).norm(dim=-1) / exact.norm(dim=-1)).mean()
        assert wanted > 0.05
        assert_equal([regularized(model, ids, segment)], [wanted], within=1e-9)


def hand_written(model: Any, ids: Tensor, segment: Segment, mask: Tensor | None = None) -> Tensor:
    """The error of the last state of a segment in one iteration, with the layers called as the model calls them."""
    calls: list[tuple[Any, Any]] = []
    states: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args, kwargs))
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers_of(model)]
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    start = states[segment.start - 1]
    guess = start
    for layer, (args, kwargs) in list(zip(layers_of(model), calls, strict=True))[segment.start : segment.stop]:
        result = layer.forward(start, *args[1:], **kwargs)
        guess = guess + (result[0] if isinstance(result, tuple) else result) - start
    error = (guess - states[segment.stop - 1]).norm(dim=-1) / states[segment.stop - 1].norm(dim=-1)
    return error.mean() if mask is None else error[mask.bool()].mean()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_models_are_trained_as_they_are(name: str, checkpointed: bool) -> None:
    """Also with their own gradient checkpointing. A second pass gives the same again."""
    model, ids, segment = hugging_face(name), example_ids(), Segment(1, 4)
    wanted = hand_written(model, ids, segment)
    expected = gradients(wanted, model)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    regularizer = LayerParallelLoss(layers_of(model), [segment], checkpoint=checkpointed)
    for _ in range(2):
        with regularizer.record():
            model(input_ids=ids, use_cache=False)
        loss = regularizer.loss()
        assert_equal([loss], [wanted])
        assert_equal(gradients(loss, model), expected, within=1e-5)  # norms compute in float32
    assert not any(layer._forward_hooks for layer in layers_of(model))


def test_padding_is_masked_as_in_the_model() -> None:
    model, ids = hugging_face("llama"), example_ids()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    regularizer = LayerParallelLoss(layers_of(model), [Segment(1, 4)])
    with regularizer.record():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert_equal([regularizer.loss(mask.bool())], [hand_written(model, ids, Segment(1, 4), mask)])


@pytest.mark.parametrize("place", ["inside", "outside", "in another"])
def test_autocast_of_the_pass_is_that_of_the_loss(place: str) -> None:
    """The first pass, in which layers are proven without gradients, has the gradients of the second."""
    model, ids = hugging_face("llama").float(), example_ids()
    regularizer = LayerParallelLoss(layers_of(model), [Segment(1, 4)])
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            with regularizer.record():
                model(input_ids=ids, use_cache=False)
            if place == "inside":
                loss = regularizer.loss()
        if place != "inside":
            with torch.autocast("cpu", torch.bfloat16, enabled=place == "in another"):
                loss = regularizer.loss()
        found.append([loss, *gradients(loss, model)])
    assert all(torch.equal(*each) for each in zip(*found, strict=True))
    assert sum(bool(each.any()) for each in found[0]) > 20
    assert found[0][0].dtype == torch.float32
    assert not torch.equal(found[0][0], regularized(model, ids, Segment(1, 4)))


def trained(weight: float) -> tuple[float, float]:
    """The loss of a small model on steps of 7, and its error in parallel, after some training."""
    torch.manual_seed(0)
    model = NanoChatForCausalLM(NanoChatConfig(**SIZES, num_hidden_layers=6)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    regularizer = LayerParallelLoss(model.model.layers, [Segment(1, 5)], stride=2)
    generator = torch.Generator().manual_seed(0)
    for step in range(80):
        ids = (torch.randint(61, (8, 1), generator=generator) + 7 * torch.arange(12)) % 61
        with regularizer.record():
            ordinary = model(input_ids=ids, labels=ids, use_cache=False).loss
        apart = regularizer.loss()
        optimizer.zero_grad()
        (ordinary + weight * ramp(step / 80) * apart).backward()
        optimizer.step()
    return ordinary.item(), apart.item()


def test_training_with_it_makes_layers_fit_for_running_at_the_same_time() -> None:
    plain, regular = trained(0.0), trained(0.5)
    assert regular[1] < 0.2 * plain[1]
    assert max(regular[0], plain[0]) < 0.5, "one has not learned: a uniform guess costs 4.1 nats"
