"""Letting a model use the stacked weights of its executable, so that they are in memory once."""

from __future__ import annotations

import torch
from torch import nn

from skipstone.ir.program import Program


@torch.no_grad()
def move_parameters(model: nn.Module, captured: Program, program: Program) -> int:
    """Turn parameters of a model into views of stacks that hold their values, and free the memory that they had.

    The model computes what it did, its state dict has the same names and values, and a change of a parameter in place
    is one of the executable's weights. A parameter stays where it is if the program still reads it there, or if a pass
    has changed what went into the stack (another dtype, keys that were conditioned).

    Args:
        captured: what was captured of the model.
        program: what became of it; `Program.moved` says which tensors lie in stacks.
    Returns:
        bytes that were freed, if nothing else holds on to them.
    """
    left = {tensor.data_ptr() for tensor in program.tensors().values()}
    places = {}
    for name, tensor in captured.tensors().items():
        if name in program.moved and tensor.data_ptr() not in left:
            places[tensor.data_ptr(), tensor.shape] = program.moved[name]
    freed = 0
    for parameter in model.parameters():
        view = places.get((parameter.data_ptr(), parameter.shape))
        if view is not None and view.dtype == parameter.dtype and torch.equal(view, parameter):
            freed += parameter.nbytes
            parameter.data = view
    return freed
