"""The command line: look at a model, optimize it, let it speak, save it, or export it."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skipstone import __version__
from skipstone.ir.errors import ArtifactError, InternalError, InvalidPlan, SkipstoneError, Unsupported, UserError
from skipstone.loading import has_tokenizer, load_model, load_tokenizer

USER_ERROR, UNSUPPORTED, DEFECT = 2, 3, 1
INTERRUPTED, BROKEN_PIPE = 130, 141
"""As shells say it: 128 and the number of the signal."""
WINDOWS, WINDOW = 64, 512
"""Calibration reads at most so many windows of a text, of so many tokens each."""
AUTO = "auto"
"""The number of rows that is to be found."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a wrong request, 3 for an unsupported one."""
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a narrow encoding has no lines for tables
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("skipstone: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who was reading has seen enough, and Python must not try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
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
    optimize.add_argument("--calibration", type=Path, metavar="FILE", help="text to calibrate, choose and prove on")
    optimize.add_argument(
        "--budget", type=_limit, metavar="nll=0.01", help="what the plan may cost: nll (relative), kl or top1"
    )
    optimize.add_argument(
        "--find-draft",
        action="store_true",
        help="let the draft guess tokens that gains most behind the calibration text",
    )
    optimize.add_argument(
        "--kv-window",
        type=_positive,
        metavar="N",
        help="keep of each head the newest N tokens and the first 4; with --budget, of as many heads as it allows",
    )
    optimize.add_argument(
        "--prompt-rows",
        type=_rows,
        metavar="N",
        help="keep of each prompt the N most important tokens; with --budget, auto for as few as it allows",
    )
    optimize.add_argument("--save-plan", type=Path, metavar="FILE", help="write the plan, with what was calibrated")
    optimize.add_argument("--save", type=Path, metavar="DIR", help="write the executable, for `skipstone generate DIR`")
    optimize.add_argument(
        "--compiled-for",
        type=_sizes,
        default=(),
        metavar="1,8",
        help="with --save: compile for these batches (triton)",
    )
    optimize.add_argument(
        "--target", default="auto", help="auto, onnxruntime, triton (with --device cuda) or eager (default: auto)"
    )
    optimize.add_argument("--device", help="cpu or cuda: where the model is put first (default: where it is loaded)")
    optimize.add_argument("--mode", default="default", help="max-autotune lets triton choose kernels by their times")
    optimize.add_argument("--max-length", type=_positive, metavar="N", help="longest sequence to make room for")
    optimize.add_argument("--prompt", metavar="TEXT", help="generate a continuation of this text")
    optimize.add_argument("--measure", action="store_true", help="time the model and the executable on the prompt")

    generate = commands.add_parser("generate", help="generate text with an executable that was saved")
    generate.set_defaults(run=_generate)
    generate.add_argument("directory", type=Path, metavar="DIR", help="what `skipstone optimize --save DIR` wrote")
    generate.add_argument("--prompt", metavar="TEXT", required=True, help="generate a continuation of this text")
    generate.add_argument("--target", help="onnxruntime, triton or eager (default: that which it was saved for)")
    generate.add_argument("--native-code", action="store_true", help="run the compiled code that is in DIR")
    for command in (optimize, generate):
        command.add_argument("--threads", type=_positive, metavar="N", help="threads of ONNX Runtime")
        command.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="default: 64")

    export = commands.add_parser("export", help="carry out a plan and write the model as ONNX")
    export.set_defaults(run=_export, kv_window=None, prompt_rows=None)
    export.add_argument("--calibration", type=Path, metavar="FILE", help="text to calibrate on")
    export.add_argument("--format", default="onnx", help="onnx (optimum's names) or genai (for onnxruntime-genai, too)")
    export.add_argument("--opset", type=_positive, default=23, metavar="N", help="23, or higher by ONNX's converter")
    for command in (optimize, export):
        _add_plan(command)
        command.add_argument("--no-cache", action="store_true", help="read the whole text again for each token")
        command.add_argument("--overwrite", action="store_true", help="replace what was written to DIR or OUT before")

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


