"""Filling in masks step by step: against a plain loop on the model itself, row by row and without padding."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EuroBertConfig, EuroBertForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import skipstone
from skipstone.errors import InvalidInput, Unsupported
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.capture.module import capture_module
from skipstone.ir.stream import find_stream
from skipstone.runtime.denoise import MaskedLM
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from tests import models
from tests.models import MASK, VOCABULARY


class Plain(nn.Module):
    """A decoder as LLaDA writes it: rotary positions and a SwiGLU, no mask, every token sees all others."""

    def __init__(self, width: int = 32, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.heads = nn.Embedding(VOCABULARY, width), heads
        norms = (nn.RMSNorm(width), nn.RMSNorm(width))
        sizes = ((width, 3 * width), (width, width), (width, 96), (48, width))
        self.blocks = nn.ModuleList(
            nn.ModuleList([*norms, *(nn.Linear(*size, bias=False) for size in sizes)]) for _ in range(layers)
        )
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def turned(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        rates = 10000.0 ** (-torch.arange(half, device=x.device) / half)
        angles = torch.arange(x.shape[2], device=x.device)[:, None] * rates
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for before, between, packed, out, up, down in self.blocks:  # type: ignore[misc]
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in packed(before(x)).chunk(3, dim=-1))
            mixed = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=False)
            x = x + out(mixed.transpose(1, 2).flatten(2))
            gate, value = up(between(x)).chunk(2, dim=-1)
            x = x + down(F.silu(gate) * value)
        return {"logits": self.head(self.norm(x))}


@cache
def model(name: str) -> Any:
    if name == "llada":
        return models.model(name)
    torch.manual_seed(0)
    if name == "eurobert":
        sizes = {each: value for each, value in models._SIZES.items() if each != "num_hidden_layers"}
        return EuroBertForMaskedLM(EuroBertConfig(**sizes, num_hidden_layers=2, mask_token_id=MASK)).eval()
    plain = Plain().eval()
    for parameter in plain.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return plain


@cache
def program(name: str) -> Any:
    if name == "llada":
        return models.program(name)
    if name == "eurobert":
        return capture_huggingface(model(name))
    return capture_module(model(name), {"input_ids": text(3, 7)})


def executable(name: str) -> MaskedLM:
    built = Executable(EagerSession(program(name)), config=getattr(model(name), "config", None))
    assert isinstance(built, MaskedLM)
    return built


def text(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens other than the mask and the special ones, int64 [batch, length]."""
    return torch.randint(3, MASK, (batch, length), generator=torch.Generator().manual_seed(seed))


def probabilities(name: str, row: list[int]) -> Tensor:
    """What the model predicts at each place of a sequence, the mask ruled out: float64 [S, V]."""
    with torch.no_grad():
        out = model(name)(input_ids=torch.tensor([row]))
    logits = (out["logits"] if isinstance(out, dict) else out.logits)[0].double()
    logits[:, MASK] = -math.inf
    return logits.softmax(-1)


def filled(name: str, prompt: list[int], length: int, steps: int, blocks: int) -> list[int]:
    """The greedy answer, most confident tokens first."""
    row = [*prompt, *[MASK] * length]
    for block in range(blocks):
        end = len(prompt) + (block + 1) * length // blocks
        total, rounds = row[:end].count(MASK), steps // blocks
        for number in range(rounds):
            best, token = probabilities(name, row).max(-1)
            still = sorted((i for i in range(end) if row[i] == MASK), key=lambda i: -float(best[i]))
            for place in still[: total // rounds + (number < total % rounds)]:
                row[place] = int(token[place])
    return row


@pytest.mark.parametrize(("name", "layers"), [("llada", 3), ("eurobert", 2), ("plain", 2)])
def test_models_whose_tokens_see_each_other_are_captured_with_their_layers(name: str, layers: int) -> None:
    assert find_stream(program(name)).layers == layers
    tokens = text(2, 9)
    expected = model(name)(input_ids=tokens)
    logits = executable(name)(input_ids=tokens)["logits"]
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)
    changed = tokens.clone()
    changed[:, -1] = MASK
    assert not torch.equal(executable(name)(input_ids=changed)["logits"][:, 0], logits[:, 0])


