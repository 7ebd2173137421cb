"""Training routers: a linear function a sublayer that tells from a prompt whether its continuation needs the sublayer.

The model is frozen. A router reads the mean state of a prompt before its sublayer (`skipstone.ir.prompts.prompt_mean`);
the sigmoid of what it says is the probability that the continuation goes without. FiRST (arXiv 2410.12513) decides so,
but publishes no training; what is done here:

* Decisions are drawn, ``logit + logistic noise > 0`` for each sequence and unit, and the gradient is that of the
  sigmoid at the same point (the straight-through estimator of the binary concrete distribution, arXiv 1611.00712). With
  decisions that are not drawn, nothing is skipped at first, where the divergence is flat, and nothing is learned.
* The loss is the divergence of the continuation's predictions from the full model's, plus a penalty on the square by
  which the mean share of skipped sublayers misses the wanted one. The first half of a sequence counts as its prompt.
* What a router reads is centred and scaled by what the calibration prompts look like, which is folded into the result.
* In the end a few sets are chosen among those that the calibration prompts decide for, and one number is added to all
  biases, so that these prompts skip about the wanted share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from skipstone.adapters import AdaptedModel
from skipstone.calibrate import Batch, CalibrationData, joined, program_inputs, token_batches
from skipstone.certify import prompt_lengths
from skipstone.ir.capture.exported import refuse_unusable
from skipstone.ir.errors import InvalidInput, Unsupported, UserError
from skipstone.ir.program import Program, Role
from skipstone.ir.prompts import prompt_mean_reference
from skipstone.ir.stream import Sublayer, SublayerKind, find_stream
from skipstone.objective import check_objective, divergence, log_probabilities
from skipstone.optimize import capture
from skipstone.passes.kv_cache import InsertKVCache
from skipstone.passes.skip_by_prompt import BIAS, WEIGHT, SkipByPrompt
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan
from skipstone.replay import Evaluator
from skipstone.routed import RoutedProgram
from skipstone.similarity import refuse_stream
from skipstone.units import SUBLAYERS, Space, Unit, entry_of

STEP_TOKENS = 1024
"""Size up to which batches of one width are joined for a step."""

SMALLEST_SPREAD = 1e-4
"""How far states must be from their mean, over their size, for a router to read them."""

TRIALS = 31
"""How many shares are tried for what prompts have to decide for."""

CANDIDATES = 512
"""How many sets, those that most prompts decide for, the sets of a plan are chosen among."""


@dataclass(frozen=True)
class Step:
    """One step of the training, on one batch.

    Attributes:
        divergence: KL(full || skipped) in nats a continuation's token.
        share: the share of all sublayers that the continuations went without.
        loss: the divergence and the penalty.
    """

    divergence: float
    share: float
    loss: float


@dataclass(frozen=True, eq=False)
class Routers:
    """Trained routers.

    Attributes:
        weight, bias: [sublayers, hidden] and [sublayers], in the wider of float32 and the model's dtype; zeros for a
            sublayer that always stays, and for all but the first of a layer that is left out whole.
        sets: what is left out; of these, a prompt chooses the most probable one.
        choices: int64 [prompts], the set that each calibration prompt chooses; without sequences of a single token.
        share: the mean share of all sublayers that these prompts' continuations go without.
        steps: how the training went.
        fingerprint: of the model that they are for.
        model: that model where adapters were trained: a copy of the one given, with the adapters merged.
    """

    weight: Tensor
    bias: Tensor
    sets: tuple[SkipSublayers, ...]
    choices: Tensor
    share: float
    steps: tuple[Step, ...]
    fingerprint: str
    model: PreTrainedModel | None = None

    @property
    def plan(self) -> Plan:
        """The plan that skips by these routers."""
        tensors = {WEIGHT: self.weight, BIAS: self.bias} if len(self.sets) > 1 else {}
        return Plan([SkipByPrompt(self.sets, by="routers")], model=self.fingerprint, tensors=tensors)

    @property
    def frequencies(self) -> Tensor:
        """float64 [sets]: the share of the calibration prompts that chooses each set."""
        return self.choices.bincount(minlength=len(self.sets)).double() / len(self.choices)


def train_routers(
    model: nn.Module | Program,
    calibration: CalibrationData,
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
    share: float = 0.25,
    sets: int = 4,
    space: Space = SUBLAYERS,
    steps: int = 300,
    rate: float = 0.05,
    penalty: float = 10.0,
    temperature: float = 1.0,
    lora: Any = None,
    lora_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> Routers:
    """Train routers for a model, and choose the sets that its prompts are continued without.

    Nothing is proved about quality: give the plan and a budget to `optimize`, with data that was not trained on. The
    model is left as it is, also when the training is interrupted.

    Args:
        model: as of `optimize`, or a captured program. It predicts next tokens.
        calibration: sequences of prompts and continuations, as `optimize` takes them; the first half of each counts as
            its prompt. A step takes one batch: give several sequences together.
        example_inputs: as of `optimize`.
        share: how many of all sublayers a continuation goes without on average, above 0.
        sets: how many sets there are to choose from, at most.
        space: what may be left out, without a minimum gap.
        steps: of training.
        rate: step size of Adam for the routers.
        penalty: nats that missing the share by 1 would cost.
        temperature: how smooth the sigmoid is that gradients are taken of.
        lora: a `peft.LoraConfig` of adapters that are trained together with the routers, to make up for what is
            skipped. Prompts then count in the divergence, too, so that the adapters leave them as they were.
        lora_rate: step size for the adapters.
        seed: of the order of the batches, the draws and the adapters.
        progress: show a progress bar.
    Raises:
        InvalidInput: an argument that cannot be, or data without continuations, or that leads to NaN.
        UserError: the model or the adapters cannot be used as they are.
        Unsupported: a model that cannot skip by prompt, or nothing is left that any prompt would skip.
    """
    recipe = _Recipe(share, sets, steps, rate, penalty, temperature, lora_rate, seed)
    if not isinstance(model, Program):
        refuse_unusable(model)
    adapting = model if isinstance(model, PreTrainedModel) and lora is not None else None
    if lora is not None and adapting is None:
        raise UserError(f"adapters for a {type(model).__name__}.", hint="Give a Hugging Face model.")
    adapted = None if adapting is None else AdaptedModel.of(adapting, lora, seed)
    program = model if isinstance(model, Program) else capture(model, example_inputs)
    units = _Units.of(program, space)
    if share >= (most := float(units.share.sum())):
        hint = "Ask for less, or protect fewer layers."
        raise InvalidInput(f"share is {share}, but of the sublayers {most:.0%} may be left out.", hint=hint)
    batches = _with_continuations(program, calibration)
    routers = _LinearRouters(_states(program, units, batches), share / most)
    done = _Training(program, units, routers, recipe, adapted).run(batches, progress)
    merged = None
    if adapted is not None:
        merged = adapted.merged()
        program = capture(merged)  # merging rounds: what its prompts look like is read anew
        units = _Units.of(program, space)
    weight, bias = routers.folded()
    logits = torch.cat([_logits(states, weight, bias).cpu() for states in _states(program, units, batches)])
    shift, chosen = _fitted(units, logits, share, sets)
    choices = _choices(logits + shift, chosen)
    return Routers(
        weight=units.by_sublayer(weight),
        bias=units.by_sublayer(bias + shift),
        sets=tuple(units.entry(row) for row in chosen),
        choices=choices,
        share=units.mean_share(chosen[choices]),
        steps=done,
        fingerprint=program.source.fingerprint,
        model=merged,
    )


@dataclass(frozen=True)
class _Recipe:
    """The numbers of a training, see `train_routers`."""

    share: float
    sets: int
    steps: int
    rate: float
    penalty: float
    temperature: float
    lora_rate: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("sets", "steps"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}, expected at least 1.")
        for name in ("share", "rate", "penalty", "temperature", "lora_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidInput(f"{name} is {getattr(self, name)}, expected a number above 0.")


# ------------------------------------------------------------------------------------------------- what may be left out


@dataclass(frozen=True)
class _Units:
    """What may be left out of a program: U units of one or more sublayers.

    Attributes:
        names: the units, in order.
        members: their sublayers, in order.
        sublayers: all sublayers of the program.
    """

    names: tuple[Unit, ...]
    members: tuple[tuple[Sublayer, ...], ...]
    sublayers: tuple[Sublayer, ...]

    @classmethod
    def of(cls, program: Program, space: Space) -> _Units:
        """Those of a program.

        Raises:
            InvalidInput: as `Space.units`.
            Unsupported: the program cannot skip by prompt.
        """
        if program.slots():
            raise Unsupported("training routers on a program with a KV cache", hint="Train them before it.")
        if space.minimum_gap:
            raise Unsupported("routers that keep a gap between layers", hint="Use a space with minimum_gap=0.")
        InsertKVCache().check(program)
        stream = find_stream(program)
        refuse_stream(program, stream)
        units = space.units(stream)
        members = (tuple(each for each in stream.sublayers if each.index in own) for own in units.values())
        return cls(tuple(units), tuple(members), stream.sublayers)

    @property
    def share(self) -> Tensor:
        """float64 [U]: the share of all sublayers that each unit is."""
        return torch.tensor([len(own) for own in self.members], dtype=torch.float64) / len(self.sublayers)

    def mean_share(self, gone: Tensor) -> float:
        """The mean share of all sublayers that prompts skip without the units that are true in bool [prompts, U]."""
        return float((gone.double() @ self.share.to(gone.device)).mean())

    def leaves_attention(self, gone: Tensor) -> bool:
        """Whether the program still attends without the units that are true in bool [U]."""
        left = {each.index for own, out in zip(self.members, gone.tolist(), strict=True) if out for each in own}
        return any(each.kind is SublayerKind.ATTENTION and each.index not in left for each in self.sublayers)

    def entry(self, gone: Tensor) -> SkipSublayers:
        """The plan entry that leaves out the units that are true in bool [U]."""
        return entry_of(name for name, out in zip(self.names, gone.tolist(), strict=True) if out)

    def by_sublayer(self, values: Tensor) -> Tensor:
        """The values [U, ...] of the units at their first sublayers, zeros at all others: [sublayers, ...]."""
        result = values.new_zeros(len(self.sublayers), *values.shape[1:])
        result[[own[0].index for own in self.members]] = values
        return result.cpu()


def _with_continuations(program: Program, calibration: CalibrationData) -> list[Batch]:
    """The batches that steps are taken on: sequences of at least two tokens.

    Raises:
        InvalidInput: there are none.
    """
    batches = [batch.sequences(batch.valid.sum(dim=1) > 1) for batch in token_batches(calibration, program.source)]
    batches = joined([batch for batch in batches if len(batch.tokens)], STEP_TOKENS)
    if not batches:
        raise InvalidInput("the data has no sequence of at least two tokens: a prompt and its continuation.")
    check_objective("kl", program, batches)
    return batches


# ---------------------------------------------------------------------------------------------------------- the routers


def _states(program: Program, units: _Units, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """What the routers read of each batch: [B, U, hidden], the mean state of each prompt before each unit."""
    evaluator = Evaluator(program)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    read = [own[0].stream for own in units.members]
    for batch in batches:
        count = prompt_lengths(batch)
        width = int(count.max())
        prompts = Batch(batch.tokens[:, :width], torch.arange(width) < count.unsqueeze(1))
        known = dict(zip(placeholders, program_inputs(program, prompts), strict=True))
        values = evaluator.compute(set(read), known)
        count = count.to(program.source.device)
        yield torch.stack([prompt_mean_reference(values[node], count) for node in read], dim=1)


def _logits(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[B, U]: what routers [U, hidden] and [U] say of states [B, U, hidden], as `SkipByPrompt` computes it."""
    return (states * weight).sum(dim=-1) + bias


