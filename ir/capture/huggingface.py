"""Capture of Hugging Face models: attentions and mixtures of experts become one node each.

transformers lets attention, mask and experts functions be registered by name. The seam registers its own for the
time of the capture, runs the model once eagerly to learn the kind of each mask, and then traces it. Names, configs and
registries are put back afterwards, also when the capture fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface, batched_mm_experts_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_outputs import ModelOutput

from skipstone.ir.capture.attention import recognise_attention
from skipstone.ir.capture.experts import recognise_experts
from skipstone.ir.capture.exported import ROOT, export, named, refuse_unusable, source_of, to_program
from skipstone.ir.capture.masks import classify
from skipstone.ir.capture.validate import TOLERANCE, compare, relative_difference
from skipstone.ir.dialect import ATTENTION, Kind, attention
from skipstone.ir.errors import Unsupported, UserError
from skipstone.ir.program import Program, Role
from skipstone.ir.sequence import offenders

NAME = "skipstone"
"""The name under which the seam registers its functions with transformers."""

IGNORED = frozenset(
    {
        # asked of other back ends: flash attention, paged caches
        *("cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "max_length_k", "max_length_q"),
        *("position_embeddings", "position_ids", "sliding_window", "use_top_left_mask"),
        # asked of the model, and passed on
        *("attention_mask", "layer_idx", "logits_to_keep", "num_items_in_batch", "output_attentions"),
        *("output_hidden_states", "output_router_logits", "past_key_values", "return_dict", "training", "use_cache"),
        "dropout",  # refused beforehand unless it is zero
    }
)
"""Keyword arguments of attention calls that do not change what eager attention computes."""

BATCH, LENGTH = 3, 11
"""Example sizes for tracing: above one, since sizes 0 and 1 are special to torch.export, and different primes."""


@dataclass
class _Mark:
    """What the seam knows of a mask tensor that it handed to the model."""

    mask: Tensor
    kind: Kind
    window: int
    padding: Tensor | None


@dataclass
class _Seam:
    """State of one capture: the kinds of the masks in call order, and the attentions met so far.

    `padded` says whether the padding mask is an input of the program; if not it is all ones and means nothing.
    """

    mask_function: Any
    padded: bool
    kinds: list[tuple[Kind, int]] = field(default_factory=list)
    learning: bool = True
    masks_made: int = 0
    marks: dict[int, _Mark] = field(default_factory=dict)
    slots: int = 0
    paths: dict[int, str] = field(default_factory=dict)

    def restart(self) -> None:
        self.learning, self.masks_made, self.slots = False, 0, 0
        self.marks.clear()

    def make_mask(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The model asks for a mask: hand out the real one, and remember its kind under its identity."""
        function = kwargs.get("mask_function")
        padding = kwargs.get("attention_mask") if self.padded else None
        if self.learning:
            self.kinds.append(classify(function, kwargs.get("local_size")) if function else (Kind.CAUSAL, 0))
        kind, window = self.kinds[self.masks_made]
        self.masks_made += 1
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask = self.mask_function(*args, **kwargs)
        if mask is not None:
            self.marks[id(mask)] = _Mark(mask, kind, window, padding)
        return mask

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        """The model attends: emit one `skipstone::attention` node."""
        where = self.paths.get(id(module), type(module).__name__)
        sinks = next((arguments.pop(name) for name in ("s_aux", "sinks") if arguments.get(name) is not None), None)
        softcap = arguments.pop("softcap", None) or 0.0
        causal = arguments.pop("is_causal", None)
        causal = getattr(module, "is_causal", True) if causal is None else causal
        bias = arguments.pop("position_bias", None)
        if arguments.get("dropout"):
            raise Unsupported("attention dropout", where=where, hint="Call model.eval() first.")
        for name, argument in arguments.items():
            if name not in IGNORED and isinstance(argument, Tensor | float | int) and not isinstance(argument, bool):
                raise Unsupported(f"attention argument {name!r}", where=where, hint="Its meaning is not known here.")
        cross = getattr(module, "is_cross_attention", False) or (
            key.shape[2] is not query.shape[2]
            and bool(torch.fx.experimental.symbolic_shapes.guard_or_true(key.shape[2] != query.shape[2]))
        )
        kind, window, mask = (Kind.CAUSAL if causal and not cross else Kind.BIDIRECTIONAL), 0, None
        mark = self.marks.get(id(attention_mask))
        if mark is not None:
            kind, window = mark.kind, mark.window
            if kind is Kind.EXPLICIT:
                mask = mark.mask
            elif mark.padding is not None:
                mask = mark.padding.to(torch.bool)[:, None, None, :]
        elif attention_mask is not None:
            kind, mask = Kind.EXPLICIT, attention_mask
        if mask is not None and mask.dtype != torch.bool:
            bias, mask = (mask if bias is None else bias + mask), None
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        slot, self.slots = (-1, self.slots) if cross else (self.slots, self.slots + 1)
        options = {"scale": float(scaling), "kind": str(kind), "window": window, "softcap": float(softcap)}
        out = attention(query, key, value, mask, bias, sinks, **options, slot=slot)
        return out.transpose(1, 2).contiguous(), None


