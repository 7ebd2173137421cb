"""Two oracles of adaptive FFN skipping, from the modules of Hugging Face models, token by token.

`paper_loop` is the loop of the paper, written out for three kinds of models. `Hooked` leaves the loop to the model and
puts hooks on its layers, so that it takes any kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from skipstone import SkipFFNAdaptive

ALWAYS = SkipFFNAdaptive(threshold=-1.0, cold_start=0, cold_end=0, warmup_tokens=0, max_share=1.0)
"""Every token behind the prompt skips every FFN but the first."""
PROMPT, LENGTH = 5, 12


@dataclass(frozen=True)
class Walk:
    """One sequence, decoded by `paper_loop`.

    Attributes:
        logits: [1, S - prompt, V], those of the tokens behind the prompt.
        skipped: for each of these tokens, the layers whose FFN it skipped.
        cosines: for each, those of the stream before and after every FFN that was computed.
        past: keys and values of all tokens.
    """

    logits: Tensor
    skipped: list[list[int]]
    cosines: list[list[float]]
    past: DynamicCache

    def margin(self, threshold: float) -> float:
        """Distance of the nearest cosine from a threshold."""
        return min(abs(each - threshold) for token in self.cosines for each in token)


LAYERS = {
    "llama": ("layers", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp", "norm"),
    "gpt2": ("h", "ln_1", "attn", "ln_2", "mlp", "ln_f"),
    "gpt_neox": ("layers", "input_layernorm", "attention", "post_attention_layernorm", "mlp", "final_layer_norm"),
}
"""Of each kind of model: its layers, their norm, attention, norm and FFN, and the norm behind all."""


@torch.no_grad()
def paper_loop(model: Any, ids: Tensor, entry: SkipFFNAdaptive, prompt: int = PROMPT) -> Walk:
    """Decode ids [1, S] behind a prompt, layer by layer."""
    kind, body = model.config.model_type, model.base_model
    stack, norm, attention, ffn_norm, ffn, last_norm = LAYERS[kind]
    layers = getattr(body, stack)
    past = DynamicCache(config=model.config)
    model(input_ids=ids[:, :prompt], past_key_values=past)
    threshold = math.inf if entry.threshold is None else entry.threshold
    most, walk = math.floor(entry.max_share * len(layers) + 1e-9), Walk(torch.empty(0), [], [], past)
    rows = []
    for at in range(prompt, ids.shape[1]):
        h, here = model.get_input_embeddings()(ids[:, [at]]), torch.tensor([[at]])
        if kind == "gpt2":
            h, options = h + body.wpe(here), {"past_key_values": past}
        else:
            name = "layer_past" if kind == "gpt_neox" else "past_key_values"
            options = {name: past, "position_embeddings": body.rotary_emb(h, here), "attention_mask": None}
        met, skipped, cosines = False, list[int](), list[float]()
        for number, layer in enumerate(layers):
            attended = getattr(layer, attention)(getattr(layer, norm)(h), **options)[0]
            before = h if kind == "gpt_neox" else h + attended  # NeoX: both read the same stream
            warm = entry.cold_start <= number < len(layers) - entry.cold_end
            if warm and met and len(skipped) < most:
                skipped.append(number)
                h = h + attended
                continue
            result = getattr(layer, ffn)(getattr(layer, ffn_norm)(before))
            cosines.append(float(torch.cosine_similarity(before.double(), (before + result).double(), dim=-1)))
            met |= warm and at >= prompt + entry.warmup_tokens and cosines[-1] >= threshold
            h = h + attended + result
        rows.append(model.get_output_embeddings()(getattr(body, last_norm)(h))[:, 0])
        walk.skipped.append(skipped)
        walk.cosines.append(cosines)
    return replace(walk, logits=torch.stack(rows, dim=1))


@dataclass
class Hooked:
    """Decodes one sequence with the model's own layers; hooks on the norm and the FFN of each decide, token by token.

    Attributes:
        model: of any kind whose layers have a norm before the FFN and call that `mlp`.
        logits: [V] after the prompt and after each token.
        skipped: for each decoded token, the layers whose FFN was skipped.
        cosines: all cosines that decided.
        past: keys and values of all tokens.
    """

    model: Any
    entry: SkipFFNAdaptive
    logits: list[Tensor] = field(default_factory=list)
    skipped: list[list[int]] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    past: DynamicCache = field(default_factory=DynamicCache)

    @torch.no_grad()
    def run(self, ids: Tensor, prompt: int = PROMPT) -> Hooked:
        """Decode ids [S] behind a prompt."""
        layers = next(each for each in self.model.modules() if isinstance(each, nn.ModuleList))
        self.layers, self.deciding = len(layers), False
        handles = []
        for number, layer in enumerate(layers):
            norm = getattr(layer, "ln_2" if self.model.config.model_type == "gpt2" else "post_attention_layernorm")
            handles.append(norm.register_forward_pre_hook(lambda _, args: setattr(self, "stream", args[0])))
            handles.append(layer.mlp.register_forward_hook(lambda _, args, out, n=number: self._decide(n, out)))
        try:
            self.logits.append(self.model(input_ids=ids[None, :prompt], past_key_values=self.past).logits[0, -1])
            for at in range(prompt, len(ids)):
                self.deciding = at - prompt >= self.entry.warmup_tokens
                self.triggered = False
                self.skipped.append([])
                out = self.model(input_ids=ids[None, at : at + 1], past_key_values=self.past)
                self.logits.append(out.logits[0, -1])
        finally:
            for handle in handles:
                handle.remove()
        return self

    def _decide(self, layer: int, out: Tensor) -> Tensor:
        warm = self.entry.cold_start <= layer < self.layers - self.entry.cold_end
        if not (self.deciding and warm):
            return out
        if self.triggered and len(self.skipped[-1]) < math.floor(self.entry.max_share * self.layers):
            self.skipped[-1].append(layer)
            return torch.zeros_like(out)
        u, h = self.stream.float(), (self.stream + out).float()
        self.cosines.append(float(torch.nn.functional.cosine_similarity(u, h, dim=-1)))
        if self.entry.threshold is not None and self.cosines[-1] >= self.entry.threshold:
            self.triggered = True
        return out
