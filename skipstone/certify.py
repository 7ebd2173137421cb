"""From a budget to an executable that keeps it, or to the model as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from skipstone.budget import Budget, Certificate, Comparison, compare, data_hash
from skipstone.calibrate import IGNORED, Batch, program_inputs
from skipstone.ir.cost import kv_bytes
from skipstone.ir.errors import InvalidInput, Unsupported, UserError
from skipstone.ir.program import Program, Role
from skipstone.ir.stream import find_stream, note_layers
from skipstone.objective import check_labels
from skipstone.passes.compress_kv import CompressKV
from skipstone.passes.compress_prompt import CompressPrompt
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.plan import Plan
from skipstone.report import measure
from skipstone.runtime.denoise import MaskedLM
from skipstone.runtime.executable import Executable, Layout, TokenModel, is_causal_lm, is_masked_lm
from skipstone.runtime.grouped_cache import GroupedCache
from skipstone.search import search

PROMPT, NEW_TOKENS, RUNS = 64, 16, 5
"""How a plan's speed is checked: greedy tokens after a prompt, and how many runs the medians are over."""


SHARES = (1.0, 0.7, 0.4)
"""Plans are tried whose cost on the data that they were chosen on is within these shares of the limit."""

UNLIMITED = 0.1
"""How far a search goes where a budget limits neither NLL nor KL: divergence in nats a token."""


def refuse_model(program: Program, batches: Sequence[Batch]) -> None:
    """Refuse what a budget cannot be proved for.

    Raises:
        Unsupported: the model predicts neither next nor masked tokens.
        InvalidInput: the data does not say what is right to predict.
    """
    if not is_causal_lm(program) and not is_masked_lm(program):
        raise Unsupported(
            f"a budget for {program.source.name}, which predicts neither next nor masked tokens",
            hint="Measure its executables with and without the plan yourself.",
        )
    check_labels(program, batches)


def candidates(program: Program, budget: Budget, batches: Sequence[Batch], progress: bool = False) -> list[Plan]:
    """Plans that skip sublayers and keep a budget on the data that they are chosen on; the first saves most.

    Args:
        program: as captured.
        batches: calibration data.
    """
    note_layers(program)
    objective: Literal["kl", "nll"] = "kl" if budget.nll is None else "nll"
    limit = budget.limits.get(objective, UNLIMITED)
    if objective == "nll":  # the budget's is relative, that of the search in nats
        limit *= _mean_nll(program, batches)
    found = search(program, batches, objective=objective, limit=limit, progress=progress)
    counts = {
        max((number for number, step in enumerate(found.steps, 1) if step.objective <= share * limit), default=0)
        for share in SHARES
    }
    return [Plan([found.entry(count)]) for count in sorted(counts - {0}, reverse=True)]


@torch.no_grad()
def _mean_nll(program: Program, batches: Sequence[Batch]) -> float:
    """Mean negative log-likelihood of the batches under a program without a cache, nats a token."""
    node = [port.role for port in program.outputs].index(Role.LOGITS)
    exact = [program.module(*program_inputs(program, batch))[node] for batch in batches]
    seen = Comparison.concatenate(
        [Comparison.of(each, each, batch) for each, batch in zip(exact, batches, strict=True)]
    )
    return float(seen.nll.sum() / seen.tokens.sum())


def within(
    build: Callable[[Plan], Executable],
    plans: Sequence[Plan],
    budget: Budget,
    batches: Sequence[Batch],
    progress: bool = False,
) -> Executable:
    """The executable of the first plan that is proved to keep the budget and is faster than the model as it is.

    A plan that makes the cache smaller need not be faster: that is what it is for.

    With several plans, each is tried at a confidence that makes all of them together as likely to pass by chance as one
    alone (Bonferroni).

    Args:
        build: makes the executable of a plan.
        plans: the one that saves most comes first.
        batches: validation data that no plan was chosen on.
    Returns:
        the executable of a plan with its certificates, or that of the empty plan; `Report.budget` says which and why.
    """
    for plan in plans:
        refuse_untested(plan, batches)
    full = build(Plan([]))
    said = [] if plans else ["no sublayer can be skipped within it"]
    for plan in plans:
        executable = build(plan)
        certificates = certify(full, executable, budget, batches, len(plans), progress)
        failed = [str(each) for each in certificates if not each.holds]
        if not failed:
            gain, saved = speedup(full, executable, batches), _cache_saved(full, executable, plan, batches)
            if gain > 1 or saved:
                said += [str(each) for each in certificates]
                speed = f"a step is {gain:.2f} times as fast as the model's"
                executable.report.budget = (*said, speed, saved) if saved else (*said, speed)
                executable.plan = replace(executable.plan, certificates=certificates)
                return executable
            failed = [f"within the budget, but a step is {gain:.2f} times as fast as the model's"]
        said += [f"{_name(plan)}: {reason}" for reason in failed]
    full.report.budget = (*said, "nothing fits: the model is unchanged")
    return full


