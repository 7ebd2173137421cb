"""Writing text with a masked diffusion language model (LLaDA, arXiv 2502.09992): an answer of masks is filled in.

Every step predicts all masked tokens at once and keeps the predictions that it trusts most; the others are made again
in the next step, when more of the answer is known. `MaskedLM` does so for every program whose tokens see each other
and that predicts the token at each place, BERT's kind among them.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.program import Role
from skipstone.runtime.executable import Executable, Layout, check_batch

Remasking = Literal["low_confidence", "random"]


class MaskedLM(Executable):
    """A model that fills in masks: tokens in, logits of the token at each place out.

    Models that were made from autoregressive ones may predict each token at the place before it, as Dream does; what
    `denoise` writes with them means nothing.
    """

    def generate(self, *args: Any, **options: Any) -> Any:
        """Raise Unsupported: tokens are not written one after another here."""
        raise Unsupported(
            f"generate with {self.program.source.name}, which predicts masked tokens and no next ones",
            hint="Use denoise(input_ids, length=...).",
        )

    @torch.no_grad()
    def predict(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """The logits of a batch, read in one go.

        Args:
            tokens: int64 [B, S], valid tokens first.
            valid: bool [B, S].
        Returns:
            floating [B, S, V]; those of padding mean nothing.
        Raises:
            InvalidInput: a sequence is too long, or a token id is unknown.
            Unsupported: the batch is padded, and the program would see the padding.
        """
        self.check_length(tokens.shape[1])
        self._check_range(tokens)
        values = {self._input_name(Role.TOKENS): tokens}
        if padding := self._input_name(Role.PADDING):
            values[padding] = valid.to(self.program.input(Role.PADDING).meta["val"].dtype)  # type: ignore[union-attr]
        elif not bool(valid.all()):
            hint = "Run sequences of one length together."
            raise Unsupported("padding for a model that has no input that says where it is", hint=hint)
        self._fill_defaults(values)
        outputs = self.session.run(values)
        return next(outputs[port.name] for port in self.program.outputs if port.role == Role.LOGITS)

    @torch.no_grad()
    def denoise(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        length: int,
        steps: int | None = None,
        block_length: int | None = None,
        remasking: Remasking = "low_confidence",
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        mask_token: int | None = None,
    ) -> Tensor:
        """Continue a prompt by `length` tokens, written in any order (LLaDA, algorithms 4 and 5).

        The answer is cut into blocks that are filled one after another, each in its share of the steps; a step settles
        ``ceil(masked / steps left)`` tokens of each sequence. Mask tokens in the prompt are filled in with the first
        block. The mask token itself is never written.

        Args:
            input_ids: the prompt, integers [B, P]; P may be 0.
            attention_mask: [B, P], nonzero on valid tokens; padding on the left.
            length: tokens to write; 0 fills in the masks of the prompt alone. An answer that ends earlier goes on with
                tokens that mean its end.
            steps: passes of the model in all; by default one for each token of the answer.
            block_length: tokens of a block; by default the answer is one block.
            remasking: which predictions are settled: those of the highest probability, or any.
            temperature: 0 predicts the likeliest token; else tokens are drawn, from logits divided by it.
            generator: of the random numbers, on the device of the executable.
            mask_token: by default `mask_token_id` of the model's configuration.
        Returns:
            int64 [B, P + length]: the prompt with its padding, then the answer.
        Raises:
            InvalidInput: an argument that cannot be, a sequence that is too long, or an unknown token id.
            Unsupported: the batch is padded, and the program would see the padding.
        """
        mask_token = self._mask_token(mask_token)
        blocks, steps = _schedule(length, steps, block_length)
        _check_sampling(remasking, temperature)
        canvas, seen = self._canvas(input_ids, attention_mask, length, mask_token)
        layout = Layout.of(canvas, seen)
        tokens = layout.to_front(canvas)
        columns = torch.arange(layout.width, device=self.device)
        valid = columns < layout.counts.unsqueeze(1)
        masked = valid & (tokens == mask_token)
        for block in range(1, blocks + 1):
            end = layout.counts - length + block * (length // blocks)
            for left in range(steps // blocks, 0, -1):
                within = masked & (columns < end.unsqueeze(1))
                if not bool(within.any()):
                    break
                logits = self.predict(tokens, valid)[within].double()
                logits[:, mask_token] = -math.inf
                chosen = _choose(logits, temperature, generator)
                confidence = torch.full(tokens.shape, -math.inf, dtype=torch.float64, device=self.device)
                if remasking == "random":
                    confidence[within] = _uniform(chosen.shape, generator, self.device)
                else:
                    confidence[within] = logits.log_softmax(-1).gather(1, chosen.unsqueeze(1)).squeeze(1)
                predicted = tokens.masked_scatter(within, chosen)
                rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
                count = -(-within.sum(1, keepdim=True) // left)
                settled = within & (rank < count)
                tokens = torch.where(settled, predicted, tokens)
                masked &= ~settled
        written = tokens.gather(1, layout.rows(layout.width))
        return torch.where(seen, written, canvas)

    def _mask_token(self, given: int | None) -> int:
        token = getattr(self.config, "mask_token_id", None) if given is None else given
        if token is None:
            hint = "Pass mask_token=; a tokenizer calls it mask_token_id."
            raise InvalidInput("the model's configuration does not say which token is the mask.", hint=hint)
        vocabulary = self.program.source.vocabulary
        if not 0 <= token < (math.inf if vocabulary is None else vocabulary) or token != int(token):
            raise InvalidInput(f"mask_token is {token}, no token in [0, {vocabulary}).")
        return int(token)

    def _canvas(
        self, input_ids: Tensor, attention_mask: Tensor | None, length: int, mask_token: int
    ) -> tuple[Tensor, Tensor]:
        """The prompt and an answer of masks, int64 [B, P + length], and its valid tokens, bool of that shape."""
        check_batch(input_ids, attention_mask)
        prompt = input_ids.to(self.device, torch.int64)
        answer = prompt.new_full((len(prompt), length), mask_token)
        canvas = torch.cat([prompt, answer], dim=1)
        if canvas.numel() == 0:
            raise InvalidInput("there is nothing to write.", hint="Give a length of at least 1.")
        seen = torch.ones_like(canvas, dtype=torch.bool)
        if attention_mask is not None:
            seen[:, : prompt.shape[1]] = attention_mask.to(self.device) != 0
        if length and prompt.shape[1] and not bool(seen[:, prompt.shape[1] - 1].all()):
            hint = "Tokenize with padding_side='left': the answer follows the last column."
            raise InvalidInput("the prompt is padded on the right.", hint=hint)
        return canvas, seen


def _schedule(length: int, steps: int | None, block_length: int | None) -> tuple[int, int]:
    """The number of blocks, and of steps in all.

    Raises:
        InvalidInput: a number is out of range, or one does not divide the other.
    """
    if length < 0:
        raise InvalidInput(f"length is {length}, expected at least 0.")
    block_length = length if block_length is None else block_length
    if length and not 1 <= block_length <= length:
        raise InvalidInput(f"block_length is {block_length}, expected 1 to {length}, the length.")
    if length and length % block_length:
        hint = f"The nearest length is {round(length / block_length) * block_length}."
        raise InvalidInput(f"a length of {length} is no multiple of block_length {block_length}.", hint=hint)
    blocks = length // block_length if length else 1
    steps = max(length, 1) if steps is None else steps
    if steps < 1 or steps % blocks:
        hint = f"The nearest number is {max(1, round(steps / blocks)) * blocks}."
        raise InvalidInput(f"steps is {steps}, expected a positive multiple of the {blocks} blocks.", hint=hint)
    return blocks, steps


def _check_sampling(remasking: str, temperature: float) -> None:
    if remasking not in get_args(Remasking):
        raise InvalidInput(f"unknown remasking {remasking!r}.", hint=f"Known are {', '.join(get_args(Remasking))}.")
    if not 0 <= temperature < math.inf:
        raise InvalidInput(f"temperature is {temperature}, expected a number of 0 or more.")


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """A token for each row of logits, float64 [N, V]: the likeliest, or one drawn (the Gumbel-max trick).

    In less than float64 the tails of the noise are cut off, and tokens are drawn as at a lower temperature (arXiv
    2409.02908).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    noise = -(-_uniform(logits.shape, generator, logits.device).log()).log()
    return (logits + temperature * noise).argmax(dim=-1)


def _uniform(shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
