"""Reading bytes of tensors: any range, any thread, few open files, and truncation found."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from merganser.checkpoint import Reader, open_checkpoint
from merganser.errors import CheckpointError, NotFoundError
from tests.checkpoint.making import check_equal, only, some_tensors, tensor_bytes, write_shards


def test_every_range_of_a_tensor(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_shards(tmp_path, {"model.safetensors": tensors})
    checkpoint = open_checkpoint(str(tmp_path))
    wanted = tensor_bytes(tensors["embed.weight"])
    info = checkpoint.tensors["embed.weight"]
    with checkpoint.reader() as reader:
        for start in range(info.nbytes + 1):
            for length in (0, 1, 5, info.nbytes - start):
                buffer = bytearray(b"?" * min(length, info.nbytes - start))
                reader.will_need(info, start, len(buffer))
                reader.read_into(info, start, memoryview(buffer))
                assert buffer == wanted[start : start + len(buffer)]


def test_buffer_may_be_an_array_of_any_type(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_shards(tmp_path, {"model.safetensors": tensors})
    checkpoint = open_checkpoint(str(tmp_path))
    norm, none = np.empty(4, np.float32), np.empty((0, 3), np.float16)
    with checkpoint.reader() as reader:
        reader.read_into(checkpoint.tensors["norm.weight"], 0, memoryview(norm))
        reader.read_into(checkpoint.tensors["none"], 0, memoryview(none))
    assert torch.equal(torch.from_numpy(norm), tensors["norm.weight"])


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_tensors_whole(file: str, tmp_path: Path) -> None:
    tensors = some_tensors()
    if file.endswith(".bin"):
        torch.save(tensors, tmp_path / file)
    else:
        write_shards(tmp_path, {file: tensors})
    checkpoint = open_checkpoint(str(tmp_path))
    with checkpoint.reader() as reader:
        for name, tensor in tensors.items():
            found = reader.tensor(checkpoint.tensors[name])
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found, tensor)


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, 17), (16, 1)])
def test_range_outside_the_tensor_is_refused(start: int, length: int, tmp_path: Path) -> None:
    write_shards(tmp_path, {"model.safetensors": {"a": torch.zeros(4)}})
    checkpoint = open_checkpoint(str(tmp_path))
    with checkpoint.reader() as reader, pytest.raises(ValueError, match="of a tensor of 16"):
        reader.read_into(only(checkpoint), start, memoryview(bytearray(length)))


def test_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model.safetensors": {"a": torch.zeros(100)}})
    checkpoint = open_checkpoint(str(tmp_path))
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 40)
    with checkpoint.reader() as reader, pytest.raises(CheckpointError, match=r"tensor 'a': truncated") as caught:
        reader.read_into(only(checkpoint), 0, memoryview(bytearray(400)))
    assert str(caught.value).startswith(f"{file}: ")


def test_file_that_goes_is_noticed(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model.safetensors": {"a": torch.zeros(4)}})
    checkpoint = open_checkpoint(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with checkpoint.reader() as reader:
        reader.will_need(only(checkpoint), 0, 16)
        with pytest.raises(NotFoundError, match="tensor 'a': the file is no longer there"):
            reader.read_into(only(checkpoint), 0, memoryview(bytearray(16)))


def test_closed_reader_says_so(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model.safetensors": {"a": torch.zeros(4)}})
    checkpoint = open_checkpoint(str(tmp_path))
    reader = checkpoint.reader()
    reader.close()
    with pytest.raises(ValueError, match="the files are closed"):
        reader.read_into(only(checkpoint), 0, memoryview(bytearray(16)))


def test_many_threads_over_more_files_than_may_be_open(tmp_path: Path) -> None:
    count = 12
    shards = {
        f"m-{i + 1:05d}-of-{count:05d}.safetensors": {f"t{i}": torch.full((500,), float(i))} for i in range(count)
    }
    write_shards(tmp_path, shards, "m.safetensors.index.json")
    checkpoint = open_checkpoint(str(tmp_path))
    wanted = {name: tensor_bytes(t) for shard in shards.values() for name, t in shard.items()}
    barrier = threading.Barrier(6)

    with Reader(max_open_files=3) as reader:

        def work(seed: int) -> None:
            barrier.wait(timeout=30)
            for k in range(200):
                info = checkpoint.tensors[f"t{(seed * 7 + k * 5) % count}"]
                buffer = bytearray(1000)
                reader.will_need(info, 0, 10)
                reader.read_into(info, k * 4, memoryview(buffer))
                assert buffer == wanted[info.name][k * 4 : k * 4 + 1000]

        with ThreadPoolExecutor(6) as pool:
            for done in [pool.submit(work, seed) for seed in range(6)]:
                done.result()
        assert len(reader._files) <= 3


def test_one_reader_serves_several_checkpoints(tmp_path: Path) -> None:
    write_shards(tmp_path / "one", {"model.safetensors": {"a": torch.ones(2)}})
    write_shards(tmp_path / "two", {"pytorch_model.bin": {"a": torch.zeros(2)}})
    buffer = bytearray(8)
    with Reader() as reader:
        for name, value in ("one", 1.0), ("two", 0.0):
            reader.read_into(only(open_checkpoint(str(tmp_path / name))), 0, memoryview(buffer))
            assert torch.equal(torch.frombuffer(buffer, dtype=torch.float32), torch.full((2,), value))


def test_systems_without_preadv_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    write_shards(tmp_path, {"model.safetensors": some_tensors()})
    check_equal(open_checkpoint(str(tmp_path)), some_tensors())


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: whole(file, [buffers[0][:3]], offset))
    write_shards(tmp_path, {"model.safetensors": some_tensors()})
    check_equal(open_checkpoint(str(tmp_path)), some_tensors())
