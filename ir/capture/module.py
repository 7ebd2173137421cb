"""Capture of any `nn.Module`, with named inputs and any structure of tensor outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from skipstone.ir.capture.attention import recognise_attention
from skipstone.ir.capture.exported import export, named, refuse_unusable, source_of, to_program
from skipstone.ir.capture.validate import compare
from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.program import Program, Role
from skipstone.ir.surrogate import sizes
from skipstone.ir.verify import REQUIRED

ROLES = {
    "input_ids": Role.TOKENS,
    "tokens": Role.TOKENS,
    "inputs_embeds": Role.EMBEDDINGS,
    "position_ids": Role.POSITIONS,
    "positions": Role.POSITIONS,
    "logits": Role.LOGITS,
}
"""Names with a meaning, where types agree; every other input or output is known by its name alone."""


def capture_module(
    module: nn.Module,
    example_inputs: Mapping[str, Tensor],
    dynamic_shapes: Mapping[str, Sequence[int]] | None = None,
) -> Program:
    """Capture a module as a program, and check the program against the module.

    Args:
        module: in evaluation mode; it is not changed.
        example_inputs: one tensor per input, by the names of `forward`'s parameters; sizes of dynamic axes at least 2.
        dynamic_shapes: the dynamic axes of each input; by default the first two of each, where the module allows it.
    Raises:
        InvalidInput: the example does not fit the module's signature, or the module fails on it.
        Unsupported: control flow on tensor values, state written during the forward pass, a graph that differs.
    """
    refuse_unusable(module)
    inputs = _checked(module, example_inputs)
    with torch.no_grad():
        try:
            outputs = module(**inputs)
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            raise InvalidInput(
                f"{type(module).__name__} fails on the example inputs: {error}.",
                hint="Pass inputs for which module(**example_inputs) works.",
            ) from error
    dynamic = dynamic_shapes or {name: range(min(value.ndim, 2)) for name, value in inputs.items()}
    exported = export(named(module, inputs), inputs, dynamic)
    source = source_of(module, vocabulary=_vocabulary(module), max_positions=None)
    names = _output_names(outputs, inputs)
    values = inputs | dict(zip(names, pytree.tree_leaves(outputs), strict=True))
    roles = {name: role for name, role in ROLES.items() if name in values and _may_be(role, values[name])}
    program = to_program(exported, source, roles, names)
    _look_at_logits(program)
    recognise_attention(program)
    compare(program, module, inputs)
    return program


def _checked(module: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(example, Mapping) or not example:
        raise InvalidInput("example_inputs must be a non-empty mapping from input names to tensors.")
    for name, value in example.items():
        if not isinstance(value, Tensor):
            raise InvalidInput(f"example input {name!r} is {type(value).__name__}, expected a tensor.")
    signature = inspect.signature(module.forward)
    try:
        signature.bind(**example)
    except TypeError as error:
        raise InvalidInput(
            f"example_inputs do not fit {type(module).__name__}.forward{signature}: {error}.",
            hint=f"Its parameters are {', '.join(signature.parameters)}.",
        ) from error
    return dict(example)


def _may_be(role: Role, value: Tensor) -> bool:
    """Whether a tensor is of the type that a role requires."""
    rank, dtypes = REQUIRED.get(role, (None, (value.dtype,)))
    return value.dtype in dtypes and rank in (None, value.ndim)


def _look_at_logits(program: Program) -> None:
    """Leave the role to logits [B, S, V] of the tokens alone; those of queries, as a detector has, are a tensor."""
    tokens, logits = program.input(Role.TOKENS), program.output(Role.LOGITS)
    if tokens is None or logits is None or logits.meta["val"].ndim != 3 or sizes(logits)[:2] == sizes(tokens)[:2]:
        return
    program.outputs = tuple(replace(port, role=Role.TENSOR) for port in program.outputs)


def _output_names(outputs: Any, inputs: Iterable[str]) -> list[str]:
    """A name for each output leaf: its key or attribute, its index path, or `output` when there is only one.

    No two are alike, and none is that of an input.
    """
    paths, _ = pytree.tree_flatten_with_path(outputs)
    names: list[str] = []
    for path, value in paths:
        name = ".".join(_entry(part) for part in path) or "output"
        if not isinstance(value, Tensor):
            feature = f"outputs that are not tensors ({name} is {type(value).__name__})"
            raise Unsupported(feature, hint="Return tensors in tuples, lists or dictionaries.")
        while name[0].isdigit() or name in (*inputs, *names):
            name = f"output_{name}"
        names.append(name)
    if not names:
        raise Unsupported("a model without outputs", hint="Return tensors in tuples, lists or dictionaries.")
    return names


def _entry(part: Any) -> str:
    return str(next(getattr(part, field) for field in ("key", "name", "idx") if hasattr(part, field)))


def _vocabulary(module: nn.Module) -> int | None:
    embeddings = [child for child in module.modules() if isinstance(child, nn.Embedding)]
    return embeddings[0].num_embeddings if len(embeddings) == 1 else None
