"""What quantized KV caches cost in quality: KL, top-1 agreement and NLL against the same model in float32.

Cases: the reference model; the same as a Qwen2 with a key bias of norm 600 (`qwen2like`); and the same with outlier
channels in keys and values (`outliers`). Each format is measured as it is and with conditioning. Scales and
conditioning are calibrated on the training split and the figures measured on the test split; what conditioning does for
which format was chosen on the validation split.

A window is 256 bytes. The first half is the prompt, the predictions in the second half are scored, teacher-forced. An
executable with one of our formats reads a window in one go: a token attends to what the cache gives back whenever it
is read, so that this equals decoding step by step. The cache of transformers attends to the prompt before it quantizes
it, and keeps new tokens in full precision until there are `residual_length` of them. It is therefore fed the prompt
first and then one token at a time, with its defaults: quanto, 4 bits, groups of 64, a residual of 128, so that what it
reads of the prompt is quantized and of the rest is not. `int4_g32_residual` is the like of it: the newest 64 tokens,
which is how many it has on average, are read in full precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import QuantizedCache

from benchmarks.harness import Row, arguments, publish
from benchmarks.reference.evaluate import CHECKPOINT, windows
from benchmarks.reference.planted import with_key_bias, with_outliers
from skipstone.calibrate import token_batches
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.key_bias import large_key_biases
from skipstone.ir.stream import note_layers
from skipstone.passes.condition_kv import ConditionKV
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.plan import Plan
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import TokenModel

LENGTH, PROMPT, BATCH = 256, 128, 16
CALIBRATION_WINDOWS = 32

FORMATS = {
    "int8": QuantizeKV(k="int8", v="int8", granularity="channel"),
    "int8_token": QuantizeKV(k="int8", v="int8", granularity="token"),
    "fp8": QuantizeKV(k="fp8", v="fp8", granularity="token"),
    "int4": QuantizeKV(k="int4", v="int4", granularity="channel"),
    "int4_g32": QuantizeKV(k="int4", v="int4", granularity="token"),
    "kivi4": QuantizeKV(k="int4", v="int4", granularity="group"),
    "nvfp4": QuantizeKV(k="nvfp4", v="nvfp4", granularity="token"),
    "mxfp4": QuantizeKV(k="mxfp4", v="mxfp4", granularity="token"),
}
RESIDUAL = {"int4_g32_residual": replace(FORMATS["int4_g32"], residual=64)}
OUTLIERS = {"int4_g32": FORMATS["int4_g32"]}


@dataclass(frozen=True)
class Score:
    """How far predictions are from those in full precision; means over all scored predictions.

    Attributes:
        kl: Kullback-Leibler divergence from full precision, nats.
        top1: share of predictions whose most likely token is the same.
        nll: negative log-likelihood of the text, nats.
    """

    kl: float
    top1: float
    nll: float


class Case:
    """A model, its predictions in full precision, and what its caches are calibrated on.

    Args:
        model: over the bytes of the corpus.
        samples: int64 [windows, LENGTH + 1].
    """

    def __init__(self, model: PreTrainedModel, samples: Tensor) -> None:
        self.model, self.inputs, self.targets = model, samples[:, :-1], samples[:, PROMPT + 1 :]
        self.exact = torch.cat([self._log_probabilities(batch) for batch in self.inputs.split(BATCH)])
        self.program = capture_huggingface(model)
        note_layers(self.program)
        data = windows("train", CALIBRATION_WINDOWS, LENGTH)[:, :-1]
        self.batches = token_batches(data.split(BATCH), self.program.source)
        self.calibrated: dict[ConditionKV | None, Mapping[str, Tensor]] = {}

    @torch.no_grad()
    def _log_probabilities(self, tokens: Tensor) -> Tensor:
        logits = self.model(input_ids=tokens, use_cache=False).logits[:, PROMPT:]
        return logits.double().log_softmax(-1)

    def score(self, log_probabilities: Tensor) -> Score:
        """Compare predictions after the prompt, [windows, LENGTH - PROMPT, vocabulary]."""
        kl = (self.exact.exp() * (self.exact - log_probabilities)).sum(-1)
        same = log_probabilities.argmax(-1) == self.exact.argmax(-1)
        nll = -log_probabilities.gather(-1, self.targets.unsqueeze(-1))
        return Score(float(kl.mean()), float(same.double().mean()), float(nll.mean()))

    def quantized(self, entry: QuantizeKV) -> Score:
        """The score of a cache in our formats."""
        conditioning = entry.conditioning(calibrated=True) if entry.condition else None
        known = self.calibrated.get(conditioning)  # the same conditioning needs measuring but once
        plan, batches = (Plan([entry]), self.batches) if known is None else (Plan([entry], tensors=known), [])
        program, refusal = rewrite(self.program, plan, target="eager", batches=batches)
        if refusal is not None:
            raise refusal
        self.calibrated[conditioning] = program.calibration
        opt = TokenModel(EagerSession(program))
        parts = []
        for tokens in self.inputs.split(BATCH):
            logits = opt.decode(tokens, opt.new_cache(*tokens.shape, spare=0))
            parts.append(logits[:, PROMPT:].double().log_softmax(-1))
        return self.score(torch.cat(parts))

    @torch.no_grad()
    def quantized_by_transformers(self) -> Score:
        """The score of the `QuantizedCache` of transformers.

        Raises:
            ImportError: its back end is not installed.
        """
        parts = []
        for tokens in self.inputs.split(BATCH):
            cache = QuantizedCache(backend="quanto", config=self.model.config)
            pieces = [tokens[:, :PROMPT], *tokens[:, PROMPT:].split(1, dim=1)]
            steps = [self.model(input_ids=each, past_key_values=cache, use_cache=True).logits for each in pieces]
            parts.append(torch.cat(steps[1:], dim=1).double().log_softmax(-1))
        return self.score(torch.cat(parts))

    @property
    def predictions(self) -> int:
        """How many predictions a score is over."""
        return self.targets.numel()


def both_ways(case: Case, formats: Mapping[str, QuantizeKV]) -> Iterator[tuple[str, Score, Score]]:
    """The name of each format, and its scores without and with conditioning."""
    for name, entry in tqdm(formats.items(), desc=type(case.model).__name__, leave=False):
        plain, conditioned = (case.quantized(replace(entry, condition=on)) for on in (False, True))
        yield name, plain, conditioned


def rows_of(case: Case, prefix: str, formats: Mapping[str, QuantizeKV], goals: Mapping[str, float]) -> Iterator[Row]:
    """The figures of a case.

    KL with conditioning has KL without as its baseline, and has to be at most the goal of its format or, where there is
    none, that baseline; NLL has that in full precision as its baseline.

    Args:
        prefix: of the metrics' names, behind the name of the figure.
        goals: of the KL with conditioning, by format.
    """
    count = case.predictions
    exact = case.score(case.exact).nll
    yield Row(f"nll_{prefix}fp32", exact, None, None, count)
    for name, plain, conditioned in both_ways(case, formats):
        label, goal = f"{prefix}{name}", goals.get(name, plain.kl)
        yield Row(f"kl_{label}", plain.kl, None, None, count)
        yield Row(f"kl_{label}_conditioned", conditioned.kl, plain.kl, goal, count, at_most=True)
        for suffix, score in (("", plain), ("_conditioned", conditioned)):
            yield Row(f"top1_{label}{suffix}", score.top1, None, None, count)
            yield Row(f"nll_{label}{suffix}", score.nll, exact, None, count)
    try:
        theirs = case.quantized_by_transformers()
    except ImportError as reason:
        print(f"{prefix}hf_quantized_cache: not measured: {reason}")
        return
    yield Row(f"kl_{prefix}hf_quantized_cache", theirs.kl, None, None, count)
    yield Row(f"top1_{prefix}hf_quantized_cache", theirs.top1, None, None, count)
    yield Row(f"nll_{prefix}hf_quantized_cache", theirs.nll, exact, None, count)


def outlier_rows(case: Case) -> Iterator[Row]:
    """What conditioning makes up for where channels stand out; the errors are KL."""
    for name, plain, conditioned in both_ways(case, OUTLIERS):
        label, gain = f"outliers_{name}", plain.kl / conditioned.kl
        yield Row(f"error_{label}", plain.kl, None, None, case.predictions)
        yield Row(f"error_{label}_conditioned", conditioned.kl, plain.kl, plain.kl / 2, case.predictions, at_most=True)
        yield Row(f"gain_{label}", gain, None, 2.0, case.predictions)


def main() -> None:
    """Measure, print and write the figures."""
    options = arguments("kv_quality", __doc__ or "").parse_args()
    samples = windows("test", 16 if options.quick else 128, LENGTH)
    reference = LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    rows = [*rows_of(Case(reference, samples), "", FORMATS | RESIDUAL, {"int8": 1e-3})]
    biased = Case(with_key_bias(reference), samples)
    found = len(large_key_biases(biased.program))
    layers = reference.config.num_hidden_layers
    rows.append(Row("qwen2like_layers_detected", found, None, layers, layers))
    rows += rows_of(biased, "qwen2like_", FORMATS, {"int8": 1e-2})
    rows += outlier_rows(Case(with_outliers(reference), samples))
    publish("Quality of quantized KV caches", rows, options.json)


if __name__ == "__main__":
    main()
