"""Generation with a draft on every target, and in artifacts."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import skipstone
from skipstone import QuantizeKV, QuantizeWeights, SelfSpeculate
from skipstone.errors import ArtifactError
from skipstone.ir.dialect import GATE, PREDICATED_LINEAR
from skipstone.ir.program import Program
from skipstone.ir.verify import verify
from skipstone.passes.base import Pass
from skipstone.runtime.artifact import store
from skipstone.runtime.artifact.artifact import PROGRAM
from skipstone.runtime.onnx import session as onnx_session
from skipstone.runtime.speculate import DraftCache, SpeculativeSession
from skipstone.runtime.triton import compiled
from skipstone.runtime.triton import session as triton_session
from tests import speculation_cases as cases
from tests.speculation_cases import CASES, FAIR, FUSED, LONG, built, counted, plain, prompt
from tests.versions import skip_without_group_query_attention

pytestmark = pytest.mark.usefixtures("one_thread")

QUANTIZED = QuantizeKV("int8", "int8", granularity="channel", condition=False)
PLANS: dict[str, tuple[Pass, ...]] = {
    "fair": (FAIR,),
    "fused": (FUSED,),
    "weights": (SelfSpeculate(weights=QuantizeWeights(4, activations="int8")),),
    "quantized": (QUANTIZED, FUSED),
}


def on(target: str, plan: str) -> Any:
    if plan == "quantized" and target == "onnxruntime":
        skip_without_group_query_attention()
    return built(PLANS[plan], dtype=torch.float32, target=target)


def assert_same(opt: Any) -> None:
    """Twice, what is generated without the draft, in fewer steps."""
    for batch in (prompt(7), prompt(3, 8)):
        wanted = plain(opt).generate(**batch, **LONG)
        for _ in range(2):
            with counted(opt) as found:
                assert torch.equal(opt.generate(**batch, **LONG), wanted)
            assert 1 + found[0] + found[2] == LONG["max_new_tokens"] and found[2] > 0


# --------------------------------------------------------------------------------------------------------- ONNX Runtime


@pytest.mark.parametrize(
    "plan", ["fair", *(pytest.param(each, marks=pytest.mark.slow) for each in ("weights", "fused", "quantized"))]
)
def test_onnxruntime_writes_what_it_writes_without_a_draft(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = on("onnxruntime", plan)
    monkeypatch.delattr(onnx_session.OnnxSession, "__init__")  # nothing is lowered once more
    assert_same(opt)
    if plan != "quantized":
        batch = prompt(3, 8)
        assert torch.equal(opt.generate(**batch, **LONG), on("eager", "fair").generate(**batch, **LONG))


# --------------------------------------------------------------------------------------------------------------- Triton


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run lowered graphs as they are, without Inductor."""
    monkeypatch.setattr(compiled.torch, "compile", lambda module, **_options: module)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("plan", ["fair", "fused", pytest.param("quantized", marks=pytest.mark.slow)])
