"""What skipstone does with every causal-LM architecture of transformers, as data, and the check that the data is true.

``python -m tests.zoo [NAME ...] --json FILE`` checks architectures (by default all) one after another, and keeps the
results as it goes.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import skipstone
from skipstone.errors import Unsupported
from skipstone.runtime.generate import CausalLM
from tests.tiny_models import PAD, VARIANTS, tiny_model, tokens

TOLERANCE = 1e-4
"""Largest difference between logits, over the range of the model's own logits."""

BATCH, LENGTH, PADDING, NEW, ROOM = 2, 24, 5, 12, 64


@dataclass(frozen=True)
class Entry:
    """What is supported of one architecture.

    Attributes:
        logits: it is captured, and its logits are those of the model.
        cache: it generates through a KV cache, the tokens that full recomputation generates.
        reason: why not, where not: the error that names it.
    """

    logits: bool
    cache: bool
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """What `check` found.

    Attributes:
        entry: what works, and the refusal if something is refused.
        failure: what must never be: wrong results, untyped errors, a missing cache without a reason.
        error: largest difference between logits over their range, unpadded or padded.
    """

    entry: Entry
    failure: str = ""
    error: float = 0.0


UNBUILDABLE: dict[str, str] = {
    "gemma3n": "ImportError: TimmWrapperModel requires the PIL library (gemma3n_text is built)",
    "gemma4_assistant": "needs the key and value states of the model that it drafts for",
    "gemma4_unified_assistant": "needs the key and value states of the model that it drafts for",
    "musicgen": "AttributeError: 'MusicgenConfig' object has no attribute 'dropout' (its decoder's config has it)",
    "musicgen_melody": "AttributeError: 'MusicgenMelodyConfig' object has no attribute 'dropout' (as musicgen)",
}
"""Model type -> why no tiny model of it can be built from its config."""

BUILDABLE = tuple(name for name in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS) if name not in UNBUILDABLE)
"""Model types and their variants of which `tiny_model` makes a model."""

CACHED = tuple(
    """afmoe apertus arcee aria_text axk1 beam bert-generation:decoder bert:decoder biogpt bitnet camembert:decoder
    cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm data2vec-text:decoder deepseek_v2 deepseek_v3 diffllama
    dots1 electra:decoder emu3 ernie4_5 ernie4_5_moe ernie:decoder exaone4 exaone_moe falcon falcon:new flex_olmo
    flint fuyu gemma gemma2 gemma3_text gemma3n_text gemma4_unified_text git glm glm4 glm4_moe glm4_moe_lite
    got_ocr2 gpt-sw3 gpt2 gpt2:scaled gpt_bigcode gpt_neo gpt_neox gpt_neox:sequential gpt_oss gptj granite
    granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3
    hyperclovax internlm3 iquestcoder jais2 kolibri1 laguna llama llama:biased llama:linear llama:llama3 llama:yarn
    megatron-bert:decoder mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mixtral
    mixtral:sliding mllama modernbert-decoder moshi nanochat nemotron olmo olmo2 olmo3 olmo:clipped olmoe opt
    opt:post persimmon phi phi3 phi4_multimodal phi:normed phimoe qwen2 qwen2_moe qwen3 qwen3:sliding qwen3_moe
    rembert:decoder roberta-prelayernorm:decoder roberta:decoder roc_bert:decoder seed_oss smollm3 solar_open
    stablelm stablelm:parallel starcoder2 vaultgemma xlm-roberta-xl:decoder xlm-roberta:decoder youtu""".split()  # noqa: SIM905
)
"""Exact logits, and generation through a KV cache."""

