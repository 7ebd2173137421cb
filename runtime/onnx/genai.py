"""``genai_config.json``: what onnxruntime-genai has to know of an exported decoder, and what it cannot run.

Its reference: https://onnxruntime.ai/docs/genai/reference/config.html. A model of the type ``decoder`` is any graph
with the inputs and outputs of `skipstone.runtime.onnx.columns`.
"""

from __future__ import annotations

from typing import Any

from skipstone.ir.dialect import WRITING_OPS
from skipstone.ir.errors import Unsupported
from skipstone.ir.program import Program, Role
from skipstone.runtime.onnx.columns import LOGITS, MASK, PAST, POSITIONS, PRESENT, TOKENS
from skipstone.runtime.onnx.files import MODEL_FILE
from skipstone.runtime.onnx.forms import reads_what_it_wrote

CONFIG_FILE = "genai_config.json"

_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size")


def refuse_genai(program: Program) -> None:
    """Refuse a program that onnxruntime-genai has no way to run.

    Args:
        program: as `skipstone.runtime.onnx.columns.in_columns` returns it, or one without a cache.
    Raises:
        Unsupported: it has no cache, caches of different shapes, or an input that the format has no name for.
    """
    if not program.slots():
        raise _refused("a model without a KV cache")
    if program.continuations:
        raise _refused("skip_by_prompt, which decodes with several graphs", entry=True)
    named = (Role.TOKENS, Role.PADDING, Role.POSITIONS, Role.CACHE_KEY, Role.CACHE_VALUE)
    if other := [port for port in program.inputs if port.role not in named]:
        if other[0].role == Role.DECODE_START:
            raise _refused("skip_ffn_adaptive, which has to be told where the prompt ends", entry=True)
        raise _refused(f"the input {other[0].name!r}")
    forms = {(fake.dtype, *map(int, (fake.shape[1], fake.shape[3]))) for fake in _caches(program)}
    if len(forms) > 1:
        shown = ", ".join(
            f"{heads} heads of {width} in {str(dtype)[6:]}" for dtype, heads, width in sorted(forms, key=str)
        )
        raise _refused(f"caches of different shapes ({shown})")


def _refused(feature: str, entry: bool = False) -> Unsupported:
    """The refusal of a feature, which an entry of the plan brought or the model itself."""
    hint = "Remove the entry from the plan, or export with format='onnx'." if entry else "Export with format='onnx'."
    return Unsupported(f"{feature}, in onnxruntime-genai", hint=hint)


def genai_config(
    program: Program, heads: int, hidden: int, vocabulary: int, generation: dict[str, Any]
) -> dict[str, Any]:
    """The content of ``genai_config.json``.

    Args:
        program: as `refuse_genai` takes it.
        heads, hidden: query heads of an attention and width of the stream, which the runtime only reports.
        vocabulary: number of logits.
        generation: Hugging Face's generation config as plain data.
    """
    cache = _caches(program)[0]
    inputs = {
        "input_ids": TOKENS,
        "attention_mask": MASK,
        "past_key_names": PAST.format(slot="%d", which="key"),
        "past_value_names": PAST.format(slot="%d", which="value"),
    }
    if program.input(Role.POSITIONS) is not None:
        inputs["position_ids"] = POSITIONS
    outputs = {
        "logits": LOGITS,
        "present_key_names": PRESENT.format(slot="%d", which="key"),
        "present_value_names": PRESENT.format(slot="%d", which="value"),
    }
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_FILE,
        "head_size": int(cache.shape[3]),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": int(cache.shape[1]),
        "num_hidden_layers": len(program.slots()),  # of caches: a skipped attention has none
        "inputs": inputs,
        "outputs": outputs,
    }
    length = program.source.max_positions or _LENGTH
    model = {"type": "decoder", "vocab_size": vocabulary, "context_length": length, "decoder": decoder}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (token := generation.get(name)) is not None:
            model[name] = token
    if "pad_token_id" not in model and "eos_token_id" in model:
        token = model["eos_token_id"]
        model["pad_token_id"] = token[0] if isinstance(token, list) else token
    search = {name: generation[name] for name in _SAMPLING if generation.get(name) is not None}
    search |= {"max_length": length, "num_beams": 1, "past_present_share_buffer": _shares_buffers(program)}
    return {"model": model, "search": search}


_LENGTH = 4096
"""Tokens of a sequence of a model that does not say how many it takes."""


def _caches(program: Program) -> list[Any]:
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    pairs = zip(program.inputs, placeholders, strict=True)
    return [node.meta["val"] for port, node in pairs if port.is_buffer]


def _shares_buffers(program: Program) -> bool:
    """Whether every cache is written by one operator that can do so in place."""
    writers = list(program.nodes(*WRITING_OPS))
    return len(writers) == len(program.slots()) and not any(map(reads_what_it_wrote, writers))
