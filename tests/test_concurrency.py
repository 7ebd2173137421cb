"""One executable, used by several threads, in several modes of torch, with copied caches: caches do not meet."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from skipstone.passes.skip_ffn_adaptive import SkipFFNAdaptive
from skipstone.plan import Plan
from skipstone.rewrite import rewrite
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.executable import Executable
from skipstone.runtime.onnx.session import OnnxSession
from tests import models

ADAPTIVE = SkipFFNAdaptive(threshold=0.8, cold_start=0, cold_end=0, warmup_tokens=1, max_share=0.7)
OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
THREADS, ROUNDS = 4, 3

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def executable(target: Any, *entries: Any) -> Any:
    program, _ = rewrite(models.program("llama"), Plan(entries), target=target)
    return Executable(EagerSession(program) if target == "eager" else OnnxSession(program, threads=1))


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize(
    ("target", "entries", "beams"),
    [("eager", (), 2), ("eager", (ADAPTIVE,), 1), ("onnxruntime", (), 2), ("onnxruntime", (ADAPTIVE,), 1)],
)
def test_threads_generate_what_each_would_alone(target: str, entries: tuple[Any, ...], beams: int) -> None:
    ours = executable(target, *entries)
    prompts = [models.tokens(2, 5 + number, seed=number) for number in range(THREADS)]
    alone = [ours.generate(each, num_beams=beams, **OPTIONS) for each in prompts]
    right: list[bool] = []

    def work(number: int) -> None:
        for _ in range(ROUNDS):
            right.append(torch.equal(ours.generate(prompts[number], num_beams=beams, **OPTIONS), alone[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * (THREADS * ROUNDS)


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_a_cache_goes_on_outside_of_inference_mode(target: str) -> None:
    ours, ids = executable(target), models.tokens(2, 9)
    with torch.inference_mode():
        _, kept = ours.prefill(ids[:, :5])
        ours.decode(ids[:, 5], kept)
    steps = [ours.decode(ids[:, place], kept) for place in (6, 7)]
    kept.grow(kept.capacity + 1)
    kept.reorder([1, 0])
    steps.append(ours.decode(ids[:, 8].flip(0), kept).flip(0))
    torch.testing.assert_close(torch.stack(steps, dim=1), ours(input_ids=ids).logits[:, 6:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda kept: pickle.loads(pickle.dumps(kept))], ids=["deep", "pickle"]
)
def test_a_prompt_is_read_once_and_copied(target: str, copied: Callable[[Any], Any]) -> None:
    ours, ids = executable(target), models.tokens(2, 9)
    _, kept = ours.prefill(ids[:, :5])
    ours.decode(ids[:, 5], kept)
    other = copied(kept)
    ours.decode(ids[:, 6].flip(0), kept)  # another answer
    steps = torch.stack([ours.decode(ids[:, place], other) for place in (6, 7, 8)], dim=1)
    torch.testing.assert_close(steps, ours(input_ids=ids).logits[:, 6:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_a_session_holds_no_cache_that_is_given_up(target: str) -> None:
    ours, ids = executable(target), models.tokens(2, 5)
    _, kept = ours.prefill(ids)
    ours.decode(ids[:, 0], kept)
    buffers = [weakref.ref(each) for each in kept.buffers.values()]
    del kept
    assert not any(each() is not None for each in buffers)
