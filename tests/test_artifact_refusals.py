"""What is refused when artifacts are written and read, and that nothing in them runs as code."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import skipstone
from skipstone.errors import ArtifactError, InvalidInput, SkipstoneError, Unsupported, UserError
from skipstone.plan import Plan
from skipstone.runtime.artifact import store, weights
from skipstone.runtime.artifact.operators import FUNCTIONS, function_of, name_of
from tests import artifact_cases as cases

pytestmark = pytest.mark.usefixtures("one_thread")

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pickle.find_class")
"""Events that loading an artifact never causes; nor does it open files for writing."""

_watched: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event in FORBIDDEN:
        _watched.append(event)
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        _watched.append(f"writes {arguments[0]}")


sys.addaudithook(_audit)


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Fail where something is run or written inside."""
    global _watched
    _watched = []
    try:
        yield
        assert _watched == []
    finally:
        _watched = None


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Small artifacts by target."""
    folder = tmp_path_factory.mktemp("originals")
    for target in ("eager", "onnxruntime"):
        cases.odd(target).save(folder / target)
    return {target: folder / target for target in ("eager", "onnxruntime")}


@pytest.fixture
def artifact(originals: Mapping[str, Path], tmp_path: Path) -> Path:
    """A copy of the eager one, to be damaged."""
    shutil.copytree(originals["eager"], tmp_path / "artifact")
    return tmp_path / "artifact"


@pytest.fixture
def with_onnx(originals: Mapping[str, Path], tmp_path: Path) -> Path:
    """A copy of that of ONNX Runtime."""
    shutil.copytree(originals["onnxruntime"], tmp_path / "artifact")
    return tmp_path / "artifact"


def sign(directory: Path) -> None:
    """Make sizes and checksums those of the files that are there now, as someone could who means harm."""
    manifest = json.loads((directory / store.MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        content = (directory / name).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (directory / store.MANIFEST).write_text(json.dumps(manifest))


def change(directory: Path, name: str, edit: Callable[[Any], Any]) -> None:
    """Edit a JSON file, and sign."""
    data = json.loads((directory / name).read_text())
    edit(data)
    (directory / name).write_text(json.dumps(data))
    if name != store.MANIFEST:
        sign(directory)


def refused(directory: Path, message: str, target: str | None = None, kind: type = ArtifactError) -> None:
    with nothing_runs(), pytest.raises(kind, match=message):
        skipstone.load(directory, target)


# -------------------------------------------------------------------------------------------------------------- files


def test_copies_load(artifact: Path) -> None:
    sign(artifact)
    with nothing_runs():
        skipstone.load(artifact)
        skipstone.load(str(artifact), "eager", device="cpu")


@pytest.mark.parametrize("name", ["program.json", "weights.safetensors", "plan.json", "report.json"])
def test_a_file_that_changed_is_refused(artifact: Path, name: str) -> None:
    file = artifact / name
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    refused(artifact, rf"{name} has {len(content) - 1} bytes instead of {len(content)}\. Was it copied")
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(artifact, f"{name} is not the file that was saved: its checksum differs")
    file.unlink()
    refused(artifact, f"{name} is missing")


def test_files_that_were_swapped_are_refused(artifact: Path) -> None:
    (artifact / "plan.json").rename(artifact / "other")
    (artifact / "report.json").rename(artifact / "plan.json")
    (artifact / "other").rename(artifact / "report.json")
    refused(artifact, "plan.json has .* bytes instead of")
    sign(artifact)
    refused(artifact, "plan.json is not a plan|Cannot read .*report.json", kind=SkipstoneError)


def test_what_is_no_artifact_is_refused(artifact: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "There is no directory .*nowhere")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is no artifact: it has no skipstone.json")
    refused(artifact / "plan.json", "There is no directory")
    (artifact / store.MANIFEST).write_text("{")
    refused(artifact, "Cannot read .*skipstone.json: JSONDecodeError")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(format="skipstone.plan"), "is no artifact: its format is 'skipstone.plan'"),
        (
            lambda data: data.update(version=3, written_by={"skipstone": "9.1"}),
            r"is of version 3, newer than 2\. Update to skipstone 9\.1",
        ),
        (lambda data: data.update(version=True), "version must be a positive integer, not True"),
        (lambda data: data.update(version=0), "version must be a positive integer, not 0"),
        (lambda data: data.update(files=3), ": TypeError"),
        (lambda data: data.pop("files"), ": KeyError: 'files'"),
        (lambda data: data["files"].pop("program.json"), "has no program.json. Is the artifact complete"),
        (lambda data: data["files"].pop("weights.safetensors"), "has no weights.safetensors"),
        (lambda data: data["files"]["plan.json"].update(bytes=-1), "instead of -1"),
        (lambda data: data["files"]["plan.json"].update(sha256=None), "checksum differs"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(artifact: Path, edit: Callable[[Any], Any], message: str) -> None:
    change(artifact, store.MANIFEST, edit)
    refused(artifact, message)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "sub/../../outside", ".", "..", "", ".hidden", "sub//file", "a\\b", "a\n"]
)
def test_names_that_lead_outside_are_refused(artifact: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_text("secret")
    change(artifact, store.MANIFEST, lambda data: data["files"].update({name: {"bytes": 6, "sha256": ""}}))
    refused(artifact, "which is no name of a file inside it")


def test_links_are_refused(artifact: Path, tmp_path: Path) -> None:
    shutil.copy(artifact / "report.json", tmp_path / "report.json")
    for target in (tmp_path / "report.json", artifact / "copy.json"):
        shutil.copy(tmp_path / "report.json", artifact / "copy.json")
        (artifact / "report.json").unlink()
        (artifact / "report.json").symlink_to(target)
        refused(artifact, "report.json is a link. Artifacts hold plain files only")
    (artifact / "report.json").unlink()
    (artifact / "report.json").symlink_to("report.json")
    refused(artifact, "Cannot read .*skipstone.json|is a link")


def test_a_manifest_or_folder_that_is_a_link_is_refused(artifact: Path, tmp_path: Path) -> None:
    change(
        artifact, store.MANIFEST, lambda data: data["files"].update({"sub/report.json": data["files"]["report.json"]})
    )
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(artifact / "report.json", tmp_path / "elsewhere" / "report.json")
    (artifact / "sub").symlink_to(tmp_path / "elsewhere")
    refused(artifact, "sub/report.json is a link")
    (artifact / store.MANIFEST).rename(tmp_path / "manifest")
    (artifact / store.MANIFEST).symlink_to(tmp_path / "manifest")
    refused(artifact, "skipstone.json is a link")


def test_a_link_to_the_directory_is_followed(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(artifact)
    skipstone.load(tmp_path / "link")


def test_what_is_no_plain_file_is_refused(artifact: Path) -> None:
    (artifact / "report.json").unlink()
    os.mkfifo(artifact / "report.json")
    refused(artifact, "report.json is no plain file")
    (artifact / "report.json").unlink()
    (artifact / "report.json").mkdir()
    refused(artifact, "report.json is no plain file")


def test_json_without_measure_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for depth in (80, 100_000):
        (artifact / "report.json").write_text("[" * depth + "]" * depth)
        sign(artifact)
        refused(artifact, "nested deeper than 64 levels|RecursionError")
    monkeypatch.setattr(store, "JSON_BYTES", 400)
    refused(artifact, "skipstone.json is larger than 400 bytes")


def test_a_request_that_cannot_be_is_refused(artifact: Path) -> None:
    with pytest.raises(UserError, match="unknown target 'tensorrt'"):
        skipstone.load(artifact, "tensorrt")
    with pytest.raises(InvalidInput, match="'toaster' is no device"):
        skipstone.load(artifact, device="toaster")
    change(artifact, "program.json", lambda data: data.update(target="tensorrt"))
    with pytest.raises(UserError, match="unknown target 'tensorrt'"):
        skipstone.load(artifact)


# ----------------------------------------------------------------------------------------------------------- programs

PAYLOAD = "x): __import__('os').system('touch ran')  #"

DEAD = {"name": "dead", "call": "aten.neg.default", "args": [{"node": "x"}], "path": ""}


def first(data: Any, key: str) -> Any:
    """The first node of the program that has this key."""
    return next(each for each in data["programs"][0]["nodes"] if key in each)


def place(data: Any) -> Any:
    """Where the first tensor, a matrix, lies."""
    return next(each for each in data["tensors"].values() if len(each["shape"]) == 2)


def replaced_call(name: str, *args: Any) -> Callable[[Any], None]:
    return lambda data: first(data, "call").update(call=name, args=list(args), kwargs={})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (replaced_call("os.system", "touch ran"), "os.system is no operator that an artifact may use"),
        (replaced_call("builtins.eval", "1"), "builtins.eval is no operator"),
        (replaced_call("aten.from_file.default", "/etc/hostname"), "aten.from_file.default is no operator"),
        (replaced_call("aten.save.default", 1, "ran"), "aten.save.default is no operator"),
        (replaced_call("aten.warn.default", "ran"), "aten.warn.default is no operator"),
        (replaced_call("aten._print.default", "ran"), "aten._print.default is no operator"),
        (replaced_call("aten.add_.Tensor", {"node": "x"}, 1), "aten.add_.Tensor is no operator"),
        (replaced_call("aten.as_strided.default", {"node": "x"}, [1], [1], 10**9), "damaged"),
        (replaced_call("operator.mul", [0], 10**12), "called on something else than numbers"),
        (replaced_call("operator.mul", 10**18, 10**18), "a number is too large"),
        (replaced_call("operator.add", 10**30, 1), "a number is too large"),
        (replaced_call("operator.add", {"node": "x"}, 1), "called on something else than numbers"),
        (replaced_call("aten.neg.default", {"node": "nothing"}), ": KeyError: 'nothing'"),
        (replaced_call("aten.neg.default", {"node": "x", "tuple": []}), ": ValueError"),
        (replaced_call("aten.neg.default", {"class": "x"}), ": KeyError: 'class'"),
        (lambda data: first(data, "call").update(name=PAYLOAD), "is no plain name"),
        (lambda data: first(data, "call").update(name="x"), "two nodes have the name x"),
        (lambda data: first(data, "call").update(kwargs={PAYLOAD: 1}), "is no plain name"),
        (lambda data: first(data, "call").update(path="x\nimport os"), "is no path of a module"),
        (lambda data: first(data, "call").update(made_by=[PAYLOAD]), "is no path of a module or name of a pass"),
        (lambda data: first(data, "call").update(layer="1"), "'1' is no integer"),
        (lambda data: first(data, "tensor").update(tensor="__class__"), ": KeyError|no name of a tensor"),
        (lambda data: data["programs"][0]["inputs"][0].update(name=PAYLOAD), "is no plain name"),
        (lambda data: data["programs"][0]["inputs"][0].update(name="lambda"), "'lambda' is no plain name"),
        (lambda data: data["programs"][0]["inputs"][0].update(role="tokens"), ": invariant 3 does not hold"),
        (lambda data: data["programs"][0]["inputs"][0].update(shape=["s", 6]), ": KeyError: 's'"),
        (lambda data: data["programs"][0]["nodes"].append(DEAD), "invariant 7 does not hold"),
        (lambda data: data["programs"][0].update(structure={"set": [0]}), ": KeyError: 'set'"),
        (lambda data: data["programs"].clear(), ": IndexError"),
        (lambda data: data["sizes"].update({name: 1 for name in data["sizes"]}), "1 is no example of a size"),
        (lambda data: data["sizes"].update({name: 10**20 for name in data["sizes"]}), "no example of a size"),
        (lambda data: data.update(threads=-1), ": ValueError: -1 is no number of threads"),
        (lambda data: data["tensors"].popitem(), ": KeyError"),
        (lambda data: place(data).update(offset=10**9), "Cannot read .*weights.safetensors: .*damaged"),
        (lambda data: place(data).update(offset=-4), "Cannot read .*weights.safetensors: .*damaged"),
        (lambda data: place(data).update(stride=[-1, 1]), "Cannot read .*weights.safetensors: .*damaged"),
        (lambda data: place(data).update(shape=[10**6, 10**6]), "Cannot read .*weights.safetensors: .*damaged"),
        (lambda data: place(data).update(span="other"), "Cannot read .*weights.safetensors: .*damaged"),
        (lambda data: place(data).update(dtype="Tensor"), ": KeyError: 'Tensor'"),
    ],
)  # fmt: skip
def test_a_program_that_may_not_be_is_refused(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[Any], Any], message: str
) -> None:
    monkeypatch.chdir(artifact.parent)
    change(artifact, "program.json", edit)
    refused(artifact, message)
    assert not Path("ran").exists()


def test_no_text_of_a_program_becomes_code(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(artifact.parent)
    original = json.loads((artifact / "program.json").read_text())
    places = list(strings(original))
    assert len(places) > 60
    for payload in (PAYLOAD, "x\n    __import__('os').system('touch ran')\n"):
        for *way, last in places:
            data = json.loads(json.dumps(original))
            owner = data
            for key in way:
                owner = owner[key]
            owner[last] = payload
            (artifact / "program.json").write_text(json.dumps(data))
            sign(artifact)
            with nothing_runs(), suppress(SkipstoneError):
                skipstone.load(artifact)(**cases.odd_inputs())
    assert not Path("ran").exists()


def strings(data: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all texts."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        if isinstance(value, str):
            yield (*way, key)
        yield from strings(value, (*way, key))


def test_every_function_has_its_name() -> None:
    for name, function in FUNCTIONS.items():
        assert function_of(name) is function and name_of(function) == name
    for overload in (torch.ops.aten.linear.default, torch.ops.aten.split.Tensor, torch.ops.skipstone.attention.default):
        assert function_of(str(overload)) is overload and name_of(overload) == str(overload)
    twin = torch.ops.skipstone.quantized_cached_attention_.default
    for other in (torch.add, os.system, twin, torch.ops.aten.add_.Tensor, torch.ops.aten.from_file.default):
        assert name_of(other) is None


# --------------------------------------------------------------------------------------------------------- ONNX models


def edited(directory: Path, edit: Callable[[onnx.ModelProto], Any]) -> None:
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    edit(model)
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    sign(directory)


def elsewhere(name: str = "stolen") -> TensorProto:
    """A tensor whose values are in a file outside."""
    tensor = TensorProto(name=name, data_type=TensorProto.UINT8, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "../../etc/hostname", "offset": "0", "length": "4"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def branch(model: onnx.ModelProto) -> None:
    graph = helper.make_graph([], "branch", [], [], [elsewhere()])
    model.graph.node.add(op_type="If", input=["x"], output=["y"]).attribute.append(helper.make_attribute("then", graph))


def constant(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=elsewhere(big(model).name)))


def big(model: onnx.ModelProto) -> TensorProto:
    return next(each for each in model.graph.initializer if each.external_data)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda model: model.graph.initializer.append(elsewhere()), "'stolen' .* has its data elsewhere"),
        (lambda model: model.graph.initializer.append(elsewhere(big(model).name)), "has its data elsewhere"),
        (branch, "'stolen' .* has its data elsewhere"),
        (constant, "has its data elsewhere"),
        (
            lambda model: model.graph.sparse_initializer.add(values=elsewhere(), indices=elsewhere("i")),
            "has its data elsewhere",
        ),
        (
            lambda model: model.graph.node.add(op_type="Run", domain="my.library"),
            "has an operator my.library.Run",
        ),
        (lambda model: model.graph.node.add(op_type="EPContext", domain="com.microsoft"), "com.microsoft.EPContext"),
        (lambda model: big(model).dims.append(2), "is not what the ONNX model expects"),
        (lambda model: setattr(big(model), "data_type", TensorProto.INT64), "is not what the ONNX model expects"),
        (lambda model: model.graph.input.pop(), "has other inputs than its program"),
        (lambda model: model.graph.output.pop(), "has other outputs than its program"),
        (lambda model: model.graph.initializer.remove(big(model)), "has no external tensor"),
        (lambda model: model.graph.node.pop(), "Cannot read the ONNX model"),
        (lambda model: model.Clear(), "has no external tensor|other inputs"),
    ],
)  # fmt: skip
def test_an_onnx_model_that_may_not_be_is_refused(
    with_onnx: Path, edit: Callable[[onnx.ModelProto], Any], message: str
) -> None:
    edited(with_onnx, edit)
    refused(with_onnx, message)
    skipstone.load(with_onnx, "eager")  # which does not need it


def test_outputs_that_would_be_written_elsewhere_are_refused(with_onnx: Path) -> None:
    output = json.loads((with_onnx / "program.json").read_text())["programs"][0]["outputs"][0]["name"]
    for written in ({output: "x"}, {"nothing": "x"}):
        change(with_onnx, "program.json", lambda data, written=written: data.update(written=[written]))
        refused(with_onnx, "has other outputs than its program")
    change(with_onnx, "program.json", lambda data: data.update(written=[[]]))
    refused(with_onnx, "Cannot read .*model.onnx: AttributeError")


def test_bytes_that_are_no_onnx_model_are_refused(with_onnx: Path) -> None:
    (with_onnx / "model.onnx").write_bytes(b"\xff" * 100)
    sign(with_onnx)
    refused(with_onnx, "Cannot read .*model.onnx: DecodeError")


# ------------------------------------------------------------------------------------------------------------- writing


def test_what_is_no_tokenizer_is_refused_before_work_begins(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"the tokenizer is str\. Load it with AutoTokenizer"):
        cases.odd().save(tmp_path / "saved", tokenizer="gpt2")
    with pytest.raises(InvalidInput, match="the tokenizer is str"):
        skipstone.export_onnx(torch.nn.Identity(), tmp_path / "exported", tokenizer="gpt2")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_is_refused(tmp_path: Path) -> None:
    opt = cases.odd()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, message in (("file", "is no directory"), ("folder", "holds something else"), ("link", "is no directory")):
        for overwrite in (False, True):
            with pytest.raises(ArtifactError, match=f"{name} {message}"):
                opt.save(tmp_path / name, overwrite=overwrite)
    opt.save(tmp_path / "saved")
    with pytest.raises(ArtifactError, match=r"saved holds an artifact. Name another directory, or ask to overwrite it"):
        opt.save(tmp_path / "saved")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link", "saved"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "mine").read_text() == "mine"


def test_an_artifact_is_replaced_whole(tmp_path: Path) -> None:
    cases.odd("onnxruntime").save(tmp_path / "new" / "saved")
    cases.odd().save(tmp_path / "new" / "saved", overwrite=True)
    assert skipstone.load(tmp_path / "new" / "saved").target == "eager"
    assert os.listdir(tmp_path / "new") == ["saved"] and not (tmp_path / "new" / "saved" / "model.onnx").exists()
    (tmp_path / "empty").mkdir()
    cases.odd().save(tmp_path / "empty")
    assert skipstone.load(tmp_path / "empty").target == "eager"


class Interrupted(BaseException):
    """As KeyboardInterrupt."""


@pytest.mark.parametrize("failure", [Interrupted(), OSError(28, "No space left on device")])
@pytest.mark.parametrize(
    ("owner", "name"), [(weights, "save_file"), (Plan, "save"), (store, "_digest"), (os, "replace")]
)
def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, owner: Any, name: str
) -> None:
    cases.odd("onnxruntime").save(tmp_path / "old")
    before = {file: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    original = getattr(owner, name)

    def fail(*arguments: Any, **options: Any) -> None:
        if owner is os and Path(arguments[1]).parent != tmp_path:  # files are moved, too; the last move is meant
            return original(*arguments, **options)
        raise failure

    expected = Interrupted if isinstance(failure, Interrupted) else ArtifactError
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(expected):
            cases.odd().save(tmp_path / "saved")
        with pytest.raises(expected):
            cases.odd().save(tmp_path / "old", overwrite=True)
    assert os.listdir(tmp_path) == ["old"]
    assert {file: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before


Pair = namedtuple("Pair", "one other")


class Returns(nn.Module):
    """Returns a structure that artifacts have no form for."""

    def forward(self, x: Tensor) -> Any:
        """x: [B, S, 6]."""
        return Pair(x + 1, x * 2)


def test_what_an_artifact_cannot_hold_is_refused(tmp_path: Path) -> None:
    inputs = {"x": cases.odd_inputs()["x"]}
    opt = skipstone.optimize(Returns().eval(), target="eager", example_inputs=inputs, progress=False)
    with pytest.raises(Unsupported, match="saving outputs that are Pair"):
        opt.save(tmp_path / "saved")
    call = next(opt.program.nodes(torch.ops.aten.add.Tensor))
    call.target = torch.add
    with pytest.raises(Unsupported, match=r"saving a call of .*add"):
        opt.save(tmp_path / "saved")
    call.target, call.kwargs = torch.ops.aten.add.Tensor, {"alpha": 1j}
    with pytest.raises(Unsupported, match="saving an argument of type complex"):
        opt.save(tmp_path / "saved")
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- fuzz


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Some bytes of a file cut off, changed, or put elsewhere."""
    start, stop = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    match chance.randrange(4):
        case 0:
            return content[:start]
        case 1:
            return content[:start] + content[stop:]
        case 2:
            return content[:start] + chance.randbytes(min(stop - start, 9)) + content[start + min(stop - start, 9) :]
    return content[stop:] + content[start:stop] + content[:start]