def certify(
    full: Executable,
    changed: Executable,
    budget: Budget,
    batches: Sequence[Batch],
    attempts: int = 1,
    progress: bool = False,
) -> tuple[Certificate, ...]:
    """What a plan costs, for every limit of a budget.

    Args:
        full, changed: executables of the empty plan and of the plan, on the same target.
        batches: validation data.
        attempts: how many plans are tried on this data; each gets its share of the error that the budget allows.
    Raises:
        InvalidInput: the data does not suffice for a bound.
        UserError: the score of the budget's own function is no number.
    """
    certificates: list[Certificate] = []
    data = data_hash(batches)
    if changed.decides_in_decoding:
        batches = [behind_prompts(batch) for batch in batches]
    if budget.limits:
        apart = by_set(changed, batches) if changed.program.continuations else {"": list(batches)}
        seen = {
            part: compare(lambda batch: logits(full, batch), lambda batch: logits(changed, batch), own, progress)
            for part, own in apart.items()
        }
        error = (1 - budget.confidence) / attempts
        whole = Comparison.concatenate(list(seen.values()))
        for metric, limit in budget.limits.items():
            certificates.append(whole.certificate(metric, limit, 1 - error, data, changed.target))
            if len(changed.program.continuations) > 1:  # all of these hold together, with the same confidence
                share = 1 - error / len(changed.program.continuations)
                certificates += [
                    replace(own.certificate(metric, limit, share, data, changed.target), part=part)
                    for part, own in seen.items()
                ]
                worst = -math.inf if metric == "top1" else math.inf
                certificates += [
                    Certificate(metric, limit, worst, worst, share, 0, 0, data, changed.target, part)
                    for part in _unseen(changed.program, seen)
                ]
    if budget.evaluate is not None and budget.max_drop is not None:
        drop = _score(budget.evaluate, full) - _score(budget.evaluate, changed)
        certificates.append(Certificate("evaluate", budget.max_drop, drop, drop, 0.0, 0, 0, "", changed.target))
    return tuple(certificates)


def _score(evaluate: Callable[[Executable], float], executable: Executable) -> float:
    score = evaluate(executable)
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise UserError(f"budget: evaluate returned {score!r}, expected a number.") from error


def _unseen(program: Program, seen: Collection[str]) -> list[str]:
    """The sets that no sequence chose: nothing is known of them. One that skips nothing is none of them."""
    whole = len(find_stream(program).sublayers)
    parts = [(f"set {number}", part) for number, part in enumerate(program.continuations)]
    return [name for name, part in parts if name not in seen and len(find_stream(part).sublayers) < whole]


def logits(model: Executable, batch: Batch) -> Tensor:
    """Logits [B, S, V] of a batch, those of padding mean nothing.

    They are read in one go. Where decoded tokens are computed in another way than prompts, the first half of each
    sequence is read as its prompt, and then the rest, which gives what decoding step by step gives.
    """
    if isinstance(model, MaskedLM):
        return model.predict(batch.tokens, batch.valid)
    assert isinstance(model, TokenModel)
    tokens, layout = model.prepare(batch.tokens, batch.valid)
    if not model.decides_in_decoding:
        return model.advance(tokens, layout, layout.rows(layout.width))
    prompts, columns = prompt_lengths(batch).to(model.device), torch.arange(layout.width, device=model.device)
    cache = model.new_cache(len(tokens), layout.width, spare=0)
    cache.decode_start = prompts
    read = Layout(int(prompts.max()), prompts, None)
    parts = [model.advance(tokens[:, : read.width], read, read.rows(read.width), cache=cache)]
    if (behind := int((layout.counts - prompts).max())) > 0:
        later = (prompts.unsqueeze(1) + columns[:behind]).clamp(max=layout.width - 1)
        # A prompt without anything behind it reads one token more.
        rest = Layout(behind, (layout.counts - prompts).clamp(min=1), None)
        parts.append(model.advance(tokens.gather(1, later), rest, rest.rows(behind), cache=cache))
    inside = columns < prompts.unsqueeze(1)
    place = torch.where(inside, columns, columns - prompts.unsqueeze(1) + read.width)
    together = torch.cat(parts, dim=1)
    place = place.clamp(max=together.shape[1] - 1).unsqueeze(-1)
    return together.gather(1, place.expand(-1, -1, together.shape[-1]))


