"""Weights of parallel lanes as one tensor each, made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from skipstone.ir.lanes import Pack
from skipstone.ir.program import Program


class StackedWeights:
    """Makes stacks of a program's tensors. Iterations over some of the lanes read parts of one stack for all of them.

    Args:
        program: what they are for.
        families: for tensors by name, those that stand in the same place in all lanes, in order.

    Attributes:
        moved: tensors whose values lie in a stack as they are, by name, as views of it.
        bytes: of all stacks.
    """

    def __init__(self, program: Program, families: Mapping[str, tuple[str, ...]]) -> None:
        self.program, self.families = program, families
        self.moved: dict[str, Tensor] = {}
        self.bytes = 0
        self._stacks: dict[tuple[str, tuple[tuple[str, ...], ...]], Tensor] = {}
        self._nodes: dict[tuple[str, tuple[tuple[str, ...], ...]], fx.Node] = {}

    def is_whole(self, pack: Pack) -> bool:
        """Whether all lanes that there are of these tensors are in the pack."""
        own = _names(pack)
        return self.families.get(own[0], own) == own

    def stack(self, pack: Pack) -> fx.Node:
        """[N, ...] of tensors [...]."""
        return self._part("stack", [pack], lambda tensors: torch.stack(tensors[0]))

    def rows(self, packs: Sequence[Pack], gains: Pack | None = None) -> fx.Node:
        """Weights [N, F1 + F2 + ..., D] of projections [F1, D], [F2, D], ... that read the same value; biases likewise.

        Args:
            gains: [D] of each lane, which their input is multiplied with; the weights then take that over.
        """

        def joined(tensors: list[list[Tensor]]) -> Tensor:
            return torch.stack([torch.cat(lane) for lane in zip(*tensors, strict=True)])

        def folded(tensors: list[list[Tensor]]) -> Tensor:
            return joined(tensors[:-1]) * torch.stack(tensors[-1]).unsqueeze(1)

        return self._part("rows", packs, joined) if gains is None else self._part("gained", [*packs, gains], folded)

    def flat(self, rows: fx.Node) -> fx.Node:
        """[N * F, ...] of a stack [N, F, ...]: the same memory."""
        key = "flat", ((str(rows.target),),)
        if key not in self._nodes:
            whole = self.program.tensor(str(rows.target)).flatten(0, 1)
            self._nodes[key] = self.program.add_tensor(self._free(f"{rows.target}_flat"), whole)
        return self._nodes[key]

    def columns(self, pack: Pack) -> fx.Node:
        """The weight [D, N * F] of a projection of all inputs side by side, from weights [D, F]."""
        node = self._whole("columns", pack, lambda tensors: torch.cat(tensors, dim=1))
        whole = self.program.tensor(str(node.target))
        self.moved |= zip(_names(pack), whole.chunk(len(pack.nodes), dim=1), strict=True)
        return node

    def summed(self, pack: Pack) -> fx.Node:
        """The sum [D] of biases [D]."""
        return self._whole("summed", pack, lambda tensors: torch.stack(tensors).double().sum(0).to(tensors[0].dtype))

    def _part(self, form: str, packs: Sequence[Pack], make: Callable[[list[list[Tensor]]], Tensor]) -> fx.Node:
        """The lanes of the packs in the stack of all lanes, a view."""
        own = tuple(_names(pack) for pack in packs)
        families = tuple(self.families.get(names[0], names) for names in own)
        start, count = families[0].index(own[0][0]), len(own[0])
        if any(family[start : start + count] != names for family, names in zip(families, own, strict=True)):
            families, start = own, 0  # a tensor of several families
        if (form, families) not in self._stacks and not self._has(families):
            families, start = own, 0  # of the others, the program has only stacks left
        if (form, families) not in self._stacks:
            with torch.no_grad():
                made = make([[self.program.tensor(name) for name in family] for family in families])
            self._stacks[form, families] = made
            self.bytes += made.nbytes
            if form != "gained":
                self._note(families, made)
        if (form, own) not in self._nodes:
            part = self._stacks[form, families][start : start + count]
            self._nodes[form, own] = self.program.add_tensor(self._free(f"{form}_{own[0][0]}"), part)
        return self._nodes[form, own]

    def _has(self, families: Sequence[tuple[str, ...]]) -> bool:
        known = self.program.tensors()
        return all(name in known for family in families for name in family)

    def _note(self, families: tuple[tuple[str, ...], ...], stack: Tensor) -> None:
        """Note where tensors lie in a stack that has those of each lane behind one another, or one of each lane."""
        for lane, names in enumerate(zip(*families, strict=True)):
            parts = (
                [stack[lane]] if len(names) == 1 else stack[lane].split([len(self.program.tensor(n)) for n in names])
            )
            self.moved |= zip(names, parts, strict=True)

    def _whole(self, form: str, pack: Pack, make: Callable[[list[Tensor]], Tensor]) -> fx.Node:
        own = (_names(pack),)
        if (form, own) not in self._nodes:
            with torch.no_grad():
                made = make([self.program.tensor(name) for name in own[0]])
            self.bytes += made.nbytes
            self._nodes[form, own] = self.program.add_tensor(self._free(f"{form}_{own[0][0]}"), made)
        return self._nodes[form, own]

    def _free(self, name: str) -> str:
        """A name that the program does not have yet."""
        name = name.replace(".", "_")
        number, free = 1, name
        while hasattr(self.program.module, free):
            number, free = number + 1, f"{name}_{number}"
        return free


def _names(pack: Pack) -> tuple[str, ...]:
    return tuple(str(node.target) for node in pack.nodes)