UNCACHED: dict[str, str] = {
    "axk2": "attention argument 'indices' at model.layers.0.self_attn",
    "bailing_hybrid": "conv1d is not known to keep tokens apart at model.layers.0.self_attn",
    "bamba": "conv1d is not known to keep tokens apart at model.layers.0.mamba",
    "bart": "add uses positions that the model counts itself at model.decoder",
    "bert": "add uses positions that the model counts itself at bert.embeddings",
    "bert-generation": "add uses positions that the model counts itself at bert.embeddings",
    "big_bird": "add uses positions that the model counts itself at bert.embeddings",
    "big_bird:decoder": "add uses positions that the model counts itself at bert.embeddings",
    "bigbird_pegasus": "add uses positions that the model counts itself at model.decoder",
    "blenderbot": "add uses positions that the model counts itself at model.decoder",
    "blenderbot-small": "add uses positions that the model counts itself at model.decoder",
    "bloom": "baddbmm pairs every token with every other at transformer.h.0.self_attention",
    "bloom:post": "baddbmm pairs every token with every other at transformer.h.0.self_attention",
    "camembert": "cumsum works along the sequence at roberta.embeddings",
    "codegen": "matmul pairs every token with every other at transformer.h.0.attn",
    "data2vec-text": "cumsum works along the sequence at data2vec_text.embeddings",
    "deepseek_v32": "attention argument 'indices' at model.layers.0.self_attn",
    "dots3_note": "attention argument 'indices' at model.layers.0.self_attn",
    "dots3_note_text": "attention argument 'indices' at model.layers.0.self_attn",
    "electra": "add uses positions that the model counts itself at electra.embeddings",
    "ernie": "add uses positions that the model counts itself at ernie.embeddings",
    "falcon:alibi": "this model: the captured graph differs from it in logits by 3.9e-02 of the range",
    "falcon_h1": "conv1d is not known to keep tokens apart at model.layers.0.mamba",
    "gemma3": "index_put is not known to keep tokens apart at model",
    "gemma4": "attention with an explicit mask or bias at model.language_model.layers.2.self_attn",
    "gemma4_text": "attention with an explicit mask or bias at model.layers.2.self_attn",
    "gemma4_text:experts": "attention with an explicit mask or bias at model.layers.2.self_attn",
    "gemma4_unified": "attention with an explicit mask or bias at model.language_model.layers.0.self_attn",
    "glm_moe_dsa": "attention argument 'indices' at model.layers.0.self_attn",
    "gpt_neox_japanese": "baddbmm pairs every token with every other at gpt_neox_japanese.layers.0.attention",
    "granitemoehybrid": "conv1d is not known to keep tokens apart at model.layers.0.mamba",
    "hy_v4": "attention argument 'indices' at model.layers.0.self_attn",
    "inkling_text": "conv1d is not known to keep tokens apart at model.layers.0.self_attn.k_sconv",
    "jetmoe": "sum works along the sequence at model.layers.0.self_attention.experts.router",
    "kimi_linear": "conv1d is not known to keep tokens apart at model.layers.0.self_attn",
    "lfm2": "conv1d is not known to keep tokens apart at model.layers.0.conv",
    "lfm2_moe": "conv1d is not known to keep tokens apart at model.layers.0.conv",
    "lfm3": "conv1d is not known to keep tokens apart at model.layers.0.conv",
    "llama4": "mul uses positions that the model counts itself at model.layers.1.self_attn",
    "llama4_text": "mul uses positions that the model counts itself at model.layers.1.self_attn",
    "mamba2": "conv1d is not known to keep tokens apart at backbone.layers.0.mixer",
    "marian": "add uses positions that the model counts itself at model.decoder",
    "mbart": "add uses positions that the model counts itself at model.decoder",
    "megatron-bert": "add uses positions that the model counts itself at bert.embeddings",
    "minimax_m3_vl_text": "attention argument 'block_indices' at model.layers.0.self_attn",
    "moss_transcribe_diarize": "mul uses positions that the model counts itself at language_model.layers.0.self_attn",
    "mpt": "attention with an explicit mask or bias at transformer.blocks.0.attn",
    "mpt:clipped": "attention with an explicit mask or bias at transformer.blocks.0.attn",
    "mvp": "add uses positions that the model counts itself at model.decoder",
    "nemotron_h": "conv1d is not known to keep tokens apart at model.layers.0.mixer",
    "openai-gpt": "matmul pairs every token with every other at transformer.h.0.attn",
    "pegasus": "add uses positions that the model counts itself at model.decoder",
    "plbart": "add uses positions that the model counts itself at model.decoder",
    "prophetnet": "add uses positions that the model counts itself at prophetnet.decoder",
    "qwen3_5_moe": "conv1d is not known to keep tokens apart at model.layers.0.linear_attn",
    "qwen3_5_moe_text": "conv1d is not known to keep tokens apart at model.layers.0.linear_attn",
    "qwen3_5_text": "conv1d is not known to keep tokens apart at model.layers.0.linear_attn",
    "qwen3_next": "conv1d is not known to keep tokens apart at model.layers.0.linear_attn",
    "rembert": "add uses positions that the model counts itself at rembert.embeddings",
    "roberta": "cumsum works along the sequence at roberta.embeddings",
    "roberta-prelayernorm": "cumsum works along the sequence at roberta_prelayernorm.embeddings",
    "roc_bert": "add uses positions that the model counts itself at roc_bert.embeddings",
    "roformer": "mul uses positions that the model counts itself at roformer.encoder.layer.0.attention.self",
    "roformer:decoder": "mul uses positions that the model counts itself at roformer.encoder.layer.0.attention.self",
    "trocr": "add uses positions that the model counts itself at model.decoder",
    "whisper": "add uses positions that the model counts itself at model.decoder",
    "xglm": "index_select works along the sequence at model.embed_positions",
    "xlm": "add uses positions that the model counts itself at transformer",
    "xlm-roberta": "cumsum works along the sequence at roberta.embeddings",
    "xlm-roberta-xl": "cumsum works along the sequence at roberta.embeddings",
    "xlm:causal": "add uses positions that the model counts itself at transformer",
    "xlnet": "einsum pairs every token with every other at transformer.layer.0.rel_attn",
    "xmod": "cumsum works along the sequence at roberta.embeddings",
    "xmod:decoder": "index_put is not known to keep tokens apart at roberta.encoder.layer.0.output",
    "zamba2": "conv1d is not known to keep tokens apart at model.layers.0.mamba",
    "zaya": "pad is not known to keep tokens apart at model.layers.0.self_attn.qkv_proj",
}
"""Exact logits, but no KV cache, for this reason: each step recomputes the sequence."""

