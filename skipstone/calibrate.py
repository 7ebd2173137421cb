"""Calibration: what passes need to know of real data, gathered by running the program over it once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad
from tqdm import tqdm

from skipstone.ir.dialect import attention_reference
from skipstone.ir.errors import InvalidInput, UserError
from skipstone.ir.formats import Format
from skipstone.ir.program import Program, Role, Source
from skipstone.ir.statistics import ChannelStatistics, sites
from skipstone.passes.quantize_kv import QuantizeKV, static_tensor
from skipstone.runtime.executable import Layout, sees_ahead

ERROR_TOKENS = 512
"""Tokens of the first calibration batch on which the error of a format is estimated."""

JOINED_TOKENS = 4096
"""Size up to which batches are joined: enough to keep a processor busy, little to hold the logits of."""

IGNORED = -100
"""The label of a position at which nothing is asked for, as in transformers and `torch.nn.functional.cross_entropy`."""

CalibrationData = Iterable[Tensor | Mapping[str, Tensor]]


@dataclass(frozen=True)
class Batch:
    """Sequences to calibrate on.

    Attributes:
        tokens: int64 [B, S], valid tokens first.
        valid: bool [B, S], true on valid tokens.
        labels: for a model that fills in masks, int64 [B, S]: the token at each masked position, ``IGNORED`` elsewhere.
            None for one that predicts next tokens.
    """

    tokens: Tensor
    valid: Tensor
    labels: Tensor | None = None

    @property
    def counted(self) -> Tensor:
        """bool [B, S]: the tokens that statistics are over, of masked sequences the masked ones."""
        return self.valid if self.labels is None else self.valid & (self.labels != IGNORED)

    @property
    def targets(self) -> Tensor:
        """int64 [B, S]: what is right to predict at each position, ``IGNORED`` where nothing is."""
        if self.labels is not None:
            return self.labels.masked_fill(~self.valid, IGNORED)
        return pad(self.tokens.masked_fill(~self.valid, IGNORED)[:, 1:], (0, 1), value=IGNORED)

    @property
    def text(self) -> Tensor:
        """int64 [B, S]: the tokens, the masked ones as they were."""
        return self.tokens if self.labels is None else torch.where(self.counted, self.labels, self.tokens)

    def sequences(self, chosen: Tensor) -> Batch:
        """Those that are true in bool [B]."""
        labels = None if self.labels is None else self.labels[chosen]
        return Batch(self.tokens[chosen], self.valid[chosen], labels)


def tokenize(texts: Sequence[str], tokenizer: Any, length: int = 512) -> list[Tensor]:
    """Token batches [1, S] of texts, cut to windows of at most `length` tokens.

    Args:
        texts: at least one.
        tokenizer: a Hugging Face tokenizer.
        length: tokens a window.
    Raises:
        InvalidInput: there is no text that has tokens, it is no list of texts, or windows would be empty.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InvalidInput("expected a list of texts to tokenize.", hint="Write tokenize([text], tokenizer).")
    if not callable(tokenizer):
        hint = "Load it with AutoTokenizer.from_pretrained(name)."
        raise InvalidInput(f"the tokenizer is {type(tokenizer).__name__}.", hint=hint)
    if length < 1:
        raise InvalidInput(f"length is {length}, expected at least 1.")
    # Verbose tokenizers warn of texts that are longer than the model takes, which windows are not.
    ids = [torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64) for text in texts]
    windows = [window.unsqueeze(0) for each in ids if len(each) for window in each.split(length)]
    if not windows:
        raise InvalidInput("the calibration texts hold no tokens.")
    return windows


def token_batches(data: CalibrationData, source: Source) -> list[Batch]:
    """Check calibration data.

    Args:
        data: tensors of token ids [B, S] (or [S]), or mappings with `input_ids`, where padded `attention_mask`, and for
            models that fill in masks `labels` (see `Batch.labels` and `skipstone.mask_tokens`).
        source: the model that they are for.
    Raises:
        InvalidInput: it is empty, or a batch has the wrong shape, type or token ids; the message says which.
    """
    batches = []
    for number, item in enumerate(items(data)):
        where = f"calibration batch {number}"
        tokens, mask, labels = read_item(item, where)
        vocabulary, longest = source.vocabulary, source.max_positions
        if int(tokens.min()) < 0 or (vocabulary is not None and int(tokens.max()) >= vocabulary):
            raise InvalidInput(f"{where} holds token ids outside [0, {vocabulary}).", hint="Use the model's tokenizer.")
        if longest is not None and tokens.shape[1] > longest:
            raise InvalidInput(f"{where} has {tokens.shape[1]} tokens a row, the model takes {longest}.")
        asked = labels[labels != IGNORED] if labels is not None else tokens[:0]
        if asked.numel() and (int(asked.min()) < 0 or (vocabulary is not None and int(asked.max()) >= vocabulary)):
            raise InvalidInput(f"{where} holds labels outside [0, {vocabulary}) that are not {IGNORED}.")
        layout = Layout.of(tokens, None if mask is None else mask != 0)
        columns = torch.arange(layout.width).unsqueeze(0)
        labels = None if labels is None else layout.to_front(labels.long(), fill=IGNORED)
        batches.append(Batch(layout.to_front(tokens.long()), columns < layout.counts.unsqueeze(1), labels))
    if not batches:
        raise InvalidInput("the calibration data is empty.", hint="Give at least one batch of tokens.")
    return batches


