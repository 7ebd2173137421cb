"""What leaving out sublayers costs in quality, as one number: how far the logits are from the full program's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, fx
from torch.nn.functional import cross_entropy

from skipstone.calibrate import IGNORED, Batch
from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.program import Program, Role
from skipstone.runtime.executable import is_causal_lm

Metric = Callable[[Tensor, Batch], float]
"""The mean over a batch's counted tokens of something that should be low, from the logits [B, S, vocabulary]."""

Choice = Literal["kl", "nll"] | Metric

Objective = Callable[[Iterable[Tensor]], float]
"""The loss of quality of a program from its logits of each batch; 0 for the full program, infinite for NaN."""


def check_objective(choice: Choice, program: Program, batches: Sequence[Batch]) -> fx.Node:
    """Refuse an objective that a program or the data does not have; the node of the logits.

    Raises:
        InvalidInput: an unknown objective, data without a token that counts, or labels for a model that takes none.
        Unsupported: the program has no logits, or the right predictions are not known.
    """
    if choice not in ("kl", "nll") and not callable(choice):
        raise InvalidInput(f"unknown objective {choice!r}.", hint="Use 'kl', 'nll' or a function of logits and batch.")
    logits = program.output(Role.LOGITS)
    if logits is None:
        raise Unsupported("choosing what to leave out by the logits of a model that has none")
    if choice == "nll" or is_causal_lm(program):
        check_labels(program, batches)
    if sum(int(_counted(choice, batch).sum()) for batch in batches) == 0:
        raise InvalidInput("the calibration data holds no token that counts.")
    return logits


def check_labels(program: Program, batches: Sequence[Batch]) -> None:
    """Refuse data that does not say what is right for this model to predict.

    Raises:
        InvalidInput: there are labels, and the model predicts next tokens.
        Unsupported: there are none, and it does not.
    """
    labelled = [batch.labels is not None for batch in batches]
    if is_causal_lm(program):
        if any(labelled):
            raise InvalidInput("the data has labels, and the model predicts next tokens.", hint="Leave them out.")
    elif not all(labelled):
        raise Unsupported(
            "the likelihood of next tokens under a model that sees them",
            hint="Mask some tokens with skipstone.mask_tokens, or use objective='kl'.",
        )


def make_objective(choice: Choice, batches: Sequence[Batch], full: Iterable[Tensor]) -> Objective:
    """An objective over batches.

    ``"kl"`` is the mean over counted tokens (`Batch.counted`) of KL(full || skipped), in nats, ``"nll"`` the rise of
    the mean negative log-likelihood of `Batch.targets`, in nats; a function is a rise likewise, its values weighted by
    counted tokens. For ``"kl"`` the full program's log-probabilities are kept: ``tokens * vocabulary`` floats.

    Args:
        full: logits [B, S, vocabulary] of the full program for each batch, floating.
    Raises:
        InvalidInput: of the full program it is NaN or infinite.
    """
    counts = [int(_counted(choice, batch).sum()) for batch in batches]

    def mean(values: Iterable[float]) -> float:
        found = sum(value * count for value, count in zip(values, counts, strict=True) if count) / sum(counts)
        return math.inf if math.isnan(found) else found

    if choice == "kl":
        reference = [log_probabilities(logits, batch.counted) for logits, batch in zip(full, batches, strict=True)]
        if not all(bool(torch.isfinite(each.exp()).all()) for each in reference):
            raise InvalidInput("the calibration data leads to NaN logits.")

        def mean_divergence(logits: Iterable[Tensor]) -> float:
            parts = zip(reference, logits, batches, strict=True)
            rows = (divergence(known, log_probabilities(each, batch.counted)) for known, each, batch in parts)
            return mean(float(each.mean()) for each in rows)

        return mean_divergence
    metric = _nll if choice == "nll" else choice
    base = mean(metric(each, batch) for each, batch in zip(full, batches, strict=True))
    if not math.isfinite(base):
        raise InvalidInput(f"the objective of the full model is {base}.")
    return lambda logits: mean(metric(each, batch) for each, batch in zip(logits, batches, strict=True)) - base


def _counted(choice: Choice, batch: Batch) -> Tensor:
    """bool [B, S]: the positions that the mean is over."""
    return batch.targets != IGNORED if choice == "nll" else batch.counted


def log_probabilities(logits: Tensor, counted: Tensor) -> Tensor:
    """[counted tokens, vocabulary], float32 or better, of logits [B, S, vocabulary] where bool [B, S] is true."""
    chosen = logits[counted.to(logits.device)]
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32)).log_softmax(-1)


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) of log-probabilities [rows, vocabulary], nats: float64 [rows].

    What has no probability in the reference adds nothing. Gradients pass through it.
    """
    terms = torch.where(reference.isneginf(), 0, reference.exp() * (reference - other))
    return terms.sum(-1, dtype=torch.float64)


def _nll(logits: Tensor, batch: Batch) -> float:
    """Mean negative log-likelihood of the targets, nats."""
    targets = batch.targets.to(logits.device)
    predicted, right = logits[targets != IGNORED], targets[targets != IGNORED]
    loss = cross_entropy(predicted.to(torch.promote_types(predicted.dtype, torch.float32)), right, reduction="none")
    return float(loss.mean(dtype=torch.float64))
