"""Compile kernels without a device, and read from the machine code what they need of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from skipstone.ir.errors import Unsupported
from skipstone.ir.quantized import cache_format
from skipstone.kernels.call import Call
from skipstone.kernels.launch import Launch
from skipstone.kernels.quantized_cached_attention import launches

ALIGNMENT = 16
"""Triton compiles numbers and addresses that this divides to code of their own: wide loads need it."""

PROCESSORS = 132
"""Of the device that calls are compiled for: they decide how many programs share the keys of a sequence."""

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread's registers that do not fit and go to memory.
        shared: bytes of shared memory of a program.
    """

    registers: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class Variant:
    """A kind of call that kernels are compiled for.

    Attributes:
        k_format, v_format: of the cache.
        width: head size.
        dtype: of the model.
        queries: new tokens of each sequence.
        group: query heads that share a key head.
        options: whether the call uses all that it may: full precision for the first and newest rows, ragged chunks,
            a sliding window, sinks and a cap.
    """

    k_format: str
    v_format: str
    width: int
    dtype: torch.dtype = torch.bfloat16
    queries: int = 1
    group: int = 4
    options: bool = False


def variant_launches(variant: Variant, arch: str) -> list[Launch]:
    """The launches of a long cache's call, whose tensors have no data.

    Args:
        arch: such as "sm_90".
    Raises:
        InvalidPlan: the format does not fit the head size.
        Unsupported: the kernels refuse the call.
    """
    call = variant_call(variant, capability(arch))
    call.check()
    return list(launches(call, call.q.new_empty(call.q.shape), PROCESSORS))


def variant_call(variant: Variant, arch: int) -> Call:
    """A long cache's call, whose tensors have no data, unchecked; `arch` is such as 90."""
    batch, kv_heads, capacity = 8, 8, 32768
    width, options = variant.width, variant.options
    forms = [cache_format(name, *((64, 4) if options else (0, 0))) for name in (variant.k_format, variant.v_format)]

    def tensor(*shape: int, dtype: torch.dtype = variant.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for form in forms:
        form.format.check(width)
    statics = [
        tensor(kv_heads, {"channel": width, "head": 1}[form.format.static], dtype=torch.float32)
        if form.format.static
        else None
        for form in forms
    ]
    caches = [
        [tensor(batch, kv_heads, p.rows(capacity), p.width, dtype=p.dtype) for p in form.parts(width, variant.dtype)]
        for form in forms
    ]
    lengths = tensor(batch, dtype=torch.int64)
    heads = kv_heads * variant.group
    operands: dict[str, Any] = {
        "count": lengths if options else None,
        "sinks": tensor(heads) if options else None,
        "residual": 64 if options else 0,
        "first": 4 if options else 0,
        "kind": "sliding" if options else "causal",
        "window": 4096 if options else 0,
        "softcap": 50.0 if options else 0.0,
    }
    q, k, v = (tensor(batch, each, variant.queries, width) for each in (heads, kv_heads, kv_heads))
    return Call(
        q, k, v, caches[0], caches[1], lengths, k_static=statics[0], v_static=statics[1], k_format=variant.k_format,
        v_format=variant.v_format, scale=width**-0.5, arch=arch, **operands,
    )  # fmt: skip


def capability(arch: str) -> int:
    """The compute capability times ten of an architecture such as "sm_90".

    Raises:
        Unsupported: it is not the name of one.
    """
    match = re.fullmatch(r"sm_(\d+)", arch)
    if match is None:
        raise Unsupported(f"architecture {arch!r}", hint='Name one such as "sm_80" or "sm_90".')
    return int(match[1])


def compile_launch(launch: Launch, arch: str) -> Any:
    """The compiled kernel of a launch (`triton.compiler.CompiledKernel`), whose tensors may be on any device.

    Args:
        arch: such as "sm_90".
    Raises:
        Unsupported: `arch` is not the name of an NVIDIA architecture, or kernels run in Triton's interpreter.
    """
    target = GPUTarget("cuda", capability(arch), 32)
    if not isinstance(launch.kernel, JITFunction):
        raise Unsupported("compiling kernels in Triton's interpreter", hint="Unset TRITON_INTERPRET.")
    return triton.compile(_source(launch), target=target, options=dict(launch.options))


def usage(launch: Launch, arch: str) -> Usage:
    """What the kernel of a launch needs on an architecture. Arguments and errors as in `compile_launch`."""
    compiled = compile_launch(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", printed))
    return Usage(int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]), compiled.metadata.shared)


def _source(launch: Launch) -> ASTSource:
    """The kernel with the types that its arguments would have at the launch."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            constants[(position,)] = launch.constants[name]
        elif launch.kernel.params[position].do_not_specialize:
            signature[name] = "i32"
        else:
            signature[name] = _type(launch.arguments[name])
            for path, value in _leaves(launch.arguments[name], (position,)):
                if _type(value) == "constexpr":
                    constants[path] = value
                elif isinstance(value, Tensor) or (isinstance(value, int) and value % ALIGNMENT == 0):
                    attributes[path] = [["tt.divisibility", ALIGNMENT]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _leaves(value: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Any]]:
    if isinstance(value, tuple):
        for position, each in enumerate(value):
            yield from _leaves(each, (*path, position))
    else:
        yield path, value


def _type(value: Any) -> Any:
    """Triton's name of the type of an argument."""
    if isinstance(value, tuple):
        return tuple(map(_type, value))
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
