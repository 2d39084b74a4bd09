"""Rounding to K types: the bytes of llama.cpp, and what the package of its authors reads from them."""

from __future__ import annotations

import hashlib
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from merganser.checkpoint.formats.gguf.encode import WRITABLE
from merganser.checkpoint.formats.gguf.k_quants import K_TYPES, quantise_k

# of what `quantize_row_*_ref` in llama.cpp's ggml-quants.c (ggml 0.25.3, x86-64) makes of `values()`
BYTES = {
    "Q2_K": "6709fbfaaf32d098",
    "Q3_K": "e334bc3165cb8662",
    "Q4_K": "2a65429bb17babf8",
    "Q5_K": "828c8c281a0bc734",
    "Q6_K": "3ee9677239043092",
}
# the root mean square of the error over that of normally distributed values; `ggml_quantize_chunk` has the same
ERRORS = {"Q2_K": 0.29678, "Q3_K": 0.15095, "Q4_K": 0.071456, "Q5_K": 0.036217, "Q6_K": 0.017754}


def values() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Blocks of many sizes, and those in which something is zero, equal, of one sign, tiny or huge."""
    draw = np.random.default_rng(0)
    # sums of whole numbers, so that no library's logarithm or sine is in them
    found = draw.integers(-1000, 1001, (4, 150, 256)).sum(axis=0).astype(np.float32)
    found *= np.exp2(draw.integers(-16, 3, (150, 1))).astype(np.float32)
    found[::5] *= np.exp2(draw.integers(-6, 4, found[::5].shape)).astype(np.float32)
    found[1] = 0
    found[2, 32:64] = 0
    found[3, :16], found[3, 16:48] = -1.5, 1.5
    found[4], found[6] = np.abs(found[4]), -np.abs(found[6])
    found[7, 64:] *= 2.0**-17
    found[8] *= 2.0**-27
    found[9], found[10] = 1e-12, 1e-20
    found[11, :200] = 0
    found[12] = np.round(found[12] / 100) * 3
    found[13] *= 2.0**6
    return found


@pytest.mark.parametrize("kind", K_TYPES)
def test_bytes_are_those_of_llama_cpp(kind: str) -> None:
    given = values()
    found = quantise_k(given, kind)
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == BYTES[kind]
    # blocks do not depend on those beside them
    assert np.array_equal(quantise_k(given[140:], kind), found.reshape(150, -1)[140:].ravel())


@pytest.mark.parametrize("kind", K_TYPES)
def test_the_package_reads_them_with_little_error(kind: str) -> None:
    given = np.random.default_rng(1).standard_normal((64, 512), dtype=np.float32)
    rows = quantise_k(given, kind).reshape(64, -1)
    error = dequantize(rows, gguf.GGMLQuantizationType[kind]) - given
    assert np.sqrt((error**2).mean()) == pytest.approx(ERRORS[kind], rel=0.01)


@pytest.mark.parametrize("kind", K_TYPES)
def test_the_largest_values_that_are_let_through_do_not_overflow(kind: str) -> None:
    from merganser.checkpoint.formats.gguf.encode import GgufEncoding

    largest = GgufEncoding(WRITABLE[kind], 256).largest
    assert largest is not None
    for given in (
        values()[20],
        -np.abs(values()[20]),
        np.full(256, 1, np.float32),
        np.eye(1, 256, dtype=np.float32)[0],
    ):
        given = given / np.abs(given).max() * np.float32(largest)
        rows = quantise_k(given, kind).reshape(1, -1)
        assert np.isfinite(dequantize(rows, gguf.GGMLQuantizationType[kind])).all()