class _LinearRouters:
    """The routers while they are trained, over centred and scaled states.

    Args:
        states: of the calibration prompts, [B, U, hidden] of each batch.
        probability: with which each unit is left out at the beginning.

    Attributes:
        weight, bias: [U, hidden] and [U], to train.
    """

    def __init__(self, states: Iterable[Tensor], probability: float) -> None:
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in states:
            exact = batch.double()
            count, total = count + len(exact), total + exact.sum(dim=0)
            squares = squares + exact.square().sum(dim=(0, 2))
        self.centre, size = total / count, squares / count
        spread = (size - self.centre.square().sum(dim=-1)).clamp(min=0).sqrt()
        # What is the same for all prompts differs by rounding alone, which is not to be read.
        self.spread = torch.where(spread > SMALLEST_SPREAD * size.sqrt(), spread, math.inf)
        self.weight = torch.zeros_like(batch[0], requires_grad=True)
        start = math.log(probability / (1 - probability))
        self.bias = torch.full_like(batch[0, :, 0], start, requires_grad=True)

    def logit(self, unit: int, states: Tensor) -> Tensor:
        """[B]: what the router of a unit says of states [B, hidden]."""
        scaled = (states - self.centre[unit]) / self.spread[unit]
        return (scaled.to(states.dtype) * self.weight[unit]).sum(dim=-1) + self.bias[unit]

    def folded(self) -> tuple[Tensor, Tensor]:
        """The weights and biases for states as they are."""
        weight = self.weight.detach().double() / self.spread.unsqueeze(-1)
        bias = self.bias.detach().double() - (weight * self.centre).sum(dim=-1)
        return weight.to(self.weight.dtype), bias.to(self.bias.dtype)


