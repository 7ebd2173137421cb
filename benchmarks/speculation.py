"""Does it pay to let a draft guess tokens? Greedy `generate` with drafts and without, on ONNX Runtime.

Drafts are the model with weights of 4 bits (`weights`), without some sublayers (`skip`), and with both (`both`); the
number behind the name says how many tokens they guess at a time. The model is the reference model, as it is and in the
shape of that of `benchmarks.decode` (`_wide`): 85 million parameters, most of them zeros, that compute what the small
model computes (`benchmarks.widened`), so that guesses are those of a trained model, and steps take the time of a large
one. Prompts are held-out text. Batch 1, prompts of 128 tokens, 64 new ones behind the first, another prompt in each
round; every system counts with the better of one and two threads (with --quick, two only).

``{draft}_gain`` is the time of `generate` without a plan over that with the draft, and ``{draft}_decode_gain`` the same
without the time of the prompt. ``same_tokens`` is the share of generations that are those without a plan: where two
tokens are equally good but for rounding, another may be chosen. ``acceptance`` is the share of guesses that were
accepted, and ``tokens_a_step`` what each step of the model gave. ``agreement`` (a) is the acceptance where one token is
guessed at a time; ``draft_over_step`` (c) is a step of the draft over one of the model, and ``check_over_step`` (v) one
of the model that reads G guesses and the token before them. ``predicted_gain`` is what follows for decoding:
E / (G c + v), with E = (1 - a^(G + 1)) / (1 - a) tokens a step (Leviathan et al., arXiv 2211.17192), and
``gain_if_accepted`` what would follow if all guesses were right: (G + 1) / (G c + v).

What else could be done: ``lossy``, the 4-bit weights as the plan, without a model that checks them, which is the most
that drafting can come to; ``lookup``, transformers' `prompt_lookup_num_tokens`, with that number, on our executable
without a plan; and ``hf``, the model itself. ``composed`` is the draft with weights of 4 bits that is asked only where
the text does not repeat itself (`SelfSpeculate.lookup`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.decode import NEW_TOKENS, PROMPT, QUICK_THREADS, THREADS
from benchmarks.harness import Row, Samples, Turn, arguments, publish, take_turns, timed
from benchmarks.reference.evaluate import CHECKPOINT, windows
from benchmarks.widened import widened
from skipstone.ir.program import Draft, Program
from skipstone.optimize import capture, lower
from skipstone.passes.quantize_weights import QuantizeWeights
from skipstone.passes.self_speculate import SelfSpeculate
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan
from skipstone.rewrite import begin, with_draft, without_draft
from skipstone.runtime.executable import Executable, TokenModel
from skipstone.runtime.session import Session
from skipstone.runtime.speculate import Speculation, SpeculativeSession

TARGET = "onnxruntime"
WEIGHTS = QuantizeWeights(bits=4, activations="int8")
TOKENS = {"weights": (4, 8), "skip": (4,), "both": (4,)}  # at a time, of each draft
LOOKED_UP = 4, 10  # at a time, in the prompt and what is written, by transformers
COMPOSED = (
    "weights",
    8,
    10,
)  # a draft, its tokens at a time, and those that it need not guess since text repeats itself
WORTH_IT = 1.1  # what is less is not worth the memory of a draft
STEPS = 16  # that a figure of one step is the mean of


def main() -> None:
    """Measure, print and write the figures."""
    options = arguments("speculation", __doc__ or "").parse_args()
    threads = QUICK_THREADS if options.quick else THREADS
    small = LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    small.generation_config.eos_token_id = None  # every system decodes all the tokens
    large = widened(small, hidden=768, intermediate=2048, heads=12, head_dim=64)
    entries, rows = drafts(SkipSublayers(ffn=(1, 2))), []
    for model, suffix, rounds in ((small, "", 7 if options.quick else 24), (large, "_wide", 3 if options.quick else 9)):
        prompts = list(windows("test", rounds, PROMPT)[:, :-1].split(1))
        rows += measure(model, prompts, entries, threads, rounds, suffix)
    publish("speculation", rows, options.json)


def drafts(skip: SkipSublayers) -> dict[str, SelfSpeculate]:
    """The drafts, whatever their numbers of tokens, with what those that skip leave out."""
    return {
        "weights": SelfSpeculate(weights=WEIGHTS),
        "skip": SelfSpeculate(skip=skip),
        "both": SelfSpeculate(skip=skip, weights=WEIGHTS),
    }


class System:
    """A way to generate, which takes another prompt in each turn.

    Args:
        name: of its figures.
        model: has `generate`.
        prompts: of token ids, int64 [1, S].
        options: of `generate`.
    Attributes:
        written: what it has generated in each turn, int64 [1, total].
    """

    def __init__(self, name: str, model: Any, prompts: Sequence[Tensor], **options: Any) -> None:
        self.name, self.model = name, model
        self.written: list[Tensor] = []
        self._prompts, self._options = prompts, options

    @torch.no_grad()
    def turn(self) -> dict[str, float]:
        """Seconds of a call, and of each token behind the first."""
        ids = self._prompts[len(self.written) % len(self._prompts)]
        one, _ = timed(lambda: self.generate(ids, 1))
        whole, tokens = timed(lambda: self.generate(ids, 1 + NEW_TOKENS))
        self.written.append(tokens)
        return {self.name: whole, f"{self.name} decode": (whole - one) / NEW_TOKENS}

    def generate(self, ids: Tensor, new_tokens: int) -> Tensor:
        """Continue a prompt greedily."""
        tokens: Tensor = self.model.generate(ids, max_new_tokens=new_tokens, do_sample=False, **self._options)
        return tokens

    def same_tokens(self, other: System) -> float:
        """The share of turns in which it wrote what another wrote."""
        pairs = list(zip(self.written, other.written, strict=True))
        return sum(torch.equal(one, two) for one, two in pairs) / len(pairs)


def measure(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    entries: Mapping[str, SelfSpeculate],
    threads: Sequence[int],
    rounds: int,
    suffix: str = "",
) -> list[Row]:
    """The figures of one model."""
    start = begin(capture(model), TARGET)
    program, _ = without_draft(start, Plan(), target=TARGET)
    drafted = {name: with_draft(program, start, Plan(), each, target=TARGET) for name, each in entries.items()}
    trials = [Trial(model, prompts, program, drafted, each) for each in threads]
    turns = {(name, each.threads): turn for each in trials for name, turn in each.turns().items()}
    samples = take_turns(turns, rounds)
    by_threads = {each.threads: each for each in trials}
    gains = {name: samples["plain"].median / samples[name].median for name in trials[0].systems if name != "plain"}
    whole, decode = samples["plain"].median, samples["plain decode"].median
    best = max([*trials[0].speculating, "composed"], key=lambda name: gains[name])
    rows = []
    for name, gain in gains.items():
        own = by_threads[samples[name].best_threads]
        rows.append(Row(f"{name}_gain{suffix}", gain, whole * 1e3, WORTH_IT if name == best else None, rounds))
        decode_gain = decode / samples[f"{name} decode"].median
        rows.append(Row(f"{name}_decode_gain{suffix}", decode_gain, decode * 1e3, None, rounds))
        if name != "lossy":
            same = own.systems[name].same_tokens(own.systems["plain"])
            rows.append(Row(f"{name}_same_tokens{suffix}", same, None, None, len(own.systems[name].written)))
        if name in own.speculating:
            rows += own.drafting(name, samples, suffix)
        elif name == "composed":
            rows += accepted(name, own.composed.speculation, suffix)
    return rows


class Trial:
    """The systems of one model, with one number of threads.

    Args:
        model: the model itself.
        prompts: int64 [1, S].
        program: of the model.
        drafted: the same with each draft.
        threads: their number.
    Attributes:
        systems: by name.
        speculating: the sessions of those that have a draft alone.
        composed: the one that looks up what repeats itself, too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Tensor],
        program: Program,
        drafted: Mapping[str, Program],
        threads: int,
    ) -> None:
        self.threads = threads
        self._prompts = prompts
        self._plain: Any = lower(program, TARGET, threads)
        self.systems = {"plain": self._system("plain", self._plain)}
        self.speculating: dict[str, SpeculativeSession] = {}
        for name, each in drafted.items():
            assert each.draft is not None
            session: Any = lower(each.draft.program, TARGET, threads)
            for tokens in TOKENS[name]:
                how = replace(each.draft, tokens=tokens)
                self.speculating[f"{name}_{tokens}"] = SpeculativeSession(self._plain, session, how)
        self.systems |= {name: self._system(name, each) for name, each in self.speculating.items()}
        kind, tokens, lookup = COMPOSED
        how = replace(drafted[kind].draft, tokens=tokens, lookup=lookup)  # type: ignore[type-var]
        self.composed = SpeculativeSession(self._plain, self.speculating[f"{kind}_{tokens}"].draft, how)
        self.systems["composed"] = self._system("composed", self.composed)
        self.systems["lossy"] = self._system("lossy", self.speculating["weights_4"].draft)
        for count in LOOKED_UP:
            name = f"lookup_{count}"
            self.systems[name] = self._system(name, self._plain, prompt_lookup_num_tokens=count)
        self.systems["hf"] = System("hf", model, prompts)

    def _system(self, name: str, session: Session, **options: Any) -> System:
        return System(name, Executable(session, generation_config=GenerationConfig()), self._prompts, **options)

    def turns(self) -> dict[str, Turn]:
        """All that is timed: `generate`, and single steps."""
        found: dict[str, Turn] = {name: each.turn for name, each in self.systems.items()}
        for count in sorted({1, *(1 + each.tokens for each in self.speculating.values())}):
            found[f"read {count}"] = self._steps(f"read {count}", self._plain, count)
        for name, tokens in TOKENS.items():
            draft = self.speculating[f"{name}_{tokens[0]}"].draft
            found[f"{name} draft"] = self._steps(f"{name} draft", draft, 1)
        return found

    def _steps(self, name: str, session: Session, count: int) -> Turn:
        """A turn of steps that read some tokens behind a prompt, each the same ones: seconds of one."""
        model, ids, columns = TokenModel(session), self._prompts[0], torch.arange(count)[None]

        def turn() -> dict[str, float]:
            _, cache = model.prefill(ids)
            model.reserve(cache, ids.shape[1] + count)
            step = ids[:, :count], ids.shape[1] + columns, torch.tensor([count]), columns, cache
            seconds, _ = timed(lambda: [session.step(*step) for _ in range(STEPS)])
            return {name: seconds / STEPS}

        return turn

    def drafting(self, name: str, samples: Mapping[str, Samples], suffix: str) -> Iterator[Row]:
        """How well a draft guesses, what its steps and those of the model take, and what should follow."""
        session = self.speculating[name]
        done, tokens = session.speculation, session.tokens
        single = self._one_at_a_time(session)
        step = samples["read 1"].median
        steps = f"{name.rpartition('_')[0]} draft", f"read {1 + tokens}"
        timings = [samples[each].by_threads[self.threads] for each in steps]
        draft, check = map(statistics.median, timings)
        agreement, count = single.accepted / single.drafted, len(timings[0])
        expected = sum(agreement**power for power in range(1 + tokens))
        cost = (tokens * draft + check) / step
        yield from accepted(name, done, suffix)
        yield Row(f"{name}_agreement{suffix}", agreement, None, None, single.drafted)
        yield Row(f"{name}_draft_over_step{suffix}", draft / step, step * 1e3, None, count, at_most=True)
        yield Row(f"{name}_check_over_step{suffix}", check / step, step * 1e3, None, count, at_most=True)
        yield Row(f"{name}_predicted_gain{suffix}", expected / cost, step * 1e3, None, count)
        yield Row(f"{name}_gain_if_accepted{suffix}", (1 + tokens) / cost, step * 1e3, None, count)

    def _one_at_a_time(self, session: SpeculativeSession) -> Speculation:
        """What the draft does when it guesses one token at a time."""
        other = SpeculativeSession(session.model, session.draft, Draft(session.draft.program, 1, session.sources))
        system = self._system("one at a time", other)
        for ids in self._prompts:
            system.generate(ids, 1 + NEW_TOKENS)
        return other.speculation


def accepted(name: str, done: Speculation, suffix: str) -> Iterator[Row]:
    """How many guesses were right, and what each step of the model gave."""
    yield Row(f"{name}_acceptance{suffix}", done.accepted / done.drafted, None, None, done.drafted)
    yield Row(f"{name}_tokens_a_step{suffix}", 1 + done.accepted / done.steps, None, None, done.steps)


if __name__ == "__main__":
    main()
