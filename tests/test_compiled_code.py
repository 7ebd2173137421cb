"""Compiled code in artifacts: it computes what the model does, and is opened only with consent and where it fits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.exc import InductorError
from torch.utils import cpp_extension
from transformers import LlamaConfig, LlamaForCausalLM

import skipstone
from skipstone.errors import ArtifactError, InternalError, InvalidInput, Unsupported
from skipstone.runtime.artifact import kernels as artifact_kernels
from skipstone.runtime.artifact import packages
from skipstone.runtime.artifact.artifact import PROGRAM
from skipstone.runtime.artifact.packages import machine
from skipstone.runtime.triton import compiled, package
from tests import artifact_cases as cases
from tests import models
from tests.test_artifact_refusals import change, sign

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
LONGEST, BATCH = 700, 2


@cache
def model(device: str = "cpu") -> Any:
    """Its embeddings alone are larger than all compiled code."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30_011, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LONGEST, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(device)


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> Iterator[None]:
    """The CUDA target on a CPU, whose Inductor takes less time for the code around its kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules["skipstone.optimize"].DEVICES, "triton", "cpu")
        patch.setattr(torch._inductor.config.aot_inductor, "compile_wrapper_opt_level", "O0")
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with code for two sequences, and prompts of several."""
    directory = tmp_path_factory.mktemp("compiled") / "saved"
    skipstone.optimize(model(), target="triton", progress=False).save(directory, compiled_for=[BATCH])
    return directory


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "artifact"))


@pytest.fixture(scope="module")
def loaded(original: Path) -> Any:
    """The original, with consent."""
    return skipstone.load(original, native_code=True)


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is opened."""

    def refuse(*_arguments: Any) -> None:
        raise AssertionError("a package was opened")

    monkeypatch.setattr(package, "Package", refuse)
    monkeypatch.setattr(compiled, "Package", refuse)
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", refuse)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is compiled is not, and runs as it is."""
    monkeypatch.setattr(compiled.torch, "compile", lambda module, **_options: module)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be compiled."""
    monkeypatch.setattr(compiled.torch, "compile", None)


def prompt(batch: int, length: int) -> Tensor:
    """Tokens [batch, length], others for each length."""
    return torch.randint(3, model().config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


def inputs_of(opt: Any, graph: str) -> list[Tensor]:
    """Inputs that there is code for."""
    inputs: list[Tensor] = opt.session.example_inputs(graph, BATCH)
    return inputs


def assert_close(given: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Equal but for so much of the range."""
    assert given.shape == wanted.shape
    assert (given - wanted).abs().max() <= tolerance * (wanted.max() - wanted.min())


# ----------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("length", [2, 7, 40, 253])
def test_nothing_is_compiled_for_prompts_and_steps_of_any_length(loaded: Any, length: int) -> None:
    ids, more = prompt(BATCH, length), prompt(BATCH, 6)
    with torch.no_grad():
        wanted = model()(torch.cat([ids, more], dim=1)).logits
    logits, kept = loaded.prefill(ids)
    before = kept.capacity
    assert_close(logits, wanted[:, length - 1])
    for column in range(6):
        assert_close(loaded.decode(more[:, column], kept), wanted[:, length + column])
    if length == 253:
        kept.grow(before + 256)
        assert_close(loaded.decode(more[:, 0], kept), model()(torch.cat([ids, more, more[:, :1]], dim=1)).logits[:, -1])


@pytest.mark.usefixtures("no_compiler")
def test_prompts_of_other_batches_and_padding_have_the_same_code(loaded: Any) -> None:
    ids, mask = prompt(5, 11), torch.ones(5, 11, dtype=torch.int64)
    mask[1, :4] = 0
    logits, _ = loaded.prefill(ids, mask)
    assert_close(
        logits, model()(ids).logits[:, -1].where(torch.arange(5).unsqueeze(1) != 1, model()(ids[1:2, 4:]).logits[:, -1])
    )


