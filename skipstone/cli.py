"""The command line: look at a model, optimize it, let it speak, save it, or export it."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skipstone import __version__
from skipstone.ir.errors import InternalError, InvalidPlan, SkipstoneError, Unsupported, UserError

USER_ERROR, UNSUPPORTED, DEFECT = 2, 3, 1
WINDOWS, WINDOW = 64, 512
"""Calibration reads at most so many windows of a text, of so many tokens each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a wrong request, 3 for an unsupported one."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except SkipstoneError as error:
        print(f"skipstone: {error}", file=sys.stderr)
        return USER_ERROR if isinstance(error, UserError) else UNSUPPORTED if isinstance(error, Unsupported) else DEFECT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skipstone", description="Make transformer inference cheaper, graph by graph."
    )
    parser.add_argument("--version", action="version", version=f"skipstone {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="show the layers and sublayers of a model and what they cost")
    inspect.set_defaults(run=_inspect)

    optimize = commands.add_parser("optimize", help="optimize a model, print the report, and generate text")
    optimize.set_defaults(run=_optimize)
    optimize.add_argument("--plan", type=Path, metavar="FILE", help="plan to carry out (JSON)")
    for name in ("layers", "attention", "ffn"):
        what = "whole layers" if name == "layers" else f"the {name} of layers"
        optimize.add_argument(f"--skip-{name}", type=_indices, default=(), metavar="1,2", help=f"skip {what}")
    optimize.add_argument(
        "--kv", type=_kv_format, metavar="FORMAT", help="format of keys and values: int8, int4, fp8:token, ..."
    )
    optimize.add_argument("--calibration", type=Path, metavar="FILE", help="text to calibrate, choose and prove on")
    optimize.add_argument(
        "--budget", type=_limit, metavar="nll=0.01", help="what the plan may cost: nll (relative), kl or top1"
    )
    optimize.add_argument("--save-plan", type=Path, metavar="FILE", help="write the plan, with what was calibrated")
    optimize.add_argument("--save", type=Path, metavar="DIR", help="write the executable, for `skipstone generate DIR`")
    optimize.add_argument("--overwrite", action="store_true", help="replace an executable that is in DIR")
    optimize.add_argument(
        "--target", default="auto", help="auto, onnxruntime, triton (a MODEL on CUDA) or eager (default: auto)"
    )
    optimize.add_argument("--prompt", metavar="TEXT", help="generate a continuation of this text")
    optimize.add_argument("--measure", action="store_true", help="time the model and the executable on the prompt")

    generate = commands.add_parser("generate", help="generate text with an executable that was saved")
    generate.set_defaults(run=_generate)
    generate.add_argument("directory", type=Path, metavar="DIR", help="what `skipstone optimize --save DIR` wrote")
    generate.add_argument("--prompt", metavar="TEXT", required=True, help="generate a continuation of this text")
    generate.add_argument("--target", help="onnxruntime, triton or eager (default: that which it was saved for)")
    for command in (optimize, generate):
        command.add_argument("--threads", type=_positive, metavar="N")
        command.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")

    export = commands.add_parser("export", help="carry out a plan and write the model as ONNX")
    export.set_defaults(run=_export)
    export.add_argument("--plan", type=Path, metavar="FILE", help="plan to carry out (JSON)")
    export.add_argument("--calibration", type=Path, metavar="FILE", help="text to calibrate on")
    export.add_argument("--format", default="onnx", help="onnx (optimum's names) or genai (for onnxruntime-genai, too)")
    export.add_argument("--opset", type=_positive, default=23, metavar="N", help="23, or higher by ONNX's converter")
    export.add_argument("--overwrite", action="store_true", help="replace what is in OUT")

    kernels = commands.add_parser("kernels", help="compile the Triton kernels for an architecture and check them")
    actions = kernels.add_subparsers(required=True, metavar="ACTION")
    compile_ = actions.add_parser("compile", help="compile all of them, without a GPU, and show what they need")
    compile_.set_defaults(run=_compile_kernels)
    compile_.add_argument("--arch", required=True, metavar="sm_90", help="architecture to compile for")

    for command in (inspect, optimize, export):
        command.add_argument("model", metavar="MODEL", help="directory, hub name, or package.module:function")
        command.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    export.add_argument("out", type=Path, metavar="OUT", help="directory to write")
    return parser


def _compile_kernels(arguments: argparse.Namespace) -> None:
    from skipstone.compile_kernels import compile_kernels, table

    compiled = compile_kernels(arguments.arch)
    print(table(compiled))
    spilling = sum(1 for _, needs in compiled if needs.spilled)
    if spilling:
        raise InternalError(f"{spilling} of {len(compiled)} kernels spill registers on {arguments.arch}")
    print(f"{len(compiled)} kernels compiled for {arguments.arch}; none spills registers.")


def _inspect(arguments: argparse.Namespace) -> None:
    print(describe(load_model(arguments.model, arguments.trust_remote_code)))


def describe(model: Any) -> str:
    """A table of the layers and sublayers of a model, with what one token costs in each.

    Raises:
        Unsupported: the model cannot be captured, or has no residual stream.
        UserError: it is not a Hugging Face model, so that its inputs are unknown.
    """
    from rich.table import Table
    from transformers import PreTrainedModel

    from skipstone.ir.capture.huggingface import capture_huggingface
    from skipstone.ir.cost import cost, evaluate
    from skipstone.ir.stream import find_stream
    from skipstone.report import count, format_bytes, format_count, render

    if not isinstance(model, PreTrainedModel):
        raise UserError(f"{type(model).__name__} is not a Hugging Face model; what it takes as input is unknown.")
    program = capture_huggingface(model)
    sublayers = find_stream(program).sublayers
    table = Table()
    for heading, justify in (("layer", "right"), ("kind", "left"), ("path", "left")):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for heading in ("parameters", "FLOPs a token", "weights"):
        table.add_column(heading, justify="right", no_wrap=True)
    for sublayer in sublayers:
        numbers = evaluate(cost(program, sublayer.nodes), batch=1, sequence=1)
        table.add_row(
            str(sublayer.layer),
            str(sublayer.kind),
            sublayer.path,
            format_count(sum(program.tensor(name).numel() for name in sublayer.parameters)),
            format_count(numbers["flops"]),
            format_bytes(numbers["parameter_bytes"]),
        )
    whole = evaluate(cost(program), batch=1, sequence=1)
    table.add_section()
    size = format_count(program.source.parameters)
    table.add_row(
        "", "model", "", size, format_count(whole["flops"]), format_bytes(whole["parameter_bytes"]), style="bold"
    )
    layers = len({sublayer.layer for sublayer in sublayers})
    head = (
        f"{program.source.name}, {program.source.dtype}: {count(layers, 'layer')}, {count(len(sublayers), 'sublayer')}"
    )
    return f"{head}\n{render(table)}"


def _optimize(arguments: argparse.Namespace) -> None:
    from skipstone.budget import Budget
    from skipstone.optimize import optimize
    from skipstone.runtime.artifact.store import check_free

    if arguments.save is not None:
        check_free(arguments.save, arguments.overwrite)
    if arguments.measure and arguments.prompt is None:
        raise UserError("--measure needs a prompt.", hint="Add --prompt TEXT.")
    plan, budget = _plan(arguments), arguments.budget and Budget(**dict([arguments.budget]))
    model = load_model(arguments.model, arguments.trust_remote_code)
    tokens = calibration = None
    tokenizer: Any = None
    is_asked_for = arguments.prompt is not None or arguments.calibration is not None
    if is_asked_for or (arguments.save is not None and _has_tokenizer(arguments.model)):
        tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code)
    if arguments.calibration is not None:
        calibration = _calibration(arguments.calibration, tokenizer, model)
    if arguments.prompt is not None:
        tokens = _tokens(arguments.prompt, tokenizer)
    executable = optimize(
        model,
        plan,
        calibration=calibration,
        budget=budget,
        target=arguments.target,
        threads=arguments.threads,
    )
    if arguments.save_plan is not None:
        executable.plan.save(arguments.save_plan)
    if arguments.measure:
        executable.report.measure(executable, tokens, model)
    if arguments.save is not None:
        executable.save(arguments.save, tokenizer=tokenizer, overwrite=arguments.overwrite)
    print(executable.report)
    if tokens is not None:
        print(f"\n{_continued(executable, tokenizer, tokens, arguments.max_new_tokens)}")


