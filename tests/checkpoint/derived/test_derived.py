"""Tensors that are computed while they are read: any range equals the whole, from any number of rows at a time."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merganser.checkpoint import DTYPES, Reader, TensorInfo, derive, open_checkpoint
from merganser.checkpoint.derived.derived import read_columns, read_rows
from merganser.checkpoint.tensor import ByteReader, renamed
from tests.checkpoint.making import write_shards


@dataclass(frozen=True)
class Doubled:
    stored: TensorInfo

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        return read_rows(reader, self.stored, first, end).float() * 2


@pytest.fixture
def values(tmp_path: Path) -> tuple[Tensor, TensorInfo]:
    tensor = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))
    write_shards(tmp_path, {"model.safetensors": {"w": tensor}})
    return tensor, open_checkpoint(str(tmp_path)).tensors["w"]


def test_every_range(values: tuple[Tensor, TensorInfo], monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, stored = values
    monkeypatch.setattr("merganser.checkpoint.derived.derived._SLAB", 12)  # two rows at a time
    info = derive("d", (6, 3, 5), [stored], Doubled(stored), natural=DTYPES["BF16"])
    info = pickle.loads(pickle.dumps(renamed(info, "other")))
    assert (info.nbytes, info.nbytes_stored, info.natural) == (360, 360, DTYPES["BF16"])
    wanted = (tensor * 2).numpy().tobytes()
    with Reader() as reader:
        assert torch.equal(reader.tensor(info), tensor * 2)
        for start in range(0, 360, 7):
            for length in (1, 19, 61, 360 - start):
                buffer = bytearray(min(length, 360 - start))
                reader.will_need(info, start, len(buffer))
                reader.read_into(info, start, memoryview(buffer))
                assert buffer == wanted[start : start + len(buffer)]


@pytest.mark.parametrize("piece", [1, 1000])
def test_columns(values: tuple[Tensor, TensorInfo], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piece by piece, and together with what lies between."""
    tensor, stored = values
    monkeypatch.setattr("merganser.checkpoint.derived.derived._PIECE", piece)
    monkeypatch.setattr("merganser.checkpoint.derived.derived._SPAN", 50)
    with Reader() as reader:
        found = read_columns(reader, stored, range(2, 11), range(1, 4))
    assert torch.equal(found, tensor.view(18, 5)[2:11, 1:4])