def _add_plan(command: argparse.ArgumentParser) -> None:
    """The options that spell a plan, see `_plan`."""
    command.add_argument("--plan", type=Path, metavar="FILE", help="plan to carry out (JSON)")
    for name, what in (("layers", "whole layers"), ("attention", "the attention of layers"), ("ffn", "their FFNs")):
        command.add_argument(f"--skip-{name}", type=_indices, default=(), metavar="1,2", help=f"skip {what}")
    command.add_argument(
        "--weights", type=_weight_format, metavar="BITS", help="bits of weights: 4 or 8; 4:int8 rounds inputs, too"
    )
    command.add_argument(
        "--kv", type=_kv_format, metavar="FORMAT", help="format of keys and values: int8, int4, fp8:token, ..."
    )


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
    from skipstone.find import find_compress_kv, find_compress_prompt, find_self_speculate
    from skipstone.optimize import optimize
    from skipstone.runtime.artifact.store import check_free

    if arguments.save is not None:
        check_free(arguments.save, arguments.overwrite)
    elif arguments.compiled_for:
        raise UserError("--compiled-for needs a place for what is compiled.", hint="Add --save DIR.")
    if arguments.save_plan is not None and not (folder := arguments.save_plan.absolute().parent).is_dir():
        raise ArtifactError(f"Cannot write the plan {arguments.save_plan}: there is no directory {folder}.")
    if arguments.measure and arguments.prompt is None:
        raise UserError("--measure needs a prompt.", hint="Add --prompt TEXT.")
    if arguments.budget and arguments.calibration is None:
        raise UserError(
            "--budget has no data to choose sublayers on and to prove it on.", hint="Add --calibration FILE."
        )
    if arguments.find_draft and (arguments.calibration is None or arguments.budget or arguments.no_cache):
        hint = "Add --calibration FILE, and leave out --no-cache; a plan that was proved before is --plan FILE."
        raise UserError("--find-draft needs text to try drafts on, a cache, and a plan that is settled.", hint=hint)
    if arguments.prompt_rows == AUTO and not arguments.budget:
        raise UserError(f"--prompt-rows {AUTO} without a budget.", hint="Add --budget nll=0.01, or say how many.")
    plan, budget = _plan(arguments), arguments.budget and Budget(**dict([arguments.budget]))
    model = load_model(arguments.model, arguments.trust_remote_code, arguments.device)
    tokens = calibration = None
    tokenizer: Any = None
    is_asked_for = arguments.prompt is not None or arguments.calibration is not None
    if is_asked_for or (arguments.save is not None and has_tokenizer(arguments.model)):
        tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code)
    if arguments.calibration is not None:
        calibration = _calibration(arguments.calibration, tokenizer, model)
    if arguments.prompt is not None:
        tokens = _tokens(arguments.prompt, tokenizer).to(model.device)
    if arguments.kv_window and budget:
        assert calibration is not None
        plan = _with(plan, find_compress_kv(model, calibration, budget, window=arguments.kv_window))
    if arguments.prompt_rows == AUTO:
        assert calibration is not None
        plan = _with(plan, find_compress_prompt(model, calibration, budget))
    if arguments.find_draft:
        options = {"target": arguments.target, "threads": arguments.threads, "progress": True}
        assert calibration is not None
        plan = find_self_speculate(model, calibration, plan, **options)
    executable: Any = optimize(
        model,
        plan,
        calibration=calibration,
        budget=budget,
        target=arguments.target,
        threads=arguments.threads,
        mode=arguments.mode,
        max_length=arguments.max_length,
        cache=not arguments.no_cache,
    )
    if arguments.save_plan is not None:
        executable.plan.save(arguments.save_plan)
    if arguments.measure:
        executable.report.measure(executable, tokens, model)
    if arguments.save is not None:
        options = {"overwrite": arguments.overwrite, "compiled_for": arguments.compiled_for}
        executable.save(arguments.save, tokenizer=tokenizer, **options)
    print(executable.report)
    if tokens is not None:
        print(f"\n{_continued(executable, tokenizer, tokens, arguments.max_new_tokens)}")
        if arguments.find_draft:
            print(f"\n{executable.speculation}")


def _generate(arguments: argparse.Namespace) -> None:
    from skipstone.artifact import load

    options = {"threads": arguments.threads, "native_code": arguments.native_code}
    executable = load(arguments.directory, arguments.target, **options)
    name = str(arguments.directory)
    if not has_tokenizer(name):
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


def _export(arguments: argparse.Namespace) -> None:
    from skipstone.export import export_onnx

    plan = _plan(arguments)
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
        cache=not arguments.no_cache,
        overwrite=arguments.overwrite,
    )
    print(report)
    print(f"\n{arguments.out} holds the exported model.")


def _plan(arguments: argparse.Namespace) -> Any:
    """The plan that the options spell, or None."""
    from skipstone.passes.compress_kv import CompressKV
    from skipstone.passes.compress_prompt import CompressPrompt
    from skipstone.passes.quantize_kv import QuantizeKV
    from skipstone.passes.quantize_weights import QuantizeWeights
    from skipstone.passes.skip_sublayers import SkipSublayers
    from skipstone.plan import Plan

    skipped = {name: getattr(arguments, f"skip_{name}") for name in ("layers", "attention", "ffn")}
    entries: list[Any] = [SkipSublayers(**skipped)] if any(skipped.values()) else []
    if arguments.weights:
        bits, activations = arguments.weights
        entries.append(QuantizeWeights(bits, activations=activations))
    if arguments.kv_window:
        entries.append(CompressKV(arguments.kv_window))
    if arguments.kv:
        name, granularity = arguments.kv
        entries.append(QuantizeKV(k=name, v=name, granularity=granularity))
    if arguments.prompt_rows:
        entries.append(CompressPrompt() if arguments.prompt_rows == AUTO else CompressPrompt(arguments.prompt_rows))
    if not entries:
        return Plan.load(arguments.plan) if arguments.plan else None
    if arguments.plan:
        hint = "Put the sublayers to skip and the formats into the plan."
        raise InvalidPlan("--plan excludes --skip-..., --weights, --kv, --kv-window and --prompt-rows.", hint=hint)
    return Plan(entries)


def _with(plan: Any, found: Any) -> Any:
    """The plan with the entry that was found in place of its own of the same kind."""
    from skipstone.plan import Plan

    (entry,) = found
    return Plan.of([*(each for each in plan if type(each) is not type(entry)), entry])


def _calibration(path: Path, tokenizer: Any, model: Any) -> Any:
    """Token batches of a text file."""
    from skipstone.calibrate import tokenize

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read the calibration text {path}: {error}.") from error
    longest = getattr(model.config, "max_position_embeddings", None) or WINDOW
    return tokenize([text], tokenizer, min(WINDOW, longest) if longest > 0 else WINDOW)[:WINDOWS]


def _rows(text: str) -> int | str:
    return AUTO if text == AUTO else _positive(text)


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected indices such as 1,2, not {text!r}") from None


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _weight_format(text: str) -> tuple[int, str]:
    bits, _, activations = text.partition(":")
    return _positive(bits), activations or "float32"


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
