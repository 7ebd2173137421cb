"""Saving and loading: what comes back computes the same, bit for bit."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import skipstone
from skipstone import optimize as optimize_function
from skipstone.errors import Unsupported
from skipstone.ir.dialect import Kind
from skipstone.ir.printer import readable
from skipstone.passes.base import Remark, Status
from skipstone.report import Conversion, Timing
from skipstone.runtime.artifact import weights
from skipstone.runtime.artifact.graph import Sizes, _from_data, _to_data, program_from_data, program_to_data, sizes_of
from skipstone.runtime.by_prompt import PromptSession
from skipstone.runtime.denoise import MaskedLM
from skipstone.runtime.eager import EagerSession
from skipstone.runtime.generate import CausalLM
from skipstone.runtime.onnx.session import OnnxSession
from skipstone.runtime.triton import compiled
from skipstone.runtime.triton.session import TritonSession
from tests import artifact_cases as cases

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def with_slow(target: str, names: Iterable[str] = cases.CASES) -> list[Any]:
    """Parameters: the cases of a target."""
    return [pytest.param(name, marks=pytest.mark.slow if (name, target) in cases.SLOW else ()) for name in names]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA target on a CPU, without Inductor."""
    monkeypatch.setattr(compiled.torch, "compile", lambda module, **_options: module)
    monkeypatch.setitem(sys.modules["skipstone.optimize"].DEVICES, "triton", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


def saved(case: str, target: str, folder: Path) -> Path:
    """The artifact of a case."""
    directory = folder / f"{case}_{target}"
    if not directory.exists():
        cases.executable(case, target).save(directory)
    return directory


def assert_same(given: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(given) == len(wanted)
    for one, other in zip(given, wanted, strict=True):
        assert torch.equal(one, other), f"off by {(one - other).abs().max()}"


# --------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("case", with_slow("eager"))
def test_the_reference_comes_back(case: str, folder: Path) -> None:
    check_comes_back(case, "eager", EagerSession, folder)


@pytest.mark.parametrize("case", with_slow("onnxruntime", cases.ONNXRUNTIME))
def test_onnx_models_come_back_without_being_made_anew(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(case, "onnxruntime", folder)
    monkeypatch.setattr(torch.onnx, "export", None)
    check_comes_back(case, "onnxruntime", OnnxSession, folder)


@pytest.mark.parametrize("case", with_slow("triton"))
@pytest.mark.usefixtures("uncompiled")
def test_the_gpu_target_comes_back(case: str, folder: Path) -> None:
    check_comes_back(case, "triton", TritonSession, folder)


def check_comes_back(case: str, target: str, session: type, folder: Path) -> None:
    opt: Any = cases.executable(case, target)
    new = skipstone.load(saved(case, target, folder))
    assert_same(cases.results(new), cases.results(opt))
    assert type(new) is type(opt) and new.target == target
    parts = [new.session.prompts, *new.session.continuations] if case in ("by_prompt", "one_set") else [new.session]
    assert [type(each) for each in parts] == [session] * len(parts)
    assert (new.threads, new.max_length, str(new.cache_refusal)) == (
        opt.threads,
        opt.max_length,
        str(opt.cache_refusal),
    )
    assert new.plan == opt.plan and new.plan.tensors.keys() == opt.plan.tensors.keys()
    assert new.config.to_dict() == opt.config.to_dict() and type(new.config) is type(opt.config)
    assert str(new.generation_config) == str(opt.generation_config)
    assert new.session.layout == opt.session.layout
    for own, other in zip(programs(new), programs(opt), strict=True):
        assert code(own) == code(other)
        assert (own.source, own.layers, own.inputs, own.outputs) == (
            other.source,
            other.layers,
            other.inputs,
            other.outputs,
        )
        assert own.output_spec == other.output_spec
        for name, tensor in other.tensors().items():
            assert torch.equal(own.tensor(name), tensor) and own.tensor(name).stride() == tensor.stride()
        assert own.weight_bytes() == other.weight_bytes(), "what was shared is shared no longer"


def programs(opt: Any) -> list[Any]:
    return [opt.program, *opt.program.continuations]


def code(program: Any) -> str:
    """The graph with types, places and passes; inputs have the names of their ports."""
    text = readable(program)
    for port, node in zip(program.inputs, program.graph.find_nodes(op="placeholder"), strict=True):
        text = re.sub(rf"\b{node.name}\b", port.name, text)
    return text


def test_classes_follow_the_roles(folder: Path) -> None:
    for case, kind in (("plain", CausalLM), ("masked", MaskedLM)):
        assert type(skipstone.load(saved(case, "eager", folder))) is kind
    assert isinstance(skipstone.load(saved("by_prompt", "eager", folder)).session, PromptSession)


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_a_plain_module_comes_back(target: str, tmp_path: Path) -> None:
    opt: Any = cases.odd(target)
    opt.save(tmp_path / "odd")
    new: Any = skipstone.load(tmp_path / "odd")
    for inputs in (cases.odd_inputs(), cases.odd_inputs(3, 7)):
        given, wanted = new(**inputs), opt(**inputs)
        assert type(given["hidden"]) is tuple and type(given["hidden"][1]) is list and list(given) == list(wanted)
        for one, other in zip(given["hidden"], wanted["hidden"], strict=True):
            assert_same(*(each if isinstance(each, list) else [each] for each in (one, other)))
        assert torch.equal(given["turned"], wanted["turned"])
    tensors = new.program.tensors()
    table = {name: each for name, each in tensors.items() if each.shape in ((3, cases.WIDTH), (cases.WIDTH, 3))}
    assert len({each.untyped_storage().data_ptr() for each in table.values()}) == 1 and len(table) == 2


def test_the_report_comes_back(tmp_path: Path) -> None:
    odd: Any = cases.odd()
    report = replace(
        odd.report,
        cache="2 slots",
        budget=["a line"],
        remarks=[Remark("a_pass", Status.REFUSED, "layers.0", "why", {"bytes": 3.0}), Remark("other", Status.APPLIED)],
        conversions=[Conversion("bfloat16", "float32", 2, 8, 16)],
        timing_before=Timing(1.5, None, 3, 4, 5),
        timing_after=Timing(1.0, 0.25, 3, 4, 5),
    )
    skipstone.Executable(odd.session, report=report).save(tmp_path / "saved")
    new = skipstone.load(tmp_path / "saved", threads=1)
    assert new.report.to_dict() == report.to_dict() | {"threads": 1} and new.threads == 1
    assert str(new.report).splitlines()[2:] == str(report).splitlines()[2:]


def test_what_was_loaded_is_saved_again(folder: Path, tmp_path: Path) -> None:
    for case, target in (("by_prompt", "eager"), ("quantized", "onnxruntime")):
        skipstone.load(saved(case, target, folder)).save(tmp_path / case)
        new: Any = skipstone.load(tmp_path / case)
        assert_same(cases.results(new), cases.results(cases.executable(case, target)))
        for name in ("weights.safetensors", "plan.json", "config.json"):
            assert (tmp_path / case / name).read_bytes() == (saved(case, target, folder) / name).read_bytes()


def test_programs_may_have_other_tensors_of_one_name(folder: Path, tmp_path: Path) -> None:
    opt = skipstone.load(saved("by_prompt", "eager", folder))
    part = opt.program.continuations[1]
    name, tensor = next(iter(part.tensors().items()))
    parent, _, leaf = name.rpartition(".")
    setattr(part.module.get_submodule(parent), leaf, 2 * tensor)
    opt.save(tmp_path / "saved")
    found = [program.tensor(name) for program in programs(skipstone.load(tmp_path / "saved"))]
    assert [torch.equal(each, tensor) for each in found] == [True, True, False]
    assert torch.equal(found[2], 2 * tensor)


def test_weights_are_written_once(folder: Path) -> None:
    for case, target in (
        ("plain", "onnxruntime"),
        ("parallel", "eager"),
        ("by_prompt", "eager"),
        ("one_set", "onnxruntime"),
    ):
        opt: Any = cases.executable(case, target)
        addresses = {(each.data_ptr(), each.nbytes) for program in programs(opt) for each in program.tensors().values()}
        data = (saved(case, target, folder) / "weights.safetensors").read_bytes()
        written = len(data) - 8 - int.from_bytes(data[:8], "little")
        assert written <= 1.02 * sum(size for _, size in addresses)


# ------------------------------------------------------------------------------------------------------- other targets


def test_another_target_may_be_asked_for(folder: Path, tmp_path: Path) -> None:
    as_eager = skipstone.load(saved("plain", "onnxruntime", folder), "eager")
    assert type(as_eager.session) is EagerSession
    assert_same(cases.results(as_eager), cases.results(cases.executable("plain", "eager")))
    cases.odd().save(tmp_path / "odd")
    as_onnx: Any = skipstone.load(tmp_path / "odd", "onnxruntime", threads=1)
    assert type(as_onnx.session) is OnnxSession and as_onnx.report.target == "onnxruntime"
    found, wanted = (each(**cases.odd_inputs())["turned"] for each in (as_onnx, cases.odd()))
    assert (found - wanted).abs().max() <= 1e-5 * (wanted.max() - wanted.min())


@pytest.mark.usefixtures("uncompiled")
def test_gates_become_kernels_on_the_gpu_target(folder: Path) -> None:
    new = skipstone.load(saved("adaptive", "eager", folder), "triton")
    assert code(new.program) == code(cases.executable("adaptive", "triton").program)


ARGUMENTS = [
    None, True, 3, -1.5, math.inf, -math.inf, math.nan, "tanh", [1, [2.0]], (1, (None,)), slice(1, None, 2),
    torch.bfloat16, torch.bool, torch.strided, torch.preserve_format, torch.channels_last, torch.device("cpu"),
    Kind.CAUSAL,
]  # fmt: skip


@pytest.mark.parametrize("value", ARGUMENTS, ids=str)
def test_arguments_come_back(value: Any) -> None:
    found = _from_data(json.loads(json.dumps(_to_data(value, CPU), allow_nan=False)), {}, CPU)
    assert repr(found) == repr(str(value) if isinstance(value, Kind) else value)


def test_devices_are_the_programs_own_or_named() -> None:
    meta = torch.device("meta")
    assert _from_data(_to_data(CPU, CPU), {}, meta) == meta
    assert _from_data(_to_data(CPU, meta), {}, meta) == CPU


class Counted(nn.Module):
    """Makes a tensor of its own, on a device that it names."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, WIDTH]."""
        return x + torch.arange(x.shape[1], device="cpu").view(-1, 1) + self.offset

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.ones(1))


def test_a_program_moves_to_another_device() -> None:
    inputs = {"x": cases.odd_inputs()["x"]}
    program = optimize_function(Counted().eval(), target="eager", example_inputs=inputs, progress=False).program
    meta = torch.device("meta")
    tensors = {name: tensor.to(meta) for name, tensor in program.tensors().items()}
    moved = program_from_data(program_to_data(program), tensors, Sizes(sizes_of([program])), meta)
    assert {node.meta["val"].device for node in moved.nodes() if isinstance(node.meta["val"], Tensor)} == {meta}
    assert moved.source == replace(program.source, device=meta)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_artifact_needs_a_gpu_or_another_target(folder: Path) -> None:
    directory = saved("plain", "triton", folder)
    with pytest.raises(Unsupported, match=r"triton target without a CUDA device.*target='onnxruntime'"):
        skipstone.load(directory)
    with pytest.raises(Unsupported, match="triton target for a model on cpu"):
        skipstone.load(directory, device="cpu")
    with pytest.raises(Unsupported, match="eager target without a CUDA device"):
        skipstone.load(directory, "eager", device="cuda")
    assert_same(cases.results(skipstone.load(directory, "eager")), cases.results(cases.executable("plain", "eager")))


def test_a_target_that_cannot_is_refused(folder: Path) -> None:
    with pytest.raises(Unsupported, match="cache format fp8_token"):
        skipstone.load(saved("by_token", "eager", folder), "onnxruntime")


# ------------------------------------------------------------------------------------------------- what is in the files


def test_changes_made_later_do_not_matter(tmp_path: Path) -> None:
    opt: Any = optimize_function(cases.Odd().eval(), target="eager", example_inputs=cases.odd_inputs(), progress=False)
    wanted = opt(**cases.odd_inputs())["turned"].clone()
    opt.save(tmp_path / "saved")
    for tensor in opt.program.tensors().values():
        tensor.data.zero_()
    new: Any = skipstone.load(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved")
    assert torch.equal(new(**cases.odd_inputs())["turned"], wanted) and wanted.any()


def test_nothing_is_pickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directories = [saved("quantized", "onnxruntime", folder), saved("by_prompt", "eager", folder)]
    for file in (file for directory in directories for file in directory.rglob("*")):
        assert file.suffix in (".json", ".safetensors", ".onnx")
        assert file.read_bytes()[:2] not in (b"PK", *(bytes([0x80, version]) for version in range(2, 6)))

    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("something was unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    for directory in directories:
        skipstone.load(directory)


_ELSEWHERE = """
import sys, torch, skipstone
torch.set_num_threads(1)  # as the test: sums of more threads have another order
inputs = torch.load(sys.argv[1], weights_only=True)
found = [skipstone.load(sys.argv[2])(**inputs)["turned"]]
language_model = skipstone.load(sys.argv[3])
found.append(language_model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False))
assert type(language_model.config).__name__ == "PreTrainedConfig" and language_model.config.own_field == 7
assert not [name for name in sys.modules if name.startswith("tests")]
torch.save(found, sys.argv[4])
"""


def test_a_process_without_the_models_code_loads_it(tmp_path: Path) -> None:
    class OwnConfig(type(cases.model("llama").config)):  # type: ignore[misc]
        model_type = "of_a_remote_repository"

    language_model: Any = cases.executable("plain", "eager")
    own = OwnConfig(**{**language_model.config.to_dict(), "model_type": OwnConfig.model_type}, own_field=7)
    other = skipstone.Executable(language_model.session, config=own, output_adapter=language_model.output_adapter)
    other.save(tmp_path / "language_model")
    cases.odd().save(tmp_path / "odd")
    torch.save(cases.odd_inputs(), tmp_path / "inputs")
    paths = [str(tmp_path / name) for name in ("inputs", "odd", "language_model", "found")]
    subprocess.run([sys.executable, "-c", _ELSEWHERE, *paths], cwd=tmp_path, check=True)
    turned, tokens = torch.load(tmp_path / "found", weights_only=True)
    assert torch.equal(turned, cases.odd()(**cases.odd_inputs())["turned"])
    assert torch.equal(tokens, language_model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False))


# -------------------------------------------------------------------------------------------------------------- tensors


@cache
def bases() -> list[Tensor]:
    torch.manual_seed(0)
    numbers = torch.randn(12, dtype=torch.complex64), torch.randn(12, dtype=torch.complex128)
    return [torch.randn(24), torch.arange(24), torch.randn(24).to(torch.bfloat16), *numbers]


VIEWS = {
    "all": lambda x: x,
    "matrix": lambda x: x.view(4, -1),
    "rows": lambda x: x.view(4, -1)[1:3],
    "turned": lambda x: x.view(4, -1).t(),
    "column": lambda x: x.view(4, -1)[:, 1],
    "spread": lambda x: x[5].expand(3, 2),
    "one": lambda x: x[3],
    "none": lambda x: x[7:7],
    "head": lambda x: x[:3],
    "tail": lambda x: x[9:],
    "numpy": lambda x: torch.from_numpy(x.view(torch.uint8).numpy())[8:40],
    "bytes": lambda x: x.view(torch.uint8)[5:11],
}


@settings(deadline=None, max_examples=60)
@example(picks=[(2, "bytes"), (2, "one")])  # of different dtypes, and the first begins where the other could not
@example(picks=[(2, "bytes"), (2, "head")])
@example(picks=[(3, "numpy"), (3, "spread")])  # side by side in one storage
@given(picks=st.lists(st.tuples(st.integers(0, 4), st.sampled_from(sorted(VIEWS))), max_size=7))
def test_any_views_come_back_and_share_what_they_shared(
    tmp_path_factory: pytest.TempPathFactory, picks: list[tuple[int, str]]
) -> None:
    tensors = {f"t{number}": VIEWS[name](bases()[base]) for number, (base, name) in enumerate(picks)}
    path = tmp_path_factory.mktemp("views") / "weights.safetensors"
    places = weights.write(tensors, path)
    found = weights.read(path, places, CPU)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].stride() == tensor.stride()
        assert torch.equal(found[name], tensor)
    for one in tensors:
        for other in tensors:
            if reached(tensors[one]) & reached(tensors[other]):
                assert distance(found, one, other) == distance(tensors, one, other)
    data = path.read_bytes()
    assert len(data) - 8 - int.from_bytes(data[:8], "little") <= sum(base.nbytes for base in bases())


def reached(tensor: Tensor) -> set[int]:
    """The addresses of the elements of a tensor."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets.unsqueeze(1) + torch.arange(size) * stride).flatten()
    return {tensor.data_ptr() + int(each) * tensor.element_size() for each in offsets}


def distance(tensors: Mapping[str, Tensor], one: str, other: str) -> int:
    return tensors[one].data_ptr() - tensors[other].data_ptr()


def test_tensors_that_are_conjugates_or_negatives_come_back(tmp_path: Path) -> None:
    base = torch.randn(4, dtype=torch.complex64)
    tensors = {"conjugate": base.conj(), "negative": base.conj().imag, "plain": base}
    places = weights.write(tensors, tmp_path / "w")
    for name, tensor in weights.read(tmp_path / "w", places, CPU).items():
        assert torch.equal(tensor, tensors[name])


def test_memory_that_overlaps_in_part_is_refused(tmp_path: Path) -> None:
    memory = numpy.zeros(12, dtype=numpy.float32)
    tensors = {"first": torch.from_numpy(memory[:8]), "second": torch.from_numpy(memory[4:])}
    with pytest.raises(Unsupported, match="memory that overlaps in part"):
        weights.write(tensors, tmp_path / "w")


def test_tensors_are_aligned(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.randn(5), "c": torch.randn(7, dtype=torch.float64)}
    places = weights.write(tensors, tmp_path / "w")
    assert all(each.data_ptr() % 64 == 0 for each in weights.read(tmp_path / "w", places, CPU).values())