def _generate(arguments: argparse.Namespace) -> None:
    from skipstone.artifact import load

    executable = load(arguments.directory, arguments.target, threads=arguments.threads)
    name = str(arguments.directory)
    if not _has_tokenizer(name):
        raise UserError(f"{name} has no tokenizer.", hint="Save one with it: executable.save(path, tokenizer=...).")
    tokenizer = load_tokenizer(name)
    print(_continued(executable, tokenizer, _tokens(arguments.prompt, tokenizer), arguments.max_new_tokens))


def _tokens(prompt: str, tokenizer: Any) -> Any:
    """The tokens of a prompt, integers [1, S]."""
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    if tokens.numel() == 0:
        raise UserError("The prompt is empty.", hint="Give at least one token after --prompt.")
    return tokens


def _continued(executable: Any, tokenizer: Any, tokens: Any, count: int) -> str:
    """The text of tokens with the `count` likeliest ones that follow."""
    from skipstone.runtime.generate import CausalLM

    if not isinstance(executable, CausalLM):
        name = executable.program.source.name
        raise Unsupported("generating text with a model that is no causal language model", where=name)
    generated = executable.generate(tokens, max_new_tokens=count, do_sample=False)
    text: str = tokenizer.decode(generated[0], skip_special_tokens=True)
    return text


