"""Executables: what a user calls once a program has been lowered to a session.

`Executable` runs any program by its input names. Programs that take tokens and return next-token logits get the
subclass `TokenModel`, which accepts padded batches and keeps a cache; `skipstone.runtime.generate.CausalLM` adds
Hugging Face's `generate` to it. Models that fill in masks get `skipstone.runtime.denoise.MaskedLM`. Building an
`Executable` gives whichever class the program's roles ask for.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from skipstone.ir.dialect import ATTENTION_OPS, WRITING_OPS, Kind, key_bias_of
from skipstone.ir.errors import InvalidInput, Unsupported
from skipstone.ir.program import Program, Role, module_path
from skipstone.ir.sequence import offenders
from skipstone.runtime.cache import Cache
from skipstone.runtime.reading import read
from skipstone.runtime.session import Session

SMALLEST_CAPACITY = 64


class Executable:
    """A program, lowered and ready to run.

    Args:
        session: the lowered program.
        config, generation_config: those of the Hugging Face model, if the program came from one.
        report: what was done to the model and what it bought.
        plan: the plan that was carried out, with what was calibrated for it.
        target: name of the lowering.
        threads: number of threads it computes with, None for the runtime's own choice.
        max_length: longest sequence to make room for; cache buffers are then allocated once. Without it they double as
            needed, up to the positions that the model has.
        cache_refusal: why the program has no cache. Without a cache and without a refusal, `generate` recomputes the
            whole sequence at each step.
        output_adapter: turns the outputs by port name into what `__call__` returns; by default the structure that the
            user's model returned.
    """

    def __new__(cls, session: Session, **options: Any) -> Executable:
        # As with `pathlib.Path`: one name to build with, the class follows from what the program can do.
        if cls is Executable and is_causal_lm(session.program):
            from skipstone.runtime.generate import CausalLM

            return object.__new__(CausalLM)
        if cls is Executable and is_masked_lm(session.program):
            from skipstone.runtime.denoise import MaskedLM

            return object.__new__(MaskedLM)
        return object.__new__(cls)

    def __init__(
        self,
        session: Session,
        *,
        config: Any = None,
        generation_config: Any = None,
        report: Any = None,
        plan: Any = None,
        target: str = "eager",
        threads: int | None = None,
        max_length: int | None = None,
        cache_refusal: Unsupported | None = None,
        output_adapter: Callable[[dict[str, Tensor]], Any] | None = None,
    ) -> None:
        self.session = session
        self.program: Program = session.program
        self.config = config
        self.generation_config = generation_config
        self.report = report
        self.plan = plan
        self.target = target
        self.threads = threads
        self.max_length = max_length
        self.cache_refusal = cache_refusal
        self.output_adapter = output_adapter
        self.supports_cache = bool(self.program.slots())

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        return self.program.source.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's parameters."""
        return self.program.source.dtype

    @property
    def decides_in_decoding(self) -> bool:
        """Whether decoded tokens are computed in another way than those of the prompt."""
        return self.program.input(Role.DECODE_START) is not None or bool(self.program.continuations)

    @property
    def depends_on_step_sizes(self) -> bool:
        """Whether results depend on how many tokens a step has: a slot of the cache is written more than once in it."""
        slots = [node.kwargs["slot"] for node in self.program.nodes(*WRITING_OPS)]
        return len(set(slots)) < len(slots)

    @property
    def limit(self) -> int | None:
        """The longest sequence that it can hold, if there is one."""
        bounds = [bound for bound in (self.max_length, self.program.source.max_positions) if bound is not None]
        return min(bounds, default=None)

    def __repr__(self) -> str:
        cache = f"{len(self.program.slots())} slots" if self.supports_cache else "none"
        return f"{type(self).__name__}({self.program.source.name}, target={self.target!r}, cache={cache})"

    @torch.no_grad()
    def __call__(self, *args: Any, **named: Any) -> Any:
        """Run the program.

        Args:
            args: inputs in the order of the program's ports.
            named: inputs by port name. Of a token program, `POSITIONS` and `PADDING` may be left out: they become
                0..S-1 and all ones.
        Returns:
            the outputs, structured as the user's model structured them.
        Raises:
            InvalidInput: an input is unknown, given twice, missing, or of another rank, size or dtype.
        """
        names = [port.name for port in self.program.inputs]
        if len(args) > len(names):
            raise InvalidInput(f"{len(args)} inputs were given, the program takes {len(names)}: {', '.join(names)}.")
        values = dict(zip(names, args, strict=False))
        check_names(named, names)
        if twice := values.keys() & named.keys():
            raise InvalidInput(f"input {min(twice)!r} is given both by position and by name.", hint="Give it once.")
        values |= named
        for name, value in values.items():
            if value is not None and not isinstance(value, Tensor):
                raise InvalidInput(f"input {name!r} is a {type(value).__name__}, not a tensor.")
        self._fill_defaults(values)
        if missing := [name for name in names if values.get(name) is None]:
            raise InvalidInput(f"input {missing[0]!r} is missing.", hint=f"The program takes {', '.join(names)}.")
        self._check_values(values)
        return self._structured(self.session.run({name: values[name].to(self.device) for name in names}))

    def generate(self, *args: Any, **options: Any) -> Any:
        """Continue a prompt, where the program is a causal language model; see `CausalLM.generate`.

        Raises:
            Unsupported: it is not.
        """
        raise Unsupported(
            f"generate with {self.program.source.name}, which is no decoder that turns tokens into next-token logits",
            hint="Call the executable on whole inputs.",
        )

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        overwrite: bool = False,
        compiled_for: Sequence[int] = (),
    ) -> None:
        """Write everything that it takes to run this executable elsewhere, for `skipstone.load`.

        The directory holds JSON, safetensors and ONNX, no code unless `compiled_for` asks for it. It comes into being
        whole or not at all. Nothing of the model's source code is needed to load it, and of what passes did to the
        program the report is kept alone.

        Args:
            directory: where to write it: empty, or not there yet.
            tokenizer: one of transformers, to be saved beside it.
            overwrite: replace an artifact that is there.
            compiled_for: sizes of batches. What reads their prompts and decodes them is compiled now, on the target
                ``"triton"``, and stored besides, with the machine code of the kernels that it launches on a GPU. It is
                for this kind of machine alone, and used only where ``skipstone.load(..., native_code=True)`` says so.
        Raises:
            ArtifactError: the directory holds something, or cannot be written.
            InvalidInput: `compiled_for` has something else than positive numbers.
            Unsupported: the program has something that an artifact cannot hold, or cannot be compiled ahead of time.
        """
        from skipstone.runtime.artifact.artifact import save  # which knows every kind of session

        save(self, Path(directory), tokenizer, overwrite, compiled_for)

    def check_length(self, longest: int) -> None:
        """Refuse sequences of `longest` tokens if the model, or the room made for it, ends before."""
        if self.limit is not None and longest > self.limit:
            bounded_by = "max_length" if self.limit == self.max_length else "the model's positions"
            raise InvalidInput(
                f"a sequence of {longest} tokens is longer than {self.limit} ({bounded_by}).",
                hint="Shorten the prompt or ask for fewer new tokens"
                + (", or raise max_length." if bounded_by == "max_length" else "."),
            )

    def _fill_defaults(self, values: dict[str, Tensor]) -> None:
        tokens = values.get(self._input_name(Role.TOKENS))
        if tokens is None:
            return
        positions, padding = self._input_name(Role.POSITIONS), self._input_name(Role.PADDING)
        if positions and values.get(positions) is None:
            first = self.program.source.first_position
            columns = torch.arange(first, first + tokens.shape[1], device=tokens.device)
            values[positions] = columns.expand(tokens.shape).contiguous()
        if padding and values.get(padding) is None:
            values[padding] = torch.ones_like(tokens)

    def _check_values(self, values: dict[str, Tensor]) -> None:
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        sizes: dict[str, tuple[int, str]] = {}
        for port, node in zip(self.program.inputs, placeholders, strict=True):
            expected, value = node.meta["val"], values[port.name]
            if not isinstance(expected, Tensor):
                continue
            if value.dim() != expected.dim():
                raise InvalidInput(f"input {port.name!r} has {value.dim()} dimensions, {expected.dim()} are expected.")
            for axis, (size, fixed) in enumerate(zip(value.shape, expected.shape, strict=True)):
                # Where sizes are symbols any will do, the same for the same symbol: broadcasting was not captured.
                wanted, like = fixed, ""
                if not isinstance(fixed, int):
                    wanted, like = sizes.setdefault(str(fixed), (size, f", as input {port.name!r} has"))
                if size != wanted:
                    raise InvalidInput(f"input {port.name!r} has size {size} in dimension {axis}, not {wanted}{like}.")
            if value.dtype != expected.dtype:
                raise InvalidInput(
                    f"input {port.name!r} is {value.dtype}, {expected.dtype} is expected.",
                    hint=f"Convert it with `.to({expected.dtype})`.",
                )
            if port.role == Role.TOKENS:
                self.check_length(value.shape[1])
                self._check_range(value)

    def _structured(self, outputs: dict[str, Tensor]) -> Any:
        if self.output_adapter is not None:
            return self.output_adapter(outputs)
        leaves = [outputs[port.name] for port in self.program.outputs]
        if self.program.output_spec is not None:
            return tree_unflatten(leaves, self.program.output_spec)
        return leaves[0] if len(leaves) == 1 else outputs

    def _check_range(self, tokens: Tensor) -> None:
        """Refuse token ids that the model has no embedding for. Tokens: integers [B, S]."""
        vocabulary = self.program.source.vocabulary
        if vocabulary is None or tokens.numel() == 0:
            return
        if int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary:
            return
        row, column = ((tokens < 0) | (tokens >= vocabulary)).nonzero()[0].tolist()
        raise InvalidInput(
            f"token id {int(tokens[row, column])} (row {row}, token {column}) is outside [0, {vocabulary}).",
            hint="Use the tokenizer of this model.",
        )

    def _input_name(self, role: Role) -> str:
        """Name of the input port of that role, "" if there is none."""
        return next((port.name for port in self.program.inputs if port.role == role), "")


