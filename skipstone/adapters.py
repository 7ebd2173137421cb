"""Adapter layers for the time of a training: LoRA (arXiv 2106.09685) by the `peft` library, on a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from skipstone.ir.capture.huggingface import capture_huggingface
from skipstone.ir.errors import InvalidInput, Unsupported, UserError
from skipstone.ir.program import Program
from skipstone.ir.stream import Sublayer, find_stream


@dataclass(frozen=True)
class AdaptedModel:
    """A copy of a model with adapters to train.

    Attributes:
        program: the captured copy.
        parameters: those to train, by their names in the program; its tensors are aliases of them without gradients.
        wrapper: the copy as `peft` holds it.
    """

    program: Program
    parameters: dict[str, nn.Parameter]
    wrapper: Any

    @classmethod
    def of(cls, model: PreTrainedModel, config: Any, seed: int) -> AdaptedModel:
        """Put adapters into a copy of a model.

        Args:
            config: a `peft.LoraConfig`; it is left as it is.
            seed: of the adapters' first values.
        Raises:
            UserError: `peft` is missing, or the adapters do not fit the model.
            Unsupported: as `capture_huggingface`, or dropout in the adapters.
        """
        try:
            import peft
        except ImportError as error:
            raise UserError("adapters need peft.", hint='Install it: pip install "skipstone[train]".') from error
        if not isinstance(config, peft.LoraConfig):
            raise UserError(f"lora is {type(config).__name__}, expected peft.LoraConfig.")
        if config.lora_dropout:
            hint = "Use lora_dropout=0.0."
            raise Unsupported("dropout in adapters, which are trained as they will run", hint=hint)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                wrapper = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
            except (ValueError, TypeError) as error:
                raise InvalidInput(f"lora: {error}") from error
        base = wrapper.get_base_model().eval()
        trained = {name: each for name, each in base.named_parameters() if each.requires_grad}
        if not trained:
            raise InvalidInput("lora: it leaves nothing to train.", hint="Use inference_mode=False.")
        program = capture_huggingface(base, adapters=True)
        names = program.tensors()
        return cls(program, {name: each for name, each in trained.items() if name in names}, wrapper)

    def counterparts(self, units: Sequence[Sequence[Sublayer]]) -> list[list[Sublayer]]:
        """The same sublayers in the copy as in the model.

        Raises:
            Unsupported: the copy's stream is divided otherwise.
        """
        own = find_stream(self.program).sublayers
        try:
            found = [[own[each.index] for each in unit] for unit in units]
        except IndexError:
            found = []
        pairs = [pair for unit, others in zip(units, found, strict=False) for pair in zip(unit, others, strict=True)]
        if not found or any((one.kind, one.layer) != (other.kind, other.layer) for one, other in pairs):
            raise Unsupported(
                "adapters between sublayers side by side",
                hint="Leave out the projections whose results are added to the stream (target_modules).",
            )
        return found

    def merged(self) -> PreTrainedModel:
        """The copy with the adapters merged into its weights; this object is of no use afterwards."""
        model: PreTrainedModel = self.wrapper.merge_and_unload()
        return model