def test_triton_writes_what_it_writes_without_a_draft(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, made = on("triton", plan), []
    if plan == "fair":
        assert_same(opt)
        assert torch.equal(opt.generate(**prompt(3, 8), **LONG), on("eager", "fair").generate(**prompt(3, 8), **LONG))
    steps = triton_session.GreedySteps
    monkeypatch.setattr(triton_session, "GreedySteps", lambda *args: (made.append(args), steps(*args))[1])
    first = opt.generate(**prompt(1, 9, 4), **LONG)
    assert made, "a batch of another size has steps of its own"
    made.clear()
    for _ in range(2):
        assert torch.equal(opt.generate(**prompt(1, 9, 4), **LONG), first)
        assert not made, "steps were recorded anew over the same buffers"
    assert torch.equal(plain(opt).generate(**prompt(1, 9, 4), **LONG), first)


@pytest.mark.usefixtures("uncompiled")
def test_steps_of_a_draft_are_those_over_the_same_buffers() -> None:
    session = on("triton", "fused").session
    one, other = session.new_cache(2, 20), session.new_cache(2, 20)
    drafts = [DraftCache(session, cache).kv for cache in (one, other, one, other)]
    for name in session.sources:
        places = [each.buffers[name].data_ptr() for each in drafts]
        assert places[:2] == places[2:] and places[0] != places[1]
    assert drafts[0].lease.storage is drafts[2].lease.storage is not drafts[1].lease.storage
    one.grow(600)
    grown = DraftCache(session, one).kv
    assert grown.capacity == 600 and grown.lease.storage is not drafts[0].lease.storage
    assert all(buffer.shape[2] == 600 for buffer in grown.buffers.values())


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("plan", ["fused", pytest.param("quantized", marks=pytest.mark.slow)])
def test_a_draft_reads_the_verified_rows(plan: str) -> None:
    """Also behind a crop, and in buffers that have grown. Here the model writes in place, and few rows are copied."""
    opt, session = on("triton", plan), on("triton", plan).session
    _, cache = opt.prefill(**prompt(3, 8))
    draft, seen = DraftCache(session, cache), set()
    for columns, kept in ((4, 1), (3, 3), (5, 2), (9, 2), (4, 4)):
        before, old = cache.lengths, draft
        if columns == 9:
            cache.grow(cache.capacity + 1)
        if not draft.is_of(cache):
            draft = DraftCache(session, cache)
        seen.add(draft is old)
        draft.follow(cache)
        for name, sources in session.sources.items():
            both = torch.cat([cache.buffers[each] for each in sources], dim=1)
            for row, length in enumerate(cache.lengths.tolist()):
                assert torch.equal(draft.kv.buffers[name][row, :, :length], both[row, :, :length])
        assert draft.kv.capacity == cache.capacity and torch.equal(draft.kv.lengths, cache.lengths)
        for _ in range(columns - 1):  # guesses, which are written behind
            one, row = torch.ones_like(cache.lengths), torch.zeros(2, 1, dtype=torch.int64)
            session.draft.step(prompt(1, 1)["input_ids"], draft.kv.lengths.unsqueeze(1), one, row, draft.kv)
            draft.kv.advance(one)
        opt.decode(torch.randint(3, cases.VOCABULARY, (2, columns)), cache)
        cache.crop(before + kept)
    assert seen == {True, False}


@pytest.mark.slow
def test_inductor_writes_what_the_eager_target_does() -> None:
    torch._dynamo.reset()
    for plan in ("fair", "fused"):
        opt = cases.Executable(cases.lower(cases.program(PLANS[plan], dtype=torch.float32, target="triton"), "triton"))
        given = opt.generate(**prompt(3, 8), **LONG)
        assert torch.equal(given, on("eager", "fair").generate(**prompt(3, 8), **LONG))
        assert torch.equal(opt.generate(**prompt(3, 8), **LONG), given)


# ------------------------------------------------------------------------------------------------------------ artifacts


def opened(directory: Path, target: str | None = None) -> Any:
    """What `load` makes of an artifact with a draft."""
    opt = skipstone.load(directory, target, threads=1)
    assert isinstance(opt.session, SpeculativeSession)
    return opt


SAVED = [
    ("onnxruntime", "fair", "eager"),
    *(
        pytest.param(*each, marks=pytest.mark.slow) for each in (
            ("eager", "fused", "eager"),
            ("eager", "fused", "onnxruntime"), ("onnxruntime", "fused", "eager"), ("onnxruntime", "weights", "eager"),
            ("eager", "quantized", "onnxruntime"), ("onnxruntime", "quantized", "onnxruntime"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("target", "plan", "other"), SAVED)
def test_artifacts_generate_as_before(target: str, plan: str, other: str, tmp_path: Path) -> None:
    opt, batch = on(target, plan), prompt(3, 8)
    opt.save(tmp_path / "saved")
    with counted(opt) as wanted_counts:
        wanted = opt.generate(**batch, **LONG)
    again = opened(tmp_path / "saved")
    assert (again.session.tokens, again.session.sources) == (opt.session.tokens, opt.session.sources)
    with counted(again) as found:
        assert torch.equal(again.generate(**batch, **LONG), wanted)
    assert found == wanted_counts
    lowered = opened(tmp_path / "saved", other)
    if plan != "quantized":  # single codes are rounded the other way
        assert torch.equal(lowered.generate(**batch, **LONG), wanted)
    lowered.save(tmp_path / "again")
    assert torch.equal(opened(tmp_path / "again").generate(**batch, **LONG), lowered.generate(**batch, **LONG))


def test_loading_for_triton_predicates_the_draft_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opt = built(CASES["adaptive"])
    opt.save(tmp_path / "saved")
    seen: list[Program] = []

    def stop(program: Program, *_: Any) -> Any:
        seen.append(program)
        raise InterruptedError

    monkeypatch.setattr("skipstone.artifact.resolve", lambda target, _device: target)
    monkeypatch.setattr("skipstone.artifact._device", lambda *_: torch.device("cpu"))
    monkeypatch.setattr("skipstone.artifact.lower", stop)
    with pytest.raises(InterruptedError):
        skipstone.load(tmp_path / "saved", "triton")
    (program,) = seen
    assert program.draft is not None and not any(True for _ in program.nodes(GATE, PREDICATED_LINEAR))
    kinds = {node.target for node in program.draft.program.nodes(GATE, PREDICATED_LINEAR)}
    assert kinds == {PREDICATED_LINEAR}
    verify(program)
    verify(program.draft.program)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("speculation") / "saved"
    on("eager", "fused").save(directory)
    return directory


def change(directory: Path, name: str, edit: Callable[[Any], Any]) -> None:
    """Edit a JSON file, and make the checksums right."""
    data = json.loads((directory / name).read_text())
    edit(data)
    (directory / name).write_text(json.dumps(data))
    if name != store.MANIFEST:
        content = (directory / name).read_bytes()
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        change(directory, store.MANIFEST, lambda manifest: manifest["files"].update({name: entry}))


def test_what_an_artifact_says_of_a_draft(saved: Path) -> None:
    draft = json.loads((saved / PROGRAM).read_text())["draft"]
    assert draft["tokens"] == 3
    assert draft["buffers"] == {
        f"{kind}_{number}": [f"{kind}_{source}" for source in sources]
        for number, sources in enumerate([[0], [1], [2, 3]])
        for kind in ("key", "value")
    }


@pytest.mark.parametrize(
    "edit",
    [
        lambda draft: draft["buffers"].pop("key_1"),
        lambda draft: draft["buffers"].update(key_1=["key_9"]),
        lambda draft: draft["buffers"].update(key_2=["key_2"]),
        lambda draft: draft["buffers"].update(key_1="key_1"),
        lambda draft: draft.update(buffers=[]),
        lambda draft: draft.pop("tokens"),
        *(lambda draft, tokens=tokens: draft.update(tokens=tokens) for tokens in (0, 32, "4")),
        *(
            pytest.param(edit, marks=pytest.mark.slow)
            for edit in (
                lambda draft: draft["buffers"].update(key_1=[]),
                lambda draft: draft["buffers"].update(key_2=["key_2", "key_3", "key_1"]),
                lambda draft: draft["buffers"].update(key_1=5),
                lambda draft: draft.pop("buffers"),
                *(lambda draft, tokens=tokens: draft.update(tokens=tokens) for tokens in (-1, 1.5, True, None)),
            )
        ),
    ],
)
def test_damaged_drafts_are_refused(saved: Path, tmp_path: Path, edit: Callable[[Any], Any]) -> None:
    shutil.copytree(saved, tmp_path / "damaged")
    change(tmp_path / "damaged", PROGRAM, lambda data: edit(data["draft"]))
    with pytest.raises(ArtifactError):
        skipstone.load(tmp_path / "damaged")


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_programs_is_refused(saved: Path, tmp_path: Path, count: int) -> None:
    shutil.copytree(saved, tmp_path / "damaged")
    change(tmp_path / "damaged", PROGRAM, lambda data: data.update(programs=(data["programs"] * 2)[:count]))
    with pytest.raises(ArtifactError):
        skipstone.load(tmp_path / "damaged")


def test_the_first_version_had_no_drafts(tmp_path: Path) -> None:
    opt, batch = plain(on("eager", "fair")), prompt(3, 8)
    opt.save(tmp_path / "saved")
    wanted = opt.generate(**batch, **LONG)
    change(tmp_path / "saved", PROGRAM, lambda data: data.pop("draft"))
    change(tmp_path / "saved", store.MANIFEST, lambda manifest: manifest.update(version=1))
    again: Any = skipstone.load(tmp_path / "saved")
    assert again.speculation is None
    assert torch.equal(again.generate(**batch, **LONG), wanted)
