"""Similarity of the residual stream: against hooks on the model, of parts and of the whole, under masks."""

from __future__ import annotations

import math
import re
from functools import reduce
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from skipstone.calibrate import Batch, token_batches
from skipstone.ir.errors import InvalidInput, UserError
from skipstone.ir.similarity import Moments, Similarity
from skipstone.ir.stream import find_stream
from skipstone.similarity import measure_similarity, similarity_by_mask_ratio
from tests import models

MOMENTS = ("total", "squares", "minimum", "maximum")
PARTS = ("sublayers", "layers", "spans")


def drawn(seed: int, tokens: int) -> list[Tensor]:
    """A stream before, between and after two layers of two sublayers, each [tokens, 8]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 8, generator=generator) for _ in range(5)]


def compared(stream: list[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    return list(pairwise(stream)), stream[::2]


def assert_equal(one: Similarity, other: Similarity, tolerance: float = 1e-12) -> None:
    for part in PARTS:
        mine, theirs = getattr(one, part), getattr(other, part)
        assert mine.count == theirs.count
        for name in MOMENTS:
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=tolerance, atol=tolerance)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 5)), min_size=1, max_size=5), st.randoms())
def test_parts_merge_to_the_whole_in_any_order_and_grouping(shapes: list[tuple[int, int]], random) -> None:
    streams = [drawn(*shape) for shape in shapes]
    whole = Similarity.of(*compared([torch.cat(parts) for parts in zip(*streams, strict=True)]))
    found = [Similarity.of(*compared(stream)) for stream in streams]
    random.shuffle(found)
    assert_equal(reduce(Similarity.merge, found), whole)
    assert_equal(reduce(lambda right, left: left.merge(right), found, Similarity.empty(4, 2)), whole)


def test_they_are_the_moments_of_cosines_and_angles() -> None:
    pairs, boundaries = compared(drawn(3, tokens=300))  # more than one chunk
    found = Similarity.of(pairs, boundaries)
    cosines = torch.stack([torch.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in pairs], -1)
    expected = {
        "mean": cosines.mean(0), "minimum": cosines.amin(0), "maximum": cosines.amax(0),
        "spread": cosines.std(0, correction=0),
    }  # fmt: skip
    torch.testing.assert_close(found.cosine, expected, rtol=1e-12, atol=1e-12)
    first, last = boundaries[0].double(), boundaries[2].double()
    angle = torch.cosine_similarity(first, last, dim=-1).acos().mean() / math.pi
    torch.testing.assert_close(found.angular_distance[0, 2], angle, rtol=1e-12, atol=1e-12)
    influence = 1 - torch.cosine_similarity(boundaries[1].double(), last, dim=-1).mean()
    torch.testing.assert_close(found.block_influence[1], influence, rtol=1e-12, atol=1e-12)


def test_a_stream_that_does_not_turn_has_distance_exactly_zero() -> None:
    x = torch.randn(50, 33)
    found = Similarity.of([(x, x.clone())], [x, x.clone()])
    assert float(found.sublayers.maximum) == float(found.block_influence) == float(found.angular_distance[0, 1]) == 0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidInput, match="do not merge"):
        Similarity.empty(4, 2).merge(Similarity.empty(6, 3))
    with pytest.raises(InvalidInput, match="no token"):
        Similarity.of(*compared(drawn(0, tokens=0)))
    pairs, boundaries = compared(drawn(0, tokens=3))
    boundaries[1][2, 0] = math.inf
    with pytest.raises(InvalidInput, match="NaN or infinity"):
        Similarity.of(pairs, boundaries)
    assert bool(Moments.empty(2).mean.isnan().all())


# ------------------------------------------------------------------------------------------------------ on programs


def hooked(model: nn.Module, name: str, tokens: Tensor) -> Similarity:
    """The statistics from hooks on the modules of the sublayers."""
    stream = find_stream(models.program(name))
    layer_paths = [re.match(r".*?\.\d+", stream.layer(i)[0].path)[0] for i in range(stream.layers)]  # type: ignore[index]
    seen: dict[str, Tensor] = {}

    def keep_input(path: str):
        return lambda module, args, kwargs: seen.__setitem__(path, args[0] if args else kwargs["hidden_states"])

    def keep_output(path: str):
        return lambda module, args, out: seen.__setitem__(path, out[0] if isinstance(out, tuple) else out)

    hooks = [model.get_submodule(p).register_forward_pre_hook(keep_input(p), with_kwargs=True) for p in layer_paths]
    hooks += [model.get_submodule(s.path).register_forward_hook(keep_output(s.path)) for s in stream.sublayers]
    hooks.append(model.get_submodule(layer_paths[-1]).register_forward_hook(keep_output("end")))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    pairs, x = [], seen[layer_paths[0]]
    for sublayer in stream.sublayers:
        x = seen[layer_paths[sublayer.layer]] if sublayer is stream.layer(sublayer.layer)[0] else x
        pairs.append((x.flatten(0, 1), (x + seen[sublayer.path]).flatten(0, 1)))
        x = x if sublayer.parallel else x + seen[sublayer.path]
    return Similarity.of(pairs, [seen[path].flatten(0, 1) for path in (*layer_paths, "end")])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_they_are_those_of_hooks_on_the_model(name: str) -> None:
    program, tokens = models.program(name), models.tokens(3, 11)
    found = measure_similarity(program, token_batches(list(tokens.split(2)), program.source))
    assert found.tokens == 33
    assert_equal(found, hooked(models.model(name), name, tokens), tolerance=1e-5)


def test_padding_neither_counts_nor_is_seen() -> None:
    """A model that looks ahead, and is told where the padding is."""
    program, long, short = models.program("bert"), models.tokens(1, 9), models.tokens(1, 5, seed=1)
    rows = torch.cat([long, torch.cat([short, torch.zeros(1, 4, dtype=torch.int64)], 1)])
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    padded = token_batches({"input_ids": rows, "attention_mask": mask}, program.source)
    alone = [measure_similarity(program, token_batches(each, program.source)) for each in (long, short)]
    assert_equal(measure_similarity(program, padded), alone[0].merge(alone[1]), tolerance=1e-5)


def test_positions_and_buckets_of_their_share() -> None:
    """Of four sequences 1, 3, 5 and 8 of 8 tokens count: one in each quarter but that a half is in the third."""
    program, tokens = models.program("bert"), models.tokens(4, 8)
    batches = token_batches(list(tokens.split(2)), program.source)
    chosen = torch.arange(8) < torch.tensor([[1], [3], [5], [8]])
    chosen = chosen[:, torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    found = similarity_by_mask_ratio(program, batches, list(chosen.split(2)), buckets=4)
    assert [each.tokens for each in found] == [1, 3, 5, 8]
    assert_equal(reduce(Similarity.merge, found), measure_similarity(program, batches, list(chosen.split(2))))
    full = measure_similarity(program, [Batch(tokens[3:], torch.ones(1, 8, dtype=torch.bool))])
    assert_equal(found[3], full, tolerance=1e-5)
    halves = similarity_by_mask_ratio(program, batches, list((torch.arange(8) < 4).expand(4, 8).split(2)), buckets=4)
    assert [each.tokens for each in halves] == [0, 0, 16, 0]


def test_masked_positions_alone_are_measured() -> None:
    program, tokens = models.program("llama"), models.tokens(2, 7)
    batches = token_batches(tokens, program.source)
    first = torch.zeros(2, 7, dtype=torch.bool)
    first[:, :3] = True
    shorter = measure_similarity(program, token_batches(tokens[:, :3], program.source))
    assert_equal(measure_similarity(program, batches, [first]), shorter, tolerance=1e-5)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([], "0 masks of positions for 1"),
        ([torch.ones(2, 7)], r"batch 0 are torch.float32 \[2, 7\]"),
        ([torch.ones(2, 6, dtype=torch.bool)], r"bool \[2, 7\]"),
        ([torch.zeros(2, 7, dtype=torch.bool)], "no token that counts"),
    ],
)
def test_wrong_positions_are_refused(positions: list[Tensor], message: str) -> None:
    program = models.program("llama")
    with pytest.raises(InvalidInput, match=message):
        measure_similarity(program, token_batches(models.tokens(2, 7), program.source), positions)


def test_padding_that_a_model_would_see_is_refused() -> None:
    program = models.program("bert").copy()
    padding = next(node for node in program.graph.nodes if node.name == "attention_mask")
    tokens = next(node for node in program.graph.nodes if node.name == "input_ids")
    padding.replace_all_uses_with(tokens)
    program.remove_inputs([padding])
    batch = Batch(models.tokens(1, 4), torch.tensor([[True, True, True, False]]))
    with pytest.raises(UserError, match="padded"):
        measure_similarity(program, [batch])
