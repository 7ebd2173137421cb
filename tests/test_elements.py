"""Element types and packing: every code, every tie, against ml_dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from skipstone.ir.elements import E2M1, E4M3, INT4, Float, decode_e8m0, encode_e8m0, pack, unpack
from tests.numpy_formats import E2M1_VALUES, E4M3_VALUES, nearest

FLOATS = pytest.mark.parametrize(("element", "numpy_type"), [(E2M1, E2M1_VALUES), (E4M3, E4M3_VALUES)])


@FLOATS
def test_every_code_of_a_float_type(element: Float, numpy_type: Any) -> None:
    codes = np.arange(2 * element.sign, dtype=np.uint8)
    expected = codes.view(numpy_type).astype(np.float32)
    stored = torch.from_numpy(codes)
    stored = pack(stored) if element.packed else stored
    values = element.decode(stored, len(codes), torch.float32)
    np.testing.assert_array_equal(values.numpy(), expected)
    np.testing.assert_array_equal(
        np.signbit(values.numpy())[~np.isnan(expected)], np.signbit(expected)[~np.isnan(expected)]
    )
    numbers = values.isfinite()
    again = element.encode(values)
    again = unpack(again, len(codes)) if element.packed else again
    assert torch.equal(again[numbers], torch.from_numpy(codes)[numbers])
    assert element.decode(element.encode(torch.tensor([torch.nan, 1.0])), 2, torch.float32).tolist() == pytest.approx(
        [torch.nan if element.nan else 0.0, 1.0], nan_ok=True
    )


@FLOATS
@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_rounding_to_a_float_type(element: Float, numpy_type: Any, real: Any) -> None:
    values = np.arange(element.sign - (element.nan > 0), dtype=np.uint8).view(numpy_type).astype(real)
    ties = (values[1:] + values[:-1]) / 2
    random = np.random.default_rng(0)
    x = random.normal(size=20_000) * 10.0 ** random.uniform(-6, 4, 20_000)
    x = np.concatenate([values, ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf), x, [1e-45, 1e-40, np.inf]])
    x = np.concatenate([x, -x]).astype(real)
    codes = element.encode(torch.from_numpy(x))
    codes = unpack(codes, len(x)) if element.packed else codes
    np.testing.assert_array_equal(codes.numpy(), nearest(x, numpy_type))
    if real is np.float32:  # ml_dtypes rounds float64 to float32 first
        expected = np.clip(x, element.low, element.high).astype(numpy_type).view(np.uint8)
        np.testing.assert_array_equal(codes.numpy(), expected)


def test_ties_of_e2m1() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    assert torch.equal(E2M1.decode(E2M1.encode(x), 8, torch.float32), expected)
    assert torch.equal(E2M1.decode(E2M1.encode(-x), 8, torch.float32), -expected)


def test_every_code_of_e8m0() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(decode_e8m0(torch.from_numpy(codes)).numpy(), expected)
    exponents = torch.arange(-200, 200, dtype=torch.int32)
    np.testing.assert_array_equal(encode_e8m0(exponents).numpy(), (exponents.numpy() + 127).clip(0, 255))


def test_every_pair_of_nibbles() -> None:
    codes = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    packed = pack(codes)
    assert packed.shape == (256, 1) and len(packed.unique()) == 256
    assert all(byte == low + 16 * high for (low, high), byte in zip(codes.tolist(), packed[:, 0].tolist(), strict=True))
    assert torch.equal(unpack(packed, 2), codes)
    values = E2M1.decode(packed, 2, torch.float32).numpy()
    np.testing.assert_array_equal(values, codes.numpy().view(E2M1_VALUES).astype(np.float32))
    assert torch.equal(INT4.decode(packed, 2, torch.float32), codes.float() - 8)


@pytest.mark.parametrize("width", [1, 5, 33, 63, 127, 64, 80, 96, 128, 192, 256])
def test_packing_is_undone(width: int) -> None:
    codes = torch.randint(0, 16, (2, 3, 5, width), dtype=torch.uint8)
    packed = pack(codes, fill=8)
    assert packed.shape == (2, 3, 5, -(-width // 2)) and torch.equal(unpack(packed, width), codes)
    if width % 2:
        assert (packed[..., -1] >> 4 == 8).all()
