"""Every layout in which checkpoints are published, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from merganser.checkpoint import open_checkpoint
from merganser.engine.merge import plan
from merganser.errors import CheckpointError, MergeError, NotFoundError, UnsupportedError
from tests.checkpoint.making import Tensors, check_equal, put, raw_file, tensor_bytes, write_shards

A: Tensors = {"a": torch.arange(4.0)}
B: Tensors = {"b": torch.ones(2, 3)}
C: Tensors = {"c": torch.zeros(1)}


def numbered(stem: str, suffix: str, *parts: Tensors) -> dict[str, Tensors]:
    return {f"{stem}-{i:05d}-of-{len(parts):05d}{suffix}": part for i, part in enumerate(parts, start=1)}


INDEX = "model.safetensors.index.json"
SHARDS = numbered("model", ".safetensors", A, B)
FIRST, SECOND = SHARDS


def mapping(**files: object) -> bytes:
    return json.dumps({"weight_map": files}).encode()


LAYOUTS: list[tuple[str, dict[str, Tensors], str | None, Tensors]] = [
    ("single", {"model.safetensors": A}, None, A),
    ("sharded", numbered("model", ".safetensors", A, B), "model.safetensors.index.json", A | B),
    ("other basename", numbered("my-llm.v2", ".safetensors", A, B), "my-llm.v2.safetensors.index.json", A | B),
    ("sharded, no index", numbered("model", ".safetensors", A, B, C), None, A | B | C),
    ("other basename, no index", numbered("weights", ".safetensors", A, B), None, A | B),
    ("one other file", {"my-model_v2.safetensors": A}, None, A),
    ("one shard of one", numbered("model", ".safetensors", A), None, A),
    ("consolidated", {"consolidated.safetensors": A}, None, A),
    ("consolidated parts", {"consolidated.00.safetensors": A, "consolidated.01.safetensors": B}, None, A | B),
    (
        "consolidated shards",
        numbered("consolidated", ".safetensors", A, B),
        "consolidated.safetensors.index.json",
        A | B,
    ),
    ("mistral", {"consolidated.safetensors": B, **numbered("model", ".safetensors", A, C)}, None, A | C),
    ("mistral single", {"consolidated.safetensors": B, "model.safetensors": A}, None, A),
    ("consolidated and other", {"consolidated.safetensors": B, "other.safetensors": A}, None, A),
    ("bin too", {"model.safetensors": A, "pytorch_model.bin": B}, None, A),
    ("consolidated and bin", {"consolidated.safetensors": A, "pytorch_model.bin": B}, None, A),
    ("variant too", {"model.safetensors": A, "model.fp16.safetensors": B}, None, A),
    ("optimizer too", {"optimizer.safetensors": B, "pytorch_model.bin": A}, None, A),
    ("leftover shards", {"model.safetensors": A, **numbered("model", ".safetensors", B, C)}, None, A),
    ("bin", {"pytorch_model.bin": A}, None, A),
    ("sharded bin", numbered("pytorch_model", ".bin", A, B), "pytorch_model.bin.index.json", A | B),
    ("sharded bin, no index", numbered("pytorch_model", ".bin", A, B), None, A | B),
    ("pt", {"anything.pt": A}, None, A),
    ("pth", {"consolidated.00.pth": A}, None, A),
    ("bin and training state", {"pytorch_model.bin": A, "training_args.bin": B, "scheduler.pt": C}, None, A),
]


@pytest.mark.parametrize(
    ("shards", "index", "wanted"), [case[1:] for case in LAYOUTS], ids=[case[0] for case in LAYOUTS]
)
def test_layout(shards: dict[str, Tensors], index: str | None, wanted: Tensors, tmp_path: Path) -> None:
    write_shards(tmp_path, shards, index)
    checkpoint = open_checkpoint(str(tmp_path))
    check_equal(checkpoint, wanted)
    assert checkpoint.path == tmp_path
    assert checkpoint.config == {}
    assert {tensor.file for tensor in checkpoint.tensors.values()} == set(checkpoint.weight_files)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in wanted.values())


def test_index_may_name_a_subfolder(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    write_shards(tmp_path, {"part/x.safetensors": A, "y.safetensors": B}, "model.safetensors.index.json")
    check_equal(open_checkpoint(str(tmp_path)), A | B)


def test_the_path_of_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDS, INDEX)
    write_shards(tmp_path, {"model.safetensors": C})
    check_equal(open_checkpoint(str(tmp_path / INDEX)), A | B)


@pytest.mark.parametrize(("stem", "suffix"), [("model", ".safetensors"), ("pytorch_model", ".bin")])
def test_a_file_beside_an_index_of_others(stem: str, suffix: str, tmp_path: Path) -> None:
    index = f"{stem}{suffix}.index.json"
    write_shards(tmp_path, numbered(stem, suffix, A, B), index)
    write_shards(tmp_path, {f"{stem}{suffix}": C})
    with pytest.raises(
        CheckpointError, match=f"both {stem}{suffix} and {index} .*are there, and it is not clear which"
    ):
        open_checkpoint(str(tmp_path))
    check_equal(open_checkpoint(str(tmp_path / f"{stem}{suffix}")), C)
    # some programs write an index for a single file, too
    (tmp_path / index).write_bytes(mapping(c=f"{stem}{suffix}"))
    check_equal(open_checkpoint(str(tmp_path)), C)


UNREAD: list[tuple[dict[str, Tensors], str | None, tuple[str, ...]]] = [
    ({"model.safetensors": A}, None, ()),
    ({"model.safetensors": A, "pytorch_model.bin": B, "model.onnx": C}, None, ()),
    ({"model.safetensors": A, "consolidated.safetensors": B}, None, ("consolidated.safetensors",)),
    ({"model.safetensors": A, "model-00001-of-00002.safetensors": B}, None, ("model-00001-of-00002.safetensors",)),
    ({"pytorch_model.bin": A, "training_args.bin": B, "optimizer.bin": C, "ema.bin": C}, None, ("ema.bin",)),
]


@pytest.mark.parametrize(("shards", "index", "unread"), UNREAD)
def test_weights_that_are_not_read_are_told(
    shards: dict[str, Tensors], index: str | None, unread: tuple[str, ...], tmp_path: Path
) -> None:
    write_shards(tmp_path, shards, index)
    assert open_checkpoint(str(tmp_path)).unread == unread
    planned = plan({"merge_method": "linear", "models": [{"model": str(tmp_path)}], "parameters": {"weight": 1}})
    told = [text for text in planned.warnings if "may also hold weights; only " in text]
    assert len(told) == (1 if unread else 0)
    assert all(text.startswith(f"{tmp_path}: {', '.join(unread)} may") for text in told)


def test_stray_shards_are_told(tmp_path: Path) -> None:
    write_shards(tmp_path, numbered("model", ".safetensors", A, B), INDEX)
    write_shards(tmp_path, {"model-00003-of-00003.safetensors": C})
    assert open_checkpoint(str(tmp_path)).unread == ("model-00003-of-00003.safetensors",)


@pytest.mark.parametrize("name", ["other.safetensors", INDEX])
def test_the_config_may_name_the_weights(name: str, tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDS, INDEX)
    write_shards(tmp_path, {"model.safetensors": C, "other.safetensors": A | B})
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": name}))
    check_equal(open_checkpoint(str(tmp_path)), A | B)
    planned = plan({"merge_method": "linear", "models": [{"model": str(tmp_path)}], "parameters": {"weight": 1}})
    assert "transformers_weights" not in planned.config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (3, "must be the name of a file, found 3"),
        ("../x.safetensors", "is not inside the checkpoint's folder"),
        ("x.py", "is not a file of weights"),
        ("none.safetensors", "no such file, but .* names it in transformers_weights"),
        ("x.safetensors.index.json", "no such file, but .* names it in transformers_weights"),
    ],
)
def test_the_config_may_name_only_weights(name: object, message: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "model", {"model.safetensors": A})
    write_shards(tmp_path, {"x.safetensors": A})
    (tmp_path / "model" / "config.json").write_text(json.dumps({"transformers_weights": name}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path / "model"))


FOREIGN = [
    ("__0_0.distcp", "distributed checkpoint of PyTorch", "format_utils dcp_to_torch FOLDER pytorch_model.bin"),
    ("zero_to_fp32.py", "DeepSpeed ZeRO", r"python zero_to_fp32\.py FOLDER OUT"),
    ("global_step500", "DeepSpeed ZeRO", r"python zero_to_fp32\.py FOLDER OUT"),
    ("model_world_size_8_rank_3.pt", "verl", r"python -m verl\.model_merger merge"),
    ("pytorch_model_fsdp_0", "FSDP", "accelerate merge-weights"),
    ("model.nemo", "NeMo", "export of NeMo"),
]


@pytest.mark.parametrize(("name", "what", "command"), FOREIGN)
def test_what_training_programs_write_is_named(name: str, what: str, command: str, tmp_path: Path) -> None:
    put(tmp_path, {name: b"x", "config.json": b"{}"})
    for reference in (tmp_path, tmp_path / name):
        with pytest.raises(
            CheckpointError, match=rf"{re.escape(name)} is an? .*{what}.*; convert it to a checkpoint .*{command}"
        ):
            open_checkpoint(str(reference))


def test_parts_of_an_original_checkpoint_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"consolidated.00.pth": A, "consolidated.01.pth": B})
    with pytest.raises(
        CheckpointError, match=r"consolidated\.00\.pth, consolidated\.01\.pth: the parts of an original Py"
    ):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["some.safetensors", "some.bin", "some.pt", "some.pth"])
def test_path_of_a_file(name: str, tmp_path: Path) -> None:
    write_shards(tmp_path, {name: A, "model.safetensors": B})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(str(tmp_path / name))
    check_equal(checkpoint, A)
    assert (checkpoint.path, checkpoint.config) == (tmp_path, {"model_type": "llama"})


def test_tensors_come_in_file_order(tmp_path: Path) -> None:
    first, second = {"z": torch.zeros(2), "b": torch.zeros(2)}, {"a": torch.zeros(2)}
    write_shards(tmp_path, numbered("model", ".safetensors", first, second), "model.safetensors.index.json")
    checkpoint = open_checkpoint(str(tmp_path))
    placed = [(str(tensor.file), tensor.offset) for tensor in checkpoint.tensors.values()]
    assert placed == sorted(placed)
    assert list(checkpoint.tensors)[-1] == "a"


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "org" / "name", {"model.safetensors": A})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for reference in ("org/name", "./org/name", "~/org/name"):
        checkpoint = open_checkpoint(reference)
        check_equal(checkpoint, A)
        assert checkpoint.reference == reference


def test_config_and_metadata(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model.safetensors": A})
    (tmp_path / "model.safetensors").write_bytes(
        raw_file(
            {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
            tensor_bytes(A["a"]),
        )
    )
    (tmp_path / "config.json").write_text('\ufeff{"model_type": "llama", "rope": Infinity}')
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config == {"model_type": "llama", "rope": float("inf")}
    assert checkpoint.metadata == {"format": "pt"}


both = mapping(a=FIRST, b=SECOND)
BAD: list[tuple[str, dict[str, object], type[MergeError], str]] = [
    ("no files", {}, CheckpointError, r"no weights: .*the folder is empty"),
    ("no weights", {"config.json": b"{}"}, CheckpointError, r"no weights: .*\*\.safetensors .*found config\.json"),
    ("only optimizer", {"optimizer.pt": A}, CheckpointError, "no weights: .*found optimizer.pt"),
    ("gguf", {"model-Q4.gguf": b"GGUF"}, CheckpointError, "truncated: the header goes on after the end of the file"),
    ("h5", {"tf_model.h5": b"x"}, CheckpointError, r"found tf_model\.h5; convert them to safetensors"),
    (
        "adapter",
        {"adapter_config.json": b"{}", "adapter_model.safetensors": A},
        UnsupportedError,
        r"which is not a model by itself; write MODEL\+ADAPTER",
    ),
    ("adapter beside", {"adapter_config.json": b"{}", "model.safetensors": A}, UnsupportedError, "LoRA adapter"),
    (
        "two files",
        {"x.safetensors": A, "y.safetensors": B},
        CheckpointError,
        "2 weight files and no index.*x.saf.*y.saf",
    ),
    ("two indexes", {"x.safetensors.index.json": both, "y.safetensors.index.json": both}, CheckpointError, "2 indexes"),
    (
        "two sets",
        {"x-00001-of-00001.safetensors": A, "y-00001-of-00001.safetensors": B},
        CheckpointError,
        r"2 sets of shards.*x-\*-of-1\.safetensors, y-\*-of-1",
    ),
    ("shard missing", {SECOND: B}, NotFoundError, r"shard 1 of 2 is missing \(model-00001-of-00002\.safetensors\)"),
    (
        "too many shards",
        {"model-00003-of-00002.safetensors": B, **SHARDS},
        CheckpointError,
        "shard 3 of 2 is one too many",
    ),
    (
        "indexed file missing",
        {INDEX: both, FIRST: A},
        NotFoundError,
        rf"{SECOND}: no such file, but .*{INDEX} says .* 1 t",
    ),
    ("all missing", {INDEX: both}, NotFoundError, rf"{FIRST}: no such file"),
    ("index broken", {INDEX: b"{"}, CheckpointError, rf"{INDEX}: is not valid JSON: .*line 1"),
    ("index list", {INDEX: b"[]"}, CheckpointError, rf"{INDEX}: must be a JSON object, found a list"),
    ("index empty", {INDEX: b""}, CheckpointError, rf"{INDEX}: is not valid JSON"),
    ("index without map", {INDEX: b"{}"}, CheckpointError, rf"{INDEX}: must have a 'weight_map'"),
    ("index with empty map", {INDEX: mapping()}, CheckpointError, rf"{INDEX}: must have a 'weight_map'"),
    ("index, number", {INDEX: mapping(a=3)}, CheckpointError, r"tensor 'a': the name of its file .* found 3"),
    ("index, no name", {INDEX: mapping(a="")}, CheckpointError, r"tensor 'a': the name of its file .* found ''"),
    ("index, no weights", {INDEX: mapping(a="config.json")}, CheckpointError, "'config.json' is not a file of weights"),
    (
        "not in file said",
        {INDEX: mapping(a=SECOND, b=FIRST), **SHARDS},
        CheckpointError,
        f"'a' should be in {SECOND}, but",
    ),
    (
        "in no file",
        {INDEX: mapping(a=FIRST, b=SECOND, q=FIRST), **SHARDS},
        CheckpointError,
        "'q' .*is in no file of the",
    ),
    (
        "not in index",
        {INDEX: mapping(a=FIRST), FIRST: A | B},
        CheckpointError,
        f"tensor 'b' is not in the index {INDEX}",
    ),
    ("in two files", {FIRST: A, SECOND: A}, CheckpointError, f"tensor 'a' is in {FIRST} too"),
    ("no tensors", {"model.safetensors": {}}, CheckpointError, "holds no tensors"),
    ("empty file", {"model.safetensors": b""}, CheckpointError, r"model\.safetensors: the file is empty"),
    ("random", {"model.safetensors": b"\x89PNG" * 99}, CheckpointError, r"model\.safetensors: not a safetensors file"),
    (
        "random shard",
        {INDEX: both, FIRST: A, SECOND: b"<html>" * 9},
        CheckpointError,
        f"{SECOND}: not a safetensors file",
    ),
    ("lfs config", {"model.safetensors": b"version https://git-lfs.github.com/"}, CheckpointError, "Git LFS pointer"),
    (
        "config broken",
        {"model.safetensors": A, "config.json": b'{\n"a": 1,\n}'},
        CheckpointError,
        r"config\.json: .*line [23]",
    ),
    (
        "config list",
        {"model.safetensors": A, "config.json": b"[]"},
        CheckpointError,
        r"config\.json: must be a JSON obj",
    ),
    ("config bytes", {"model.safetensors": A, "config.json": b"\xff"}, CheckpointError, r"config\.json: is not UTF-8"),
    ("config deep", {"model.safetensors": A, "config.json": b"[" * 99999}, CheckpointError, r"config\.json: is nested"),
]


@pytest.mark.parametrize(("files", "kind", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_folder_is_refused(files: dict[str, object], kind: type[MergeError], message: str, tmp_path: Path) -> None:
    put(tmp_path, files)
    with pytest.raises(kind, match=message) as caught:
        open_checkpoint(str(tmp_path))
    assert str(caught.value).startswith(str(tmp_path))


OUTSIDE = ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "C:\\x.safetensors", "..\\x.safetensors"]


@pytest.mark.parametrize(
    "name", [*OUTSIDE, "\\\\host\\x.safetensors", "C:x.safetensors", "sub\\x.safetensors", "x\0.safetensors"]
)
def test_index_may_not_leave_the_folder(name: str, tmp_path: Path) -> None:
    write_shards(tmp_path, {"x.safetensors": A})
    put(tmp_path / "model", {INDEX: mapping(a=name)})
    with pytest.raises(CheckpointError, match="is not inside the checkpoint's folder") as caught:
        open_checkpoint(str(tmp_path / "model"))
    assert str(tmp_path / "model" / INDEX) in str(caught.value)


def test_link_of_an_index_may_not_leave_the_folder(tmp_path: Path) -> None:
    write_shards(tmp_path, {"x.safetensors": A})
    put(tmp_path / "model", {INDEX: mapping(a="y.safetensors")})
    (tmp_path / "model" / "y.safetensors").symlink_to("../x.safetensors")
    with pytest.raises(CheckpointError, match=r"'y\.safetensors' is a link that leaves the checkpoint's folder"):
        open_checkpoint(str(tmp_path / "model"))


def test_dead_link(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(NotFoundError, match=r"model\.safetensors: is a link to a file that is not there"):
        open_checkpoint(str(tmp_path))


def test_directory_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a directory"):
        open_checkpoint(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_pipe_in_place_of_a_file_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a regular file"):
        open_checkpoint(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("closed", ["model.safetensors", "config.json", "pytorch_model.bin", "."])
def test_no_permission(closed: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_shards(folder, {"pytorch_model.bin" if closed.endswith("bin") else "model.safetensors": A})
    (folder / "config.json").write_text("{}")
    target = folder / closed
    target.chmod(0)
    try:
        with pytest.raises(CheckpointError, match="cannot be read: permission denied"):
            open_checkpoint(str(folder))
    finally:
        target.chmod(0o700)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("./nope", "model './nope' not found: no such file or folder"),
        ("/nope/nope", "model '/nope/nope' not found: no such file or folder"),
        ("~/nope-nope", "model '~/nope-nope' not found: no such file or folder"),
        ("~no-such-user/x", "not found: no such file or folder"),
        ("a/b/c", "model 'a/b/c' not found: no such file or folder"),
        ("a\\b", r"model 'a\\\\b' not found: no such file or folder"),
        ("nope/model.safetensors", "not found: no such file or folder"),
        ("", "model '' not found: the path is empty"),
        ("a\0b", r"model 'a\\x00b' not found"),
        ("./\ud800", "not found"),
        ("./" + "x" * 5000, "not found: no such file or folder"),
    ],
)
def test_no_such_path(reference: str, message: str) -> None:
    with pytest.raises(NotFoundError, match=message):
        open_checkpoint(reference)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("x.gguf", CheckpointError, r"x\.gguf: truncated: the header goes on after the end"),
        ("adapter_model.safetensors", UnsupportedError, "which is not a model by itself"),
        ("config.json", CheckpointError, "not a checkpoint: give a folder, or a file that ends in .safetensors"),
    ],
)
def test_file_that_is_no_checkpoint(name: str, kind: type[MergeError], message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(kind, match=message):
        open_checkpoint(str(tmp_path / name))


def test_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model.safetensors": A})
    with pytest.raises(CheckpointError, match="revision 'main' is given, but the model is a folder"):
        open_checkpoint(str(tmp_path), revision="main")


def test_an_index_that_two_folders_share_is_compared_with_the_files_of_each(tmp_path: Path) -> None:
    for name in ("whole", "swapped", "lacking"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, SHARDS, INDEX)
    check_equal(open_checkpoint(str(tmp_path / "whole")), A | B)
    one, two = (tmp_path / "swapped" / name for name in SHARDS)
    one.rename(two.with_name("aside"))
    two.rename(one)
    two.with_name("aside").rename(two)
    next((tmp_path / "lacking" / name) for name in SHARDS).unlink()
    with pytest.raises(CheckpointError, match=r"should be in \S+, but is in \S+"):
        open_checkpoint(str(tmp_path / "swapped"))
    with pytest.raises(NotFoundError, match="no such file, but"):
        open_checkpoint(str(tmp_path / "lacking"))
    check_equal(open_checkpoint(str(tmp_path / "whole")), A | B)
