"""How well a model predicts the held-out text: `python -m benchmarks.reference.evaluate DIR [--windows N]`.

Any callable that turns token ids into logits can be measured, so that a model and its optimized executable are compared
on the same windows. A model that fills in masks is measured on masked bytes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.reference import tokenizer
from benchmarks.reference.corpus import Split, corpus
from skipstone.calibrate import IGNORED
from skipstone.masking import mask_tokens

CHECKPOINT = Path(__file__).parent / "stdlib-llama"

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Shares of masked bytes that a model that fills in masks is measured at."""


@dataclass(frozen=True)
class Evaluation:
    """What a model scored, with the size of the sample."""

    nll: float
    """Mean negative log-likelihood, nats per byte."""
    standard_error: float
    """Standard error of `nll` over windows, nats per byte; the windows are taken as independent."""
    top1: float
    """Share of bytes that were the most likely one, 0 to 1."""
    windows: int
    predicted_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """The mean negative log-likelihood in bits."""
        return self.nll / math.log(2)

    def __str__(self) -> str:
        return (
            f"{self.nll:.4f} ± {self.standard_error:.4f} nats per byte, {self.bits_per_byte:.4f} bits per byte, "
            f"top-1 {self.top1:.2%} ({self.predicted_bytes:,} bytes in {self.windows} windows)"
        )


def windows(split: Split, count: int, length: int) -> Tensor:
    """Windows of `length` bytes, evenly spread over a split, each after the begin token: int64 [count, length + 1].

    Raises ValueError where there are fewer than two windows, or the split is shorter than one.
    """
    text = tokenizer.encode(corpus(split))
    if count < 2 or not 0 < length <= len(text):
        raise ValueError(f"{count} windows of {length} bytes: take at least 2, of 1 to {len(text)} bytes")
    starts = torch.linspace(0, len(text) - length, count, dtype=torch.float64).long()
    return F.pad(text[starts[:, None] + torch.arange(length)], (1, 0), value=tokenizer.BEGIN)


def evaluate(logits_fn: Callable[[Tensor], Tensor], samples: Tensor, batch: int = 8) -> Evaluation:
    """Score next-byte predictions on `samples`, int64 [windows, length + 1], at least two windows.

    `logits_fn` takes token ids int64 [batch, length], the last batch may be smaller, and returns logits
    [batch, length, vocabulary] in any floating dtype.
    """
    return _score(logits_fn, ((part[:, :-1], part[:, 1:]) for part in samples.split(batch)))


def evaluate_masked(
    logits_fn: Callable[[Tensor], Tensor],
    samples: Tensor,
    share: float | None = None,
    batch: int = 8,
    seed: int = 0,
) -> Evaluation:
    """Score predictions of masked bytes on `samples`, int64 [windows, length + 1], at least two windows.

    Without a share, the mean negative log-likelihood is a Monte-Carlo estimate of an upper bound of that of a byte,
    with one mask for each window (see `skipstone.masking.mask_tokens`).

    Args:
        logits_fn: as in `evaluate`, over the whole window.
        share: of bytes that are masked, 0 to 1; None for all numbers of them alike.
        seed: of the masks.
    """
    masked = mask_tokens(samples.split(batch), tokenizer.MASK, share=share, keep=(tokenizer.BEGIN,), seed=seed)
    return _score(logits_fn, ((part["input_ids"], part["labels"]) for part in masked))


@torch.no_grad()
def _score(logits_fn: Callable[[Tensor], Tensor], parts: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Score predictions of labels from token ids, both int64 [batch, length]."""
    losses, hits, predicted = [], 0, 0
    for ids, labels in parts:
        logits, asked = logits_fn(ids).float(), labels != IGNORED
        loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        losses.append(loss.double().sum(1) / asked.sum(1))
        hits += int((logits.argmax(-1) == labels).sum())
        predicted += int(asked.sum())
    per_window = torch.cat(losses)
    error = per_window.std().item() / math.sqrt(len(per_window))
    return Evaluation(per_window.mean().item(), error, hits / predicted, len(per_window), predicted)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference.evaluate", description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=CHECKPOINT, metavar="DIR")
    parser.add_argument("--split", choices=get_args(Split), default="test")
    parser.add_argument("--windows", type=int, default=512, metavar="N")
    parser.add_argument("--length", type=int, default=256, metavar="BYTES")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.directory, dtype=torch.float32).eval()
    samples = windows(options.split, options.windows, options.length)

    def logits_fn(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    if not hasattr(model.config, "mask_token_id"):
        print(f"{options.split}: {evaluate(logits_fn, samples)}")
        return
    print(f"{options.split}, upper bound: {evaluate_masked(logits_fn, samples)}")
    for share in SHARES:
        print(f"{options.split}, {share:.0%} masked: {evaluate_masked(logits_fn, samples, share)}")


if __name__ == "__main__":
    main()