REFUSED: dict[str, str] = {
    "blt": "control flow that depends on tensor values at blt/modeling_blt.py:909",
    "cpmant": "a sequence size fixed to 11 by the model's own code at input_ids",
    "dbrx": "control flow that depends on tensor values at dbrx/modeling_dbrx.py:295",
    "deepseek_v4": "sequence sizes below 8 at input_ids",
    "doge": "sequence sizes below 9 at input_ids",
    "falcon_mamba": "a sequence size fixed to 11 by the model's own code at input_ids",
    "gemma3_text:bidirectional": "sequence sizes below 4 at input_ids",
    "inkling2_text": "sequence sizes below 4 at input_ids",
    "jamba": "a sequence size fixed to 11 by the model's own code at input_ids",
    "llama:dynamic": "dynamic RoPE scaling, whose frequencies follow the longest position at model.rotary_emb",
    "longcat_flash": "control flow that depends on tensor values at longcat_flash/modeling_longcat_flash.py:188",
    "mamba": "a sequence size fixed to 11 by the model's own code at input_ids",
    "minimax": "sequence sizes below 8 at input_ids",
    "olmo_hybrid": "this model: the captured graph differs from it in logits by 5.5e-01 of the range",
    "phi3:long": "longrope RoPE scaling, whose frequencies follow the longest position at model.rotary_emb",
    "qwen3_5": "this model: the captured graph differs from it in logits by 5.4e-01 of the range",
    "qwen4_exp": "control flow that depends on tensor values at qwen4_exp/modeling_qwen4_exp.py:733",
    "qwen4_exp_text": "control flow that depends on tensor values at qwen4_exp/modeling_qwen4_exp.py:733",
    "recurrent_gemma": "a sequence size fixed to 11 by the model's own code at input_ids",
    "reformer": "control flow that depends on tensor values at reformer/modeling_reformer.py:750",
    "rwkv": "a sequence size fixed to 11 by the model's own code at input_ids",
    "xlstm": "a sequence size fixed to 11 by the model's own code at input_ids",
    "zamba": "a sequence size fixed to 11 by the model's own code at input_ids",
}
"""Not captured at all, for this reason."""

ARCHITECTURES: dict[str, Entry] = {
    **{name: Entry(True, True) for name in CACHED},
    **{name: Entry(True, False, reason) for name, reason in UNCACHED.items()},
    **{name: Entry(False, False, reason) for name, reason in REFUSED.items()},
}
"""Model type or variant -> what is supported of it."""


@torch.no_grad()
def check(name: str) -> Result:
    """Optimize a tiny model without rewriting anything, and compare what it computes with the model itself.

    Args:
        name: a model type or a variant.
    """
    model = tiny_model(name)
    try:
        opt = _optimize(model)
    except Unsupported as refusal:
        return Result(Entry(False, False, str(refusal)))
    except Exception as error:
        return Result(Entry(False, False), f"optimize: {type(error).__name__}: {error}")
    refusal = str(opt.cache_refusal or "")
    entry = Entry(True, bool(opt.supports_cache), refusal)
    if entry.cache == bool(refusal):
        return Result(entry, f"supports_cache is {entry.cache}, and cache_refusal is {refusal!r}")
    try:
        error = max(_unpadded_error(opt, model), _padded_error(opt, model))
        if not error <= TOLERANCE:
            return Result(entry, "the logits differ", error)
        if not isinstance(opt, CausalLM):  # an encoder
            return Result(entry, error=error)
        if not entry.cache:
            opt = _optimize(model, cache=False)
        return Result(entry, _generation_failure(opt, model), error)
    except Exception as error:
        return Result(entry, f"run: {type(error).__name__}: {error}")


