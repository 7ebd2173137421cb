"""Does it pay to let prompts choose what their continuations skip? Quality and speed of skipping by prompt.

Every set leaves out as many sublayers, so that all methods save about the same time of a decode step: one set for all
prompts, sets by the similarity profiles of prompts, and sets by trained routers. They choose on the training split. On
the test split, `dnll_*` is the relative rise of the negative log-likelihood of the second half of each window, decoded
behind the first half, which is read in full; `*_bound` is its one-sided bound at 95%. `dnll_static` leaves out the same
sublayers as `dnll_one_set` while prompts are read, too.

Times are those of the reference model on ONNX Runtime with one thread. `prefill_over_full` is what choosing costs:
prompts read with the features and the choice, over prompts read without. `decode_gain` is a step of the full model over
one without a set; `mixed_batch_over_equal` a step of eight sequences that go on by different sets over a step of eight
by the same one.

On the model of `benchmarks.decode`, with two threads and routers that always choose the first of two sets,
`decode_gain_110m` is what that set gains, and `decode_over_static_110m` its step over one of a program that never had
what the set leaves out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.decode import make_model
from benchmarks.harness import Row, arguments, publish, take_turns, timed
from benchmarks.reference.evaluate import CHECKPOINT, windows
from benchmarks.skipping import batches, bound
from skipstone.budget import Comparison, compare
from skipstone.certify import behind_prompts, chosen_sets, logits
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.stream import find_stream, note_layers
from skipstone.optimize import lower, optimize
from skipstone.passes.skip_by_prompt import BIAS, WEIGHT, SkipByPrompt
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan
from skipstone.prompts import skip_by_prompt
from skipstone.rewrite import rewrite
from skipstone.runtime.executable import TokenModel
from skipstone.search import search
from skipstone.training import train_routers
from skipstone.units import SUBLAYERS

SETS = 3
SHARE = 8  # of the sublayers, one in so many is left out
CALIBRATION_WINDOWS, TEST_WINDOWS, QUICK_WINDOWS = 96, 128, 32
STEPS = 300  # of training routers
PROMPT, NEW_TOKENS, SEQUENCES = 128, 32, 8
LARGE_SETS = SkipSublayers(layers=(3, 6, 9)), SkipSublayers(ffn=(2, 4, 6, 8))


def main() -> None:
    """Measure, print and write the figures."""
    options = arguments("by_prompt", __doc__ or "").parse_args()
    model = LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    trial = Trial(model, options.quick)
    rows = [*trial.rows(), *speed(model, trial.plans["by_similarity"], rounds=3 if options.quick else 15)]
    rows += large_speed(rounds=3 if options.quick else 9)
    publish("by_prompt", rows, options.json)


class Trial:
    """Methods of choosing by prompt, on one model.

    Args:
        model: the model.
        quick: fewer windows.
    """

    def __init__(self, model: LlamaForCausalLM, quick: bool) -> None:
        self.program = capture_huggingface(model)
        note_layers(self.program)
        stream = find_stream(self.program)
        self.chosen_on = batches("train", QUICK_WINDOWS if quick else CALIBRATION_WINDOWS)
        self.measured_on = [behind_prompts(each) for each in batches("test", QUICK_WINDOWS if quick else TEST_WINDOWS)]
        self.full = self.eager(Plan([SkipByPrompt((SkipSublayers(),))]))
        count = len(stream.sublayers) // SHARE
        alike = dict.fromkeys(SUBLAYERS.units(stream), 1.0)
        one = search(self.program, self.chosen_on, count=count, milliseconds=alike).entry()
        found = skip_by_prompt(self.program, self.chosen_on, sets=SETS, count=count, milliseconds=alike)
        share = count / len(stream.sublayers)
        routers = train_routers(
            self.program, (each.tokens for each in self.chosen_on), share=share, sets=SETS, steps=50 if quick else STEPS
        )
        print(f"routers: share of sublayers on their own prompts {routers.share:.3f}, wanted {share:.3f}")
        self.plans = {
            "static": Plan([one, SkipByPrompt((SkipSublayers(),))]),
            "one_set": Plan([SkipByPrompt((one,))]),
            "by_similarity": found,
            "by_routers": routers.plan,
        }

    def rows(self) -> Iterator[Row]:
        """The figures of quality."""
        for name, plan in self.plans.items():
            opt = self.eager(plan)
            print(f"{name}: {list(plan)}")
            if len(opt.program.continuations) > 1:
                chosen = Counter(n for each in self.measured_on for n in chosen_sets(opt, each).tolist())
                print(f"  prompts by set: {dict(sorted(chosen.items()))}")
            seen = self.cost(opt)
            dnll = float(seen.increase.sum() / seen.nll.sum())
            sample = len(seen.tokens)
            yield Row(f"dnll_{name}", dnll, None, None, sample, at_most=True)
            yield Row(f"dnll_{name}_bound", bound(seen), None, None, sample, at_most=True)

    def cost(self, opt: TokenModel) -> Comparison:
        """Against the full model."""
        return compare(lambda each: logits(self.full, each), lambda each: logits(opt, each), self.measured_on)

    def eager(self, plan: Plan) -> TokenModel:
        """An executable without a lowering."""
        program, _ = rewrite(self.program, plan, target="eager", strict=False)
        return TokenModel(lower(program, "eager"))


def speed(model: LlamaForCausalLM, plan: Plan, rounds: int) -> Iterator[Row]:
    """What choosing costs, and what a set gains."""
    full = optimize(model, threads=1, progress=False)
    chosen = optimize(model, plan, threads=1, progress=False)
    prompts = windows("test", 256, PROMPT)[:, :-1]
    by_set: dict[int, list[Tensor]] = {}
    for row in prompts:
        _, kept = chosen.prefill(row[None])
        by_set.setdefault(int(kept.choice[0]), []).append(row)
    most = max(by_set.values(), key=len)
    equal = torch.stack(most[:SEQUENCES])
    mixed = torch.stack([row for rows in zip(*by_set.values(), strict=False) for row in rows][:SEQUENCES])
    systems = {
        "full": decoding("full", full, equal[:1]),
        "set": decoding("set", chosen, equal[:1]),
        "equal": decoding("equal", chosen, equal),
        "mixed": decoding("mixed", chosen, mixed),
    }
    times = take_turns({(name, 1): turn for name, turn in systems.items()}, rounds)
    prefill, decode = (times[f"full{part}"].median for part in (" prefill", ""))
    print(f"prompts by set: { {number: len(rows) for number, rows in sorted(by_set.items())} }")
    yield Row("prefill_over_full", times["set prefill"].median / prefill, prefill * 1e3, None, rounds, at_most=True)
    yield Row("decode_gain", decode / times["set"].median, decode * 1e3, None, rounds)
    step = times["equal"].median
    yield Row("mixed_batch_over_equal", times["mixed"].median / step, step * 1e3, None, rounds, at_most=True)
    _, whole = full.prefill(equal[:1])
    _, part = chosen.prefill(equal[:1])
    yield Row("kv_bytes_over_full", part.nbytes / whole.nbytes, whole.nbytes, None, 1, at_most=True)


def large_speed(rounds: int) -> Iterator[Row]:
    """What a set gains on a model whose steps take their time to read weights."""
    model = make_model()
    plans = {"full": Plan(), "static": Plan([LARGE_SETS[0]]), "set": always_first(model)}
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    turns = {
        (name, 2): decoding(name, optimize(model, plan, threads=2, progress=False), ids) for name, plan in plans.items()
    }
    times = take_turns(turns, rounds)
    full, static, chosen = (times[name].median for name in plans)
    yield Row("decode_gain_110m", full / chosen, full * 1e3, None, rounds)
    yield Row("decode_over_static_110m", chosen / static, static * 1e3, None, rounds, at_most=True)


def always_first(model: LlamaForCausalLM) -> Plan:
    """Skipping by routers that read nothing and choose the first of `LARGE_SETS`, whatever the prompt."""
    first = {2 * layer + sublayer for layer in LARGE_SETS[0].layers for sublayer in (0, 1)}
    bias = torch.tensor([1.0 if each in first else -1.0 for each in range(2 * model.config.num_hidden_layers)])
    tensors = {WEIGHT: torch.zeros(len(bias), model.config.hidden_size), BIAS: bias}
    return Plan([SkipByPrompt(LARGE_SETS, "routers")], tensors=tensors)


def decoding(name: str, system: TokenModel, ids: Tensor) -> Callable[[], Mapping[str, float]]:
    """A turn that reads the prompts [B, S], then decodes greedily: seconds of the prefill and of a step."""

    @torch.no_grad()
    def turn() -> dict[str, float]:
        prefill, (scores, cache) = timed(lambda: system.prefill(ids))

        def decode() -> None:
            last = scores
            for _ in range(NEW_TOKENS):
                last = system.decode(last.argmax(dim=-1), cache)

        seconds, _ = timed(decode)
        return {f"{name} prefill": prefill, name: seconds / NEW_TOKENS}

    return turn


if __name__ == "__main__":
    main()
