"""Train a reference model: `python -m benchmarks.reference.train [--minutes 60] [--objective masked] [--snlp 0.5]`.

The run can be interrupted and started again: it goes on from its last checkpoint. It uses a GPU when there is one.
"""

from __future__ import annotations

import argparse
import math
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
from transformers import PreTrainedModel

from benchmarks.reference import tokenizer
from benchmarks.reference.architectures import ARCHITECTURES, UNMASKED, build
from benchmarks.reference.captured import Captured
from benchmarks.reference.corpus import corpus
from benchmarks.reference.optimizers import optimizers
from skipstone import Segment
from skipstone.training import LayerParallelLoss, ramp

HERE = Path(__file__).parent

LEAST = 1e-3
"""The smallest probability with which a byte is masked; LLaDA's."""

STRIDE = 4
"""Every how many layers of a segment the regularizer compares states."""

REPORTED = 10
"""Every how many steps the losses are read, which waits for the device."""


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0

    def share(self, steps: int | None, minutes: float | None) -> float:
        """The share of the run that is done, by the limit that is nearer."""
        return max(self.step / steps if steps else 0.0, self.seconds / 60 / minutes if minutes else 0.0)


def segments(layers: int) -> list[Segment]:
    """A quarter, half and three quarters of the layers, in the middle: what the regularizer trains for.

    The paper takes as many layers (8, 16 and 24 of 32), but the last ones. A plan takes them from the middle, since the
    first and the last layers bear it worst (arXiv 2407.09298); layers behind a segment can make up for its error.
    """
    counts = [count for quarters in (1, 2, 3) if (count := layers * quarters // 4) > 1]
    return [Segment((layers - count) // 2, (layers + count) // 2) for count in counts]


def batch(data: Tensor, size: int, length: int, generator: torch.Generator) -> Tensor:
    """Random windows, int64 [size, length + 1], on the data's device; each starts with the begin token."""
    starts = torch.randint(len(data) - length, (size, 1), generator=generator).to(data.device, non_blocking=True)
    windows = data[starts + torch.arange(length, device=data.device)]
    return F.pad(windows, (1, 0), value=tokenizer.BEGIN)


def next_loss(model: PreTrainedModel, windows: Tensor, generator: torch.Generator) -> Tensor:
    """Mean negative log-likelihood of the next byte, nats."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def masked_loss(model: PreTrainedModel, windows: Tensor, generator: torch.Generator) -> Tensor:
    """LLaDA's bound of the negative log-likelihood of a byte, nats (arXiv 2502.09992, equation 3).

    Of a window, each byte is masked with probability t, and its loss weighs 1/t. The t are uniform between `LEAST` and
    1; those of a batch are spread evenly, which lowers the variance and not the mean (MDLM, arXiv 2406.07524).
    """
    text = windows[:, 1:]
    spread = (torch.arange(len(text)) + torch.rand(1, generator=generator)) / len(text)
    share = (LEAST + (1 - LEAST) * spread).unsqueeze(1)
    masked = (torch.rand(text.shape, generator=generator) < share).to(text.device)
    shown = torch.cat([windows[:, :1], text.masked_fill(masked, tokenizer.MASK)], dim=1)
    logits = model(input_ids=shown, use_cache=False).logits[:, 1:]
    losses = F.cross_entropy(logits[masked].float(), text[masked], reduction="none")
    return (losses / share.to(text.device).expand_as(text)[masked]).sum() / text.numel()


OBJECTIVES: dict[str, Callable[[PreTrainedModel, Tensor, torch.Generator], Tensor]] = {
    "next": next_loss,
    "masked": masked_loss,
}
"""The loss of windows int64 [size, length + 1], by name; random numbers come from the generator, on the CPU."""


def schedule(share: float) -> float:
    """Learning-rate factor at `share` of the run: short warm-up, flat, then linear to zero over the last 60%."""
    return min(1.0, share / 0.02 + 0.05, max(0.0, (1 - share) / 0.6))


def export(model: PreTrainedModel, directory: Path) -> None:
    """Write the checkpoint in bfloat16 with its tokenizer; files that are already there are replaced one by one."""
    scratch = directory.parent / f".{directory.name}.{os.getpid()}"
    half = type(model)(model.config).to(torch.bfloat16)
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


@dataclass
class Step:
    """One step of the training, without waiting for the device.

    Attributes:
        windows: what it learns from, int64 [size, length + 1].
        weight: of the regularizer, a tensor of no dimensions.
    """

    model: PreTrainedModel
    objective: Callable[[PreTrainedModel, Tensor, torch.Generator], Tensor]
    steppers: list[torch.optim.Optimizer]
    generator: torch.Generator
    regularizer: LayerParallelLoss | None
    windows: Tensor
    weight: Tensor

    def __call__(self) -> Tensor:
        """Take it; the loss of the objective and that of the regularizer, [2]."""
        for stepper in self.steppers:
            stepper.zero_grad(set_to_none=True)
        losses = self.losses()
        torch.addcmul(losses[0], losses[1], self.weight).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for stepper in self.steppers:
            stepper.step()
        return losses.detach()

    def losses(self) -> Tensor:
        """The loss of the objective and that of the regularizer, [2]."""
        kind = self.windows.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            if self.regularizer is None:
                loss = self.objective(self.model, self.windows, self.generator)
                return torch.stack([loss, torch.zeros_like(loss)])
            with self.regularizer.record():
                loss = self.objective(self.model, self.windows, self.generator)
            return torch.stack([loss, self.regularizer.loss()])


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="length of the run; it decides the schedule; 60 without --steps")
    parser.add_argument("--steps", type=int, help="length of the run in steps; with --minutes, what comes first")
    parser.add_argument("--objective", choices=OBJECTIVES, default="next", help="what the model learns to predict")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--snlp", type=float, default=0.0, help="weight of the regularizer for layers in parallel")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--out", type=Path, default=HERE / "stdlib-llama")
    parser.add_argument("--work", type=Path, default=Path("build/reference"))
    parser.add_argument("--device", default="auto", help="a torch device; auto takes a GPU when there is one")
    parser.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True, help="a CUDA graph of a step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stop-after", type=int, help="interrupt this call after so many steps")
    options = parser.parse_args(arguments)
    if not (options.minutes or options.steps):
        options.minutes = 60.0
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if options.device == "auto" else options.device)
    # How many bytes are masked decides the shape of what their loss is computed from: a graph cannot hold that.
    graph = options.graph and device.type == "cuda" and options.objective == "next"
    config = ARCHITECTURES[options.architecture](options.layers, options.width, options.objective == "masked")
    model = build(config, UNMASKED if graph else "sdpa").to(device)
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

    data = tokenizer.encode(corpus("train")).to(device)
    print(f"{len(data):,} bytes of text, {sum(each.numel() for each in model.parameters()):,} parameters, {device}")
    regularizer = None
    if options.snlp:
        regularizer = LayerParallelLoss(model.model.layers, segments(options.layers), stride=STRIDE)
    windows, weight = data.new_empty(options.batch, options.length + 1), torch.zeros((), device=device)
    step = Step(model, OBJECTIVES[options.objective], steppers, generator, regularizer, windows, weight)
    take = Captured(step) if graph else step
    bar, last_kept = tqdm(unit="step", initial=progress.step, mininterval=1), time.monotonic()
    smooth: Tensor | None = None
    stopped_at = progress.step + options.stop_after if options.stop_after else None
    try:
        while True:
            share = progress.share(options.steps, options.minutes)
            if share >= 1 or progress.step == stopped_at:
                break
            started = time.monotonic()
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"].fill_(options.rate * schedule(share))
            weight.fill_(options.snlp * ramp(share))
            windows.copy_(batch(data, options.batch, options.length, generator))
            losses = take()
            progress.step += 1
            progress.tokens += options.batch * options.length
            smooth = losses.clone() if smooth is None else smooth.lerp_(losses, 0.02)
            if progress.step % REPORTED == 0:
                loss, apart = smooth.tolist()
                if not math.isfinite(loss + apart):
                    raise SystemExit(f"step {progress.step}: the losses are {loss} and {apart}")
                bar.set_postfix(loss=f"{loss:.3f}", apart=f"{apart:.3f}", share=f"{share:.2f}", refresh=False)
            progress.seconds += time.monotonic() - started
            bar.update()
            if time.monotonic() - last_kept > 240:
                keep()
                last_kept = time.monotonic()
    except KeyboardInterrupt:
        print("interrupted; the next call goes on from here")
    finally:
        bar.close()
    keep()
    last = "none" if smooth is None else " and ".join(f"{each:.4f}" for each in smooth.tolist())
    minutes = progress.seconds / 60
    print(f"{progress.step} steps, {progress.tokens:,} bytes, {minutes:.1f} minutes, last losses {last}")


if __name__ == "__main__":
    main()