VALUES = (
    None,
    True,
    -1,
    0,
    1,
    2**63,
    10**400,
    1.5,
    "",
    "x",
    "../x",
    PAYLOAD,
    "aten.neg.default",
    [],
    {},
    {"node": "x"},
)


def mutated(data: Any, chance: random.Random) -> Any:
    """Plain data with one value somewhere replaced, removed, or given twice."""
    if not isinstance(data, dict | list) or not data or chance.random() < 0.1:
        return chance.choice(VALUES)
    keys = list(data) if isinstance(data, dict) else range(len(data))
    key: Any = chance.choice(keys)
    copy: Any = data.copy()
    action = chance.random()
    if action < 0.06:
        del copy[key]
    elif action < 0.12:
        copy[key] = data[chance.choice(keys)]
    else:
        copy[key] = mutated(data[key], chance)
    return copy


@pytest.mark.parametrize(
    ("start", "count"), [(0, 500), pytest.param(500, 5000, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_whatever_is_in_the_files_only_typed_errors_come(
    originals: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, count: int
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = 0
    for seed in range(start, start + count):
        chance = random.Random(seed)
        artifact = tmp_path / f"{seed}"
        shutil.copytree(originals[chance.choice(["eager", "onnxruntime"])], artifact)
        files = sorted(file.name for file in artifact.iterdir())
        is_signed = chance.random() < 0.6
        name = chance.choice(["program.json"] * 4 + files if is_signed else files)
        file = artifact / name
        if chance.random() < 0.1:
            other = artifact / chance.choice(files)
            content, swapped = file.read_bytes(), other.read_bytes()
            file.write_bytes(swapped), other.write_bytes(content)
        elif name.endswith(".json") and chance.random() < 0.8:
            file.write_text(json.dumps(mutated(json.loads(file.read_text()), chance)))
        elif name != "model.onnx" or not is_signed:  # ONNX Runtime does not promise to survive any model
            file.write_bytes(damaged(file.read_bytes(), chance))
        if is_signed and name != store.MANIFEST and json_of(artifact / store.MANIFEST):
            sign(artifact)
        with nothing_runs():
            try:
                skipstone.load(artifact)
                loaded += 1
            except SkipstoneError as error:
                assert str(error), seed
        shutil.rmtree(artifact)
    assert 0 < loaded < count / 2
    assert not os.listdir(tmp_path)


def json_of(path: Path) -> bool:
    """Whether a file is a manifest still."""
    try:
        return isinstance(json.loads(path.read_bytes()), dict) and "files" in json.loads(path.read_bytes())
    except ValueError:
        return False