@pytest.mark.usefixtures("uncompiled")
def test_other_batches_are_compiled_as_ever(loaded: Any) -> None:
    for batch in (1, 3):
        ids = prompt(batch, 5)
        options = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(loaded.generate(ids, **options), model().generate(ids, **options))


def test_weights_are_nowhere_but_in_the_program(original: Path, loaded: Any) -> None:
    weights = model().model.embed_tokens.weight
    files = sorted(original.glob("*.pt2"))
    assert len(files) == 2 and sum(file.stat().st_size for file in files) < weights.nbytes
    rows = [weights[row].detach().numpy().tobytes() for row in (1, 7, 30_010)]
    for file in files:
        with zipfile.ZipFile(file) as archive:
            held = [archive.read(name) for name in archive.namelist()]
        assert any(each.startswith(b"\x7fELF") for each in held)
        assert not any(each.startswith((b"\x80", b"PK")) for each in held), "something is pickled"
        assert not any(row in each for row in rows for each in held)
    own = {tensor.data_ptr() for tensor in loaded.program.tensors().values()}
    for graph in loaded.session.graphs.values():
        for each in graph._compiled.values():
            if isinstance(each, package.Package):
                assert {tensor.data_ptr() for tensor in each._tensors} <= own and each._loader.get_constant_fqns() == []


@pytest.mark.usefixtures("no_compiler")
def test_inputs_may_lie_in_memory_as_they_like(loaded: Any) -> None:
    inputs = [torch.randn(each.shape) if each.is_floating_point() else each for each in inputs_of(loaded, "whole")]
    inputs[0] = prompt(1, inputs[0].shape[1])
    inputs[0] = inputs[0].expand(BATCH, -1)
    names = [port.name for port in loaded.program.inputs]
    wanted = loaded.session.run(dict(zip(names, [each.contiguous() for each in inputs], strict=True)))
    turned = [each.mT.contiguous().mT if each.dim() == 4 else each for each in inputs]
    found = loaded.session.run(dict(zip(names, turned, strict=True)))
    assert all(torch.equal(found[name], each) for name, each in wanted.items())


def test_inputs_of_another_dtype_are_a_defect(loaded: Any) -> None:
    inputs = inputs_of(loaded, "single")
    (each,) = [
        found for found in loaded.session.graphs["single"]._compiled.values() if isinstance(found, package.Package)
    ]
    with pytest.raises(InternalError, match="float16"):
        each(*inputs[:-1], inputs[-1].half())


_ELSEWHERE = """
import sys, torch, skipstone, skipstone.optimize
device, directory, given, found = sys.argv[1:]
torch.set_num_threads(1)
sys.modules["skipstone.optimize"].DEVICES["triton"] = device
torch.compile = None
captured, launched = [], []
if device == "cuda":
    import triton
    triton.knobs.compilation.listener = lambda **about: launched.append((about["src"].name, about["cache_hit"]))

class Graph(torch.cuda.graph):
    def __enter__(self):
        captured.append(self)
        super().__enter__()

torch.cuda.graph = Graph
opt = skipstone.load(directory, native_code=True)
ids = torch.load(given, weights_only=True).to(device)
logits, kept = opt.prefill(ids)
outs = [logits, *[opt.decode(ids[:, column], kept).clone() for column in range(3)]]
outs.append(opt.generate(ids, max_new_tokens=8, do_sample=False))
assert (captured and launched) or device == "cpu"
assert all(was_there for _, was_there in launched), launched
assert not [name for name in sys.modules if name.startswith("tests") or "modeling_llama" in name]
torch.save([each.cpu() for each in outs], found)
"""


def elsewhere(directory: Path, ids: Tensor, folder: Path, device: str) -> list[Tensor]:
    """What a process without a C++ compiler and the model's code finds: logits of a prompt and of steps, and a text."""
    torch.save(ids, folder / "given")
    paths = [str(directory), str(folder / "given"), str(folder / "found")]
    environment = {**os.environ, "CXX": "/nowhere/c++", "PYTHONPATH": str(ROOT)}
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    subprocess.run([sys.executable, "-c", _ELSEWHERE, device, *paths], cwd=folder, check=True, env=environment)
    found: list[Tensor] = torch.load(folder / "found", weights_only=True)
    return found