def by_set(model: Executable, batches: Sequence[Batch]) -> dict[str, list[Batch]]:
    """The sequences apart by the set that their prompts choose, under a plan that skips by prompt.

    Returns:
        by name of the set, e.g. ``"set 2"``, those sequences; sets that no prompt chooses are missing.
    """
    if len(model.program.continuations) == 1:
        return {"set 0": list(batches)}
    found: dict[str, list[Batch]] = {}
    for batch in batches:
        choice = chosen_sets(model, batch)
        for number in sorted(set(choice.tolist())):
            found.setdefault(f"set {number}", []).append(batch.sequences(choice == number))
    return dict(sorted(found.items()))


def chosen_sets(model: Executable, batch: Batch) -> Tensor:
    """int64 [B], on the CPU: the set that the prompt of each sequence chooses."""
    assert isinstance(model, TokenModel)
    prompts = prompt_lengths(batch)
    mask = torch.arange(batch.tokens.shape[1]) < prompts.unsqueeze(1)
    _, cache = model.prefill(batch.tokens, mask)
    assert isinstance(cache, GroupedCache)
    return cache.choice.cpu()


def prompt_lengths(batch: Batch) -> Tensor:
    """int64 [B]: the first half of each sequence, which counts as its prompt."""
    return (batch.valid.sum(dim=1) + 1) // 2


def behind_prompts(batch: Batch) -> Batch:
    """The batch with nothing to predict inside of the prompts, see `prompt_lengths`."""
    inside = torch.arange(batch.tokens.shape[1]) < prompt_lengths(batch).unsqueeze(1)
    return replace(batch, labels=batch.targets.masked_fill(inside, IGNORED))


def speedup(full: Executable, changed: Executable, batches: Sequence[Batch]) -> float:
    """Measured time of a decode step (without a cache: of the whole prompt) of the model over that of a plan.

    Of a plan that skips by prompt, the mean over its sets counts, weighted by the sequences that choose them.
    """
    room = PROMPT + NEW_TOKENS if full.limit is None else min(PROMPT + NEW_TOKENS, full.limit)
    new_tokens = min(NEW_TOKENS, room // 2)
    groups = by_set(changed, batches).values() if changed.program.continuations else [batches]
    before = after = 0.0
    for group in groups:
        batch, share = group[0], sum(len(each.tokens) for each in group)
        prompt = batch.tokens[:1, : int(batch.valid[0].sum())][:, : room - new_tokens]
        times = measure({"full": full, "changed": changed}, prompt, new_tokens, RUNS)  # type: ignore[dict-item]
        before += share * (times["full"].decode_ms or times["full"].prefill_ms)
        after += share * (times["changed"].decode_ms or times["changed"].prefill_ms)
    return before / after


def _cache_saved(full: Executable, changed: Executable, plan: Plan, batches: Sequence[Batch]) -> str:
    """How much smaller a plan that is about the cache makes that of the longest sequence; "" if it does not."""
    if not any(isinstance(entry, CompressKV | CompressPrompt | QuantizeKV) for entry in plan):
        return ""
    longest = max(_longest(batches))
    prompt = (longest + 1) // 2 if changed.decides_in_decoding else 0
    before, after = (kv_bytes(each.program, longest, prompt) for each in (full, changed))
    if after >= before:
        return ""
    tokens = f"{longest} tokens" + (f", {prompt} of them a prompt," if prompt else "")
    return f"keys and values of {tokens} take {after / before:.1%} of the model's bytes"


def refuse_untested(plan: Plan, batches: Sequence[Batch]) -> None:
    """Refuse a proof on sequences that are so short that a plan about the cache does nothing to them.

    Raises:
        InvalidInput: with the length that it takes.
    """
    longest = max(_longest(batches))
    for entry in plan:
        if isinstance(entry, CompressKV) and entry.window is not None and longest <= entry.window + entry.sinks:
            seen, what = entry.window + entry.sinks, "streaming heads see"
        elif isinstance(entry, CompressPrompt) and (longest + 1) // 2 <= entry.rows:
            seen, what = 2 * entry.rows, "would be kept, the first half of each being its prompt"
        else:
            continue
        raise InvalidInput(
            f"{entry.name}: the longest sequence to prove the budget on has {longest} tokens, all of which {what}.",
            hint=f"Give sequences of more than {seen} tokens, as long as the model will be used with.",
        )


def _longest(batches: Sequence[Batch]) -> list[int]:
    """The longest sequence of each batch."""
    return [int(batch.valid.sum(dim=1).max()) for batch in batches]


def _name(plan: Plan) -> str:
    return ", ".join(str(entry) for entry in plan)