# --------------------------------------------------------------------------------------------------------- the training


class _Training:
    """The training of routers, and of adapters, if there are any; see `train_routers`."""

    def __init__(
        self, program: Program, units: _Units, routers: _LinearRouters, recipe: _Recipe, adapted: AdaptedModel | None
    ) -> None:
        self.program, self.units, self.routers, self.recipe = program, units, routers, recipe
        self.groups: list[dict[str, Any]] = [{"params": [routers.weight, routers.bias], "lr": recipe.rate}]
        self.adapting = adapted is not None
        if adapted is None:
            self.student = RoutedProgram(program, units.members)
        else:
            members = adapted.counterparts(units.members)
            self.student = RoutedProgram(adapted.program, members, adapted.parameters)
            self.groups.append({"params": list(adapted.parameters.values()), "lr": recipe.lora_rate})

    def run(self, batches: Sequence[Batch], progress: bool) -> tuple[Step, ...]:
        """Train.

        Raises:
            InvalidInput: a loss is NaN or infinite.
        """
        optimizer = torch.optim.Adam(self.groups)
        generator = torch.Generator().manual_seed(self.recipe.seed)
        order: list[int] = []
        steps: list[Step] = []
        with tqdm(total=self.recipe.steps, desc="train routers", disable=not progress, leave=False) as bar:
            while len(steps) < self.recipe.steps:
                order = order or torch.randperm(len(batches), generator=generator).tolist()
                batch = batches[order.pop()]
                drawn = torch.rand(len(batch.tokens), len(self.units.names), generator=generator, dtype=torch.float64)
                with torch.enable_grad():
                    loss, step = self.loss(batch, torch.logit(drawn, eps=1e-9))
                    if not math.isfinite(step.loss):
                        hint = "Look at the model's logits, or take a smaller rate."
                        raise InvalidInput(f"the loss of step {len(steps)} is {step.loss}.", hint=hint)
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                steps.append(step)
                bar.set_postfix_str(f"divergence {step.divergence:.4f}, share {step.share:.1%}", refresh=False)
                bar.update()
        return tuple(steps)

    def loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Step]:
        """The loss of a batch, which gradients pass through.

        Args:
            noise: logistic, float64 [B, U].
        """
        prompts = prompt_lengths(batch)
        behind = batch.valid & (torch.arange(batch.valid.shape[1]) >= prompts.unsqueeze(1))
        # Of a frozen model the predictions inside of prompts are always the full ones.
        counted = batch.valid if self.adapting else behind
        inputs = program_inputs(self.program, batch)
        place = [port.role for port in self.program.outputs].index(Role.LOGITS)
        with torch.no_grad():
            full = log_probabilities(self.program.module(*inputs)[place], counted)
        decisions: list[Tensor] = []
        noise = noise.to(full.device)

        def decide(unit: int, states: Tensor) -> Tensor:
            drawn = self.routers.logit(unit, states) + noise[:, unit].to(states.dtype)
            soft, hard = torch.sigmoid(drawn / self.recipe.temperature), (drawn > 0).to(drawn.dtype)
            decisions.append(hard + (soft - soft.detach()))
            return decisions[-1]

        outputs = self.student.route(inputs, prompts.to(full.device), decide)
        rows = divergence(full, log_probabilities(outputs[place], counted))
        mean = rows.sum() / int(behind.sum())
        share = (torch.stack(decisions, dim=1).double() @ self.units.share.to(full.device)).mean()
        loss = mean + self.recipe.penalty * (share - self.recipe.share).square()
        return loss, Step(mean.item(), share.item(), loss.item())