@dataclass(frozen=True)
class Layout:
    """Where the valid tokens of a batch stand in the caller's columns, and how they are brought to the front.

    A row is rotated left until its first valid token comes first: left padding, right padding and both become right
    padding, and the way back is the rotation to the right.

    Attributes:
        width: number of columns S.
        counts: int64 [B], valid tokens of each row.
        first: int64 [B, 1], column of the first of them; None when no row is padded.
    """

    width: int
    counts: Tensor
    first: Tensor | None

    @classmethod
    def of(cls, tokens: Tensor, mask: Tensor | None) -> Layout:
        """The layout of tokens [B, S] under a mask [B, S] that is true on valid tokens (None: on all).

        Raises:
            InvalidInput: the valid tokens of a row are not adjacent.
        """
        batch, width = tokens.shape
        if mask is None or bool(mask.all()):
            return cls(width, torch.full((batch,), width, device=tokens.device), None)
        starts = mask.clone()
        starts[:, 1:] &= ~mask[:, :-1]
        if bool((runs := starts.sum(dim=1)).gt(1).any()):
            raise InvalidInput(
                f"attention_mask has a hole: row {int(runs.argmax())} has zeros between valid tokens.",
                hint="Pad on one side, and remove tokens that should not be seen.",
            )
        return cls(width, mask.sum(dim=1), mask.int().argmax(dim=1, keepdim=True))

    def to_front(self, values: Tensor, fill: int = 0) -> Tensor:
        """Values [B, S] from the caller's columns to right-padded rows; the padding becomes `fill`."""
        if self.first is None:
            return values
        columns = torch.arange(self.width, device=values.device)
        rotated = values.gather(1, (columns + self.first) % self.width)
        return rotated.masked_fill(columns >= self.counts.unsqueeze(1), fill)

    def rows(self, last: int) -> Tensor:
        """int64 [B, last]: the rows at which the caller's `last` rightmost columns stand."""
        columns = torch.arange(self.width - last, self.width, device=self.counts.device)
        if self.first is None:
            return columns.expand(len(self.counts), last).contiguous()
        return (columns - self.first) % self.width

    def clear_padding(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Zero the logits [B, R, V] of rows [B, R] that are padding."""
        if self.first is None:
            return logits
        return logits.masked_fill((rows >= self.counts.unsqueeze(1)).unsqueeze(-1), 0)


class TokenModel(Executable):
    """A causal language model: tokens in, next-token logits out, with a cache when the program has slots.

    Row b of a batch with n_b valid tokens stands at positions 0..n_b - 1, on whichever side it is padded.
    """

    @cached_property
    def _padding_refusal(self) -> Unsupported | None:
        """Why a valid token might see padding on its right, unless it is proved that none sees later ones."""
        if self.supports_cache:  # a cache is given to proved programs only
            return None
        mixing = next((each for each in offenders(self.program) if each.mixes), None)
        if mixing is None:
            return None
        return Unsupported(
            f"padding for a model whose tokens may see later ones ({mixing.reason})",
            where=module_path(mixing.node),
            hint="Run sequences of one length together, without padding.",
        )

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Cache]:
        """Read a prompt into a new cache.

        Args:
            input_ids: integers [B, S].
            attention_mask: [B, S], nonzero on valid tokens; padding on either side.
        Returns:
            the logits after the last valid token [B, V], and the cache.
        Raises:
            InvalidInput: the prompt is empty, too long, or holds an unknown token id.
            Unsupported: the program has no cache.
        """
        self.require_cache()
        tokens, layout = self.prepare(input_ids, attention_mask)
        self._check_not_empty(layout)
        cache = self.new_cache(*tokens.shape)
        cache.decode_start = layout.counts
        logits = self.advance(tokens, layout, (layout.counts - 1).unsqueeze(1), cache=cache)
        return logits[:, 0], cache

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Append tokens to every sequence of a cache.

        Args:
            tokens: integers [B], or [B, S] for several tokens at once.
            cache: from `prefill`; it is advanced by S.
        Returns:
            logits [B, V], or [B, S, V].
        Raises:
            InvalidInput: the batch differs from the cache's, the sequence becomes too long, or a token id is unknown.
        """
        self.require_cache()
        if not isinstance(cache, Cache):
            hint = "Use the cache that prefill() returned."
            raise InvalidInput(f"the cache is a {type(cache).__name__}.", hint=hint)
        single = isinstance(tokens, Tensor) and tokens.dim() == 1
        tokens, layout = self.prepare(tokens.unsqueeze(1) if single else tokens)
        logits = self.advance(tokens, layout, layout.rows(layout.width), cache=cache)
        return logits[:, 0] if single else logits

    def require_cache(self) -> None:
        """Raise the reason why there is no cache, if there is none."""
        if not self.supports_cache:
            hint = "It was built without one: call it on whole sequences."
            raise self.cache_refusal or Unsupported("decoding through a cache", hint=hint)

    def prepare(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Layout]:
        """Check tokens and mask, and bring the valid tokens to the front.

        Args:
            input_ids: integers [B, S].
            attention_mask: [B, S] or None.
        Returns:
            int64 [B, S] with padding replaced by token 0, and the layout that it came from.
        Raises:
            InvalidInput: shape, dtype, token id or mask is wrong.
        """
        check_batch(input_ids, attention_mask)
        if input_ids.numel() == 0:
            raise InvalidInput(f"input_ids is empty: {list(input_ids.shape)}.", hint="Give at least one token a row.")
        tokens = input_ids.to(self.device, torch.int64)
        if attention_mask is not None:
            attention_mask = attention_mask.to(self.device) != 0
        layout = Layout.of(tokens, attention_mask)
        if layout.first is not None and self._padding_refusal is not None:
            raise self._padding_refusal
        self.check_length(int(layout.counts.max()))
        tokens = layout.to_front(tokens)
        self._check_range(tokens)
        return tokens, layout

    def new_cache(self, batch: int, rows: int, spare: int = SMALLEST_CAPACITY) -> Cache:
        """An empty cache with room for `rows` tokens a sequence, and `spare` more if the model reaches so far."""
        capacity = self._bounded(self.max_length or rows + spare)
        return self.session.new_cache(batch, max(capacity, rows))

    def load_cache(self, path: str | os.PathLike[str]) -> Cache:
        """Read a cache that `Cache.save` wrote for this program.

        Raises:
            ArtifactError: it is no such file, or a cache of another program.
            Unsupported: the program has no cache.
        """
        self.require_cache()
        return self.session.load_cache(path)

    def reserve(self, cache: Cache, rows: int) -> None:
        """Make room for `rows` tokens a sequence: the capacity doubles, up to the limit."""
        if rows > cache.capacity:
            cache.grow(max(rows, self._bounded(2 * cache.capacity)))

    @torch.no_grad()
    def advance(
        self,
        tokens: Tensor,
        layout: Layout,
        rows: Tensor,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        extra: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Run prepared tokens, after those that are in the cache, and count them in.

        Args:
            tokens: int64 [B, S], right-padded.
            layout: where they came from.
            rows: int64 [B, R], the rows whose logits are wanted.
            positions: int64 [B, S], right-padded; by default they continue the sequence.
            cache: advanced by the valid tokens of each row; None runs the sequence on its own, all of it as a prompt.
            extra: further inputs of an uncached program, by port name.
        Returns:
            logits [B, R, V].
        Raises:
            InvalidInput: the sequence becomes longer than the limit, the cache is of another batch, or positions do not
                count up where that is needed.
        """
        batch, width = tokens.shape
        if cache is not None and cache.batch != batch:
            raise InvalidInput(f"tokens of {batch} sequences for a cache of {cache.batch}.")
        start = torch.zeros_like(layout.counts) if cache is None else cache.lengths
        self.check_length(int((start + layout.counts).max()))
        if positions is None:
            # Padding repeats the last valid position: it must not run past the table of learned positions.
            offsets = torch.arange(width, device=tokens.device).minimum((layout.counts - 1).clamp(min=0).unsqueeze(1))
            positions = start.unsqueeze(1) + offsets + self.program.source.first_position
        elif self._counts_positions:
            self._check_counted(positions, start, layout)
        if not self.supports_cache:
            return self._recompute(tokens, positions, rows, extra or {})
        if cache is None:
            cache = self.new_cache(batch, width, spare=0)
            cache.decode_start = layout.counts
        self.reserve(cache, int(start.max()) + width)
        return read(self.session, tokens, positions, layout.counts, rows, cache)

    @cached_property
    def _counts_positions(self) -> bool:
        """Whether some attention adds a key bias itself, for positions that it counts from the first one on."""
        return any(key_bias_of(node) is not None for node in self.program.nodes(*ATTENTION_OPS))

    def _check_counted(self, positions: Tensor, start: Tensor, layout: Layout) -> None:
        """Refuse position_ids [B, S] that do not count on from the rows in the cache."""
        columns = torch.arange(positions.shape[1], device=positions.device)
        counted = start.unsqueeze(1) + columns + self.program.source.first_position
        if bool(((positions != counted) & (columns < layout.counts.unsqueeze(1))).any()):
            raise InvalidInput(
                "position_ids must count up by one from the first token: the keys' bias was split from the keys.",
                hint="Leave position_ids out, or use QuantizeKV(condition=False).",
            )

    def _recompute(self, tokens: Tensor, positions: Tensor, rows: Tensor, extra: dict[str, Tensor]) -> Tensor:
        by_role = {Role.TOKENS: tokens, Role.POSITIONS: positions, Role.LOGIT_ROWS: rows}
        values = {port.name: by_role[port.role] for port in self.program.inputs if port.role in by_role}
        outputs = self.session.run(values | extra)
        logits = next(outputs[port.name] for port in self.program.outputs if port.role == Role.LOGITS)
        if self._input_name(Role.LOGIT_ROWS):
            return logits
        return logits.gather(1, rows.unsqueeze(-1).expand(*rows.shape, logits.shape[-1]))

    def _check_not_empty(self, layout: Layout) -> None:
        if int(layout.counts.min()) == 0:
            row = int(layout.counts.argmin())
            raise InvalidInput(f"row {row} of the prompt has no valid token.", hint="Give at least one token a row.")

    def _bounded(self, capacity: int) -> int:
        return capacity if self.limit is None else min(capacity, self.limit)


_OF_DECODERS = {Role.LOGITS, Role.CHOICE, Role.PROMPT_SCORES, Role.CACHE_KEY, Role.CACHE_VALUE}
"""What a causal language model returns."""


def is_causal_lm(program: Program) -> bool:
    """Whether a program turns tokens into the logits of the next ones, and returns nothing besides."""
    inputs, outputs = ({port.role for port in ports} for ports in (program.inputs, program.outputs))
    if Role.TOKENS not in inputs or Role.PADDING in inputs:
        return False
    if Role.LOGITS not in outputs or outputs - _OF_DECODERS:
        return False
    logits = program.output(Role.LOGITS)
    return not sees_ahead(program) and logits is not None and logits.meta["val"].dim() == 3


def is_masked_lm(program: Program) -> bool:
    """Whether a program turns tokens that see each other into the logits of the token at each place, and no more."""
    inputs, outputs = ({port.role for port in ports} for ports in (program.inputs, program.outputs))
    logits = program.output(Role.LOGITS)
    if Role.TOKENS not in inputs or inputs - {Role.TOKENS, Role.POSITIONS, Role.PADDING}:
        return False
    if logits is None or outputs != {Role.LOGITS} or logits.meta["val"].dim() != 3:
        return False
    tokens = logits.meta["val"].shape[-1]
    return sees_ahead(program) and tokens == (program.source.vocabulary or tokens)


def sees_ahead(program: Program) -> bool:
    """Whether tokens attend to later ones."""
    return any(node.kwargs.get("kind") == Kind.BIDIRECTIONAL for node in program.nodes(*ATTENTION_OPS))


def check_batch(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Refuse what is no batch of tokens, integers [B, S], with a mask of the same shape.

    Raises:
        InvalidInput: a shape or the dtype is wrong.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        shape = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise InvalidInput(f"input_ids must be a tensor [batch, sequence], got {shape}.")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise InvalidInput(f"input_ids is {input_ids.dtype}.", hint="Token ids are int64 or int32.")
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        raise InvalidInput(f"attention_mask is a {type(attention_mask).__name__}, not a tensor.")
    if attention_mask.shape != input_ids.shape:
        shapes = f"{list(attention_mask.shape)}, input_ids has {list(input_ids.shape)}"
        raise InvalidInput(f"attention_mask has shape {shapes}.", hint="Give one number a token.")


def check_names(given: Iterable[str], known: Collection[str], also: Iterable[str] = ()) -> None:
    """Refuse given names that are not known.

    Args:
        given: names that a caller used.
        known: names that may be used.
        also: names that the caller may have meant, though they do not belong here.
    Raises:
        InvalidInput: with the nearest name.
    """
    valid = [*known, *also]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, valid, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(valid)}."
            raise InvalidInput(f"unknown input {name!r}.", hint=hint)