class _CausalForward(nn.Module):
    """Tokens and positions in, logits out. The padding mask is all ones: padding is the runtime's matter."""

    def __init__(self, model: nn.Module, positions: bool, mask: bool) -> None:
        super().__init__()
        setattr(self, ROOT, model)
        self.positions, self.mask = positions, mask

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        extra: dict[str, Any] = {"position_ids": position_ids} if self.positions else {}
        if self.mask:
            extra["attention_mask"] = torch.ones_like(input_ids)
        return {"logits": getattr(self, ROOT)(input_ids=input_ids, use_cache=False, return_dict=True, **extra).logits}


def _tensors(out: ModelOutput) -> dict[str, Tensor]:
    """The tensor outputs by name."""
    return {name: value for name, value in out.items() if isinstance(value, Tensor)}


def capture_huggingface(
    model: PreTrainedModel, example_inputs: Mapping[str, Tensor] | None = None, *, adapters: bool = False
) -> Program:
    """Capture a Hugging Face model as a program, and check the program against the model.

    A causal LM becomes ``input_ids, position_ids -> logits`` with dynamic batch and sequence. Any other model keeps its
    named inputs (default: ``input_ids`` and ``attention_mask``) and its named tensor outputs.

    Args:
        model: in evaluation mode. It is put back exactly as it was, also on failure.
        example_inputs: needed where the main input is not tokens.
        adapters: capture PEFT adapters as layers of their own; they are refused otherwise, for merging is better.
    Raises:
        UserError: the model or the example cannot be used as they are.
        Unsupported: something that would not be exact, with its place.
    """
    refuse_unusable(model, adapters)
    _refuse_stateful_rope(model)
    config = model.config.get_text_config()
    source = source_of(
        model,
        vocabulary=_rows(model),
        max_positions=_positions(config),
    )
    causal = example_inputs is None and model.can_generate() and not model.config.is_encoder_decoder
    inputs = dict(example_inputs) if example_inputs is not None else _example(model, source.vocabulary, causal)
    wrapper: nn.Module = named(model, inputs, _tensors)
    if causal and _rewrites_tokens(model, inputs["input_ids"]):
        causal, inputs = False, _example(model, source.vocabulary, False)
        wrapper = named(model, inputs, _tensors)
    if causal:
        wrapper, first = _causal(model, inputs)
        limit = source.max_positions
        source = replace(source, first_position=first, max_positions=None if limit is None else limit - first)
    try:
        program = _capture(model, wrapper, inputs, source, causal, seam=True)
        if causal and _sees_ahead(program):  # an encoder, whose tokens see padding unless they are told of it
            causal, inputs = False, _example(model, source.vocabulary, False)
            wrapper = named(model, inputs, _tensors)
            program = _capture(model, wrapper, inputs, source, causal, seam=True)
        compare(program, wrapper, inputs, source.max_positions)
    except Unsupported as refusal:
        # The seam could not say what this attention does: keep the model's own.
        program = _capture(model, wrapper, inputs, source, causal, seam=False)
        compare(program, wrapper, inputs, source.max_positions)
        if any(True for _ in offenders(program)):
            program.cache_refusal = refusal
    return program