def check_elsewhere(directory: Path, folder: Path, device: str, tolerance: float) -> None:
    ids = prompt(BATCH, 9)
    *found, text = elsewhere(directory, ids, folder, device)
    there = ids.to(device)
    with torch.no_grad():
        wanted = model(device)(torch.cat([there, there[:, :3]], dim=1)).logits[:, 8:].cpu()
    for column, logits in enumerate(found):
        assert_close(logits, wanted[:, column], tolerance)
    assert torch.equal(text, model(device).generate(there, max_new_tokens=8, do_sample=False).cpu())


def test_a_process_without_a_compiler_and_the_models_code_runs_it(original: Path, tmp_path: Path) -> None:
    check_elsewhere(original, tmp_path, "cpu", 1e-5)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpp_extension.CUDA_HOME is None:  # PyTorch's own wheels bring the headers
        import nvidia

        homes = [path.parent.parent for base in nvidia.__path__ for path in Path(base).glob("*/include/cuda.h")]
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(homes[0]))
    monkeypatch.setitem(sys.modules["skipstone.optimize"].DEVICES, "triton", "cuda")
    opt = skipstone.optimize(model("cuda"), target="triton", progress=False)
    opt.save(tmp_path / "saved", compiled_for=[BATCH])
    check_elsewhere(tmp_path / "saved", tmp_path, "cuda", 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["experts", "quantized", "by_token", "adaptive", "parallel", "by_prompt"])
def test_every_kind_of_program_comes_back(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opt: Any = cases.executable(case, "triton")
    opt.save(tmp_path / "saved", compiled_for=[1, BATCH])
    new: Any = skipstone.load(tmp_path / "saved", native_code=True)
    reference: Any = skipstone.load(tmp_path / "saved", target="eager")
    monkeypatch.setattr(compiled.torch, "compile", None)
    for batch in (1, BATCH):
        ids = models.tokens(batch, 9)
        if case == "by_prompt":  # both go on with the same program
            ids = ids[:1].expand(batch, -1)
        (mine, kept), (wanted, other) = new.prefill(ids), reference.prefill(ids)
        assert_close(mine, wanted)
        for seed in range(3):
            tokens = models.tokens(batch, 1, seed)[:, 0]
            assert_close(new.decode(tokens, kept), reference.decode(tokens, other))


# -------------------------------------------------------------------------------------------------------------- consent


@pytest.mark.usefixtures("unopened", "uncompiled")
def test_without_consent_the_program_is_compiled_as_ever(original: Path) -> None:
    ids = prompt(BATCH, 5)
    for target in (None, "eager"):
        logits, _ = skipstone.load(original, target).prefill(ids)
        assert_close(logits, model()(ids).logits[:, -1])


@pytest.mark.usefixtures("unopened")
def test_consent_to_what_is_not_there_is_refused(original: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="for target='triton' alone"):
        skipstone.load(original, "eager", native_code=True)
    cases.executable("plain", "triton").save(tmp_path / "saved")
    with pytest.raises(InvalidInput, match="saved with compiled_for alone"):
        skipstone.load(tmp_path / "saved", native_code=True)


# ------------------------------------------------------------------------------------------------------------- refusals


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize("consent", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "checksum differs"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes instead of"),
        (lambda file: file.unlink(), "is missing"),
    ],
    ids=["changed", "truncated", "missing"],
)
def test_damage_is_found_before_anything_is_opened(
    artifact: Path, damage: Callable[[Path], Any], message: str, consent: bool
) -> None:
    damage(artifact / "code-1.pt2")
    with pytest.raises(ArtifactError, match=message):
        skipstone.load(artifact, native_code=consent)