def _optimize(model: PreTrainedModel, cache: bool = True) -> skipstone.Executable:
    plan = skipstone.Plan([])
    return skipstone.optimize(
        model, plan=plan, target="eager", max_length=ROOM, cache=cache, strict=False, progress=False
    )


def _prompts() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, S] without padding; the same with a left-padded last row, and the mask of that."""
    plain = tokens(BATCH, LENGTH)
    mask = torch.ones_like(plain)
    mask[-1, :PADDING] = 0
    return plain, plain.masked_fill(mask == 0, PAD), mask


def _logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    # Some forward functions take no `use_cache`; to all of them the config is the default.
    model.config.use_cache = False
    return model(input_ids=input_ids).logits


def _difference(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or not actual.isfinite().all():
        return float("inf")
    return float((actual - expected).abs().max() / (expected.max() - expected.min()))


def _unpadded_error(opt: skipstone.Executable, model: PreTrainedModel) -> float:
    plain, _, _ = _prompts()
    return _difference(opt(input_ids=plain).logits, _logits(model, plain))


def _padded_error(opt: skipstone.Executable, model: PreTrainedModel) -> float:
    """Each row of a left-padded batch against the model on that row alone; refusing padding is no error.

    Encoders count positions from the first column, padded or not: they are compared on the batch as it is.
    """
    _, padded, mask = _prompts()
    try:
        logits = opt(input_ids=padded, attention_mask=mask).logits
    except Unsupported:
        return 0.0
    if not isinstance(opt, CausalLM):
        expected = model(input_ids=padded, attention_mask=mask).logits
        return _difference(logits[mask.bool()], expected[mask.bool()])
    rows = zip(logits, padded, mask.bool(), strict=True)
    return max(_difference(row[None, valid], _logits(model, ids[None, valid])) for row, ids, valid in rows)


def _generation_failure(opt: skipstone.Executable, model: PreTrainedModel) -> str:
    """The first way in which generated tokens differ from those of full recomputation, "" if they agree."""
    plain, padded, mask = _prompts()
    if failure := _differing(opt.generate(plain, max_new_tokens=NEW, do_sample=False), model, plain):
        return f"generated tokens differ {failure}"
    # Tiny models like to repeat themselves; with every token used once, a wrong position cannot hide.
    varied = opt.generate(plain, max_new_tokens=NEW, do_sample=False, no_repeat_ngram_size=1)
    if failure := _differing(varied, model, plain, no_repeat_ngram_size=1):
        return f"generated tokens without repetition differ {failure}"
    try:
        generated = opt.generate(padded, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    except Unsupported:
        return ""
    for row, (ids, valid) in enumerate(zip(padded, mask.bool(), strict=True)):
        if failure := _differing(generated[row : row + 1], model, ids[None, valid]):
            return f"tokens generated after padding differ in row {row}, {failure}"
    return ""


def _differing(generated: Tensor, model: PreTrainedModel, prompt: Tensor, **options: int) -> str:
    """Where generated tokens leave the greedy ones of the model; a tie within the tolerance may go either way."""
    expected = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    for row, (ours, theirs) in enumerate(zip(generated[:, -NEW:], expected.sequences[:, -NEW:], strict=True)):
        for step in (ours != theirs).nonzero()[:1].flatten().tolist():
            scores = expected.scores[step][row]
            allowed = TOLERANCE * (scores[scores.isfinite()].max() - scores[scores.isfinite()].min())
            if scores[theirs[step]] - scores[ours[step]] > allowed:
                return f"at step {step} of row {row}"
    return ""


class _Timeout(BaseException):
    """Not an `Exception`: code under test must not swallow it."""


def _within(seconds: int, run: Callable[[], Result]) -> Result:
    def expire(signum: int, frame: FrameType | None) -> None:
        raise _Timeout

    signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        return run()
    except _Timeout:
        return Result(Entry(False, False), f"no result within {seconds} seconds")
    finally:
        signal.alarm(0)


def main() -> None:
    """Check architectures and write their results to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types or variants (default: all that are not in the file yet)")
    parser.add_argument("--json", type=Path, required=True, help="results are added to this file")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    for name in options.names or [name for name in BUILDABLE if name not in results]:
        result = _within(options.timeout, lambda name=name: check(name))
        results[name] = asdict(result)
        options.json.write_text(json.dumps(results, indent=1))
        print(name, result, flush=True)


if __name__ == "__main__":
    main()