def items(data: CalibrationData) -> Iterable[Tensor | Mapping[str, Tensor]]:
    """The items of calibration data, which may be a single one.

    Raises:
        InvalidInput: it is nothing of the kind.
    """
    if isinstance(data, Tensor | Mapping):
        return [data]
    if not isinstance(data, Iterable):
        raise InvalidInput(f"calibration data is {type(data).__name__}.", hint="Give a list of token batches.")
    return data


def joined(batches: Sequence[Batch], tokens: int = JOINED_TOKENS) -> list[Batch]:
    """The same sequences in the same order, in fewer batches: neighbours of one width become one.

    Args:
        tokens: a batch gets no larger than this by it, padding included.
    """
    result: list[Batch] = []
    for batch in batches:
        last = result[-1] if result else None
        if last is not None and _fit(last, batch) and last.tokens.numel() + batch.tokens.numel() <= tokens:
            pairs: Any = zip(vars(last).values(), vars(batch).values(), strict=True)
            parts: list[Any] = [None if one is None else torch.cat((one, other)) for one, other in pairs]
            result[-1] = Batch(*parts)
        else:
            result.append(batch)
    return result


def _fit(one: Batch, other: Batch) -> bool:
    return one.tokens.shape[1] == other.tokens.shape[1] and (one.labels is None) == (other.labels is None)


