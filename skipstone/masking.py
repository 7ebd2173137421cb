"""Masked sequences, for models that fill in masks: what they are calibrated on, compared on and scored on."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from skipstone.calibrate import IGNORED, CalibrationData, items, read_item
from skipstone.ir.errors import InvalidInput


def mask_tokens(
    data: CalibrationData, mask_token: int, *, share: float | None = None, keep: Collection[int] = (), seed: int = 0
) -> list[dict[str, Tensor]]:
    """Token batches with some tokens of each sequence masked, and what they were.

    Of a sequence of L tokens that may be masked, l are drawn, and l itself from 1 to L, all numbers being equally
    likely. The mean over sequences of the mean negative log-likelihood of their masked tokens then is an unbiased
    estimate of LLaDA's bound of the negative log-likelihood of a token (arXiv 2502.09992, equation 6). The numbers of
    several sequences are spread evenly, which lowers the variance and not the mean.

    Args:
        data: tensors of token ids [B, S] (or [S]), or mappings with `input_ids` and `attention_mask`.
        mask_token: what stands for a masked token.
        share: mask this share of each sequence instead, 0 to 1, but at least one token.
        keep: tokens that are never masked, such as the one that begins each sequence.
        seed: of the choice.
    Returns:
        mappings with `input_ids`, `attention_mask` and `labels` as transformers has them: int64 [B, S], labels -100
        where nothing is masked.
    Raises:
        InvalidInput: the share is out of range, the mask token is no token id, or an item is no batch of tokens or
            holds the mask token.
    """
    if share is not None and not 0 < share <= 1:
        raise InvalidInput(f"share is {share}, expected a number above 0 and up to 1.")
    if isinstance(mask_token, bool) or not isinstance(mask_token, int):
        hint = "Give the token id that stands for a masked token, as the model's configuration has it."
        raise InvalidInput(f"mask_token is {mask_token!r}.", hint=hint)
    batches = [read_item(item, f"batch {number}") for number, item in enumerate(items(data))]
    generator = torch.Generator().manual_seed(seed)
    sequences = sum(len(tokens) for tokens, *_ in batches)
    order = torch.randperm(sequences, generator=generator).double()
    drawn = iter(((order + torch.rand(1, generator=generator, dtype=torch.float64)) / sequences).tolist())
    masked = []
    for number, (tokens, mask, _) in enumerate(batches):
        tokens = tokens.long()
        valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
        if bool((valid & (tokens == mask_token)).any()):
            raise InvalidInput(f"batch {number} holds the mask token {mask_token}.", hint="Give whole texts.")
        may = valid & ~torch.isin(tokens, torch.tensor(list(keep), dtype=torch.int64))
        most = may.sum(1)
        if share is None:
            count = 1 + (torch.tensor([next(drawn) for _ in tokens], dtype=torch.float64) * most).floor()
        else:
            count = (share * most).round().clamp(min=1)
        places = torch.rand(tokens.shape, generator=generator).masked_fill(~may, 2.0).argsort(1).argsort(1)
        hidden = places < count.minimum(most).unsqueeze(1)
        masked.append(
            {
                "input_ids": tokens.masked_fill(hidden, mask_token),
                "attention_mask": valid.long(),
                "labels": tokens.masked_fill(~hidden, IGNORED),
            }
        )
    return masked
