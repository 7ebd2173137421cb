"""Plans: what may stand in them, and that a file gives back what was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipstone.ir.errors import ArtifactError, InvalidPlan
from skipstone.passes.cleanup import Cleanup
from skipstone.passes.quantize_kv import FormatChoice, QuantizeKV
from skipstone.passes.skip_sublayers import SkipSublayers
from skipstone.plan import Plan

INDICES = st.lists(st.integers(0, 2**40), unique=True, max_size=6).map(tuple)
ENTRY = st.builds(
    SkipSublayers,
    attention=INDICES,
    ffn=INDICES,
    layers=INDICES,
    paths=st.lists(st.text(max_size=12), unique=True, max_size=4).map(tuple),
)


@given(entries=st.lists(ENTRY, max_size=1), model=st.none() | st.text(max_size=64))
def test_json_gives_back_the_plan(entries, model):
    plan = Plan(entries, model)
    assert Plan.from_json(plan.to_json()) == plan
    assert hash(Plan.from_json(plan.to_json())) == hash(plan)


@given(st.text())
def test_any_text_is_a_plan_or_an_invalid_plan(text):
    with pytest.raises(InvalidPlan):
        Plan.from_json(text)


@given(st.integers(0, 400))
def test_a_truncated_plan_is_refused(length):
    text = Plan([SkipSublayers(layers=(1, 2))]).to_json().rstrip()
    if length < len(text):
        with pytest.raises(InvalidPlan, match="not JSON"):
            Plan.from_json(text[:length])


def test_the_form_of_the_file():
    plan = Plan([SkipSublayers(attention=(1,), paths=("model.layers.3.mlp",))], model="abc")
    fields = {"attention": [1], "ffn": [], "layers": [], "paths": ["model.layers.3.mlp"]}
    assert json.loads(plan.to_json()) == {
        "format": "skipstone.plan",
        "version": 1,
        "model": "abc",
        "entries": [{"pass": "skip_sublayers", "version": 1, **fields}],
    }


def test_a_plan_is_a_value():
    entry = SkipSublayers(layers=(3,))
    assert list(Plan([entry])) == [entry]
    assert Plan([entry]) == Plan((entry,)) != Plan()
    assert len(Plan()) == 0
    assert Plan([SkipSublayers(layers=[3])]) == Plan([entry]), "lists become tuples"
    with pytest.raises(AttributeError):
        Plan().model = "other"


def test_fields_that_are_left_out_keep_their_defaults():
    assert Plan.from_json(_file({"layers": [2]})) == Plan([SkipSublayers(layers=(2,))])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": [1]}, "Did you mean 'layers'"),
        ({"colour": [1]}, "Known: attention, ffn, layers, paths"),
        ({"layers": 1}, "must be a list, not 1"),
        ({"layers": "12"}, "must be a list"),
        ({"layers": ["1"]}, r"layers\[0\] must be int, not '1'"),
        ({"layers": [1.0]}, "must be int"),
        ({"layers": [True]}, "must be int"),
        ({"layers": [None]}, "must be int"),
        ({"paths": [1]}, "must be str"),
        ({"ffn": [2, 1, 2]}, "2 is given twice"),
        ({"paths": ["a", "a"]}, "'a' is given twice"),
        ({"attention": [0, -1]}, "index -1 is negative"),
        ({"version": 2}, "version 2 is newer than 1"),
        ({"version": "1"}, "version must be a positive integer"),
        ({"version": 0}, "version must be a positive integer"),
        ({"pass": "skip_sublayer"}, "Did you mean 'skip_sublayers'"),
        ({"pass": None}, "does not say which pass"),
    ],
)
def test_a_wrong_entry_is_refused(fields, message):
    with pytest.raises(InvalidPlan, match=message):
        Plan.from_json(_file(fields))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format is 'other'"),
        ({"version": 2}, "newer"),
        ({"version": True}, "positive integer"),
        ({"entries": {}}, "must be a list"),
        ({"entries": [1]}, "entry 0 is not a JSON object"),
        ({"model": 5}, "model must be str"),
        ({"entrys": []}, "Did you mean 'entries'"),
    ],
)
def test_a_wrong_head_is_refused(changes, message):
    with pytest.raises(InvalidPlan, match=message):
        Plan.from_json(json.dumps(json.loads(_file({})) | changes))


@pytest.mark.parametrize("text", ["", "[]", "null", "1", '"plan"', "[" * 100_000, "NaN", '{"a": NaN}', b"\xff\xfe\x00"])
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(InvalidPlan):
        Plan.from_json(text)


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(InvalidPlan, match="'layers' stands there twice"):
        Plan.from_json(_file({"layers": [1]}).replace('"layers": [1]', '"layers": [1], "layers": [2]'))


def test_entries_are_checked_when_a_plan_is_made():
    with pytest.raises(InvalidPlan, match="negative"):
        Plan([SkipSublayers(layers=(-1,))])
    with pytest.raises(InvalidPlan, match="twice"):
        Plan([SkipSublayers(layers=(1, 1))])
    with pytest.raises(InvalidPlan, match="cannot hold"):
        Plan([Cleanup()])
    with pytest.raises(InvalidPlan, match="cannot hold"):
        Plan(["skip_sublayers"])
    with pytest.raises(InvalidPlan, match="takes a list"):
        Plan(SkipSublayers(layers=(1,)))
    with pytest.raises(InvalidPlan, match="model must be str"):
        Plan([], model=3)


def test_a_pass_stands_once():
    with pytest.raises(InvalidPlan, match="skip_sublayers stands twice"):
        Plan([SkipSublayers(layers=(1,)), SkipSublayers(layers=(2,))])


def test_passes_stand_in_the_order_in_which_they_run(monkeypatch):
    class Later(SkipSublayers):
        name = "later"

    monkeypatch.setattr("skipstone.plan.ENTRIES", (SkipSublayers, Later))
    assert len(Plan([SkipSublayers(), Later()])) == 2
    with pytest.raises(InvalidPlan, match=r"skip_sublayers stands after later.*order is: skip_sublayers, later"):
        Plan([Later(), SkipSublayers()])


def test_a_file_gives_back_the_plan(tmp_path: Path):
    path = tmp_path / "plan.json"
    plan = Plan([SkipSublayers(ffn=(0, 5))], model="f00")
    Plan().save(path)
    plan.save(path)
    assert Plan.load(path) == plan
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"], "no temporary file stays behind"


def test_errors_name_the_file(tmp_path: Path):
    path = tmp_path / "broken.json"
    path.write_text('{"format": "skipstone.plan"')
    with pytest.raises(InvalidPlan, match=r"broken\.json is not JSON"):
        Plan.load(path)
    with pytest.raises(InvalidPlan, match=r"absent\.json: No such file"):
        Plan.load(tmp_path / "absent.json")
    with pytest.raises(ArtifactError, match="No such file"):
        Plan().save(tmp_path / "absent" / "plan.json")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "plan.json"
    Plan(model="old").save(path)

    def fail(*_paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(ArtifactError, match="No space left"):
        Plan(model="new").save(path)
    assert Plan.load(path).model == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]


def _file(fields: dict) -> str:
    entry = {"pass": "skip_sublayers", "version": 1} | fields
    return json.dumps({"format": "skipstone.plan", "version": 1, "model": None, "entries": [entry]})


# Tensors

QUANTIZED = Plan(
    [QuantizeKV(k="int4", choices=(FormatChoice((1, 2), heads=(0,), k="int8"),))],
    tensors={"quantize_kv/a/key/minimum": torch.arange(6.0).reshape(2, 3)},
)


def test_a_file_gives_back_the_tensors(tmp_path: Path):
    QUANTIZED.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == QUANTIZED
    assert again.tensors.keys() == QUANTIZED.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in QUANTIZED.tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]


def test_a_plan_without_tensors_reads_none(tmp_path: Path):
    (tmp_path / "plan.safetensors").write_bytes(b"of another plan")
    Plan([SkipSublayers(layers=(1,))]).save(tmp_path / "plan.json")
    assert not Plan.load(tmp_path / "plan.json").tensors


def _missing(path: Path):
    path.unlink()


def _tampered(path: Path):
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def _truncated(path: Path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "message"), [(_missing, "are missing"), (_tampered, "not the one"), (_truncated, "not the one")]
)
def test_damaged_tensors_are_refused(tmp_path: Path, damage, message: str):
    QUANTIZED.save(tmp_path / "plan.json")
    damage(tmp_path / "plan.safetensors")
    with pytest.raises(InvalidPlan, match=message):
        Plan.load(tmp_path / "plan.json")


def test_a_digest_over_no_safetensors_is_refused(tmp_path: Path):
    QUANTIZED.save(tmp_path / "plan.json")
    content = b"no tensors at all"
    (tmp_path / "plan.safetensors").write_bytes(content)
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"tensors": hashlib.sha256(content).hexdigest()}))
    with pytest.raises(InvalidPlan, match="is damaged"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_is_not_called_like_its_tensors(tmp_path: Path):
    with pytest.raises(ArtifactError, match="cannot be called"):
        QUANTIZED.save(tmp_path / "plan.safetensors")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": "row"}, "granularity must be one of 'channel', 'token', 'group'"),
        ({"choices": [{"heads": [1]}]}, "field 'layers' is missing"),
        ({"choices": [{"layers": [1], "format": "int8"}]}, "'format' is unknown"),
        ({"residual": 1.5}, "residual must be int"),
        ({"layers": [-1]}, "layers"),
    ],
)
def test_settings_of_the_wrong_type_are_refused(fields, message: str):
    entry = {"pass": "quantize_kv", "version": 1, **fields}
    with pytest.raises(InvalidPlan, match=message):
        Plan.from_json(json.dumps({"format": "skipstone.plan", "version": 1, "entries": [entry]}))