# ------------------------------------------------------------------------------------------------------- what comes out


def _fitted(units: _Units, logits: Tensor, share: float, count: int) -> tuple[Tensor, Tensor]:
    """What to add to logits [prompts, U], and sets, bool [sets, U], by which prompts skip about a share.

    Prompts that take one of a few sets skip less, as a rule, than they decide for. How much more they have to decide
    for is found by trying.

    Raises:
        Unsupported: there are no sets by which anything is skipped.
    """
    best, missed = None, math.inf
    for aim in torch.linspace(share, min(2 * share, float(units.share.sum())), TRIALS).tolist():
        shift = _shift(logits, units.share, aim)
        chosen = _choose_sets(units, logits + shift, count)
        if not bool(chosen.any()):
            continue
        off = abs(units.mean_share(chosen[_choices(logits + shift, chosen)]) - share)
        if off < missed:
            best, missed = (shift, chosen), off
    if best is None:
        raise Unsupported(
            f"skipping {share:.1%} of the sublayers by {count} sets that prompts decide for: these decode in full, or "
            "attend to nothing",
            hint="Ask for another share, or for more sets.",
        )
    return best


def _shift(logits: Tensor, shares: Tensor, share: float) -> Tensor:
    """What to add to logits [prompts, U] so that prompts skip a mean share: they skip where logits are above 0.

    Args:
        shares: float64 [U], what each unit counts.
    """
    values, order = logits.flatten().sort(descending=True)
    skipped = shares.to(logits.device).expand(len(logits), -1).flatten()[order].cumsum(0) / len(logits)
    lower = torch.cat([values[1:], values[-1:] - 1])
    missed = torch.where(values > lower, (skipped - share).abs(), math.inf)  # no cut goes through equal logits
    cut = missed.argmin()
    return -(values[cut] + lower[cut]) / 2


