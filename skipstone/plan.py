"""A plan: which rewrites to make and with what settings, as data that outlives the process.

A plan holds no code. Its entries are the configurations of passes; a file spells them out as JSON, and reading one back
checks every name, type and number before anything is rewritten.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import os
import tempfile
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from skipstone.budget import Certificate
from skipstone.ir.errors import ArtifactError, InvalidPlan
from skipstone.passes.base import Pass
from skipstone.passes.compress_kv import CompressKV
from skipstone.passes.compress_prompt import CompressPrompt
from skipstone.passes.fuse_parallel import FuseParallel
from skipstone.passes.layer_parallel import LayerParallel
from skipstone.passes.quantize_kv import QuantizeKV
from skipstone.passes.quantize_weights import QuantizeWeights
from skipstone.passes.self_speculate import SelfSpeculate
from skipstone.passes.skip_by_prompt import SkipByPrompt
from skipstone.passes.skip_ffn_adaptive import SkipFFNAdaptive
from skipstone.passes.skip_sublayers import SkipSublayers

FORMAT = "skipstone.plan"
VERSION = 1
TENSORS = ".safetensors"

# Every pass that may stand in a plan, in the order in which they run.
ENTRIES: tuple[type[Pass], ...] = (
    SkipSublayers,
    LayerParallel,
    FuseParallel,
    QuantizeWeights,
    SkipByPrompt,
    SkipFFNAdaptive,
    CompressKV,
    QuantizeKV,
    CompressPrompt,
    SelfSpeculate,
)


@dataclass(frozen=True)
class Plan:
    """Rewrites in the order in which they run.

    Attributes:
        entries: configurations of passes, each pass at most once, in the order of `ENTRIES`.
        model: fingerprint (`Source.fingerprint`) of the model that the plan was made for, if it is for one alone.
        tensors: what was calibrated for it, by name; with it, the plan is carried out again without data.
        certificates: what these entries were proved to cost.
    Raises:
        InvalidPlan: an entry is no pass, stands in the wrong place, or has a field of the wrong type.
    """

    entries: Sequence[Pass] = ()
    model: str | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    certificates: Sequence[Certificate] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.entries, Pass) or not isinstance(self.entries, Sequence):
            raise InvalidPlan("A plan takes a list of entries.", hint="Write Plan([SkipSublayers(layers=(3,))]).")
        entries = tuple(_checked(entry) for entry in self.entries)
        _check_order(entries)
        _conform(self.model, str | None, "model")
        object.__setattr__(self, "entries", entries)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @classmethod
    def of(cls, entries: Iterable[Pass], **settings: Any) -> Plan:
        """A plan of entries in any order; the settings are its other attributes."""
        return cls(sorted(map(_checked, entries), key=lambda entry: ENTRIES.index(type(entry))), **settings)

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, in the form of its file."""
        entries = [{"pass": entry.name, "version": entry.version, **_plain_fields(entry)} for entry in self.entries]
        plan: dict[str, Any] = {"format": FORMAT, "version": VERSION, "model": self.model, "entries": entries}
        if self.tensors:
            plan["tensors"] = hashlib.sha256(self._tensor_bytes()).hexdigest()
        if self.certificates:
            plan["certified"] = {"plan": _digest(plan), "certificates": _plain(tuple(self.certificates))}
        return plan

    def _tensor_bytes(self) -> bytes:
        return safetensors.torch.save(dict(self.tensors))

    @classmethod
    def from_json(cls, text: str | bytes, origin: str = "the plan", tensors: bytes | None = None) -> Plan:
        """Read a plan from JSON text.

        Args:
            origin: what to call the text in messages, e.g. the file it comes from.
            tensors: the content of the safetensors file that was saved with it.
        Raises:
            InvalidPlan: it is not a plan, or not one that this version can carry out.
        """
        try:
            data = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise InvalidPlan(f"{origin} is not JSON: {error}.", hint="Is the file complete?") from error
        return cls.from_dict(data, origin, tensors)

    @classmethod
    def from_dict(cls, data: Any, origin: str = "the plan", tensors: bytes | None = None) -> Plan:
        """The plan that `to_dict` wrote; raises like `from_json`."""
        if not isinstance(data, dict):
            raise InvalidPlan(f"{origin} is not a JSON object.", hint=f'It must begin with {{"format": "{FORMAT}"}}.')
        if data.get("format") != FORMAT:
            raise InvalidPlan(f"{origin} is not a plan: its format is {data.get('format')!r}, expected {FORMAT!r}.")
        _check_version(data.get("version"), VERSION, origin)
        for key in data:
            _check_known(key, ("format", "version", "model", "entries", "tensors", "certified"), f"{origin}: key")
        if not isinstance(data.get("entries"), list):
            raise InvalidPlan(f"{origin}: 'entries' must be a list.")
        entries = [_entry(each, f"{origin}: entry {number}") for number, each in enumerate(data["entries"])]
        known = _read_tensors(data.get("tensors"), tensors, origin)
        return cls(entries, data.get("model"), known, _read_certificates(data, origin))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file, whole or not at all; its tensors go to a safetensors file of the same name.

        Raises:
            ArtifactError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix == TENSORS:
            raise ArtifactError(f"A plan is JSON: it cannot be called {path.name}.", hint="Call it plan.json.")
        try:
            if self.tensors:
                write_atomically(path.with_suffix(TENSORS), self._tensor_bytes())
            write_atomically(path, self.to_json().encode())
        except OSError as error:
            raise ArtifactError(f"Cannot write the plan {os.fspath(path)}: {error.strerror or error}.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a file.

        Raises:
            InvalidPlan: there is no such file, or it is not a plan.
        """
        name = os.fspath(path)
        try:
            text = Path(path).read_bytes()
            beside = Path(path).with_suffix(TENSORS)
            tensors = beside.read_bytes() if beside.exists() else None
        except OSError as error:
            raise InvalidPlan(f"Cannot read the plan {name}: {error.strerror or error}.") from error
        return cls.from_json(text, name, tensors)


def _read_tensors(digest: Any, content: bytes | None, origin: str) -> dict[str, Tensor]:
    """The tensors of a plan that names their digest.

    Raises:
        InvalidPlan: they are missing, or not those that the plan was saved with.
    """
    if digest is None:
        return {}
    if content is None:
        hint = f"Keep the {TENSORS} file beside it, or calibrate again."
        raise InvalidPlan(f"{origin} was saved with calibrated tensors, which are missing.", hint=hint)
    if hashlib.sha256(content).hexdigest() != digest:
        raise InvalidPlan(f"{origin}: its {TENSORS} file is not the one that it was saved with.")
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise InvalidPlan(f"{origin}: its {TENSORS} file is damaged: {error}.") from error


def _read_certificates(data: Mapping[str, Any], origin: str) -> tuple[Certificate, ...]:
    """The certificates of a plan.

    Raises:
        InvalidPlan: they are no certificates, or of another plan.
    """
    certified = data.get("certified")
    if certified is None:
        return ()
    if not isinstance(certified, dict) or set(certified) != {"plan", "certificates"}:
        raise InvalidPlan(f"{origin}: 'certified' must hold 'plan' and 'certificates'.")
    if certified["plan"] != _digest(data):
        hint = "Remove 'certified', and prove the plan again with optimize(..., budget=...)."
        raise InvalidPlan(f"{origin} has certificates of other entries, or for another model.", hint=hint)
    certificates: tuple[Certificate, ...] = _conform(
        certified["certificates"], tuple[Certificate, ...], f"{origin}: certificates"
    )
    return certificates


def _digest(plan: Mapping[str, Any]) -> str:
    """sha256 of what certificates are about: the model, the entries, and what was calibrated for them."""
    about = {key: plan.get(key) for key in ("model", "entries", "tensors")}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file through a temporary one beside it, so that no reader and no crash ever sees half of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Reading


def _entry(data: Any, where: str) -> Pass:
    """The entry that a JSON object spells."""
    if not isinstance(data, dict):
        raise InvalidPlan(f"{where} is not a JSON object.")
    settings = dict(data)
    name = settings.pop("pass", None)
    known = {each.name: each for each in ENTRIES}
    if not isinstance(name, str):
        raise InvalidPlan(f"{where} does not say which pass it is.", hint=f"Passes: {', '.join(known)}.")
    _check_known(name, known, f"{where}: pass")
    kind = known[name]
    where = f"{where} ({name})"
    _check_version(settings.pop("version", None), kind.version, where)
    entry: Pass = _build(kind, settings, where)
    return entry


def _build(kind: type[Any], settings: Mapping[str, Any], where: str) -> Any:
    """A configuration of class `kind` from plain data."""
    hints = _hints(kind)
    for key in settings:
        _check_known(key, hints, f"{where}: field")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in settings]:
        raise InvalidPlan(f"{where}: field {missing[0]!r} is missing.")
    return kind(**{key: _conform(value, hints[key], f"{where}: {key}") for key, value in settings.items()})


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key {repeated!r} stands there twice")
    return result


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not a number")


# Checking


def _checked(entry: Any) -> Pass:
    """The entry with every field checked and every list made a tuple."""
    if type(entry) not in ENTRIES:
        names = ", ".join(each.__name__ for each in ENTRIES)
        raise InvalidPlan(f"A plan cannot hold {entry!r}.", hint=f"It takes {names}.")
    checked: Pass = _conform(entry, type(entry), entry.name)
    return checked


def _check_order(entries: Sequence[Pass]) -> None:
    places = [ENTRIES.index(type(entry)) for entry in entries]
    for first, second in itertools.pairwise(places):
        if first == second:
            raise InvalidPlan(f"Pass {ENTRIES[first].name} stands twice in the plan.", hint="Merge the two entries.")
        if first > second:
            raise InvalidPlan(
                f"Pass {ENTRIES[second].name} stands after {ENTRIES[first].name} but runs before it.",
                hint=f"The order is: {', '.join(ENTRIES[place].name for place in sorted(set(places)))}.",
            )


def _check_known(name: str, known: Iterable[str], what: str) -> None:
    known = list(known)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"Did you mean {nearest[0]!r}?" if nearest else f"Known: {', '.join(known) or 'none'}."
        raise InvalidPlan(f"{what} {name!r} is unknown.", hint=hint)


def _check_version(version: Any, newest: int, where: str) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InvalidPlan(f"{where}: the version must be a positive integer, not {version!r}.")
    if version > newest:
        raise InvalidPlan(f"{where}: version {version} is newer than {newest}.", hint="Update skipstone.")


def _conform(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type that `hint` declares: lists become tuples, objects become configurations.

    Integers inside a tuple are indices of layers or sublayers, hence neither negative nor given twice.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _conform_union(value, arguments, where)
    if origin is typing.Literal:
        if not any(type(value) is type(each) and value == each for each in arguments):
            raise _wrong(value, f"one of {', '.join(map(repr, arguments))}", where)
        return value
    if origin is tuple:
        return _conform_tuple(value, arguments, where)
    if is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            value = {field.name: getattr(value, field.name) for field in fields(hint)}
        if not isinstance(value, Mapping):
            raise _wrong(value, "an object", where)
        return _build(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:  # exact: a bool is no index
        raise _wrong(value, "null" if hint is type(None) else hint.__name__, where)
    if hint is float and not math.isfinite(value):
        raise _wrong(value, "a finite number", where)
    return value


def _conform_union(value: Any, choices: Sequence[Any], where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    choices = [choice for choice in choices if choice is not type(None)]
    for choice in choices[:-1]:
        try:
            return _conform(value, choice, where)
        except InvalidPlan:
            continue  # the last choice speaks for all of them
    return _conform(value, choices[-1], where)


def _conform_tuple(value: Any, arguments: Sequence[Any], where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(value, "a list", where)
    hint, *rest = arguments
    if rest == [...]:
        hints = [hint] * len(value)
    elif len(value) == len(arguments):
        hints = list(arguments)
    else:
        raise _wrong(value, f"a list of {len(arguments)}", where)
    result = tuple(
        _conform(each, kind, f"{where}[{i}]") for i, (each, kind) in enumerate(zip(value, hints, strict=True))
    )
    if rest == [...] and hint in (int, str):
        if hint is int and (negative := [each for each in result if each < 0]):
            raise InvalidPlan(f"{where}: index {negative[0]} is negative.", hint="Indices count from 0.")
        if len(set(result)) != len(result):
            repeated = next(each for i, each in enumerate(result) if each in result[:i])
            raise InvalidPlan(f"{where}: {repeated!r} is given twice.")
    return result


def _wrong(value: Any, expected: str, where: str) -> InvalidPlan:
    return InvalidPlan(f"{where} must be {expected}, not {value!r}.")


def _hints(kind: type[Any]) -> dict[str, Any]:
    resolved = typing.get_type_hints(kind)
    return {field.name: resolved[field.name] for field in fields(kind)}


# Writing


def _plain_fields(config: Any) -> dict[str, Any]:
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return _plain_fields(value) if is_dataclass(value) else value