def _refuse_stateful_rope(model: PreTrainedModel) -> None:
    """Refuse rotary embeddings that change their frequencies, and with them every cached key, as sequences grow."""
    for path, module in model.named_modules():
        kinds = getattr(module, "rope_type", "")
        for kind in kinds.values() if isinstance(kinds, Mapping) else [kinds]:
            if kind in ("dynamic", "longrope"):
                raise Unsupported(
                    f"{kind} RoPE scaling, whose frequencies follow the longest position of each call",
                    where=path,
                    hint="Load it with another rope_type: 'yarn', 'llama3' and 'linear' scale all lengths alike, "
                    "'default' does not scale.",
                )


def _rewrites_tokens(model: PreTrainedModel, tokens: Tensor) -> bool:
    """Whether the model generates from other tokens than it is given; XLM appends a mask token at each step."""
    if type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
        return False
    try:
        prepared = model.prepare_inputs_for_generation(tokens, attention_mask=torch.ones_like(tokens))
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):  # it wants more than tokens
        return False
    used = prepared.get("input_ids")
    return isinstance(used, Tensor) and not torch.equal(used, tokens)


def _sees_ahead(program: Program) -> bool:
    return any(
        node.kwargs["kind"] == Kind.BIDIRECTIONAL and node.kwargs.get("slot", -1) != -1
        for node in program.nodes(ATTENTION)
    )


def _capture(
    model: PreTrainedModel, wrapper: nn.Module, inputs: Mapping[str, Tensor], source: Any, causal: bool, seam: bool
) -> Program:
    dynamic = {name: range(min(value.ndim, 2)) for name, value in inputs.items()}
    attention_seam = _registered(model, padded=not causal) if seam else nullcontext()
    with _untouched(model), _registered_experts(model), attention_seam as state:
        outputs = _outputs(model, wrapper, inputs, seam)
        if state is not None:
            state.restart()
        exported = export(wrapper, inputs, dynamic)
    roles = {"input_ids": Role.TOKENS, "position_ids": Role.POSITIONS, "logits": Role.LOGITS}
    roles |= {"inputs_embeds": Role.EMBEDDINGS, "attention_mask": Role.PADDING}
    program = to_program(exported, source, roles, list(outputs))
    recognise_attention(program)
    return program


def _outputs(model: PreTrainedModel, wrapper: nn.Module, inputs: Mapping[str, Tensor], seam: bool) -> dict[str, Tensor]:
    """What the model returns for the example, or a typed reason why it returns nothing."""
    try:
        with torch.no_grad():
            outputs: dict[str, Tensor] = wrapper(**inputs)
    except Unsupported:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        what = f"{type(error).__name__}: {error}"
        if seam:
            raise Unsupported(f"this model's own way to call its attention ({what})") from error
        raise Unsupported(
            f"{type(model).__name__} with the inputs {', '.join(inputs)} ({what})",
            hint="Pass example_inputs={name: tensor} for which model(**example_inputs) works.",
        ) from error
    return outputs


@contextmanager
def _registered(model: PreTrainedModel, padded: bool) -> Iterator[_Seam]:
    """The seam's functions stand in transformers' registries, and the model uses them, inside this block only."""
    # The masks keep the form (boolean or additive) that the model's own attention would get.
    state = _Seam(eager_mask if model.config._attn_implementation == "eager" else sdpa_mask, padded)
    state.paths = {id(module): path for path, module in model.named_modules()}
    AttentionInterface.register(NAME, state.attend)
    AttentionMaskInterface.register(NAME, state.make_mask)
    for config in _configs(model):
        config._attn_implementation_internal = NAME
    try:
        yield state
    finally:
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop(NAME, None)


