"""The byte-level tokenizer of the reference model: token ids 0 to 255 are the bytes themselves."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

VOCABULARY = 259
BEGIN, END, PADDING = 256, 257, 258
MASK = 259
"""Only models that fill in masks know it: their vocabulary is one larger."""


def build(mask: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers wants it, with or without a mask; `save_pretrained` puts it beside the checkpoint.

    It puts the begin token before a text, as in training, unless `add_special_tokens=False`. The names of special
    tokens that occur in a text are bytes like any others, so that the ids of a text are exactly those of `encode`.
    """
    # The byte-level alphabet writes each byte as one printable character; without merges that character is the token.
    alphabet = {symbol: byte for byte, symbol in _byte_symbols().items()}
    special = {"<s>": BEGIN, "</s>": END, "<pad>": PADDING}
    named = {}
    if mask:
        special["<mask>"], named["mask_token"] = MASK, "<mask>"
    tokenizer = Tokenizer(models.BPE(vocab=alphabet | special, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        add_bos_token=True,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        **named,
    )


def encode(text: bytes) -> Tensor:
    """Token ids of `text`, int64 [len(text)], without special tokens."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64)


def _byte_symbols() -> dict[int, str]:
    """The printable stand-in of each byte in the byte-level alphabet: itself where printable, else shifted past 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
