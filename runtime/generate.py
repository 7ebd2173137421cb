"""Text generation with Hugging Face semantics.

`CausalLM` is a `transformers.GenerationMixin` that is no `nn.Module`: transformers prepares the configuration, the
logits processors and the stopping criteria, and runs beams and assisted decoding. Greedy decoding and sampling, with
whatever processors, criteria and streamer, take the loops of `skipstone.runtime.decoding` instead of the mixin's own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation import logits_process as processing
from transformers.generation.utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.program import Role
from skipstone.runtime.cache import Cache
from skipstone.runtime.decoding import generate_greedily, generate_tokens
from skipstone.runtime.executable import TokenModel, check_names
from skipstone.runtime.session import GreedySession, Session
from skipstone.runtime.speculate import Speculation, SpeculativeSession, generate_speculatively

# What transformers hands to every forward and what a program cannot return.
UNAVAILABLE_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits", "labels")
STEP_INPUTS = ["past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep"]
# What these loops know; with anything else, transformers' own loop runs. Tokenizers are for criteria made before.
LOOP_INPUTS = frozenset([*STEP_INPUTS, "tokenizer", "assistant_tokenizer"])
# Processors that remember nothing, so that they may be called for guesses, too.
STATELESS = (
    processing.TemperatureLogitsWarper,
    processing.TopKLogitsWarper,
    processing.TopPLogitsWarper,
    processing.MinPLogitsWarper,
    processing.TypicalLogitsWarper,
    processing.EpsilonLogitsWarper,
    processing.EtaLogitsWarper,
    processing.InfNanRemoveLogitsProcessor,
    processing.MinLengthLogitsProcessor,
    processing.MinNewTokensLengthLogitsProcessor,
    processing.RepetitionPenaltyLogitsProcessor,
    processing.NoRepeatNGramLogitsProcessor,
    processing.NoBadWordsLogitsProcessor,
    processing.SequenceBiasLogitsProcessor,
    processing.SuppressTokensLogitsProcessor,
    processing.ForcedEOSTokenLogitsProcessor,
)
# Ways to decode that look inside the model.
INSIDE_OPTIONS = ("assistant_early_exit", "use_mtp", "speculation_type")


class GenerationCache:
    """A cache behind the methods that transformers calls on its caches.

    transformers counts columns of the padded batch, the cache counts valid tokens of each row; both are kept here.

    Attributes:
        kv: the cache; None until the first forward pass, which is when the batch is known.
        columns: columns of the caller's batch that have been read.
        prompt: number of tokens that `generate` was called with, int64 [B] or the same for all rows, until the next
            forward pass takes note of it. Without it, the prompt is what is read first.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self) -> None:
        self.kv: Cache | None = None
        self.columns = 0
        self.prompt: Tensor | int | None = None

    @property
    def is_initialized(self) -> bool:
        """Whether anything has been read into it."""
        return self.kv is not None

    @property
    def batch_size(self) -> int:
        """Number of rows, -1 before the first forward pass."""
        return -1 if self.kv is None else self.kv.batch

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns read, padding included."""
        return self.columns

    def reset(self) -> None:
        """Forget everything."""
        self.kv, self.columns = None, 0

    def activate_past_recording(self) -> None:
        """Nothing to do: every row stays until it is overwritten, so any number can be cropped."""

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens of every row (transformers counts downwards).

        Raises:
            InvalidInput: the number is positive, or more than there is.
        """
        if not -self.columns <= tokens_to_remove <= 0:
            hint = "Pass a negative number, at most as many as the sequence has."
            raise InvalidInput(f"cannot crop a cache of {self.columns} tokens by {tokens_to_remove}.", hint=hint)
        if self.kv is not None and tokens_to_remove:
            self.kv.crop((self.kv.lengths + tokens_to_remove).clamp(min=0))
            self.columns += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes the former row ``beam_idx[i]``."""
        if self.kv is not None:
            self.kv.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        if self.kv is not None:
            self.kv.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        if self.kv is not None:
            self.kv.select(indices)


class CausalLM(TokenModel, GenerationMixin):
    """A causal language model with `generate`, usable wherever transformers takes a model to generate with."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    _supports_cache_class = True

    def __init__(self, session: Session, **options: Any) -> None:
        super().__init__(session, **options)
        source = self.program.source
        if self.config is None:
            self.config = PreTrainedConfig(vocab_size=source.vocabulary, max_position_embeddings=source.max_positions)
        # A copy: what the caller sets on it must not reach the model that the program came from.
        self.generation_config = copy.deepcopy(self.generation_config) or GenerationConfig()

    def can_generate(self) -> bool:
        """Whether transformers may call `generate`."""
        return True

    def to(self, device: Any) -> CausalLM:
        """Itself, if `device` is the one that it was lowered for.

        Raises:
            Unsupported: it is another device.
        """
        if torch.device(device).type != self.device.type:
            hint = f"Optimize the model on {device}, or pass device={str(self.device)!r}."
            raise Unsupported(f"moving an executable from {self.device} to {device}", hint=hint)
        return self

    def get_experts_implementation(self) -> dict[str, str]:
        """Nothing that transformers could switch: the program has fixed how experts run."""
        return {}

    @property
    def speculation(self) -> Speculation | None:
        """What drafting has done in all that `generate` wrote, None without a draft."""
        return self.session.speculation if isinstance(self.session, SpeculativeSession) else None

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **named: Any,
    ) -> Any:
        """Logits of a batch, padded on either side.

        Args:
            input_ids: integers [B, S].
            attention_mask: [B, S], or [B, past + S] with a cache; nonzero on valid tokens, which must be adjacent.
            position_ids: integers [B, S]; by default the valid tokens of each row count from 0.
            past_key_values: a cache that this executable returned; it is advanced in place.
            use_cache: start a cache and return it.
            logits_to_keep: number of columns, from the right, whose logits are wanted; 0 for all.
            return_dict: False for a plain tuple.
            named: further inputs of the program by port name, and tokens and positions by theirs.
        Returns:
            `CausalLMOutputWithPast`: logits [B, S, V] in the caller's columns, zero where the batch is padded.
        Raises:
            InvalidInput: an input is wrong; the message says which and where.
            Unsupported: an output that the program does not have is asked for.
        """
        input_ids = named.pop(self._input_name(Role.TOKENS), None) if input_ids is None else input_ids
        position_ids = named.pop(self._input_name(Role.POSITIONS), None) if position_ids is None else position_ids
        extra = self._extra_inputs(named)
        if input_ids is None:
            raise InvalidInput("input_ids is missing.", hint="Give the tokens, integers [batch, sequence].")
        cache = past_key_values
        if cache is None and use_cache and self.supports_cache:
            cache = GenerationCache()
        elif cache is not None:
            self._check_cache(cache)
            attention_mask = _new_columns(attention_mask, input_ids, cache)
        tokens, layout = self.prepare(input_ids, attention_mask)
        if cache is None:
            self._check_not_empty(layout)
        elif cache.kv is None:
            cache.kv = self.new_cache(*tokens.shape)
            cache.kv.decode_start = layout.counts
        if cache is not None and cache.kv is not None and cache.prompt is not None:
            cache.kv.decode_start = torch.zeros_like(cache.kv.lengths) + cache.prompt
            cache.prompt = None
        if position_ids is not None:
            position_ids = layout.to_front(self._check_positions(position_ids, tokens.shape))
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            hint = "Give a number of columns, counted from the right; 0 for all."
            raise InvalidInput(f"logits_to_keep is {logits_to_keep!r}.", hint=hint)
        rows = layout.rows(min(logits_to_keep, layout.width) or layout.width)
        kv = None if cache is None else cache.kv
        logits = self.advance(tokens, layout, rows, positions=position_ids, cache=kv, extra=extra)
        if cache is not None:
            cache.columns += layout.width
        output = CausalLMOutputWithPast(logits=layout.clear_padding(logits, rows), past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    __call__ = forward  # type: ignore[assignment]  # named arguments, where the base class takes ports

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """Continue a prompt, as `transformers.GenerationMixin.generate` does.

        Args:
            inputs: the prompt, integers [B, S]; also accepted as `input_ids`.
            generation_config, kwargs: all that transformers' `generate` takes. Pad batches on the left.
        Returns:
            int64 [B, total]: the prompt as given, then the new tokens, padded after the end of a sequence; or the
            output object that transformers returns when asked to.
        Raises:
            InvalidInput: the prompt is empty, right-padded, too long for the tokens asked for, or holds an unknown id.
            Unsupported: the program has no cache and was not built to do without, or cannot do what is asked for.
        """
        if not self.supports_cache and self.cache_refusal is not None and kwargs.get("use_cache") is not False:
            raise self.cache_refusal
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        if prompt is not None and kwargs.get("past_key_values") is None:
            prompt = self._check_prompt(prompt, kwargs.get("attention_mask"))
        # By name: in the order of the bases `Executable.generate` comes first, which refuses.
        return GenerationMixin.generate(self, prompt, generation_config=generation_config, **kwargs)

    def init_continuous_batching(self, *args: Any, **options: Any) -> Any:
        """Raise Unsupported: transformers' continuous batching brings attention and a cache of its own."""
        raise Unsupported("continuous batching", hint="Call generate() on a padded batch.")

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        position_ids: Tensor | None = None,
        is_first_iteration: bool = False,
        tokenizer: Any = None,
        assistant_tokenizer: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward pass: the last `next_sequence_length` columns, and all else as it is.

        Tokenizers, which transformers leaves among them, end here.
        """
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        if position_ids is not None:
            position_ids = position_ids[:, -input_ids.shape[1] :]
        return {"input_ids": input_ids, "position_ids": position_ids, **kwargs}

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Called by transformers with what is no option of `generate`: refuse what the model does not take either."""
        given = [name for name, value in model_kwargs.items() if value is not None and name not in UNAVAILABLE_OUTPUTS]
        check_names(given, ["input_ids", *STEP_INPUTS], also=vars(GenerationConfig()))

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called by transformers once lengths are settled: check them, and put our cache into `model_kwargs`."""
        for name in INSIDE_OPTIONS:
            if getattr(generation_config, name, None) not in (None, False):
                hint = "Pass assistant_model or prompt_lookup_num_tokens to speculate."
                raise Unsupported(f"{name} of an optimized model", hint=hint)
        if self.depends_on_step_sizes:
            self._check_step_sizes(generation_config, generation_mode)
        cache, mask = (model_kwargs.get(name) for name in ("past_key_values", "attention_mask"))
        width = (model_kwargs["position_ids"] if mask is None else mask).shape[-1]
        prompt: Tensor | int = width
        if mask is not None:  # the caller's, or what transformers took for one: the tokens that are no pad tokens
            prompt = _prompt_lengths(mask)
        if not generation_config.use_cache and self.supports_cache:
            self._check_without_cache(cache)
        if cache is not None:
            self._check_cache(cache)
            cache._is_user_defined = True  # transformers' mark
            # A mask of ones was dropped; its width, that of the past included, was noted down.
            cache.prompt = getattr(generation_config, "_mask_length", width) if mask is None else prompt
            return
        self.check_length(int(torch.as_tensor(prompt).max()) + generation_config.max_length - width)
        if generation_config.cache_implementation is not None:
            hint = "Leave it out: the plan decides the format of the cache."
            raise InvalidInput(f"cache_implementation={generation_config.cache_implementation!r}.", hint=hint)
        if not self.supports_cache:
            generation_config.use_cache = False
        elif generation_config.use_cache:
            model_kwargs["past_key_values"] = GenerationCache()
            model_kwargs["past_key_values"].prompt = prompt

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by transformers for greedy decoding and sampling: take the tight loop where it does the same."""
        cache = model_kwargs.get("past_key_values")
        special = generation_config.return_dict_in_generate or generation_config.prefill_chunk_size is not None
        fresh = cache is not None and not getattr(cache, "_is_user_defined", False)
        if special or synced_gpus or not fresh or model_kwargs.keys() - LOOP_INPUTS:
            return super()._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        positions = model_kwargs.get("position_ids")
        if positions is not None:
            following = generation_config.max_length - input_ids.shape[1]
            positions = self._check_positions(positions, input_ids.shape, following)
        # As transformers does, which takes any criterion of that kind for one that ends sequences.
        ends = [each.eos_token_id for each in stopping_criteria if hasattr(each, "eos_token_id")]  # type: ignore[attr-defined]
        pad_token = generation_config._pad_token_tensor if ends else None
        is_plain = all(type(each) in (EosTokenCriteria, MaxLengthCriteria) for each in stopping_criteria)  # type: ignore[attr-defined]
        if isinstance(self.session, SpeculativeSession):
            return generate_speculatively(
                self,
                input_ids,
                model_kwargs.get("attention_mask"),
                positions=positions,
                processor=logits_processor or None,
                drafting=_stateless(logits_processor) or None,
                finished=stopping_criteria,
                max_length=generation_config.max_length,
                ends_anywhere=is_plain,
                sample=generation_config.do_sample,
                pad_token=pad_token,
                streamer=streamer,
            )
        is_greedy = not generation_config.do_sample and not logits_processor and streamer is None
        if is_plain and is_greedy and isinstance(self.session, GreedySession):
            return generate_greedily(
                self,
                input_ids,
                model_kwargs.get("attention_mask"),
                positions=positions,
                max_length=generation_config.max_length,
                ends=torch.cat([each.reshape(-1) for each in ends]) if ends else None,
                pad_token=pad_token,
            )
        return generate_tokens(
            self,
            input_ids,
            model_kwargs.get("attention_mask"),
            positions=positions,
            processor=logits_processor,
            finished=stopping_criteria,
            sample=generation_config.do_sample,
            pad_token=pad_token,
            streamer=streamer,
        )

    def _check_prompt(self, prompt: Tensor, attention_mask: Tensor | None) -> Tensor:
        _, layout = self.prepare(prompt, attention_mask)
        self._check_not_empty(layout)
        return prompt.long()

    def _check_without_cache(self, cache: Any) -> None:
        if cache is not None:
            raise InvalidInput("past_key_values are given, with use_cache=False.", hint="Leave one of them out.")
        if self.decides_in_decoding:
            raise Unsupported(
                "use_cache=False with a plan by which decoded tokens are computed in another way than prompts",
                hint="Leave it out: without a cache, all tokens of a step would be read as a prompt.",
            )

    def _check_step_sizes(self, generation_config: GenerationConfig, generation_mode: Any) -> None:
        """Refuse steps of several tokens where one at a time would give others."""
        ways = {
            "an assistant or prompt lookup": generation_mode is GenerationMode.ASSISTED_GENERATION,
            "prefill_chunk_size": generation_config.prefill_chunk_size is not None,
            "use_cache=False": not generation_config.use_cache,
        }
        for way, is_taken in ways.items():
            if is_taken:
                raise Unsupported(
                    f"{way} with a plan by which several tokens a step give others than one",
                    hint="Leave it out, or use kv='iterate' in layer_parallel.",
                )

    def _check_cache(self, cache: Any) -> None:
        if not isinstance(cache, GenerationCache):
            hint = "Pass the cache that this executable returned, or none."
            raise InvalidInput(f"past_key_values is a {type(cache).__name__}.", hint=hint)
        self.require_cache()

    def _check_positions(self, position_ids: Tensor, shape: torch.Size, following: int = 0) -> Tensor:
        """int64 [B, S], for tokens of that shape, after which each sequence goes on by `following` tokens."""
        if position_ids.is_floating_point():
            raise InvalidInput(f"position_ids is {position_ids.dtype}.", hint="Positions are int64 or int32.")
        positions = position_ids.to(self.device, torch.int64)
        if positions.dim() != 2 or positions.shape[1] != shape[1] or len(positions) not in (1, shape[0]):
            shapes = f"{list(positions.shape)}, input_ids has {list(shape)}"
            raise InvalidInput(f"position_ids has shape {shapes}.", hint="Give one position a token.")
        source = self.program.source
        bound = None if source.max_positions is None else source.max_positions + source.first_position
        if int(positions.min()) < 0 or (bound is not None and int(positions.max()) + following >= bound):
            reached = f"position_ids reaches outside [0, {bound})"
            raise InvalidInput(reached + (f" with {following} new tokens." if following else "."))
        return positions.expand(shape).contiguous()

    def _extra_inputs(self, named: dict[str, Any]) -> dict[str, Tensor]:
        for name in UNAVAILABLE_OUTPUTS:
            value = named.pop(name, None)
            if value is not None and value is not False:
                raise Unsupported(f"{name} of an optimized model", hint="Ask the original model for it.")
        named = {name: value for name, value in named.items() if value is not None}
        known = [port.name for port in self.program.inputs if port.role == Role.TENSOR]
        check_names(named, known, also=["input_ids", *STEP_INPUTS])
        return {name: value.to(self.device) for name, value in named.items()}


def _stateless(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Those that a draft may call for tokens that will not be written."""
    return LogitsProcessorList(each for each in processors if type(each) in STATELESS)  # type: ignore[attr-defined]


def _prompt_lengths(mask: Tensor) -> Tensor:
    """int64 [B]: the valid tokens of prompts, by their mask [B, S].

    Raises:
        InvalidInput: a prompt has none, or is padded on the right.
    """
    valid = mask != 0
    counts = valid.sum(dim=1)
    if int(counts.min()) == 0:
        hint = "Give attention_mask where pad tokens are to be read."
        raise InvalidInput("a row of the prompt has no valid token.", hint=hint)
    if not bool(valid[:, -1].all()):
        hint = "Tokenize with padding_side='left': new tokens follow the last column."
        raise InvalidInput("the prompt is padded on the right.", hint=hint)
    return counts


def _new_columns(mask: Tensor | None, input_ids: Tensor, cache: GenerationCache) -> Tensor | None:
    """The part of a mask [B, past + S] that belongs to the new tokens [B, S].

    Raises:
        InvalidInput: the mask has another width, or hides tokens that are in the cache.
    """
    if mask is None or cache.kv is None:
        return mask
    expected = (input_ids.shape[0], cache.columns + input_ids.shape[1])
    if mask.shape != expected:
        hint = f"With a cache of {cache.columns} columns it must be {list(expected)}."
        raise InvalidInput(f"attention_mask has shape {list(mask.shape)}.", hint=hint)
    past = (mask[:, : cache.columns] != 0).sum(dim=1).to(cache.kv.lengths.device)
    if not torch.equal(past, cache.kv.lengths):
        hint = "Pass the mask that the cache was filled with, extended by the new tokens."
        raise InvalidInput("attention_mask differs from what is in the cache.", hint=hint)
    return mask[:, cache.columns :]