def test_what_is_no_package_is_refused(artifact: Path) -> None:
    file = artifact / "code-0.pt2"
    file.write_bytes(file.read_bytes()[:-1000])
    sign(artifact)
    with pytest.raises(ArtifactError, match=r"Cannot read .*code-0\.pt2"):
        skipstone.load(artifact, native_code=True)


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize(
    ("change_of_machine", "message"),
    [
        ({"torch": "2.4.0"}, r"for torch 2\.4\.0, here is 2\."),
        ({"skipstone": "0.0.1"}, r"for skipstone 0\.0\.1, here is"),
        ({"platform": "darwin"}, "for the platform darwin, here is"),
        ({"processor": "riscv64"}, "for processors of type riscv64, here is"),
        ({"device": "cuda", "capability": [9, 0]}, "for the device cuda, here is cpu"),
        ({"triton": "3.4.0"}, r"for Triton 3\.4\.0, here is None"),
        ({"capability": [8, 0]}, r"for compute capability 8\.0, here is None"),
        ({"instructions": ["avx1024", *machine(torch.device("cpu"))["instructions"]]}, "not here: avx1024"),
    ],
    ids=str,
)
def test_code_for_something_else_is_refused(artifact: Path, change_of_machine: Mapping[str, Any], message: str) -> None:
    change(artifact, PROGRAM, lambda data: data["compiled"]["made_for"].update(change_of_machine))
    with pytest.raises(ArtifactError, match=message):
        skipstone.load(artifact, native_code=True)


def test_a_processor_may_have_more_instructions(artifact: Path) -> None:
    change(artifact, PROGRAM, lambda data: data["compiled"]["made_for"]["instructions"].pop())
    skipstone.load(artifact, native_code=True)


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 0, 1), (1, 2, 0), (1, 1, 3)], ids=str)
def test_code_of_another_program_is_refused(artifact: Path, place: tuple[int, int, int]) -> None:
    part, row, column = place

    def edit(data: Any) -> None:
        data["compiled"]["packages"][0]["signature"][part][row][column] = "another"

    change(artifact, PROGRAM, edit)
    with pytest.raises(ArtifactError, match="compiled code of another program"):
        skipstone.load(artifact, native_code=True)


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that were put where Triton finds them."""
    binaries = pytest.importorskip("skipstone.kernels.binaries", reason="needs the extra `triton`")
    found: list[Any] = []
    monkeypatch.setattr(binaries, "restore", found.append)
    return found


@pytest.fixture
def with_kernels(restored: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact whose sessions launched two kernels when they rehearsed, as on a GPU."""
    from skipstone.kernels.binaries import Binary

    monkeypatch.setattr(compiled.CompiledGraph, "write_package", lambda *given: given[-1].write_bytes(b""))
    found = [Binary(f"{number:064x}", "multiply", bytes([number]) * 5, b"{}") for number in range(2)]
    monkeypatch.setattr(artifact_kernels, "launched", lambda _rehearse, _device: found)
    cases.executable("plain", "triton").save(tmp_path / "kernels", compiled_for=[BATCH])
    return tmp_path / "kernels"


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages are not opened."""
    monkeypatch.setattr(compiled.CompiledGraph, "open_package", lambda *_given: None)


@pytest.mark.usefixtures("unpacked")
def test_kernels_come_back_with_consent_alone(with_kernels: Path, restored: list[Any]) -> None:
    skipstone.load(with_kernels)
    skipstone.load(with_kernels, target="eager")
    assert not restored
    skipstone.load(with_kernels, native_code=True)
    assert [(each.hash, each.name, each.code, each.about) for each in restored] == [
        ("0" * 64, "multiply", bytes([0] * 5), b"{}"),
        ("0" * 63 + "1", "multiply", bytes([1] * 5), b"{}"),
    ]


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize(
    "entry",
    [{"hash": "../" * 21 + "a"}, {"name": "../multiply"}, {"hash": 7}, {"code": "/etc/passwd"}, {"about": "code"}],
    ids=str,
)
def test_kernels_that_are_none_are_refused_before_any_is_there(
    with_kernels: Path, restored: list[Any], entry: dict[str, Any]
) -> None:
    change(with_kernels, PROGRAM, lambda data: data["compiled"]["kernels"][1].update(entry))
    with pytest.raises(ArtifactError):
        skipstone.load(with_kernels, native_code=True)
    assert not restored


@pytest.mark.usefixtures("no_compiler")
def test_what_is_rehearsed_is_what_the_packages_hold(
    original: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and steps of several sizes, through packages and nothing else, and not those of the session itself."""
    sizes: list[tuple[int, ...]] = []
    real = package.Package.__call__

    def call(self: Any, *inputs: Tensor) -> Any:
        sizes.append(tuple(inputs[0].shape))
        return real(self, *inputs)

    monkeypatch.setattr(package.Package, "__call__", call)
    before = [dict(graph._compiled) for graph in loaded.session.graphs.values()]
    listed = json.loads((original / PROGRAM).read_text())["compiled"]["packages"]
    packages._rehearse([loaded.session], listed, [BATCH], original)
    assert sizes == [(BATCH, columns) for columns in (32, 33, 512, 513)] + [(BATCH, 1)] * 8
    assert [graph._compiled for graph in loaded.session.graphs.values()] == before


