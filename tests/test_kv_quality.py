"""What quantized caches cost on the reference model, and on variants of it that are as hard as large models are."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from benchmarks.reference.evaluate import CHECKPOINT, windows
from benchmarks.reference.planted import KEY_BIAS_NORM, with_key_bias, with_outliers
from skipstone.calibrate import token_batches
from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.key_bias import large_key_biases
from skipstone.ir.program import Program
from skipstone.ir.stream import note_layers
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.plan import Plan
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import TokenModel

INT8 = QuantizeKV()
INT4_GROUPS = QuantizeKV(k="int4", v="int4", granularity="token")


@cache
def model(name: str) -> PreTrainedModel:
    reference = LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    planted = {"plain": lambda: reference, "biased": lambda: with_key_bias(reference)}
    return (planted | {"outliers": lambda: with_outliers(reference)})[name]()


@cache
def captured(name: str) -> Program:
    program = capture_huggingface(model(name))
    note_layers(program)
    return program


@cache
def held_out() -> Tensor:
    return windows("valid", 4, 128)[:, :-1]


@torch.no_grad()
def log_probabilities(name: str) -> Tensor:
    return model(name)(input_ids=held_out(), use_cache=False).logits.double().log_softmax(-1)


def divergence(name: str, entry: QuantizeKV) -> float:
    """Mean KL of the quantized program from its own full-precision model, nats a token, on 4 x 128 held-out bytes."""
    batches = token_batches([windows("train", 8, 128)[:, :-1]], captured(name).source)
    program, _ = rewrite(captured(name), Plan([entry]), target="eager", batches=batches)
    opt = TokenModel(EagerSession(program))
    got = opt.decode(held_out(), opt.new_cache(*held_out().shape)).double().log_softmax(-1)
    exact = log_probabilities(name)
    return float((exact.exp() * (exact - got)).sum(-1).mean())


@pytest.mark.slow  # the reference model is captured for it
def test_conditioned_int8_on_the_reference_model() -> None:
    assert divergence("plain", INT8) <= 1e-3


def test_outliers_are_planted_without_changing_the_function() -> None:
    difference = log_probabilities("outliers") - log_probabilities("plain")
    assert difference.abs().max() < 1e-3


@pytest.mark.slow
def test_conditioning_makes_up_for_outliers() -> None:
    """At least half of the loss is gone, and where no channel stands out nothing is lost."""
    plain, conditioned = (divergence("outliers", replace(INT4_GROUPS, condition=on)) for on in (False, True))
    assert conditioned < plain / 2
    assert divergence("plain", INT4_GROUPS) <= divergence("plain", replace(INT4_GROUPS, condition=False))


@pytest.mark.slow
def test_a_large_key_bias_trips_the_detector_and_is_survived() -> None:
    norms = [float(layer.self_attn.k_proj.bias.detach().norm()) for layer in model("biased").model.layers]
    assert norms == pytest.approx([KEY_BIAS_NORM] * len(norms))
    assert len(large_key_biases(captured("biased"))) == len(norms)
    assert not large_key_biases(captured("plain"))
    plain, conditioned = (divergence("biased", replace(INT8, condition=on)) for on in (False, True))
    assert conditioned <= 1e-2 and conditioned < plain / 10