@pytest.mark.parametrize("name", ["llada", "eurobert", "plain"])
@pytest.mark.parametrize(("length", "steps", "blocks"), [(6, 6, 1), (7, 3, 1), (6, 4, 2), (6, 9, 3), (1, 1, 1)])
def test_it_is_the_plain_loop(name: str, length: int, steps: int, blocks: int) -> None:
    prompt = text(1, 5)
    found = executable(name).denoise(prompt, length=length, steps=steps, block_length=length // blocks, mask_token=MASK)
    assert found[0].tolist() == filled(name, prompt[0].tolist(), length, steps, blocks)


def test_a_padded_batch_is_written_as_its_rows_alone() -> None:
    """The padding comes back as it was given, even where it looks like a mask."""
    prompt = text(3, 6)
    mask = torch.tensor([[0, 0, 0, 0, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    prompt[mask == 0] = MASK
    found = executable("llada").denoise(prompt, mask, length=6, steps=4, block_length=3)
    assert torch.equal(found[:, :6], prompt)
    for row, kept, answer in zip(prompt, mask.bool(), found, strict=True):
        alone = row[kept].tolist()
        assert [*alone, *answer[6:].tolist()] == filled("llada", alone, 6, 4, 2)


def test_without_a_prompt_and_without_an_answer() -> None:
    opt = executable("llada")
    alone = opt.denoise(torch.empty(2, 0, dtype=torch.int64), length=4)
    assert alone.shape == (2, 4)
    assert not bool((alone == MASK).any())
    prompt = text(2, 8)
    prompt[0, 2:5] = prompt[1, 6] = MASK
    found = opt.denoise(prompt, length=0, steps=3)
    for row, answer in zip(prompt.tolist(), found.tolist(), strict=True):
        assert answer == filled("llada", row, 0, 3, 1)
    assert torch.equal(found[prompt != MASK], prompt[prompt != MASK])


def test_masks_in_the_prompt_go_with_the_first_block() -> None:
    prompt = text(1, 5)
    prompt[0, 1] = MASK
    found = executable("llada").denoise(prompt, length=4, steps=4, block_length=2)
    assert found[0].tolist() == filled("llada", prompt[0].tolist(), 4, 4, 2)


@pytest.mark.parametrize(("length", "steps", "blocks", "passes"), [(8, 8, 1, 8), (8, 3, 1, 3), (4, 12, 2, 4)])
def test_a_step_is_one_pass_and_none_is_idle(length: int, steps: int, blocks: int, passes: int) -> None:
    opt, seen = executable("llada"), []
    run = opt.session.run
    opt.session.run = lambda values: seen.append(int((values["input_ids"] == MASK).sum())) or run(values)  # type: ignore[method-assign,func-returns-value]
    opt.denoise(text(1, 5), length=length, steps=steps, block_length=length // blocks, remasking="random")
    assert len(seen) == passes
    settled = [a - b for a, b in zip(seen, [*seen[1:], 0], strict=True)]
    assert sum(settled) == length
    assert max(settled) - min(settled) <= 1


def test_tokens_are_drawn_from_the_softened_distribution() -> None:
    """A chi-square test of 20,000 draws; its 99.9% quantile is about d + 3.1 sqrt(2 d)."""
    temperature, draws, prompt = 0.7, 20_000, text(1, 3)
    expected = probabilities("llada", [*prompt[0].tolist(), MASK])[-1].pow(1 / temperature)
    expected *= draws / expected.sum()
    generator = torch.Generator().manual_seed(0)
    opt = executable("llada")
    found = opt.denoise(prompt.expand(draws, 3), length=1, temperature=temperature, generator=generator)[:, -1]
    counts = torch.bincount(found, minlength=VOCABULARY).double()
    assert counts[MASK] == 0
    common = expected > 5
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    hoped = torch.cat([expected[common], expected[~common].sum()[None]])
    degrees = len(hoped) - 1
    assert degrees >= 5
    assert float(((seen - hoped).square() / hoped).sum()) < degrees + 3.1 * math.sqrt(2 * degrees)


def test_random_numbers_come_from_the_generator() -> None:
    opt = executable("llada")

    def write(seed: int, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return opt.denoise(text(2, 4), length=8, generator=generator, **options)

    for options in ({"temperature": 1.0}, {"remasking": "random"}):
        assert torch.equal(write(0, **options), write(0, **options))
        assert not torch.equal(write(0, **options), write(1, **options))
    assert torch.equal(write(0), write(1))


@pytest.mark.slow
def test_an_optimized_model_writes_the_same_on_onnx_runtime() -> None:
    opt = skipstone.optimize(models.model("llada"), progress=False)
    prompt, mask = text(2, 5), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    found = opt.denoise(input_ids=prompt, attention_mask=mask, length=6, steps=3)
    assert torch.equal(found, executable("llada").denoise(prompt, mask, length=6, steps=3))


class Published(PreTrainedModel):
    """What matters of the classes that LLaDA is published with: they claim to generate, and branch on their mask."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = Plain()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def can_generate(self) -> bool:
        return True

    def prepare_inputs_for_generation(self, input_ids: Tensor, **options: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> CausalLMOutputWithPast:
        if attention_mask is not None and 0.0 in attention_mask:
            raise NotImplementedError
        return CausalLMOutputWithPast(logits=self.model(input_ids)["logits"])


def test_published_code_is_taken_with_an_example_of_its_tokens() -> None:
    published = Published(PreTrainedConfig(mask_token_id=MASK, vocab_size=VOCABULARY)).eval()
    example = {"input_ids": text(2, 7)}
    opt = skipstone.optimize(published, target="eager", example_inputs=example, progress=False)
    prompt, row = text(1, 4), [*text(1, 4)[0].tolist(), MASK]
    logits = published(torch.tensor([row])).logits[0, -1]
    assert opt.denoise(prompt, length=1)[0, -1] == int(logits[:MASK].argmax())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"length": -1}, "length is -1"),
        ({"length": 200}, "205 tokens is longer than 96"),
        ({"block_length": 0}, "block_length is 0, expected 1 to 8"),
        ({"block_length": 9}, "block_length is 9, expected 1 to 8"),
        ({"block_length": 3}, "no multiple of block_length 3.*The nearest length is 9"),
        ({"steps": 0}, "steps is 0, expected a positive multiple of the 1 blocks"),
        ({"steps": 5, "block_length": 4}, "multiple of the 2 blocks.*The nearest number is 4"),
        ({"remasking": "best"}, "unknown remasking 'best'.*low_confidence, random"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"mask_token": VOCABULARY}, "mask_token is 61"),
        ({"mask_token": 3.5}, r"mask_token is 3\.5"),
        ({"input_ids": [[1, 2]]}, r"must be a tensor \[batch, sequence\], got list"),
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, r"got \[3\]"),
        ({"input_ids": torch.ones(2, 3)}, "input_ids is torch.float32"),
        ({"input_ids": torch.full((1, 5), 77)}, r"token id 77 \(row 0, token 0\)"),
        ({"input_ids": torch.empty(0, 5, dtype=torch.int64)}, "nothing to write"),
        ({"input_ids": torch.empty(1, 0, dtype=torch.int64), "length": 0}, "nothing to write"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \[1, 4\]"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, "padded on the right.*padding_side='left'"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1]])}, "a hole"),
    ],
)
def test_what_cannot_be_is_refused_before_work_begins(changed: dict[str, Any], message: str) -> None:
    opt = executable("llada")
    opt.session.run = lambda values: pytest.fail("work began")  # type: ignore[method-assign]
    options = {"input_ids": text(1, 5), "length": 8} | changed
    with pytest.raises(InvalidInput, match=message):
        opt.denoise(**options)


def test_what_a_model_lacks_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"which token is the mask.*mask_token="):
        executable("plain").denoise(text(1, 5), length=4)
    with pytest.raises(Unsupported, match="no input that says where"):
        executable("plain").denoise(text(2, 3), torch.tensor([[1, 1, 1], [0, 1, 1]]), length=4, mask_token=MASK)
    with pytest.raises(Unsupported, match=r"no next ones.*denoise\(input_ids, length=\.\.\.\)"):
        executable("llada").generate(text(1, 5))


def test_only_models_that_fill_in_masks_denoise() -> None:
    assert not isinstance(Executable(EagerSession(models.program("llama"))), MaskedLM)
    assert not isinstance(Executable(EagerSession(models.program("bert"))), MaskedLM)  # it returns hidden states
    tagger = program("plain").copy()
    tagger.source = replace(tagger.source, vocabulary=VOCABULARY + 1)  # its logits are not over the vocabulary
    assert type(Executable(EagerSession(tagger))) is Executable
