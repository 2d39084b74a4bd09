"""`.bin` files: any tensor that torch can save comes back, and no code is ever run."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.checkpoint import Reader, open_checkpoint
from merganser.checkpoint.formats.pickled import read_pickled
from merganser.errors import CheckpointError, MergeError, NotFoundError
from tests.checkpoint.making import check_equal, read_all, some_tensors, tensor_bytes


def odd_tensors() -> dict[str, torch.Tensor]:
    """Views of all kinds: strides, offsets, one storage behind several tensors."""
    whole = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    return {
        "whole": whole,
        "tied": whole,
        "part": whole[1:, 2],
        "transposed": whole.permute(2, 0, 1),
        "one row": whole.permute(2, 0, 1)[:1].transpose(1, 2),
        "step": whole.reshape(-1)[::7],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "expanded scalar": torch.tensor(4.0).expand(5),
        "scalar view": whole[1, 2, 3],
        "negated": torch._neg_view(whole[0]),
        "parameter": torch.nn.Parameter(whole[2].clone()),
        "uint16": torch.tensor([1, 2, 65535], dtype=torch.uint16),
        "float8": torch.zeros(3).to(torch.float8_e5m2),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_of_all_kinds(zipped: bool, tmp_path: Path) -> None:
    tensors = some_tensors() | odd_tensors()
    if not zipped:
        # The old format has no words for these.
        for name in ("uint16", "float8", "negated"):
            del tensors[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own old format
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(str(tmp_path))
    wanted = {name: tensor.detach().resolve_neg() for name, tensor in tensors.items()}
    check_equal(checkpoint, wanted)
    assert {tensor.offset for tensor in checkpoint.tensors.values()} == {-1}


def test_every_range_of_a_strided_tensor(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in odd_tensors().items() if name in ("transposed", "one row", "step")}
    torch.save(tensors, tmp_path / "x.bin")
    checkpoint = open_checkpoint(str(tmp_path / "x.bin"))
    with checkpoint.reader() as reader:
        for name, info in checkpoint.tensors.items():
            wanted = tensor_bytes(tensors[name])
            for start in range(0, info.nbytes, 3):
                for length in (1, 9, info.nbytes - start):
                    buffer = bytearray(min(length, info.nbytes - start))
                    reader.will_need(info, start, len(buffer))
                    reader.read_into(info, start, memoryview(buffer))
                    assert buffer == wanted[start : start + length]


def test_zip_files_are_mapped_not_loaded(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    tensor_before = torch.full((1000,), 3.0)
    torch.save({"a": tensor_before}, file)
    (tensor,) = read_pickled(file)
    content = bytearray(file.read_bytes())
    position = content.index(tensor_bytes(tensor_before))
    content[position : position + 4] = b"\x00\x00\x80\x3f"
    with file.open("r+b") as handle:
        handle.write(content)
    buffer = bytearray(4)
    assert tensor.source is not None
    with Reader() as reader:
        tensor.source.read_into(reader, "a", 0, memoryview(buffer))
    assert buffer == b"\x00\x00\x80\x3f", "what is on disk now is what is read"


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_wrapped_state_dict(key: str, tmp_path: Path) -> None:
    torch.save({"epoch": 3, key: OrderedDict(some_tensors()), "optimizer": {"lr": 0.1}}, tmp_path / "x.pt")
    check_equal(open_checkpoint(str(tmp_path / "x.pt")), some_tensors())


class Runs:
    """Pickles as a call that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_is_not_run(zipped: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"a": Runs(trace)}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"x\.bin: cannot be read without running code from it.*convert it to saf"
    ):
        read_pickled(tmp_path / "x.bin")
    assert not trace.exists()
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert trace.exists(), "the file is harmless, so this test shows nothing"


T = torch.zeros(2)
BAD: list[tuple[str, object, str]] = [
    ("list", [T], "must hold a mapping from names to tensors, found list"),
    ("tensor", T, "must hold a mapping from names to tensors, found Tensor"),
    ("nothing known", {"weights": {"a": T}}, "alone or under one of the keys .*; such keys found: none"),
    ("ambiguous", {"model": {"a": T}, "state_dict": {"a": T}}, "such keys found: state_dict, model"),
    ("number key", {1: T}, "the name of a tensor must be a string, found 1"),
    ("mixed", {"a": T, "epoch": 3}, "entry 'epoch' is not a tensor, found int"),
    ("nested", {"model": {"a": T, "b": {"c": T}}}, "entry 'b' is not a tensor, found dict"),
    ("sparse", {"a": torch.eye(2).to_sparse()}, "tensor 'a': only dense tensors can be read, found torch.sparse_coo"),
    ("meta", {"a": torch.zeros(2, device="meta")}, "tensor 'a': only dense tensors can be read, found .* on meta"),
    ("complex", {"a": torch.zeros(2, dtype=torch.complex64)}, "tensor 'a': dtype torch.complex64 cannot be read"),
]


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_content_is_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_pickled(tmp_path / "x.bin")
    assert str(caught.value).startswith(f"{tmp_path / 'x.bin'}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04" + b"x" * 99, "or is damaged .*convert it to safetensors"),
        (b"<html>" * 9, "or is damaged"),
    ],
)
def test_bad_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_pickled(tmp_path / "x.bin")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"x\.bin: no such file"):
        read_pickled(tmp_path / "x.bin")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    file = tmp_path_factory.mktemp("fuzz") / "x.bin"
    torch.save({"a": torch.arange(20.0), "b": torch.ones(2, 2).T}, file)
    return file, file.read_bytes()


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_file_is_refused_or_read(data: st.DataObject, saved: tuple[Path, bytes]) -> None:
    file, whole = saved
    content = bytearray(whole)
    for position in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    # A new file each time: the bytes of a mapped one must not change.
    file.unlink(missing_ok=True)
    file.write_bytes(content[: data.draw(st.integers(0, len(whole)))])
    try:
        checkpoint = open_checkpoint(str(file))
    except MergeError:
        return
    assert all(len(found) == checkpoint.tensors[name].nbytes for name, found in read_all(checkpoint).items())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("container", ["key", "set"])
def test_a_pickle_that_takes_forever_is_refused(zipped: bool, container: str, tmp_path: Path) -> None:
    value: object = "a"
    for _ in range(24):
        value = (value, value)
    content = {"w": torch.zeros(2), "x": {value: 1} if container == "key" else {value}}
    file = tmp_path / "x.bin"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="nested so that reading them would take practically forever; convert it"):
        read_pickled(file)


def test_a_long_string_that_is_encoded_is_refused(tmp_path: Path) -> None:
    class Encoded:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return __import__("_codecs").encode, ("a" * 200_000, "punycode")

    torch.save({"w": torch.zeros(2), "x": Encoded()}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="it encodes a long string"):
        read_pickled(tmp_path / "x.bin")
