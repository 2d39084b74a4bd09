"""Distributed checkpoints of PyTorch: whole tensors and chunks, the state of optimizers left out, damage refused."""

from __future__ import annotations

import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from merganser.checkpoint import open_checkpoint
from merganser.errors import CheckpointError
from tests.checkpoint.quantised.making import check_parts, randn, values
from tests.making import llama


def saved(folder: Path, state: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder


def changed(folder: Path, change: Any) -> None:
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def test_whole_tensors(tmp_path: Path) -> None:
    tensors = {**llama(0, dtype=torch.bfloat16), "ids": torch.arange(3), "scalar": torch.tensor(2.5)}
    moments = {"state": {"x": torch.ones(2)}}
    saved(tmp_path, {**tensors, "optim": moments, "epoch": 3})
    checkpoint = open_checkpoint(str(tmp_path))
    found = values(checkpoint)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert checkpoint.left_out == {"optim.state.x": "the state of an optimizer", "epoch": "no tensor"}


def test_the_name_of_the_trainer_is_stripped(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(saved(tmp_path, {"model": llama(0)})))
    assert checkpoint.tensors.keys() == llama(0).keys()
    assert checkpoint.wrappers == ("model.",)


@pytest.mark.parametrize(
    ("shape", "cuts"),
    [
        ((7, 6), [((0, 0), (3, 6)), ((3, 0), (4, 6))]),
        ((7, 6), [((0, 0), (7, 2)), ((0, 2), (7, 4))]),
        ((7, 6), [((0, 0), (3, 4)), ((0, 4), (3, 2)), ((3, 0), (4, 4)), ((3, 4), (4, 2))]),
        ((5, 3, 6), [((0, 0, 0), (2, 3, 6)), ((2, 0, 0), (3, 3, 6))]),
        ((9,), [((0,), (4,)), ((4,), (5,))]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks(tmp_path: Path, shape: Any, cuts: Any, dtype: torch.dtype) -> None:
    """As several processes cut a tensor: written as single tensors here, and put together in the metadata."""
    whole = randn(*shape).to(dtype)

    def part(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        return whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))].contiguous()

    saved(tmp_path, {f"c{i}": part(*cut) for i, cut in enumerate(cuts)})

    def joined(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["c0"]
        entry.size = torch.Size(shape)
        entry.chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in cuts]
        metadata.state_dict_metadata = {"w": entry}
        old = {index.fqn: place for index, place in metadata.storage_data.items()}
        metadata.storage_data = {MetadataIndex("w", torch.Size(at), i): old[f"c{i}"] for i, (at, _) in enumerate(cuts)}

    changed(tmp_path, joined)
    checkpoint = open_checkpoint(str(tmp_path))
    assert torch.equal(values(checkpoint)["w"].to(dtype), whole)
    natural = checkpoint.tensors["w"].natural
    assert natural is not None
    assert natural.name == str(dtype).removeprefix("torch.")
    if len(shape) > 1:
        check_parts(checkpoint, "w")


class Hostile:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def _missing_chunk(metadata: Any) -> None:
    metadata.storage_data = {}


def _outside(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.relative_path = "../x.distcp"


def _beyond(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.offset = 1 << 50


def _wrong_shape(metadata: Any) -> None:
    metadata.state_dict_metadata["w"].size = torch.Size([9, 9])


def _hostile(metadata: Any) -> None:
    metadata.planner_data = Hostile()


def _negative(metadata: Any) -> None:
    metadata.state_dict_metadata["w"].size = torch.Size([7, -6])


def _negative_place(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.offset = -1


def _endless(metadata: Any) -> None:
    value: Any = ("x",)
    for _ in range(60):
        value = (value, value)
    metadata.planner_data = value


def _cut(*chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> Any:
    def change(metadata: Any) -> None:
        (place,) = metadata.storage_data.values()
        entry = metadata.state_dict_metadata["w"]
        entry.size = torch.Size([14, 6])
        entry.chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in chunks]
        metadata.storage_data = {MetadataIndex("w", torch.Size(at)): place for at, _ in chunks}

    return change


BAD: list[tuple[Any, str]] = [
    (_negative, r"of shape \[7, -6\] is not known"),
    (_negative_place, "is damaged"),
    (_endless, "its values are nested so that reading them would take practically forever"),
    (_cut(((0, 0), (7, 6)), ((6, 0), (7, 6))), "its chunks overlap, so that others are missing"),
    (_cut(((0, 0), (7, 6)), ((8, 0), (7, 6))), r"the chunk at \[8, 0\] of shape \[7, 6\] does not fit"),
    (_cut(((0, 0), (7, 6)), ((-7, 0), (7, 6))), "does not fit"),
    (_cut(((0, 0), (7, 5)), ((7, 0), (7, 6))), "is not stored as"),
    (_missing_chunk, r"no file holds its chunk at \[0, 0\]"),
    (_outside, r"file '\.\./x\.distcp' is not one of the checkpoint's folder"),
    (_beyond, "is damaged"),
    (_wrong_shape, "its chunks hold 42 of 81 elements"),
    (_hostile, r"it holds builtins\.print"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_damage(tmp_path: Path, change: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, {"w": randn(7, 6)})
    changed(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path))
    assert capsys.readouterr().out == ""


def test_a_value_under_a_number_that_would_fill_the_memory(tmp_path: Path) -> None:
    folder = saved(tmp_path, {"w": randn(7, 6)})
    # an empty list, kept under the number 2^31 - 1
    (folder / ".metadata").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")
    with pytest.raises(CheckpointError, match="it keeps a value under the number 2,147,483,647"):
        open_checkpoint(str(folder))


def test_missing_and_cut_files(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", {"w": randn(70, 60)})
    cut = shutil.copytree(folder, tmp_path / "b")
    file = cut / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(CheckpointError, match="is damaged"):
        open_checkpoint(str(cut))
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"no such file, but \.metadata says that it holds 'w'"):
        open_checkpoint(str(folder))
    (folder / ".metadata").write_bytes(b"\x80\x04garbage")
    with pytest.raises(CheckpointError, match=r"\.metadata: cannot be read"):
        open_checkpoint(str(folder))