def read_item(item: Tensor | Mapping[str, Tensor], where: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tokens, attention mask and labels of an item of calibration data, each integers [B, S].

    Args:
        where: what the item is called in messages.
    Raises:
        InvalidInput: a shape or a type is wrong.
    """
    if isinstance(item, str):
        hint = "Turn texts into tokens: calibration=skipstone.tokenize(texts, tokenizer)."
        raise InvalidInput(f"{where} is a text.", hint=hint)
    tokens = item.get("input_ids") if isinstance(item, Mapping) else item
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        found = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InvalidInput(f"{where} is {found}.", hint="Give token ids: integers [batch, sequence].")
    tokens = tokens.unsqueeze(0) if tokens.dim() == 1 else tokens
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise InvalidInput(f"{where} has shape {list(tokens.shape)}.", hint="Give tokens [batch, sequence].")
    names = ("attention_mask", "labels")
    mask, labels = (item.get(name) if isinstance(item, Mapping) else None for name in names)
    for name, each in zip(names, (mask, labels), strict=True):
        if each is not None and not isinstance(each, Tensor):
            raise InvalidInput(f"{where}: {name} is {type(each).__name__}, expected a tensor.")
        if each is not None and each.shape != tokens.shape:
            raise InvalidInput(f"{where}: {name} {list(each.shape)} for tokens {list(tokens.shape)}.")
    return tokens, mask, labels


def program_inputs(program: Program, batch: Batch) -> list[Tensor]:
    """The inputs of a program without a cache for a batch, in the order of its ports and on its device.

    Raises:
        UserError: it takes something else than tokens, positions and padding.
        InvalidInput: the batch is padded, and the tokens of the program would see the padding.
    """
    columns = torch.arange(batch.tokens.shape[1]).expand(batch.tokens.shape) + program.source.first_position
    values = {Role.TOKENS: batch.tokens, Role.POSITIONS: columns.contiguous(), Role.PADDING: batch.valid}
    known = {port.role for port in program.inputs}
    if known - set(values) or Role.TOKENS not in known:
        raise UserError(f"calibration needs a model over tokens alone, this one takes {sorted(known)}.")
    if sees_ahead(program) and Role.PADDING not in known and not bool(batch.valid.all()):
        raise InvalidInput(
            "a calibration batch is padded, and the model has no input that says where.",
            hint="Give batches of sequences of one length.",
        )
    placeholders = (node for node in program.graph.nodes if node.op == "placeholder")
    dtypes = (node.meta["val"].dtype for node in placeholders)
    return [
        values[port.role].to(program.source.device, dtype) for port, dtype in zip(program.inputs, dtypes, strict=True)
    ]


def measure(program: Program, batches: Sequence[Batch], pass_name: str, progress: bool = False) -> dict[str, Tensor]:
    """Ranges and means of the keys and values of every attention, channel by channel, in one pass over the data.

    Args:
        program: without a cache.
        pass_name: the pass that they are for.
        progress: show a progress bar.
    Returns:
        the tensors that `skipstone.ir.statistics.calibrated` reads, by name.
    Raises:
        InvalidInput: the data leads to NaN or infinite keys or values.
    """
    found: dict[str, ChannelStatistics] = {}
    for batch in tqdm(batches, desc=f"calibrate {pass_name}", disable=not progress, leave=False):

        def observe(node: fx.Node, site: str, args: tuple[Any, ...], valid: Tensor = batch.valid) -> None:
            for which, rows in zip(("key", "value"), args[1:3], strict=True):
                name = f"{pass_name}/{site}/{which}"
                try:
                    new = ChannelStatistics.of(rows, valid.to(rows.device))
                except InvalidInput as error:
                    raise InvalidInput(f"{which}s at {site}: {error.problem}", hint=error.hint) from error
                found[name] = found[name].merge(new) if name in found else new

        observe_attentions(program, batch, observe)
    return {f"{name}/{key}": value for name, each in found.items() for key, value in each.tensors().items()}


def estimate_errors(program: Program, entry: QuantizeKV, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The relative error of each attention's output when its keys and values alone go through their formats.

    It is ``|O' - O| / |O|`` (Frobenius norms) on the first `ERROR_TOKENS` tokens of the first batch; rows that a plan
    keeps in full precision are not taken out.

    Args:
        program: calibrated, without a cache.
        entry: the formats.
    Returns:
        scalars by name, as `QuantizeKV` reports them.
    """
    first = Batch(batches[0].tokens[:1, :ERROR_TOKENS], batches[0].valid[:1, :ERROR_TOKENS])
    errors: dict[str, Tensor] = {}

    def observe(node: fx.Node, site: str, args: tuple[Any, ...]) -> None:
        kept = [
            _through(form, x, static_tensor(program, node, site, which, form))
            for which, form, x in zip(("key", "value"), entry.formats(node), args[1:3], strict=True)
        ]
        options: dict[str, Any] = dict(node.kwargs)
        exact, rounded = (attention_reference(*each, **options) for each in (args, (args[0], *kept, *args[3:])))
        exact, rounded = (each[:, :, : int(first.valid.sum())].float() for each in (exact, rounded))
        errors[f"{entry.name}/{site}/error"] = ((rounded - exact).norm() / exact.norm().clamp(min=1e-30)).cpu()

    observe_attentions(program, first, observe)
    return errors


def _through(form: Format, x: Tensor, static: Tensor | None) -> Tensor:
    """x [B, KH, T, D] as the cache gives it back; tokens whose group is not complete stay as they are."""
    rows = x.shape[2] // form.group_tokens * form.group_tokens
    coded = form.decode(form.encode(x[:, :, :rows], static), static, x.dtype, x.shape[3])
    return torch.cat([coded, x[:, :, rows:]], dim=2)


@torch.no_grad()
def observe_attentions(
    program: Program, batch: Batch, observe: Callable[[fx.Node, str, tuple[Any, ...]], None]
) -> None:
    """Run a program without a cache up to its last attention.

    Args:
        observe: is given every attention, its name (`skipstone.ir.statistics.sites`) and its operands.
    """
    with suppress(_AllSeen):
        _Observer(program, observe).run(*program_inputs(program, batch))


class _AllSeen(Exception):
    """What comes behind the last attention, the head above all, need not be computed."""


class _Observer(fx.Interpreter):
    def __init__(self, program: Program, observe: Callable[[fx.Node, str, tuple[Any, ...]], None]) -> None:
        super().__init__(program.module)
        self.sites, self.observe = sites(program), observe
        self.left = len(self.sites)
        self.extra_traceback = False  # it would put the node into the message of our own errors

    def run_node(self, n: fx.Node) -> Any:
        if n in self.sites:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.observe(n, self.sites[n], args)
            self.left -= 1
            if self.left == 0:
                raise _AllSeen
        return super().run_node(n)
