"""How many tokens of a prompt are enough: measured on data, with what follows the prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from skipstone.budget import Budget, Comparison, compare
from skipstone.calibrate import Batch
from skipstone.certify import behind_prompts, logits, prompt_lengths, refuse_model
from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.program import Program
from skipstone.optimize import lower
from skipstone.passes.compress_prompt import CompressPrompt
from skipstone.plan import Plan
from skipstone.rewrite import rewrite
from skipstone.runtime.executable import Executable

TRIALS = 32
"""Numbers of rows that are told apart, up to the longest prompt."""


@dataclass(frozen=True)
class PromptFigures:
    """What it costs to keep so many rows, on the data that their number was chosen on.

    Attributes:
        entry: the plan entry.
        seen: the predictions behind the prompts with it, and the model's.
    """

    entry: CompressPrompt
    seen: Comparison


def choose_prompt_rows(
    program: Program,
    batches: Sequence[Batch],
    budget: Budget,
    *,
    like: CompressPrompt | None = None,
    progress: bool = False,
) -> PromptFigures:
    """As few rows of prompts as keep a budget, with a bound at its confidence.

    The first half of each sequence is its prompt; what is predicted behind it counts. The number is sought by
    bisection, in steps of a part of the longest prompt: whether fewer rows would keep the budget is not asked where
    more do not.

    Args:
        program: without a cache.
        batches: sequences as long as the model will be used with.
        budget: with a limit on predictions.
        like: the entry, but for its number of rows; None for the usual settings.
        progress: show a progress bar.
    Raises:
        InvalidInput: the budget has no such limit, or no prompt is longer than what is kept always.
        InvalidPlan: impossible settings.
        Unsupported: the model can have no cache, or no number of rows keeps the budget.
    """
    refuse_model(program, batches)
    if not budget.limits:
        raise InvalidInput("a budget without a limit on predictions.", hint="Give nll, kl or top1.")
    like = CompressPrompt() if like is None else like
    least = like.observed + like.sinks + 1
    replace(like, rows=least).validate()
    longest = max(int(prompt_lengths(batch).max()) for batch in batches)
    if longest <= least:
        problem = f"the longest prompt has {longest} tokens, of which {least} are kept always."
        raise InvalidInput(problem, hint="Give longer sequences: the first half of each is its prompt.")
    full = executable_of(program, Plan([]))
    step = math.ceil((longest - least) / TRIALS)
    choices = range(least, longest, step)
    best: PromptFigures | None = None
    exceeds, fits = -1, len(choices)
    total = math.ceil(math.log2(len(choices) + 1))
    with tqdm(desc="rows of prompts", total=total, unit=" trials", disable=not progress, leave=False) as bar:
        while fits - exceeds > 1:
            trial = (fits + exceeds) // 2
            entry = replace(like, rows=choices[trial])
            seen = compare_behind_prompts(full, executable_of(program, Plan([entry])), batches)
            if seen.keeps(budget):
                fits, best = trial, PromptFigures(entry, seen)
            else:
                exceeds = trial
            bar.update()
    if best is None:
        raise Unsupported(
            f"prompts of {program.source.name} that are not kept whole, within the budget",
            hint="Allow more, or observe more of the last queries.",
        )
    return best


def executable_of(program: Program, plan: Plan) -> Executable:
    """What a plan gives for a program without a cache, on the eager target.

    Raises:
        Unsupported: the program can have no cache.
    """
    rewritten, refusal = rewrite(program.copy(), plan, target="eager")
    if refusal is not None:
        raise refusal
    return Executable(lower(rewritten, "eager"), plan=plan)


def compare_behind_prompts(full: Executable, changed: Executable, batches: Sequence[Batch]) -> Comparison:
    """The predictions behind the first halves of sequences, by a model and with a plan that looks at prompts."""
    later = [behind_prompts(batch) for batch in batches]
    return compare(lambda batch: logits(full, batch), lambda batch: logits(changed, batch), later)