@contextmanager
def _registered_experts(model: PreTrainedModel) -> Iterator[None]:
    """Inside this block each mixture of experts is one `skipstone::experts`, where that operator covers it."""

    def forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        form = forms.get(id(module))
        if form is None:  # transformers' default form does not export; its batched one does
            return batched_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return form(hidden_states, top_k_index, top_k_weights)

    forms = {id(module): recognise_experts(module) for module in model.modules() if hasattr(module, "_apply_gate")}
    ExpertsInterface.register(NAME, forward)
    for config in _configs(model):
        if getattr(config, "_experts_implementation_internal", None) is not None:
            config._experts_implementation_internal = NAME
    try:
        yield
    finally:
        ExpertsInterface._global_mapping.pop(NAME, None)


@contextmanager
def _untouched(model: PreTrainedModel) -> Iterator[None]:
    """Put every config of the model back as it was."""
    names = ("_attn_implementation_internal", "_experts_implementation_internal")
    before = [(config, {n: vars(config)[n] for n in names if n in vars(config)}) for config in _configs(model)]
    try:
        yield
    finally:
        for config, values in before:
            for name in names:
                if name in values:
                    setattr(config, name, values[name])
                else:
                    vars(config).pop(name, None)


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config object that a module of the model reads, nested ones included."""
    found: dict[int, Any] = {}
    pending = [module.config for module in model.modules() if hasattr(module, "config")]
    while pending:
        config = pending.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        pending += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return list(found.values())


def _rows(model: PreTrainedModel) -> int | None:
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return getattr(embedding, "num_embeddings", None)


def _example(model: PreTrainedModel, vocabulary: int | None, causal: bool) -> dict[str, Tensor]:
    if model.config.is_encoder_decoder:
        raise UserError(
            f"{type(model).__name__} is an encoder-decoder model, whose two sequences are not known here.",
            hint="Pass example_inputs={'input_ids': ..., 'decoder_input_ids': ...} with different lengths of at least "
            "two: its forward pass is captured, without generate.",
        )
    if model.main_input_name != "input_ids" or vocabulary is None:
        raise UserError(
            f"{type(model).__name__} takes {model.main_input_name!r}, and its sizes are not known here.",
            hint="Pass example_inputs={name: tensor} with a batch of at least two.",
        )
    tokens = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % min(vocabulary, 50) + min(3, vocabulary - 1) // 3
    tokens = (tokens % vocabulary).to(model.device)
    if causal:
        return {"input_ids": tokens, "position_ids": torch.arange(LENGTH, device=model.device).repeat(BATCH, 1)}
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _causal(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[_CausalForward, int]:
    """The model with positions as an input, and the first position where it counts by itself.

    That is 0, or in RoBERTa behind the padding token. A model that counts in another way is not told positions.
    """
    accepted = inspect.signature(model.forward).parameters
    mask = "attention_mask" in accepted
    own, given = (_CausalForward(model, positions, mask) for positions in (False, True))
    if "position_ids" not in accepted:
        return own, 0
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    tokens = inputs["input_ids"]
    if pad is not None:  # a token that some models do not count
        inputs = {**inputs, "input_ids": tokens.masked_fill(tokens == pad, pad + 1 if pad == 0 else pad - 1)}
    expected = _outputs(model, own, inputs, seam=False)["logits"]
    for first in (0, 1 + (pad or 0)):
        positions = inputs["position_ids"] + first
        try:
            outputs = _outputs(model, given, {**inputs, "position_ids": positions}, seam=False)
        except Unsupported:
            continue
        if relative_difference(outputs["logits"], expected) <= TOLERANCE.get(expected.dtype, 0.0):
            return given, first
    return own, 0


def _positions(config: Any) -> int | None:
    """The longest sequence that a configuration has positions for; some say -1 where there is no end (XLNet)."""
    numbers = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((number for number in numbers if number is not None and number > 0), None)