def _has_tokenizer(name: str) -> bool:
    """Whether MODEL brings a tokenizer, as far as can be told without loading it: those of the hub do."""
    return Path(name, "tokenizer_config.json").exists() if Path(name).exists() else ":" not in name


def _export(arguments: argparse.Namespace) -> None:
    from skipstone.export import export_onnx
    from skipstone.plan import Plan

    plan = Plan.load(arguments.plan) if arguments.plan else None
    model = load_model(arguments.model, arguments.trust_remote_code)
    tokenizer = calibration = None
    if arguments.calibration is not None or Path(arguments.model, "tokenizer_config.json").exists():
        tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code)
    if arguments.calibration is not None:
        calibration = _calibration(arguments.calibration, tokenizer, model)
    report = export_onnx(
        model,
        arguments.out,
        plan,
        format=arguments.format,
        opset=arguments.opset,
        tokenizer=tokenizer,
        calibration=calibration,
        overwrite=arguments.overwrite,
    )
    print(report)
    print(f"\n{arguments.out} holds the exported model.")


def _plan(arguments: argparse.Namespace) -> Any:
    """The plan that the options spell, or None."""
    from skipstone.passes.quantize_kv import QuantizeKV
    from skipstone.passes.skip_sublayers import SkipSublayers
    from skipstone.plan import Plan

    skipped = {name: getattr(arguments, f"skip_{name}") for name in ("layers", "attention", "ffn")}
    entries: list[Any] = [SkipSublayers(**skipped)] if any(skipped.values()) else []
    if arguments.kv:
        name, granularity = arguments.kv
        entries.append(QuantizeKV(k=name, v=name, granularity=granularity))
    if not entries:
        return Plan.load(arguments.plan) if arguments.plan else None
    if arguments.plan:
        hint = "Put the sublayers to skip and the formats into the plan."
        raise InvalidPlan("--plan excludes --skip-... and --kv.", hint=hint)
    return Plan(entries)


def _calibration(path: Path, tokenizer: Any, model: Any) -> Any:
    """Token batches of a text file."""
    from skipstone.calibrate import tokenize

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read the calibration text {path}: {error}.") from error
    longest = getattr(model.config, "max_position_embeddings", None) or WINDOW
    return tokenize([text], tokenizer, min(WINDOW, longest))[:WINDOWS]


def load_model(name: str, trust_remote_code: bool = False) -> Any:
    """The model that MODEL means, in evaluation mode.

    Args:
        name: a local Hugging Face directory, a hub name, or `package.module:function`.
        trust_remote_code: whether code from the hub or the directory may run.
    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    if ":" in name and not Path(name).exists():
        return _call(name).eval()
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust_remote_code).eval()
    except (OSError, ValueError) as error:
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
    except (OSError, ValueError) as error:
        raise _cannot_load("tokenizer", name, error) from error


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
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    local = Path(name).exists()
    hint = "" if local else "It is neither a local directory nor a reachable name on the hub."
    return UserError(f"Cannot load the {what} {name!r}: {first.rstrip('.')}.", hint=hint)


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected indices such as 1,2, not {text!r}") from None


def _kv_format(text: str) -> tuple[str, str]:
    name, _, granularity = text.partition(":")
    return name, granularity or "channel"


def _limit(text: str) -> tuple[str, float]:
    name, _, limit = text.partition("=")
    try:
        if name in ("nll", "kl", "top1"):
            return name, float(limit)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected nll=0.01, kl=0.02 or top1=0.98, not {text!r}")


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
