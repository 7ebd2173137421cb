"""Measuring how far sublayers turn the residual stream, by running the program over data once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx
from tqdm import tqdm

from skipstone.calibrate import Batch, program_inputs
from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.program import Program, Role
from skipstone.ir.similarity import Similarity
from skipstone.ir.stream import ResidualStream, Sublayer, find_stream
from skipstone.replay import Evaluator


def measure_similarity(
    program: Program, batches: Sequence[Batch], positions: Sequence[Tensor] | None = None, progress: bool = False
) -> Similarity:
    """How far every sublayer and layer turns the residual stream, in one pass over the data.

    Args:
        program: without a cache.
        batches: at least one.
        positions: for each batch, bool [B, S]: the tokens that count, of the valid ones; None for `Batch.counted`: of
            masked sequences the masked tokens, else all.
        progress: show a progress bar.
    Raises:
        InvalidInput: no token counts, or the data leads to NaN or infinity.
        Unsupported: the program has no residual stream [B, S, hidden].
    """
    (similarity,) = similarity_by_mask_ratio(program, batches, positions, buckets=1, progress=progress)
    if similarity.tokens == 0:
        raise InvalidInput("the calibration data holds no token that counts.")
    return similarity


def similarity_by_mask_ratio(
    program: Program,
    batches: Sequence[Batch],
    positions: Sequence[Tensor] | None = None,
    buckets: int = 4,
    progress: bool = False,
) -> tuple[Similarity, ...]:
    """`measure_similarity` of the sequences apart by the share of their valid tokens that count.

    Returns:
        for each of `buckets` equal intervals of that share, from 0 to 1, the statistics of the sequences in it; those
        of no token where there is none.
    """
    stream = find_stream(program)
    refuse_stream(program, stream)
    chosen = _chosen(batches, positions)
    found = [Similarity.empty(len(stream.sublayers), stream.layers)] * buckets
    evaluator = Evaluator(program)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    ends = [*(stream.layer(number)[0].stream for number in range(stream.layers)), stream.exit]
    wanted = {*ends, *(node for each in stream.sublayers for node in compared(each))}
    work = zip(batches, chosen, strict=True)
    for batch, counted in tqdm(work, "calibrate similarity", len(batches), disable=not progress, leave=False):
        known = dict(zip(placeholders, program_inputs(program, batch), strict=True))
        values = evaluator.compute(wanted, known)
        share = counted.sum(1) / batch.valid.sum(1).clamp(min=1)
        bucket = (share * buckets).long().clamp(max=buckets - 1)
        for number in bucket.unique().tolist():
            rows = (counted & (bucket == number).unsqueeze(1)).to(program.source.device)
            if not bool(rows.any()):
                continue
            part = {node: value[rows] for node, value in values.items()}
            pairs = [before_and_after(each, part) for each in stream.sublayers]
            found[number] = found[number].merge(Similarity.of(pairs, [part[node] for node in ends]))
    return tuple(found)


def compared(sublayer: Sublayer) -> tuple[fx.Node, fx.Node]:
    """The stream, and what says how it is afterwards: of sublayers side by side, the branch of this one alone."""
    return sublayer.stream, sublayer.branch if sublayer.parallel else sublayer.add


def before_and_after(sublayer: Sublayer, values: Mapping[fx.Node, Tensor]) -> tuple[Tensor, Tensor]:
    """The stream before and after a sublayer, from the values of the nodes in `compared`."""
    before, other = (values[node] for node in compared(sublayer))
    return before, before + other if sublayer.parallel else other


def _chosen(batches: Sequence[Batch], positions: Sequence[Tensor] | None) -> list[Tensor]:
    """The tokens that count, bool [B, S] for each batch."""
    if positions is None:
        return [batch.counted for batch in batches]
    if len(positions) != len(batches):
        raise InvalidInput(f"there are {len(positions)} masks of positions for {len(batches)} calibration batches.")
    for number, (batch, mask) in enumerate(zip(batches, positions, strict=True)):
        if mask.dtype != torch.bool or mask.shape != batch.valid.shape:
            raise InvalidInput(
                f"the positions of calibration batch {number} are {mask.dtype} {list(mask.shape)}.",
                hint=f"Give a mask: bool {list(batch.valid.shape)}.",
            )
    return [batch.valid & mask for batch, mask in zip(batches, positions, strict=True)]


def refuse_stream(program: Program, stream: ResidualStream) -> None:
    """Refuse a stream in which a token is not a vector in its own row.

    Raises:
        Unsupported: it is such a stream, or one whose sublayers cannot be compared one by one.
    """
    tokens = program.input(Role.TOKENS)
    shape = stream.entry.meta["val"].shape
    if tokens is None or len(shape) != 3 or list(map(str, shape[:2])) != list(map(str, tokens.meta["val"].shape)):
        raise Unsupported(f"statistics of a residual stream of shape {list(shape)}", where=stream.entry.name)
    scaled = [each for each in stream.sublayers if each.parallel and not each.skip.is_identity]
    if scaled:
        raise Unsupported("statistics of sublayers side by side with a scaled stream", where=scaled[0].path)
