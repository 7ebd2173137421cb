"""Generation with a draft: what is generated is what the model generates, whatever the draft guesses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from skipstone import LayerParallel, Plan, Segment, SelfSpeculate, SkipSublayers
from skipstone.ir.printer import readable
from skipstone.optimize import lower, rewrite
from skipstone.runtime.cache import KVCache
from skipstone.runtime.executable import Executable
from skipstone.runtime.speculate import DraftCache
from tests import speculation_cases as cases
from tests.speculation_cases import (
    CASES,
    FAIR,
    FUSED,
    LONG,
    PAD,
    PERFECT,
    POSITIONS,
    VOCABULARY,
    built,
    counted,
    plain,
    prompt,
)

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("fair", "fused", "weights", "beneath: skipped", "beneath: tokens", "beneath: channels, fused")


def assert_same(opt: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """What the executable generates, which is what it does without its draft."""
    options = {**LONG, **options}
    wanted = plain(opt).generate(**batch, **options)
    given = opt.generate(**batch, **options)
    assert torch.equal(given, wanted)
    return given


# ------------------------------------------------------------------------------------------------------------- greedily


@pytest.mark.parametrize(
    "case", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in CASES]
)
def test_greedy_tokens_are_those_of_the_model(case: str) -> None:
    opt = built(CASES[case])
    for batch in (prompt(6), prompt(1), prompt(3, 8)):
        with counted(opt) as found:
            assert_same(opt, batch)
        steps, drafted, accepted = found
        assert 1 + steps + accepted == LONG["max_new_tokens"] and accepted <= drafted


@pytest.mark.parametrize("case", ["fair", pytest.param("beneath: channels, fused", marks=pytest.mark.slow)])
def test_the_model_beside_a_draft_is_that_without_one(case: str) -> None:
    with_draft, alone = built(CASES[case]).program, cases.program(CASES[case][:-1])
    assert readable(with_draft) == readable(alone)
    assert with_draft.tensors().keys() == alone.tensors().keys()
    assert all(torch.equal(with_draft.tensor(name), value) for name, value in alone.tensors().items())


def test_greedy_tokens_are_those_of_the_original_model() -> None:
    for lengths in ((7,), (2, 9, 5)):
        batch = prompt(*lengths)
        ours = built((FAIR,)).generate(**batch, **LONG)
        assert torch.equal(ours, cases.model().generate(**batch, **LONG, eos_token_id=None))


SHALLOW = SelfSpeculate(3, SkipSublayers(ffn=(1,)))
"""For "gpt2", whose heads have keys of their own."""


@pytest.mark.parametrize(
    "entry",
    [
        SelfSpeculate(3, parallel=LayerParallel((Segment(0, 3, iterations=2),))),
        pytest.param(SHALLOW, marks=pytest.mark.slow),
    ],
)
def test_heads_with_keys_of_their_own(entry: SelfSpeculate) -> None:
    opt = built((entry,), "gpt2")
    for lengths in ((5,), (3, 8)):
        assert_same(opt, prompt(*lengths))


SKIPS = st.builds(
    SkipSublayers,
    attention=st.sets(st.integers(0, 2), max_size=3).map(tuple),
    ffn=st.sets(st.integers(0, 3), max_size=4).map(tuple),
).filter(lambda each: each != SkipSublayers())


def check_any_skip(skip: SkipSublayers, tokens: int, lengths: list[int], new: int) -> None:
    program = rewrite(cases.captured(), Plan([SelfSpeculate(tokens, skip)]), target="eager", strict=False)[0]
    opt = Executable(lower(program, "eager"), target="eager")
    assert_same(opt, prompt(*lengths), max_new_tokens=new)


QUICKLY = (Phase.explicit, Phase.reuse, Phase.generate)
"""A smaller example takes minutes to find: each is a program."""
ANY_SKIP = given(SKIPS, st.integers(1, 8), st.lists(st.integers(1, 12), min_size=1, max_size=2), st.integers(1, 20))


@pytest.mark.slow
@settings(max_examples=50, deadline=None, phases=QUICKLY)
@ANY_SKIP
def test_any_sublayers_may_be_skipped(skip: SkipSublayers, tokens: int, lengths: list[int], new: int) -> None:
    check_any_skip(skip, tokens, lengths, new)


@pytest.mark.slow
def test_half_precision_differs_by_its_rounding_at_most() -> None:
    opt = built((FAIR,), dtype=torch.bfloat16)
    equal = 0
    for seed in range(8):
        ids = prompt(9, seed=seed)["input_ids"]
        given, wanted = opt.generate(ids, **LONG)[0], plain(opt).generate(ids, **LONG)[0]
        different = (given != wanted).nonzero().flatten().tolist()
        equal += not different
        if different:  # behind the first one they read other tokens
            best, second = opt(wanted[None, : different[0]]).logits[0, -1].float().topk(2).values.tolist()
            assert best - second <= 4 * torch.finfo(torch.bfloat16).eps * abs(best)
    assert equal >= 2


# ---------------------------------------------------------------------------------------------------------- any guesses


class Scripted:
    """A draft whose guesses are given. What it writes to the cache is far from what the model reads there.

    Args:
        draft: the session that it stands for.
        wanted: int64 [B, T], what the model writes behind a prompt of `width` columns, the prompt included.
        right: for each row and new token, whether it is guessed.
    """

    def __init__(self, draft: Any, wanted: Tensor, padding: Tensor, width: int, right: list[list[bool]]) -> None:
        self.program, self.layout, self.cache_over = draft.program, draft.layout, draft.cache_over
        self.wanted, self.padding, self.width, self.right = wanted, padding, width, right

    def step(self, tokens: Tensor, positions: Tensor, count: Tensor, logit_rows: Tensor, cache: Any) -> Tensor:
        logits = torch.zeros(len(tokens), 1, VOCABULARY)
        for row, length in enumerate(cache.lengths.tolist()):
            for buffer in cache.buffers.values():
                buffer[row, :, length] = 1e3
            column = int(positions[row] + self.padding[row]) + 1
            assert length == int(positions[row]), "the draft does not stand where the sequence stands"
            guess = int(self.wanted[row, column]) + (not self.right[row][column - self.width])
            logits[row, 0, guess % VOCABULARY] = 1.0
        return logits


def simulate(
    right: list[list[bool]], tokens: int, new: int, is_over: Callable[[int, int], bool], idle: bool
) -> list[int]:
    """Steps, drafted and accepted tokens, from which guesses are right and which new token ends which row."""
    running, written, counts = [not is_over(row, 0) for row in range(len(right))], 1, [0, 0, 0]
    while written < new and any(running):
        guessed = min(tokens, new - written - 1)
        counts[0], counts[1] = counts[0] + 1, counts[1] + guessed
        for number in range(guessed + 1):
            agree = number < guessed and all(
                right[row][written] or (idle and not running[row]) for row in range(len(right))
            )
            running = [each and not is_over(row, written) for row, each in enumerate(running)]
            written += 1
            counts[2] += agree
            if not agree or not any(running):
                break
    return counts


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_guesses_give_the_tokens_of_the_model(data: st.DataObject) -> None:
    opt = built((PERFECT,))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), "lengths")
    new, tokens = data.draw(st.integers(1, 18), "new"), data.draw(st.integers(1, 8), "tokens")
    right = [data.draw(st.lists(st.sampled_from([True, True, False]), min_size=18, max_size=18)) for _ in lengths]
    batch, width = prompt(*lengths), max(lengths)
    options = {**LONG, "max_new_tokens": new}
    ends: list[int] = []
    if data.draw(st.booleans(), "ends"):
        free = plain(opt).generate(**batch, **options)[:, width:]
        ends = [int(free[0, data.draw(st.integers(0, new - 1), "end")])]
        options["eos_token_id"] = ends[0]
    wanted = plain(opt).generate(**batch, **options)
    padding = width - torch.tensor(lengths)
    longest = torch.nn.functional.pad(wanted, (0, width + new - wanted.shape[1]), value=PAD)
    with pytest.MonkeyPatch.context() as patch, counted(opt) as found:
        patch.setattr(opt.session, "draft", Scripted(opt.session.draft, longest, padding, width, right))
        patch.setattr(opt.session, "tokens", tokens)
        assert torch.equal(opt.generate(**batch, **options), wanted)
    assert found == simulate(right, tokens, new, lambda row, at: int(longest[row, width + at]) in ends, bool(ends))


@pytest.mark.parametrize(("new", "tokens"), [(1, 4), (2, 4), (3, 4), (24, 1), (24, 4), (26, 4), (24, 31)])
def test_a_perfect_draft_is_always_right(monkeypatch: pytest.MonkeyPatch, new: int, tokens: int) -> None:
    opt = built((PERFECT,))
    monkeypatch.setattr(opt.session, "tokens", tokens)
    with counted(opt) as found:
        assert_same(opt, prompt(3, 8), max_new_tokens=new)
    steps = math.ceil((new - 1) / (tokens + 1))
    assert found == [steps, new - 1 - steps, new - 1 - steps]


def test_a_draft_that_is_always_wrong_costs_its_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = built((PERFECT,))
    draft = opt.session.draft
    step = draft.step
    monkeypatch.setattr(draft, "step", lambda *args: -step(*args), raising=False)
    with counted(opt) as found:
        assert_same(opt, prompt(6))
    assert found == [23, 19 * 4 + 3 + 2 + 1, 0]


# ------------------------------------------------------------------------------------------------------------ the cache


def settled(cache: KVCache) -> Iterator[Tensor]:
    """What the buffers hold of each sequence that no later step changes."""
    for each in cache.layout:
        if each.part.fixed_rows is None:
            ends = each.form.quantized_until(cache.lengths) if each.form.ring_rows else cache.lengths
            yield from (cache.buffers[each.name][row, :, : end // each.part.tokens] for row, end in enumerate(ends))


CACHES = ("groups", "channels", "channels, fused", "tokens, fused", "groups, fused")


@pytest.mark.parametrize(
    "case", ["fair", "beneath: tokens", *(pytest.param(f"beneath: {each}", marks=pytest.mark.slow) for each in CACHES)]
)
def test_keys_and_values_are_those_of_decoding_token_by_token(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, batch = built(CASES[case]), prompt(3, 8)
    wanted, step, compared = plain(opt).generate(**batch, **LONG), opt.session.step, []

    def compare(*args: Any) -> Tensor:
        cache = args[-1]
        if cache.lengths.any():  # it is no prompt; the draft has written behind what is there
            _, other = plain(opt).prefill(**batch)
            for column in wanted[:, 8 : 8 + int(cache.lengths[1]) - 8].unbind(1):
                plain(opt).decode(column, other)
            assert torch.equal(other.lengths, cache.lengths) and torch.equal(other.decode_start, cache.decode_start)
            for own, theirs in zip(settled(cache), settled(other), strict=True):
                torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-10 if own.is_floating_point() else 0)
            compared.append(int(cache.lengths[1]))
        return step(*args)

    monkeypatch.setattr(opt.session, "step", compare)
    assert torch.equal(opt.generate(**batch, **LONG), wanted)
    assert compared == sorted(set(compared)) and len(compared) > 3 and compared[-1] > 24


def test_one_buffer_of_the_model_is_one_of_the_draft() -> None:
    session = built((FAIR,)).session
    cache = session.new_cache(2, 8)
    own = DraftCache(session, cache).kv
    assert own.buffers.keys() == {"key_0", "value_0", "key_1", "value_1"}
    assert own.buffers["key_1"] is cache.buffers["key_3"] and own.buffers["value_0"] is cache.buffers["value_0"]


# ----------------------------------------------------------------------------------------------------- ends and lengths


def end_in(opt: Any, batch: dict[str, Tensor], after: int) -> int:
    """A token that the first row writes first behind so many, and the others never."""
    new = plain(opt).generate(**batch, **LONG)[:, batch["input_ids"].shape[1] :].tolist()
    others = {token for row in new[1:] for token in row}
    return next(each for at, each in enumerate(new[0]) if at >= after and each not in {*new[0][:at], *others})


@pytest.mark.parametrize("entry", [PERFECT, FAIR], ids=["perfect", "fair"])
@pytest.mark.parametrize("lengths", [(6,), (3, 8)], ids=str)
def test_an_end_inside_a_draft(entry: SelfSpeculate, lengths: tuple[int, ...]) -> None:
    opt, batch = built((entry,)), prompt(*lengths)
    for after in range(8):
        end = end_in(opt, batch, after)
        given = assert_same(opt, batch, eos_token_id=[end, 1])
        at = given[0, max(lengths) :].tolist().index(end)
        assert (given[0, max(lengths) + at + 1 :] == PAD).all()
        assert given.shape[1] == max(lengths) + (at + 1 if len(lengths) == 1 else LONG["max_new_tokens"])


@pytest.mark.parametrize("entry", [PERFECT, FAIR], ids=["perfect", "fair"])
@pytest.mark.parametrize("new", [1, 2, 3, 5])
def test_fewer_tokens_than_a_draft_guesses(entry: SelfSpeculate, new: int) -> None:
    opt = built((entry,))
    assert assert_same(opt, prompt(3, 8), max_new_tokens=new).shape[1] == 8 + new
    assert_same(opt, prompt(6), max_new_tokens=None, max_length=6 + new)


@pytest.mark.parametrize(
    ("name", "entry"), [("llama", PERFECT), ("llama", FUSED), pytest.param("gpt2", SHALLOW, marks=pytest.mark.slow)]
)
def test_the_last_position_may_be_reached(name: str, entry: SelfSpeculate, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, grown, grow = built((entry,), name), [], KVCache.grow
    monkeypatch.setattr(KVCache, "grow", lambda cache, capacity: (grown.append(capacity), grow(cache, capacity)))
    monkeypatch.setattr(type(opt), "new_cache", lambda model, batch, rows: model.session.new_cache(batch, rows + 3))
    for lengths in ((1,), (3, 8)):
        grown.clear()
        assert assert_same(opt, prompt(*lengths), max_new_tokens=POSITIONS - max(lengths)).shape[1] == POSITIONS
        assert max(grown) == POSITIONS and len(set(grown)) > 2


def test_a_shorter_limit_may_be_reached() -> None:
    opt = Executable(built((PERFECT,)).session, target="eager", max_length=17)
    assert assert_same(opt, prompt(6), max_new_tokens=11).shape[1] == 17


def test_positions_may_be_given() -> None:
    opt = built((FAIR,))
    positions = torch.tensor([[4, 5, 6, 8, 9]])
    given = assert_same(opt, prompt(5), position_ids=positions)
    assert not torch.equal(given, opt.generate(**prompt(5), **LONG))


# ----------------------------------------------------------------------------------------- what transformers hands over


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = 0

    def put(self, tokens: Tensor) -> None:
        self.seen.append(tokens.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("lengths", [(6,), (3, 8)], ids=str)
def test_the_streamer_sees_the_same_columns(lengths: tuple[int, ...]) -> None:
    opt, batch = built((FAIR,)), prompt(*lengths)
    options = {**LONG, "eos_token_id": end_in(opt, batch, 5)}
    ours, theirs = Recorder(), Recorder()
    opt.generate(**batch, **options, streamer=ours)
    plain(opt).generate(**batch, **options, streamer=theirs)
    assert ours.seen == theirs.seen and ours.ended == 1


class AtLength(StoppingCriteria):
    """Each row ends at a length of its own."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **_options: Any) -> Tensor:
        return input_ids.shape[1] >= self.lengths


