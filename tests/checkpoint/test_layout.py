"""What `plan_shards` promises is what the safetensors library reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from merganser.checkpoint import DTYPE_BY_NAME, DTYPES, Shard, index_json, open_checkpoint, plan_shards
from merganser.checkpoint.dtypes import DType
from tests.checkpoint.making import check_equal, some_tensors, tensor_bytes

Spec = tuple[str, DType, tuple[int, ...]]


def specs(tensors: dict[str, torch.Tensor]) -> list[Spec]:
    return [(n, DTYPE_BY_NAME[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for n, t in tensors.items()]


def write(folder: Path, shards: list[Shard], tensors: dict[str, torch.Tensor]) -> None:
    for shard in shards:
        content = bytearray(shard.size)
        content[: len(shard.header)] = shard.header
        for name, (offset, nbytes) in shard.entries.items():
            data = tensor_bytes(tensors[name])
            assert len(data) == nbytes
            content[offset : offset + nbytes] = data
        (folder / shard.name).write_bytes(content)


@pytest.mark.parametrize("shard_bytes", [10**9, 64, 1])
def test_files_load_with_safetensors(shard_bytes: int, tmp_path: Path) -> None:
    tensors = some_tensors()
    shards = plan_shards(specs(tensors), shard_bytes, {"made_by": "a test"})
    write(tmp_path, shards, tensors)
    loaded = {}
    for shard in shards:
        with safe_open(tmp_path / shard.name, "pt") as file:
            assert file.metadata() == {"format": "pt", "made_by": "a test"}
            assert file.offset_keys() == list(shard.entries)
            loaded.update({name: file.get_tensor(name) for name in file.offset_keys()})
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    if len(shards) > 1:
        (tmp_path / "model.safetensors.index.json").write_bytes(index_json(shards))
    check_equal(open_checkpoint(str(tmp_path)), tensors)


def test_one_shard_has_the_plain_name() -> None:
    (shard,) = plan_shards([("a", DTYPES["F32"], (2,))], 8, {})
    assert shard.name == "model.safetensors"
    assert len(shard.header) % 8 == 0
    assert shard.entries == {"a": (len(shard.header), 8)}
    assert shard.size == len(shard.header) + 8


def test_shards_fill_in_the_given_order_and_a_large_tensor_stands_alone() -> None:
    lengths = {"a": 4, "b": 4, "c": 4, "large": 40, "d": 8, "e": 1}
    shards = plan_shards([(name, DTYPES["U8"], (length,)) for name, length in lengths.items()], 10, {})
    assert [list(shard.entries) for shard in shards] == [["a", "b"], ["c"], ["large"], ["d", "e"]]
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]


def test_index_names_the_shard_of_each_tensor() -> None:
    shards = plan_shards([("b", DTYPES["F32"], (2,)), ("a", DTYPES["BF16"], (3,))], 8, {})
    assert json.loads(index_json(shards)) == {
        "metadata": {"total_size": 14},
        "weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
    }


def test_no_tensors_make_one_empty_file(tmp_path: Path) -> None:
    shards = plan_shards([], 8, {})
    write(tmp_path, shards, {})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.offset_keys() == []


@pytest.mark.parametrize(
    ("tensors", "shard_bytes", "message"),
    [
        ([("a", DTYPES["F32"], ()), ("a", DTYPES["F32"], ())], 8, "'a' appears twice"),
        ([("__metadata__", DTYPES["F32"], ())], 8, "keeps this name for itself"),
        ([("a", DTYPES["F32"], ())], 0, "must be positive, found 0"),
    ],
)
def test_impossible_layout_is_refused(tensors: list[Spec], shard_bytes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_shards(tensors, shard_bytes, {})


@settings(max_examples=100)
@given(
    tensors=st.lists(
        st.tuples(
            st.text(max_size=8).filter(lambda name: name != "__metadata__"),
            st.sampled_from([d for d in DTYPES.values() if d.bits >= 8]),
            st.lists(st.integers(0, 5), max_size=3).map(tuple),
        ),
        unique_by=lambda spec: spec[0],
        max_size=12,
    ),
    shard_bytes=st.integers(1, 200),
)
def test_layout_is_tight_aligned_and_stable(tensors: list[Spec], shard_bytes: int) -> None:
    shards = plan_shards(tensors, shard_bytes, {})
    order = {name: i for i, (name, _, _) in enumerate(tensors)}
    bits = {name: dtype.bits for name, dtype, _ in tensors}
    members = [name for shard in shards for name in shard.entries]
    assert sorted(members) == sorted(order)
    assert all(shard.entries for shard in shards) or not tensors
    for shard in shards:
        position = len(shard.header)
        for name, (offset, nbytes) in shard.entries.items():
            assert offset == position
            assert offset % (bits[name] // 8) == 0
            position += nbytes
        assert position == shard.size
        assert list(shard.entries) == sorted(shard.entries, key=lambda name: (-bits[name], order[name]))
        total = sum(nbytes for _, nbytes in shard.entries.values())
        assert total <= shard_bytes or sum(nbytes > 0 for _, nbytes in shard.entries.values()) == 1
    spans = [sorted(order[name] for name in shard.entries) for shard in shards]
    assert [i for span in spans for i in span] == list(range(len(tensors)))