def edit_entry(**changes: Any) -> Callable[[Any], None]:
    return lambda data: data["compiled"]["packages"][0].update(changes)


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize(
    "edit",
    [
        edit_entry(file="../code-0.pt2"),
        edit_entry(file="/etc/passwd"),
        edit_entry(program=7),
        edit_entry(graph="third"),
        lambda data: data["compiled"].pop("made_for"),
        lambda data: data["compiled"].pop("packages"),
        lambda data: data["compiled"].pop("kernels"),
        lambda data: data["compiled"]["packages"][0].pop("file"),
        lambda data: data.update(compiled=3),
    ],
)
def test_nonsense_is_refused(artifact: Path, edit: Callable[[Any], Any]) -> None:
    change(artifact, PROGRAM, edit)
    with pytest.raises(ArtifactError):
        skipstone.load(artifact, native_code=True)


@pytest.mark.parametrize("batches", [[0], [-1], [1, 2.0], [True], ["1"], 1], ids=str)
def test_only_numbers_of_sequences_are_taken(batches: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"compiled_for (has|is)"):
        cases.executable("plain", "triton").save(tmp_path / "saved", compiled_for=batches)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("case", "target", "message"),
    [("plain", "eager", "another target"), ("odd", "triton", "without tokens and their cache")],
)
def test_what_has_no_compiled_code_is_refused(case: str, target: str, message: str, tmp_path: Path) -> None:
    opt: Any = cases.odd(target) if case == "odd" else cases.executable(case, target)
    with pytest.raises(Unsupported, match=message):
        opt.save(tmp_path / "saved", compiled_for=[1])
    assert not (tmp_path / "saved").exists()


def test_what_cannot_be_compiled_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise InductorError(RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(Unsupported, match=r"ahead of time \(.*no C\+\+ compiler\)"):
        cases.executable("plain", "triton").save(tmp_path / "saved", compiled_for=[1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("case", "batches", "wanted"),
    [
        ("plain", [2, 3, 2], [(0, "whole", 2), (0, "single", 2), (0, "single", 3)]),
        ("plain", [1, 4], [(0, "whole", 1), (0, "whole", 4), (0, "single", 1), (0, "single", 4)]),
        ("by_prompt", [3], [(0, "whole", 3), (1, "single", 3), (2, "single", 3)]),
    ],
)
def test_no_code_is_made_twice(
    case: str, batches: list[int], wanted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def write(_self: Any, inputs: Any, path: Path) -> None:
        made.append(len(inputs[0]))
        path.write_bytes(b"")

    monkeypatch.setattr(compiled.CompiledGraph, "write_package", write)
    cases.executable(case, "triton").save(tmp_path / "saved", compiled_for=batches)
    listed = json.loads((tmp_path / "saved" / PROGRAM).read_text())["compiled"]["packages"]
    found = [(each["program"], each["graph"], batch) for each, batch in zip(listed, made, strict=True)]
    assert found == wanted and len({each["file"] for each in listed}) == len(listed)
