"""Train the reference model: `python -m benchmarks.reference.train [--minutes 60] [--objective masked]`.

The run can be interrupted and started again: it goes on from its last checkpoint. It uses a GPU when there is one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.reference import tokenizer
from benchmarks.reference.corpus import corpus

HERE = Path(__file__).parent


LEAST = 1e-3
"""The smallest probability with which a byte is masked; LLaDA's."""


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


def config(layers: int = 12, width: int = 128, masked: bool = False) -> LlamaConfig:
    """Llama shape with grouped-query attention: `layers` layers, heads of 32.

    A model that fills in masks is the same with one token more, and every token sees all others.
    """
    own = {"is_causal": False, "mask_token_id": tokenizer.MASK} if masked else {}
    return LlamaConfig(
        vocab_size=tokenizer.VOCABULARY + masked,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 64),
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.BEGIN,
        eos_token_id=tokenizer.END,
        pad_token_id=tokenizer.PADDING,
        dtype="float32",
        **own,
    )


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and gains."""
    hidden = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    kept = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in kept]
    return [
        torch.optim.Muon(hidden, lr=rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def batch(data: Tensor, size: int, length: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random windows, int64 [size, length + 1]; each starts with the begin token."""
    starts = torch.randint(len(data) - length, (size,), generator=generator)
    windows = data[starts[:, None] + torch.arange(length)]
    return F.pad(windows, (1, 0), value=tokenizer.BEGIN).to(device)


def next_loss(model: LlamaForCausalLM, windows: Tensor, generator: torch.Generator) -> Tensor:
    """Mean negative log-likelihood of the next byte, nats."""
    logits = model(input_ids=windows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def masked_loss(model: LlamaForCausalLM, windows: Tensor, generator: torch.Generator) -> Tensor:
    """LLaDA's bound of the negative log-likelihood of a byte, nats (arXiv 2502.09992, equation 3).

    Of a window, each byte is masked with probability t, and its loss weighs 1/t. The t are uniform between `LEAST` and
    1; those of a batch are spread evenly, which lowers the variance and not the mean (MDLM, arXiv 2406.07524).
    """
    text = windows[:, 1:]
    spread = (torch.arange(len(text)) + torch.rand(1, generator=generator)) / len(text)
    share = (LEAST + (1 - LEAST) * spread).unsqueeze(1)
    masked = (torch.rand(text.shape, generator=generator) < share).to(text.device)
    shown = torch.cat([windows[:, :1], text.masked_fill(masked, tokenizer.MASK)], dim=1)
    logits = model(input_ids=shown).logits[:, 1:]
    losses = F.cross_entropy(logits[masked].float(), text[masked], reduction="none")
    return (losses / share.to(text.device).expand_as(text)[masked]).sum() / text.numel()


OBJECTIVES: dict[str, Callable[[LlamaForCausalLM, Tensor, torch.Generator], Tensor]] = {
    "next": next_loss,
    "masked": masked_loss,
}
"""The loss of windows int64 [size, length + 1], by name; random numbers come from the generator, on the CPU."""


def schedule(share: float) -> float:
    """Learning-rate factor at `share` of the run: short warm-up, flat, then linear to zero over the last 60%."""
    return min(1.0, share / 0.02 + 0.05, max(0.0, (1 - share) / 0.6))


def export(model: LlamaForCausalLM, directory: Path) -> None:
    """Write the checkpoint in bfloat16 with its tokenizer; files that are already there are replaced one by one."""
    scratch = directory.parent / f".{directory.name}.{os.getpid()}"
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.config.dtype = torch.bfloat16
    half.save_pretrained(scratch)
    tokenizer.build(mask=hasattr(model.config, "mask_token_id")).save_pretrained(scratch)
    directory.mkdir(parents=True, exist_ok=True)
    for file in scratch.iterdir():
        os.replace(file, directory / file.name)
    shutil.rmtree(scratch)
    model.config.dtype = torch.float32


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of the run to a temporary file and move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    torch.save(state, scratch)
    os.replace(scratch, path)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the run; it decides the schedule")
    parser.add_argument("--steps", type=int, help="length of the run in steps, instead of minutes")
    parser.add_argument("--objective", choices=OBJECTIVES, default="next", help="what the model learns to predict")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--out", type=Path, default=HERE / "stdlib-llama")
    parser.add_argument("--work", type=Path, default=Path("build/reference"))
    parser.add_argument("--device", default="auto", help="a torch device; auto takes a GPU when there is one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stop-after", type=int, help="interrupt this call after so many steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if options.device == "auto" else options.device)
    model = LlamaForCausalLM(config(options.layers, options.width, options.objective == "masked")).to(device)
    model.train()
    steppers, generator, progress = optimizers(model, options.rate), torch.Generator().manual_seed(0), Progress()
    checkpoint = options.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)
        generator.set_state(state["generator"].cpu())
        progress = Progress(**state["progress"])

    def keep() -> None:
        states = [stepper.state_dict() for stepper in steppers]
        position = {"generator": generator.get_state(), "progress": vars(progress)}
        save(checkpoint, {"model": model.state_dict(), "optimizers": states, **position})
        export(model, options.out)

    data = tokenizer.encode(corpus("train"))
    bar, last_kept, smooth, stopped_at = tqdm(unit="step", initial=progress.step), time.monotonic(), None, None
    if options.stop_after:
        stopped_at = progress.step + options.stop_after
    try:
        while True:
            share = progress.step / options.steps if options.steps else progress.seconds / 60 / options.minutes
            if share >= 1 or progress.step == stopped_at:
                break
            started = time.monotonic()
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = options.rate * schedule(share)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                windows = batch(data, options.batch, options.length, generator, device)
                loss = OBJECTIVES[options.objective](model, windows, generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepper in steppers:
                stepper.step()
                stepper.zero_grad(set_to_none=True)
            progress.step += 1
            progress.tokens += options.batch * options.length
            progress.seconds += time.monotonic() - started
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            bar.set_postfix(loss=f"{smooth:.3f}", share=f"{share:.2f}", refresh=False)
            bar.update()
            if time.monotonic() - last_kept > 240:
                keep()
                last_kept = time.monotonic()
    except KeyboardInterrupt:
        print("interrupted; the next call goes on from here")
    finally:
        bar.close()
    keep()
    minutes = progress.seconds / 60
    print(f"{progress.step} steps, {progress.tokens:,} bytes, {minutes:.1f} minutes, last loss {smooth}")


if __name__ == "__main__":
    main()
