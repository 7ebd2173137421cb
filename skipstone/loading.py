"""Models and tokenizers by name, for the command line."""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path
from typing import Any

from skipstone.ir.errors import UserError


def load_model(name: str, trust_remote_code: bool = False, device: str | None = None) -> Any:
    """The model that MODEL means, in evaluation mode.

    Args:
        name: a local Hugging Face directory, a hub name, or `package.module:function`.
        trust_remote_code: whether code from the hub or the directory may run.
        device: where to put it, if not where it is loaded.
    Raises:
        UserError: there is no such model or device, or it cannot be loaded there.
    """
    model = _load(name, trust_remote_code).eval()
    if device is None:
        return model
    try:
        return model.to(device)
    except (AssertionError, RuntimeError) as error:  # the first where torch is built without CUDA
        raise UserError(f"Cannot put the model on {device!r}: {_first_line(error)}.") from error


def _load(name: str, trust_remote_code: bool) -> Any:
    if ":" in name and not Path(name).exists():
        return _call(name)
    if Path(name).is_file():
        raise UserError(f"{name} is a file.", hint="MODEL is the directory that holds config.json and the weights.")
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        raise _cannot_load("model", name, error) from error


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer that belongs to MODEL.

    Raises:
        UserError: it has none.
    """
    if ":" in name and not Path(name).exists():
        raise UserError(f"{name} has no tokenizer.", hint="A prompt needs a model directory or a hub name.")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError) as error:
        raise _cannot_load("tokenizer", name, error) from error


def has_tokenizer(name: str) -> bool:
    """Whether MODEL brings a tokenizer, as far as can be told without loading it: those of the hub do."""
    return Path(name, "tokenizer_config.json").exists() if Path(name).exists() else ":" not in name


def _call(name: str) -> Any:
    """What `package.module:function` returns; the working directory is searched for the package."""
    import torch

    path, _, function = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise UserError(f"Cannot import {path!r}: {error}.", hint="MODEL is package.module:function.") from error
    make = getattr(module, function, None)
    if not callable(make):
        nearest = difflib.get_close_matches(function, [each for each in vars(module) if not each.startswith("_")], n=1)
        hint = f"Did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"Module {path!r} has no function {function!r}.", hint=hint)
    model = make()
    if not isinstance(model, torch.nn.Module):
        raise UserError(f"{name} returned {type(model).__name__}, not a torch.nn.Module.")
    return model


def _cannot_load(what: str, name: str, error: Exception) -> UserError:
    local = Path(name).exists()
    hint = "" if local else "It is neither a local directory nor a reachable name on the hub."
    return UserError(f"Cannot load the {what} {name!r}: {_first_line(error)}.", hint=hint)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