@pytest.mark.parametrize("end", [None, 1])
@pytest.mark.parametrize("lengths", [(10, 10), (12, 20), (30, 9)])
@pytest.mark.parametrize("entry", [PERFECT, FAIR], ids=["perfect", "fair"])
def test_stopping_criteria(entry: SelfSpeculate, lengths: tuple[int, int], end: int | None) -> None:
    """Without an end token, sequences that have stopped go on until all have."""
    criteria = StoppingCriteriaList([AtLength(*lengths)])
    given = assert_same(built((entry,)), prompt(3, 8), stopping_criteria=criteria, eos_token_id=end)
    assert given.shape[1] == min(max(lengths), 8 + LONG["max_new_tokens"])
    assert bool((given[0, lengths[0] :] == PAD).all()) == (end is not None or lengths[0] >= given.shape[1])


def test_stop_strings() -> None:
    words = {"abcdef": PAD} | {f"w{number}": number for number in range(1, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="abcdef"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="abcdef")
    opt, batch = built((PERFECT,)), prompt(6)
    for after in range(1, 6):
        end = end_in(opt, batch, after)
        given = assert_same(opt, batch, stop_strings=[f"w{end}"], tokenizer=wrapped)
        assert given.shape[1] < 6 + LONG["max_new_tokens"]


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 9}], ids=str
)
@pytest.mark.parametrize("entry", [PERFECT, FUSED], ids=["perfect", "fused"])
def test_processors_that_remember_nothing(entry: SelfSpeculate, options: dict[str, Any]) -> None:
    opt = built((entry,))
    for batch in (prompt(6), prompt(3, 8)):
        ends = {"eos_token_id": end_in(opt, batch, 2)} if "min_new_tokens" in options else {}
        with counted(opt) as found:
            given = assert_same(opt, batch, **options, **ends)
        assert not torch.equal(given, opt.generate(**batch, **LONG, **ends))
        # The draft's guesses are processed as well: one that computes what the model does stays perfect.
        assert entry is not PERFECT or found[1] == found[2]


