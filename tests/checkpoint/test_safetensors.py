"""The safetensors header: what is read, what is refused and with which words, and that nothing else can come out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merganser.checkpoint import DTYPES
from merganser.checkpoint.formats import safetensors as safetensors_file
from merganser.checkpoint.formats.safetensors import read_header
from merganser.errors import CheckpointError, MergeError, NotFoundError
from tests.checkpoint.making import entry, raw_file, some_tensors, tensor_bytes


def test_header_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    tensors = some_tensors()
    save_file(tensors, file, metadata={"format": "pt", "note": "ü"})
    found, metadata = read_header(file)
    assert metadata == {"format": "pt", "note": "ü"}
    assert [t.offset for t in found] == sorted(t.offset for t in found)
    assert {t.name: (t.dtype.name, t.shape, t.nbytes, t.numel) for t in found} == {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape), t.numel() * t.element_size(), t.numel())
        for name, t in tensors.items()
    }
    content = file.read_bytes()
    for info in found:
        assert content[info.offset : info.offset + info.nbytes] == tensor_bytes(tensors[info.name])


@pytest.mark.parametrize("tag", DTYPES)
def test_every_known_dtype_is_one_that_safetensors_reads(tag: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    nbytes = DTYPES[tag].nbytes(8)
    file.write_bytes(raw_file({"a": entry(tag, [8], [0, nbytes])}, bytes(nbytes)))
    (tensor,), _ = read_header(file)
    assert (tensor.dtype.tag, tensor.shape, tensor.nbytes) == (tag, (8,), nbytes)
    with safetensors.safe_open(file, "np") as opened:
        assert opened.get_slice("a").get_dtype() == tag


def test_any_string_can_be_a_name(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    names = ["", "a b", "../../etc/passwd", "é\n\x00", "__metadata", "𝔞"]
    file.write_bytes(raw_file({name: entry("U8", [1], [i, i + 1]) for i, name in enumerate(names)}, bytes(len(names))))
    found, _ = read_header(file)
    assert [tensor.name for tensor in found] == names


def test_header_may_be_padded_and_empty(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw_file(b"{}      "))
    assert read_header(file) == ([], {})


A = {"a": entry()}
BAD = [
    ("empty", b"", "the file is empty"),
    ("short", b"\x01\x02", "has 2 bytes, the format needs 8 or more"),
    ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
    (
        "length over cap",
        (10**8 + 1).to_bytes(8, "little") + b"{}",
        "length reads 100,000,001 bytes, at most 100,000,000",
    ),
    ("length huge", b"\xff" * 16, "length reads 18,446,744,073,709,551,615 bytes"),
    ("length past end", (99).to_bytes(8, "little") + b"{}", "length reads 99 bytes, the file has 10 bytes in all"),
    ("not json", raw_file(b"{nope}"), "is not valid JSON: .* at line 1, column 2"),
    ("not utf-8", raw_file(b'{"\xff": 1}'), r"is not UTF-8 text \(byte 2\)"),
    ("utf-16", raw_file('{"a": 1}'.encode("utf-16-le")), "is not valid JSON"),
    ("list", raw_file(b"[1]"), "the header must begin with '{'"),
    ("space first", raw_file(b" {}"), "the header must begin with '{'"),
    ("length 0", raw_file(b""), "the header must begin with '{'"),
    ("two documents", raw_file(b"{}{}"), "is not valid JSON: Extra data"),
    ("deep", raw_file(b'{"a":' + b"[" * 100_000), "is nested too deeply"),
    ("digits", raw_file(b'{"a":' + b"9" * 100_000 + b"}"), "a number of 100000 digits"),
    ("twice", raw_file(b'{"a":{},"b":{},"a":{}}'), "key 'a' appears twice"),
    ("key twice", raw_file(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "key 'dtype' appears twice"),
    ("metadata list", raw_file({"__metadata__": ["a"]}), "__metadata__ .* must map strings to strings"),
    ("metadata number", raw_file({"__metadata__": {"a": 1}}), "__metadata__ .* must map strings to strings"),
    ("surrogate", raw_file(b'{"\\ud800": {}}'), r"tensor '\\ud800': the name is not valid Unicode"),
    ("entry number", raw_file({"a": 3}), "tensor 'a': the header's entry must be an object, found 3"),
    ("no shape", raw_file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), "tensor 'a': .* has no 'shape'"),
    ("dtype unknown", raw_file({"a": entry("F31")}), "tensor 'a': unknown dtype 'F31'; known are F64, F32"),
    ("dtype complex", raw_file({"a": entry("C64", [1])}, bytes(8)), "tensor 'a': unknown dtype 'C64'"),
    ("dtype object", raw_file({"a": entry({})}), "tensor 'a': unknown dtype {}"),
    ("shape negative", raw_file({"a": entry(shape=[-2])}), r"tensor 'a': shape must be a list .* found \[-2\]"),
    ("shape float", raw_file({"a": entry(shape=[2.0])}), r"tensor 'a': shape must be a list .* found \[2.0\]"),
    ("shape bool", raw_file({"a": entry(shape=[True])}), "tensor 'a': shape must be a list"),
    ("shape number", raw_file({"a": entry(shape=2)}), "tensor 'a': shape must be a list"),
    ("shape 2^63", raw_file({"a": entry(shape=[2**63])}), "tensor 'a': shape must be a list"),
    ("shape overflow", raw_file({"a": entry(shape=[2**32, 2**31])}), r"tensor 'a': .* more than 2\^63 elements"),
    ("shape long", raw_file({"a": entry(shape=[9] * 100_000)}), r"tensor 'a': .* more than 2\^63 elements"),
    ("one offset", raw_file({"a": entry(offsets=[8])}), "tensor 'a': data_offsets must be two numbers, found 1"),
    ("offset negative", raw_file({"a": entry(offsets=[-8, 0])}), "tensor 'a': data_offsets must be a list"),
    (
        "offsets backwards",
        raw_file({"a": entry(offsets=[8, 0])}, bytes(8)),
        "tensor 'a': .* run backwards, from 8 to 0",
    ),
    ("too few bytes", raw_file({"a": entry(offsets=[0, 4])}, bytes(4)), r"span 4 bytes, shape \[2\] of F32 needs 8"),
    ("half a byte", raw_file({"a": entry("F4", [3], [0, 2])}, bytes(2)), "3 elements of F4 do not fill whole bytes"),
    ("truncated", raw_file(A, bytes(5)), r"truncated: header promises 77 bytes, file has 74; tensor 'a' runs past"),
    (
        "offset huge",
        raw_file({"a": entry("U8", [2**62], [0, 2**62])}),
        "truncated: header promises 4611686018427388008 bytes",
    ),
    ("trailing", raw_file(A, bytes(11)), "3 bytes after the last tensor: header promises 77 bytes, file has 80"),
    ("no tensors, data", raw_file({}, bytes(3)), "3 bytes after the last tensor"),
    ("overlap", raw_file({**A, "b": entry(offsets=[4, 12])}, bytes(12)), "tensors 'a' and 'b' overlap"),
    ("same place", raw_file({**A, "b": entry()}, bytes(8)), "tensors 'a' and 'b' overlap"),
    (
        "hole",
        raw_file({**A, "b": entry(offsets=[9, 17])}, bytes(17)),
        "tensor 'b': 1 bytes before it belong to no tensor",
    ),
    ("hole first", raw_file({"a": entry(offsets=[4, 12])}, bytes(12)), "tensor 'a': 4 bytes before it"),
]


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert len(str(caught.value)) < 600, "a hostile header must not flood the terminal"


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"x\.safetensors: no such file"):
        read_header(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}: cannot be read: is a folder")):
        read_header(tmp_path)


def outcome(file: Path, content: bytes) -> list[tuple[str, str, tuple[int, ...]]] | None:
    """What we read from a file: None when it is refused. Any other exception is a failure of the test."""
    file.write_bytes(content)
    refusal = ""
    try:
        found, _ = read_header(file)
    except MergeError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith(f"{file}: ")
        return None
    position = len(content) - sum(tensor.nbytes for tensor in found)
    for tensor in found:
        assert tensor.offset == position
        position += tensor.nbytes
    assert position == len(content)
    return [(tensor.name, tensor.dtype.tag, tensor.shape) for tensor in found]


def peer_outcome(file: Path) -> list[tuple[str, str, tuple[int, ...]]] | None:
    """What the safetensors library reads from the same file."""
    try:
        with safetensors.safe_open(file, "np") as opened:
            slices = [(name, opened.get_slice(name)) for name in opened.offset_keys()]
            return [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices]
    except (safetensors.SafetensorError, OSError):
        return None


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


@given(content=st.binary(max_size=300))
def test_random_bytes_are_refused_or_read(content: bytes, scratch: Path) -> None:
    assert outcome(scratch, content) in (None, [])


def seed_file() -> bytes:
    header = {"__metadata__": {"format": "pt"}, "a": entry("F32", [2], [0, 8]), "b": entry("BF16", [2, 1], [8, 12])}
    return raw_file(header, bytes(range(12)))


@settings(max_examples=300)
@given(
    changes=st.lists(st.tuples(st.integers(0, len(seed_file()) - 1), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, len(seed_file())),
    tail=st.binary(max_size=3),
)
@example(changes=[], cut=len(seed_file()), tail=b"")
def test_mutated_file(changes: list[tuple[int, int]], cut: int, tail: bytes, scratch: Path) -> None:
    content = bytearray(seed_file())
    for position, value in changes:
        content[position] = value
    ours = outcome(scratch, bytes(content[:cut]) + tail)
    if not changes and cut == len(content) and not tail:
        assert ours == [("a", "F32", (2,)), ("b", "BF16", (2, 1))]
    if ours is not None:
        assert ours == peer_outcome(scratch), "a file that we read differently from everyone else"


numbers: st.SearchStrategy[Any] = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([2**31, 2**62, 2**63, 2**64, -(2**63), 10**30]),
    st.booleans(),
    st.floats(),
    st.none(),
)
entries = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.one_of(st.sampled_from([*DTYPES, "C64", "f32"]), numbers),
            "shape": st.one_of(st.lists(numbers, max_size=4), numbers),
            "data_offsets": st.one_of(st.lists(numbers, max_size=3), numbers),
        },
    ),
    numbers,
    st.text(max_size=3),
)


@settings(max_examples=300)
@given(
    header=st.dictionaries(st.one_of(st.just("__metadata__"), st.text(max_size=5)), entries, max_size=4),
    data=st.binary(max_size=40),
)
def test_hostile_header(header: dict[str, Any], data: bytes, scratch: Path) -> None:
    ours = outcome(scratch, raw_file(header, data))
    if ours is not None:
        assert ours == peer_outcome(scratch)


@settings(max_examples=200)
@given(
    sizes=st.lists(
        st.tuples(st.sampled_from(["F32", "BF16", "U8", "F64"]), st.lists(st.integers(0, 3), max_size=3)), max_size=5
    ),
    shift=st.lists(st.integers(-2, 2), min_size=5, max_size=5),
)
def test_only_tight_layouts_are_read(sizes: list[tuple[str, list[int]]], shift: list[int], scratch: Path) -> None:
    header, position = {}, 0
    for i, (tag, shape) in enumerate(sizes):
        nbytes = DTYPES[tag].itemsize
        for length in shape:
            nbytes *= length
        begin = position + (shift[i] if shift[0] == 0 else 0)
        header[f"t{i}"] = {"dtype": tag, "shape": shape, "data_offsets": [begin, begin + nbytes]}
        position += nbytes
    ours = outcome(scratch, raw_file(json.dumps(header).encode(), bytes(position)))
    theirs = peer_outcome(scratch)
    assert (ours is None) == (theirs is None)
    assert sorted(ours or []) == sorted(theirs or [])


def test_a_header_that_two_files_share_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps({"a": entry("U8", [2], [0, 2]), "__metadata__": {"by": "me"}}).encode()
    first, second, short = (tmp_path / name for name in ("first", "second", "short"))
    first.write_bytes(raw_file(text, b"12"))
    second.write_bytes(raw_file(text, b"34"))
    short.write_bytes(raw_file(text, b"5"))
    (own,), metadata = read_header(first)
    monkeypatch.setattr(safetensors_file, "parse_object", None)
    (other,), again = read_header(second)
    assert (own.file, other.file) == (first, second)
    assert own.name is other.name
    # what a caller does with the metadata of one file is not seen by others
    metadata.clear()
    assert again == read_header(first)[1] == {"by": "me"}
    # the length of each file is checked all the same
    with pytest.raises(
        CheckpointError,
        match=r"short: truncated: header promises \d+ bytes, file has \d+; tensor 'a' runs past the end",
    ):
        read_header(short)
    monkeypatch.undo()
    longer = tmp_path / "longer"
    longer.write_bytes(raw_file(text, b"678"))
    with pytest.raises(CheckpointError, match="longer: 1 bytes after the last tensor"):
        read_header(longer)


def test_not_all_headers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "_MOST_KEPT", 2)
    for name in "abcde":
        (tmp_path / name).write_bytes(raw_file({name: entry("U8", [1], [0, 1])}, b"1"))
        assert [tensor.name for tensor in read_header(tmp_path / name)[0]] == [name]
        assert len(safetensors_file._parsed) <= 2
