"""The KV cache's buffers and lengths."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from skipstone.ir.errors import ArtifactError, InvalidInput
from skipstone.ir.quantized import cache_format
from skipstone.runtime.cache import CacheBuffer, KVCache


def layout(name: str, heads: int, width: int, dtype: torch.dtype, form: str = "full", **kept) -> list[CacheBuffer]:
    """The buffers of one half of a slot."""
    held = cache_format(form, **kept)
    parts = held.parts(width, dtype)
    return [CacheBuffer(f"{name}_{part.name}".removesuffix("_codes"), heads, part, held) for part in parts]


PLAIN = (
    *layout("key_0", 2, 8, torch.float32), *layout("value_0", 2, 8, torch.float32),
    *layout("key_1", 1, 4, torch.bfloat16), *layout("value_1", 1, 6, torch.bfloat16),
)  # fmt: skip


def filled(batch: int = 3, capacity: int = 5) -> KVCache:
    cache = KVCache.allocate(PLAIN, batch, capacity, "cpu")
    for tensor in cache.buffers.values():
        tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
    cache.lengths = torch.tensor([5, 2, 4])[:batch].clone()
    return cache


def test_allocate():
    cache = KVCache.allocate(PLAIN, 3, 5, torch.device("cpu"))
    shapes = {"key_0": (3, 2, 5, 8), "value_0": (3, 2, 5, 8), "key_1": (3, 1, 5, 4), "value_1": (3, 1, 5, 6)}
    assert {name: tuple(tensor.shape) for name, tensor in cache.buffers.items()} == shapes
    assert cache.buffers["key_1"].dtype == torch.bfloat16
    assert (cache.batch, cache.capacity, cache.lengths.tolist()) == (3, 5, [0, 0, 0])
    assert cache.nbytes == 3 * 5 * sum(each.token_bytes for each in PLAIN) == 3 * 5 * (128 + 20)
    assert all(not tensor.any() and tensor.is_contiguous() for tensor in cache.buffers.values())


def test_growing_keeps_rows_and_clears_the_rest():
    cache, before = filled(), filled()
    cache.grow(9)
    assert cache.capacity == 9
    assert (
        torch.equal(cache.buffers["key_0"][:, :, :5], before.buffers["key_0"])
        and not cache.buffers["key_0"][:, :, 5:].any()
    )
    assert (
        torch.equal(cache.buffers["value_1"][:, :, :5], before.buffers["value_1"])
        and not cache.buffers["value_1"][:, :, 5:].any()
    )
    assert cache.lengths.tolist() == [5, 2, 4]
    buffer = cache.buffers["key_0"]
    cache.grow(9)
    assert cache.buffers["key_0"] is buffer


@pytest.mark.parametrize(("lengths", "expected"), [(2, [2, 2, 2]), ([5, 0, 1], [5, 0, 1])])
def test_cropping_changes_lengths_only(lengths, expected):
    cache = filled()
    buffer, content = cache.buffers["key_0"], cache.buffers["key_0"].clone()
    cache.crop(torch.tensor(lengths) if isinstance(lengths, list) else lengths)
    assert cache.lengths.tolist() == expected
    assert cache.buffers["key_0"] is buffer and torch.equal(buffer, content)


def test_select_reorder_and_repeat():
    cache, before = filled(), filled()
    cache.reorder(torch.tensor([2, 2, 0]))
    assert cache.lengths.tolist() == [4, 4, 5]
    assert torch.equal(cache.buffers["value_1"], before.buffers["value_1"][[2, 2, 0]])
    cache.select([1])
    assert cache.batch == 1 and cache.lengths.tolist() == [4]
    cache.repeat(2)
    assert cache.lengths.tolist() == [4, 4]
    assert (
        torch.equal(cache.buffers["key_0"], before.buffers["key_0"][[2, 2]]) and cache.buffers["key_0"].is_contiguous()
    )


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda c: c.grow(4), "cannot grow to 4"),
        (lambda c: c.crop(3), "can be cropped to a shorter length"),
        (lambda c: c.crop(-1), "crop to -1"),
        (lambda c: c.crop(torch.tensor([1, 1])), "has 3 sequences"),
        (lambda c: c.select([3]), "cache with 3"),
        (lambda c: c.select([-1]), "cache with 3"),
        (lambda c: c.select([]), "list of indices"),
        (lambda c: c.reorder([0]), "1 indices"),
        (lambda c: c.repeat(0), "0 times"),
        (lambda c: KVCache.allocate([], 1, 1), "at least one slot"),
        (lambda c: KVCache.allocate(PLAIN, 1, 0), "holds nothing"),
    ],
)
def test_what_cannot_be_is_refused(action, message):
    with pytest.raises(InvalidInput, match=message):
        action(filled())


# Files

QUANTIZED = (
    *layout("key_0", 2, 8, torch.float32, "kivi4:4", residual=3, first=2),
    *layout("value_0", 2, 8, torch.float32, "int8_token", residual=3, first=2),
)


def random(capacity: int = 20) -> KVCache:
    cache = KVCache.allocate(QUANTIZED, 2, capacity)
    for tensor in cache.buffers.values():
        tensor.copy_(torch.randint(0, 100, tensor.shape))
    cache.advance(torch.tensor([13, 7]))
    return cache


def test_only_what_grows_with_the_sequence_grows():
    cache, before = random(10), random(10)
    cache.grow(21)
    rows = {name: tensor.shape[2] for name, tensor in cache.buffers.items()}
    ring = cache_format("kivi4:4", 3, 2).ring_rows
    assert rows["key_0"] == rows["value_0"] == rows["value_0_scale"] == 21
    assert rows["key_0_scale"] == rows["key_0_offset"] == 6
    assert (rows["key_0_recent"], rows["key_0_first"]) == (ring, 2)
    assert cache.buffers["key_0_recent"].shape == before.buffers["key_0_recent"].shape


def test_a_file_gives_back_the_valid_rows(tmp_path):
    cache = random()
    cache.save(tmp_path / "cache")
    again = KVCache.load(tmp_path / "cache", QUANTIZED)
    assert again.lengths.tolist() == [13, 7] and again.capacity == 13
    for name, tensor in again.buffers.items():
        assert torch.equal(tensor, cache.buffers[name][:, :, : tensor.shape[2]])
    assert again.buffers["key_0_scale"].shape[2] == 4
    again.crop(torch.tensor([9, 7]))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_files_that_are_no_cache_of_this_program_are_refused(tmp_path):
    path = tmp_path / "cache"
    with pytest.raises(ArtifactError, match="Cannot read"):
        KVCache.load(path, QUANTIZED)
    random().save(path)
    with pytest.raises(ArtifactError, match="of another program"):
        KVCache.load(path, PLAIN)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 97):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArtifactError):
            KVCache.load(path, QUANTIZED)
    save_file({"lengths": torch.zeros(2)}, path)
    with pytest.raises(ArtifactError, match="not a cache of this version"):
        KVCache.load(path, QUANTIZED)
    with pytest.raises(ArtifactError, match="Cannot write"):
        random().save(tmp_path / "no" / "cache")


def test_a_file_with_missing_or_impossible_tensors_is_refused(tmp_path):
    random().save(tmp_path / "cache")
    with safe_open(tmp_path / "cache", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    damaged = [
        {name: tensor for name, tensor in tensors.items() if name != "key_0_scale"},
        tensors | {"lengths": torch.tensor([13, -1])},
        tensors | {"lengths": torch.tensor([13.0, 7.0])},
        tensors | {"reached": torch.tensor([1, 1])},
        tensors | {"key_0": tensors["key_0"].short()},
    ]
    for each in damaged:
        save_file(each, tmp_path / "damaged", metadata=metadata)
        with pytest.raises(ArtifactError, match="damaged"):
            KVCache.load(tmp_path / "damaged", QUANTIZED)