class Counting(LogitsProcessor):
    """Forbids another token at each call, and notes what it was called with."""

    def __init__(self) -> None:
        self.prefixes: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.prefixes.append(input_ids.clone())
        best = scores.argmax(dim=-1, keepdim=True)
        return scores.scatter(1, best, -torch.inf) if len(self.prefixes) % 3 == 0 else scores


@pytest.mark.parametrize("sample", [False, True])
def test_processors_that_remember_are_called_once_a_token(sample: bool) -> None:
    opt = built((PERFECT,))
    for batch in (prompt(6), prompt(3, 8)):
        ours, theirs = Counting(), Counting()
        options = {**LONG, "do_sample": sample}
        given = opt.generate(**batch, **options, logits_processor=[ours])
        width = batch["input_ids"].shape[1]
        assert len(ours.prefixes) == LONG["max_new_tokens"]
        for at, prefix in enumerate(ours.prefixes):
            assert torch.equal(prefix, given[:, : width + at])
        if not sample:
            assert torch.equal(given, plain(opt).generate(**batch, **options, logits_processor=[theirs]))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"return_dict_in_generate": True, "output_scores": True},
        {"use_cache": False}, {"prefill_chunk_size": 2},
    ],
    ids=lambda options: "-".join(options),
)  # fmt: skip
def test_other_ways_to_decode_leave_the_draft_out(options: dict[str, Any]) -> None:
    opt, batch = built((FAIR,)), prompt(6)
    with counted(opt) as found:
        given, wanted = (each.generate(**batch, **LONG, **options) for each in (opt, plain(opt)))
    if "return_dict_in_generate" in options:
        torch.testing.assert_close(torch.stack(given.scores), torch.stack(wanted.scores))
        given, wanted = given.sequences, wanted.sequences
    assert torch.equal(given, wanted) and found == [0, 0, 0]


def test_steps_by_hand_are_those_of_the_model() -> None:
    opt, batch, more = built((FUSED,)), prompt(3, 8), torch.randint(3, VOCABULARY, (2, 4))
    (first, cache), (wanted, other) = opt.prefill(**batch), plain(opt).prefill(**batch)
    assert torch.equal(first, wanted)
    assert torch.equal(opt.decode(more, cache), plain(opt).decode(more, other))
    assert torch.equal(opt(**batch).logits, plain(opt)(**batch).logits)
    assert plain(opt).speculation is None


@pytest.mark.parametrize("case", ["fair", "fused", "weights"])
def test_calls_do_not_interfere(case: str) -> None:
    opt, batch = built(CASES[case]), prompt(3, 8)
    with counted(opt) as found:
        first = opt.generate(**batch, **LONG)
    opt.generate(**prompt(12), **{**LONG, "do_sample": True})
    with counted(opt) as again:
        assert torch.equal(opt.generate(**batch, **LONG), first)
    assert found == again
