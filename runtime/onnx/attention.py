"""GroupQueryAttention in the form that suits each step: conditions around it that look at the sizes of the step.

The operator as it is computes every step, but some of them slowly (ONNX Runtime 1.32 on CPUs, `benchmarks.kv_speed`):

- One query over a quantized cache is faster on the operator's path for attention sinks. Sinks of -infinity add nothing
  to the softmax.
- Of many queries, each dequantizes all rows again. The tokens of a first prompt attend to each other alone, so they are
  quantized and dequantized beforehand, once, and the operator computes in float32.
- With a sliding window, it walks over the whole cache nevertheless. One query of one sequence gets the rows of the
  window alone, as a cache of their own.

Every form writes the same bytes into the cache, in place: the cache's buffer is what the result of a condition is bound
to, and so what its branches write to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from skipstone.runtime.onnx.quantized import MICROSOFT
from skipstone.runtime.onnx.tape import BranchTape

_OPERATOR = "GroupQueryAttention"
_INPUTS = (
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache",
    "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale", "q_norm_weight", "k_norm_weight",
    "query_seqlens",
)  # fmt: skip
_QUANTIZATION = ("k_quant_type", "v_quant_type", "kv_cache_bit_width")
_CACHES = ("past_key", "past_value")

Results = Sequence[ir.Value]  # the output, and the caches of keys and values
Form = Callable[[BranchTape], Results]


def expand(model: ir.Model, in_place: bool = True) -> None:
    """Put conditions around every GroupQueryAttention that has more than one form.

    Args:
        in_place: whether caches have room for the new rows; otherwise those forms are left out that write them there.
    """
    conditions: dict[str, ir.Value] = {}
    for node in [node for node in model.graph if node.op_type == _OPERATOR]:
        _Expansion(model.graph, node, conditions, in_place).run()


class _Expansion:
    """Replaces one node.

    Args:
        conditions: those that are in the graph already, by name; all nodes share them.
        in_place: see `expand`.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node, conditions: dict[str, ir.Value], in_place: bool) -> None:
        self.graph, self.node, self.conditions, self.in_place = graph, node, conditions, in_place
        self.input = dict(zip(_INPUTS, node.inputs, strict=True))
        self.query, self.total = self.input["query"], self.input["total_sequence_length"]
        self.option: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
        self.bits: int = self.option.get("kv_cache_bit_width", 32)
        self.width: int = self.input["past_key"].shape[3]

    def run(self) -> None:
        forms = self._forms()
        if not forms:
            return
        tape = BranchTape(str(self.node.outputs[0].name))
        results = self._choice(tape, forms)
        nodes = tape.named()
        for node in nodes:
            node.metadata_props.update(self.node.metadata_props)
        ir.convenience.replace_nodes_and_values(self.graph, self.node, [self.node], nodes, self.node.outputs, results)

    def _forms(self) -> list[tuple[ir.Value, Form]]:
        """The forms that this node has beside itself, each with the condition that it is for; the first one counts."""
        forms: list[tuple[ir.Value, Form]] = []
        # A window of 1 would be a cache without rows.
        if self.in_place and (window := self.option.get("local_window_size", 0)) > 1:
            # Copying the window pays from two windows on where the kernel is slow, from three on in float32.
            rows = window * (3 if self.bits == 32 else 2)
            forms.append((self._condition(f"beyond_{rows}", partial(self._is_beyond, rows)), self._window))
        if self.bits < 32:
            if self.input["head_sink"] is None:
                forms.append((self._condition("single", self._is_single), self._with_neutral_sinks))
            if self.in_place:
                forms.append((self._condition("first", self._is_first), self._first_prompt))
        return forms

    def _choice(self, tape: BranchTape, forms: Sequence[tuple[ir.Value, Form]]) -> Results:
        """The first form whose condition holds, or the operator as it is."""
        if not forms:
            return self._attention(tape)
        (condition, form), *others = forms
        then, otherwise = (BranchTape(f"{tape.prefix}.{branch}") for branch in ("then", "else"))
        branches = {
            "then_branch": then.branch(*form(then)),
            "else_branch": otherwise.branch(*self._choice(otherwise, others)),
        }
        return tape.op_multi_out("If", [condition], branches, num_outputs=3)

    def _attention(self, tape: BranchTape, without: Sequence[str] = (), **inputs: ir.Value | None) -> Results:
        """The operator, without some of its attributes and with other inputs."""
        option = {name: value for name, value in self.option.items() if name not in without}
        given = list((self.input | inputs).values())
        return tape.op_multi_out(_OPERATOR, given, option, domain=MICROSOFT, num_outputs=3)

    # Conditions

    def _condition(self, name: str, make: Callable[[BranchTape], ir.Value]) -> ir.Value:
        if name not in self.conditions:
            tape = BranchTape(f"{_OPERATOR}.{name}")
            self.conditions[name] = make(tape)
            self.graph.insert_before(self.node, tape.named())
        return self.conditions[name]

    def _is_single(self, tape: BranchTape) -> ir.Value:
        """Whether every sequence has one query."""
        return tape.op("Equal", [self._rows(tape), tape.integers(1)])

    def _is_first(self, tape: BranchTape) -> ir.Value:
        """Whether no sequence has anything in the cache: all of the longest one is new."""
        return tape.op("Equal", [self._rows(tape), self._total(tape)])

    def _is_beyond(self, rows: int, tape: BranchTape) -> ir.Value:
        """Whether there is one query in all, and it follows so many rows or more."""
        queries = tape.op("ReduceProd", [tape.op("Shape", [self.query], {"end": 2})])
        is_one = tape.op("Equal", [queries, tape.integers(1)])
        return tape.op("And", [is_one, tape.op("Greater", [self._total(tape), tape.integers(rows)])])

    def _rows(self, tape: BranchTape) -> ir.Value:
        """The new rows S of each sequence, int64 [1]."""
        return tape.op("Shape", [self.query], {"start": 1, "end": 2})

    def _total(self, tape: BranchTape) -> ir.Value:
        """The rows of the longest sequence, int64 [1]."""
        return tape.op("Reshape", [tape.op("Cast", [self.total], {"to": ir.DataType.INT64}), tape.integers(1)])

    # Forms

    def _with_neutral_sinks(self, tape: BranchTape) -> Results:
        # On this path, a query that sees nothing would become NaN; here each sees itself.
        return self._attention(tape, head_sink=self._neutral_sinks())

    def _neutral_sinks(self) -> ir.Value:
        heads = self.option["num_heads"]
        return self._constant(f"neutral_sinks_{heads}", torch.full((heads,), -torch.inf))

    def _first_prompt(self, tape: BranchTape) -> Results:
        keys, key_codes = self._quantized(tape, "key", "k_scale")
        values, value_codes = self._quantized(tape, "value", "v_scale")
        absent = dict.fromkeys((*_CACHES, "k_scale", "v_scale", "query_seqlens"))
        out, *_ = self._attention(tape, _QUANTIZATION, key=keys, value=values, **absent)
        return out, self._written(tape, "past_key", key_codes), self._written(tape, "past_value", value_codes)

    def _quantized(self, tape: BranchTape, which: str, scale: str) -> tuple[ir.Value, ir.Value]:
        """New keys or values [B, S, KH * D] as the cache gives them back, and its rows for them [B * S * KH, *].

        As the operator does it: with the reciprocal of the scale, and that of 1 for a scale of 0.
        """
        scales, half = tape.op("Reshape", [self.input[scale], tape.integers(-1)]), 2.0 ** (self.bits - 1)
        used = tape.op("Cast", [scales], {"to": ir.DataType.BOOL})
        inverse = tape.op("Reciprocal", [tape.op("Where", [used, scales, tape.number(1.0)])])
        rounded = tape.op("Round", [tape.op("Mul", [self.input[which], inverse])])
        clipped = tape.op("Clip", [rounded, tape.number(-half), tape.number(half - 1)])
        codes = tape.op("Cast", [clipped], {"to": ir.DataType.INT8})
        elements = tape.op("Cast", [codes], {"to": ir.DataType.FLOAT})
        if self.bits == 4:
            codes = self._packed(tape, elements)
        return tape.op("Mul", [elements, scales]), tape.op("Reshape", [codes, tape.integers(-1, self.width)])

    def _packed(self, tape: BranchTape, elements: ir.Value) -> ir.Value:
        """Pairs of 4-bit integers, each plus 8, as bytes: the first of a pair is the low half.

        A product with a matrix is exact here, and ONNX Runtime has nothing that is nearly as fast.
        """
        pairs = torch.tensor([1.0, 16.0]).reshape(2, 1)
        matrix = self._constant(f"pairs_{self.width}", torch.kron(torch.eye(self.width), pairs))
        rows = tape.op("Reshape", [elements, tape.integers(-1, 2 * self.width)])
        bytes_ = tape.op("Add", [tape.op("MatMul", [rows, matrix]), tape.number(8.0 + 8 * 16)])
        return tape.op("Cast", [bytes_], {"to": ir.DataType.UINT8})

    def _window(self, tape: BranchTape) -> Results:
        size: int = self.option["local_window_size"]
        end = self._total(tape)
        begin, last = (tape.op("Sub", [end, tape.integers(rows)]) for rows in (size, 1))
        inputs: dict[str, ir.Value | None] = {
            name: tape.op("Slice", [self.input[name], begin, last, tape.integers(2)]) for name in _CACHES
        }
        if (bias := self.input["attention_bias"]) is not None:
            inputs["attention_bias"] = tape.op("Slice", [bias, begin, end, tape.integers(3)])
        if self.bits < 32 and self.input["head_sink"] is None:
            inputs["head_sink"] = self._neutral_sinks()
        inputs["seqlens_k"] = tape.op("Cast", [tape.integers(size - 1)], {"to": ir.DataType.INT32})
        inputs["total_sequence_length"] = tape.op("Cast", [tape.integer(size)], {"to": ir.DataType.INT32})
        out, *windows = self._attention(tape, ["local_window_size"], query_seqlens=None, **inputs)
        new = [tape.op("Gather", [window, tape.integers(size - 1)], {"axis": 2}) for window in windows]
        rows = [tape.op("Reshape", [each, tape.integers(-1, self.width)]) for each in new]
        return out, *(self._written(tape, name, each) for name, each in zip(_CACHES, rows, strict=True))

    def _written(self, tape: BranchTape, name: str, rows: ir.Value) -> ir.Value:
        """A cache with new rows [B * S * KH, *] behind those that are there, of which every sequence has as many."""
        sizes = tape.op("Shape", [self.query], {"end": 2})
        sizes = tape.op("Concat", [sizes, tape.integers(self.option["kv_num_heads"])], {"axis": 0})
        everywhere = tape.op("ConstantOfShape", [sizes], {"value": ir.tensor(torch.ones(1, dtype=torch.bool))})
        by_sequence_row_and_head = tape.op("NonZero", [everywhere])
        by_axis = tape.op("Gather", [by_sequence_row_and_head, tape.integers(0, 2, 1)])
        begin = tape.op("Sub", [self._total(tape), self._rows(tape)])
        offset = tape.op("Concat", [tape.integers(0, 0), begin], {"axis": 0})
        places = tape.op("Add", [tape.op("Transpose", [by_axis]), offset])
        return tape.op("ScatterND", [self.input[name], places, rows])

    def _constant(self, name: str, content: Tensor) -> ir.Value:
        """An initializer that all nodes share."""
        name = f"{_OPERATOR}.{name}"
        if name not in self.graph.initializers:
            value = ir.tensor(content, name=name)
            self.graph.register_initializer(
                ir.Value(name=name, shape=value.shape, type=ir.TensorType(value.dtype), const_value=value)
            )
        return self.graph.initializers[name]