def _choices(logits: Tensor, chosen: Tensor) -> Tensor:
    """int64 [prompts]: the most probable set of each, of bool [sets, U]; see `SkipByPrompt`."""
    return (logits @ chosen.T.to(logits.dtype)).argmax(dim=1)


def _choose_sets(units: _Units, logits: Tensor, count: int) -> Tensor:
    """At most so many sets for prompts with logits [prompts, U], bool [sets, U].

    The candidates are what single prompts decide for. Of each prompt it counts how probable its best set is over what
    it decides for; candidates are taken one by one, each time the one that adds most to the sum. Where routers are
    sure, these are the most frequent decisions. Sets that leave no attention are no candidates.
    """
    distinct, times = (logits > 0).unique(dim=0, return_counts=True)
    order = times.argsort(descending=True, stable=True)[:CANDIDATES]
    kept = [row for row in distinct[order] if units.leaves_attention(row)]
    if not kept:
        return distinct[:0]
    candidates = torch.stack(kept)
    own = logits.double().clamp(min=0).sum(dim=1, keepdim=True)
    ratios = (logits.double() @ candidates.T.double() - own).exp()
    chosen: list[int] = []
    best = torch.zeros_like(ratios[:, :1])
    while len(chosen) < min(count, len(kept)):
        gains = torch.maximum(ratios, best).sum(dim=0)
        gains[chosen] = -math.inf
        chosen.append(int(gains.argmax()))
        best = torch.maximum(best, ratios[:, chosen[-1:]])
    return candidates[chosen]
