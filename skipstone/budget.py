"""What a rewrite may cost, and the proof of what it does: measured on data that it was not chosen on, with a bound."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from statistics import fmean
from typing import Any, NamedTuple

import mpmath
import torch
from torch import Tensor
from tqdm import tqdm

from skipstone.calibrate import IGNORED, Batch, CalibrationData
from skipstone.ir.errors import InvalidInput, UserError

HELD_OUT = 0.4
"""Share of the calibration sequences that a budget is proved on, where it brings no data of its own."""

Logits = Callable[[Batch], Tensor]
"""Logits [B, S, V] of a batch."""


@dataclass(frozen=True)
class Budget:
    """How much quality a plan may cost. Every limit that is given must hold.

    The figures of ``nll``, ``kl`` and ``top1`` are bounded one-sidedly from validation data, sequence by sequence, at
    the given confidence; what counts is the bound, not the figure.

    Attributes:
        nll: largest relative increase of the mean negative log-likelihood, e.g. 0.01.
        kl: largest mean divergence from the full model's predictions, nats a token.
        top1: least share of predictions whose most likely token stays the same, e.g. 0.98.
        evaluate: a score of an executable, higher is better. It is compared as it is, without a bound.
        max_drop: by how much ``evaluate`` may fall; needed with it.
        confidence: of the bounds.
        validation: sequences to prove it on, as `optimize` takes calibration data. By default the last
            ``HELD_OUT`` of the calibration sequences, which then are not used for anything else.
    Raises:
        UserError: there is no limit, or one that cannot be.
    """

    nll: float | None = None
    kl: float | None = None
    top1: float | None = None
    evaluate: Callable[[Any], float] | None = None
    max_drop: float | None = None
    confidence: float = 0.95
    validation: CalibrationData | None = None

    def __post_init__(self) -> None:
        if not any(limit is not None for limit in (self.nll, self.kl, self.top1, self.evaluate)):
            raise UserError("a budget without a limit.", hint="Write Budget(nll=0.01), or give kl, top1 or evaluate.")
        for name in ("nll", "kl", "max_drop"):
            limit = getattr(self, name)
            if limit is not None and not (_is_number(limit) and limit >= 0):
                raise UserError(f"budget: {name} is {limit!r}, expected a number of 0 or more.")
        if self.top1 is not None and not (_is_number(self.top1) and 0 <= self.top1 <= 1):
            raise UserError(f"budget: top1 is {self.top1!r}, expected a share between 0 and 1.")
        if not (_is_number(self.confidence) and 0.5 <= self.confidence < 1):
            raise UserError(f"budget: confidence is {self.confidence!r}, expected a number in [0.5, 1).")
        if self.evaluate is not None and not callable(self.evaluate):
            hint = "Give a function that takes an executable and returns a score."
            raise UserError(f"budget: evaluate is {self.evaluate!r}.", hint=hint)
        if (self.evaluate is None) != (self.max_drop is None):
            raise UserError("budget: evaluate and max_drop belong together.", hint="Give both, or neither.")

    @property
    def limits(self) -> dict[str, float]:
        """The limits on predictions, by metric."""
        return {name: limit for name in METRICS if (limit := getattr(self, name)) is not None}


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Certificate:
    """One figure of a plan, measured on validation data.

    Attributes:
        metric: ``nll``, ``kl``, ``top1`` (see `Budget`) or ``evaluate``.
        limit: what the budget allowed; for ``evaluate`` the drop.
        value: what was measured; for ``evaluate`` the drop.
        bound: what it is at worst, at this confidence; for ``evaluate`` the value itself.
        confidence: of the bound, one-sided, after the correction for repeated attempts; 0 without a bound.
        sequences, tokens: how many sequences and predictions it was measured on; 0 for ``evaluate``.
        data: sha256 of the validation tokens, "" for ``evaluate``.
        target: what the executable ran on.
        part: of a plan that skips by prompt, the set whose sequences it is about; "" for all of them.
    """

    metric: str
    limit: float
    value: float
    bound: float
    confidence: float
    sequences: int
    tokens: int
    data: str
    target: str
    part: str = ""

    @property
    def holds(self) -> bool:
        """Whether the bound is within the limit."""
        return self.bound >= self.limit if self.metric == "top1" else self.bound <= self.limit

    def __str__(self) -> str:
        sign = ("<", ">=") if self.metric == "top1" else (">", "<=")
        relation = sign[self.holds]
        name = f"{self.part}, {self.metric}" if self.part else self.metric
        if self.metric == "evaluate":
            return f"{self.metric}: drop of {self.value:.4g} {relation} {self.limit:g}, without a bound"
        return (
            f"{name}: {self.value:.4g}, at {self.confidence:.1%} confidence {self.bound:.4g} {relation} "
            f"{self.limit:g} ({self.sequences} sequences, {self.tokens:,} predictions)"
        )


@dataclass(frozen=True)
class Comparison:
    """Predictions of a model and of its rewritten form, summed over each sequence.

    Attributes:
        tokens: predictions, float64 [N], at least one in each sequence.
        nll: negative log-likelihood of the text under the model, nats, float64 [N].
        increase: by how much it is higher under the rewritten form, float64 [N].
        kl: divergence of the rewritten form's predictions from the model's, nats, float64 [N].
        agreement: predictions whose most likely token is the same, float64 [N].
    """

    tokens: Tensor
    nll: Tensor
    increase: Tensor
    kl: Tensor
    agreement: Tensor

    @classmethod
    def of(cls, exact: Tensor, changed: Tensor, batch: Batch) -> Comparison:
        """Compare logits [B, S, V] where a batch has targets; sequences without one are left out."""
        targets = batch.targets
        counted = targets != IGNORED
        before, after = (logits.double().log_softmax(dim=-1) for logits in (exact, changed))
        nll, new_nll = (-each.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) for each in (before, after))
        possible = before > -torch.inf  # what is ruled out adds 0 times infinity, which is nothing
        kl = torch.where(possible, before.exp() * (before - after), 0.0).sum(dim=-1)
        agreement = (before.argmax(dim=-1) == after.argmax(dim=-1)).double()
        kept = counted.any(dim=1)
        figures = (torch.ones_like(nll), nll, new_nll - nll, kl, agreement)
        return cls(*(torch.where(counted, each, 0.0).sum(dim=1)[kept] for each in figures))

    @classmethod
    def concatenate(cls, parts: Sequence[Comparison]) -> Comparison:
        """All sequences of several comparisons."""
        return cls(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)))

    def certificate(self, metric: str, limit: float, confidence: float, data: str, target: str) -> Certificate:
        """The figure of a metric and its bound; less than two sequences prove nothing, and the bound is infinite.

        Bounds take sequences as drawn independently. They hold as often as they say where the sequences are many; where
        they are few and differ by orders of magnitude, somewhat less often. A figure is infinite where the rewritten
        form rules out what the model, or the text, does not.

        Raises:
            InvalidInput: a prediction is NaN.
        """
        estimate = METRICS[metric](self)
        value = estimate.value
        if math.isnan(value):
            raise InvalidInput(
                f"budget: {metric} on the validation data is {value}.", hint="Look at the model's logits."
            )
        sequences, tokens = len(self.tokens), int(self.tokens.sum())
        if metric == "top1":
            margin = estimate._replace(skewness=-estimate.skewness).margin(confidence, sequences)
            if value == 1.0 and sequences > 1:  # no spread: the exact bound for no disagreement in independent trials
                margin = 1 - (1 - confidence) ** (1 / tokens)
            return Certificate(metric, limit, value, value - margin, confidence, sequences, tokens, data, target)
        margin = estimate.margin(confidence, sequences)
        return Certificate(metric, limit, value, value + margin, confidence, sequences, tokens, data, target)

    def keeps(self, budget: Budget) -> bool:
        """Whether the bounds of all metrics are within a budget; NaN never is."""
        return all(
            not math.isnan(METRICS[metric](self).value)
            and self.certificate(metric, limit, budget.confidence, "", "").holds
            for metric, limit in budget.limits.items()
        )


class Estimate(NamedTuple):
    """A figure over sequences.

    Attributes:
        value: the figure.
        error: its standard error.
        skewness: of what single sequences add to it.
    """

    value: float
    error: float
    skewness: float

    def margin(self, confidence: float, sequences: int) -> float:
        """By how much the truth is larger at most, at this confidence.

        It is Student's, and where few large values make the figure, more by the first term of the Edgeworth expansion
        of a studentized mean (Johnson 1978, Hall 1992): the sample that misses them has a small standard error, too.
        """
        if math.isinf(self.value):
            return 0.0
        if sequences < 2:
            return math.inf
        quantile = student_quantile(confidence, sequences - 1)
        return self.error * (
            quantile + max(self.skewness, 0.0) * (2 * quantile * quantile + 1) / (6 * math.sqrt(sequences))
        )


def _ratio(above: Tensor, below: Tensor) -> Estimate:
    """The ratio of two totals over sequences [N] (the delta method)."""
    count = len(above)
    ratio = float(above.sum() / below.sum())
    if count < 2:
        return Estimate(ratio, math.inf, 0.0)
    residual = above - ratio * below
    deviation = float((residual.square().sum() / (count - 1)).sqrt())
    skewness = 0.0
    if count > 2 and deviation > 0:
        skewness = float((residual / deviation).pow(3).sum()) * count / ((count - 1) * (count - 2))
    return Estimate(ratio, deviation * math.sqrt(count) / float(below.sum()), skewness)


METRICS: dict[str, Callable[[Comparison], Estimate]] = {
    "nll": lambda seen: _ratio(seen.increase, seen.nll),
    "kl": lambda seen: _ratio(seen.kl, seen.tokens),
    "top1": lambda seen: _ratio(seen.agreement, seen.tokens),
}
"""How each metric is estimated."""


@cache
def student_quantile(probability: float, degrees: int) -> float:
    """The value that Student's t distribution stays below with this probability, of at least one half.

    Args:
        degrees: of freedom, at least 1.
    """
    # P(|T| > t) is the regularized incomplete beta function at v / (v + t^2).
    tail = 2 * (1 - probability)

    def excess(t: Any) -> Any:
        return mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True) - tail

    if tail == 1:
        return 0.0
    low, high = 0.0, 1.0
    while excess(high) > 0:
        low, high = high, 2 * high
    for _ in range(60):
        middle = fmean((low, high))
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


def compare(exact: Logits, changed: Logits, batches: Iterable[Batch], progress: bool = False) -> Comparison:
    """Compare two models on batches; both run on each before the next is read."""
    parts = [
        Comparison.of(exact(batch), changed(batch), batch)
        for batch in tqdm(list(batches), desc="validate", disable=not progress, leave=False)
    ]
    return Comparison.concatenate(parts)


# ------------------------------------------------------------------------------------------------------------- the data


def hold_out(batches: Sequence[Batch], share: float = HELD_OUT) -> tuple[list[Batch], list[Batch]]:
    """Split data into what a plan is chosen on and what it is proved on.

    Sequences stay in order and the last ones are held out, so that pieces of one document stay together. What is held
    out and stands among the first too is left out there.

    Args:
        share: of the sequences to hold out.
    """
    digests = [[_digest(row) for row in _rows(batch)] for batch in batches]
    order = [digest for batch in digests for digest in batch]
    proof = set(order[len(order) - round(share * len(order)) :])
    chosen_on, proved_on = [], []
    for batch, names in zip(batches, digests, strict=True):
        held = torch.tensor([name in proof for name in names])
        chosen_on.append(batch.sequences(~held))
        proved_on.append(batch.sequences(held))
    return [each for each in chosen_on if len(each.tokens)], [each for each in proved_on if len(each.tokens)]


def check_data(chosen_on: Sequence[Batch], proved_on: Sequence[Batch]) -> None:
    """Refuse validation data that proves nothing.

    Raises:
        InvalidInput: it has fewer than two sequences with a target, or some that stand in the calibration data too.
    """
    count = sum(int((batch.targets != IGNORED).any(dim=1).sum()) for batch in proved_on)
    if count < 2:
        raise InvalidInput(
            f"a budget is proved on at least two sequences with a token to predict, there are {count}.",
            hint="Give more calibration data, better thirty sequences or more for the proof alone.",
        )
    known = {_digest(row) for batch in chosen_on for row in _rows(batch)}
    common = sum(_digest(row) in known for batch in proved_on for row in _rows(batch))
    if common:
        hint = "A budget is proved on sequences that nothing was chosen on."
        raise InvalidInput(f"{common} validation sequences stand in the calibration data too.", hint=hint)


def data_hash(batches: Sequence[Batch]) -> str:
    """sha256 over the valid tokens of all sequences, masked ones as they were, in order."""
    digests = [_digest(row) for batch in batches for row in _rows(batch)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _rows(batch: Batch) -> list[Tensor]:
    """The valid tokens of each sequence, masked ones as they were: where the masks are makes no other text of it."""
    return [tokens[valid] for tokens, valid in zip(batch.text, batch.valid, strict=True)]


def _digest(row: Tensor) -> str:
    return hashlib.sha256(row.cpu().contiguous().numpy().tobytes()).hexdigest()
