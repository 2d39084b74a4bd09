"""Headers and pickles that are well-formed and that no model has: large, long, or of another kind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merganser.checkpoint import open_checkpoint
from merganser.engine.merge import plan
from merganser.errors import CheckpointError
from merganser.jsonfile import exists, open_regular
from tests.making import make_recipe

ONE = torch.ones(2)


def sparse(folder: Path, shape: list[int]) -> Path:
    """Write a file of a terabyte that takes no room on the disk."""
    folder.mkdir()
    header = {"model.layers.0.mlp.up_proj.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 10**12]}}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 10**12)
    return folder


# What a plan does grew with the number of blocks of a tensor, or with its longest side.
@pytest.mark.parametrize(
    ("method", "parameters"), [("linear", {"weight": 1}), ("emr", {}), ("knots", {}), ("dare_ties", {"weight": 1})]
)
@pytest.mark.parametrize("shape", [[250_000_000_000], [250_000_000_000, 1], [500_000, 500_000]])
def test_a_tensor_of_a_terabyte_is_planned_at_once(
    method: str, parameters: Mapping[str, Any], shape: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, model = (sparse(tmp_path / name, shape) for name in "ab")
    from merganser.engine.sidecars import codec

    def counted(*args: Any) -> Any:
        for count, span in enumerate(spans(*args)):
            assert count < 10, "a plan goes through the blocks of a tensor"
            yield span

    spans = codec.spans
    monkeypatch.setattr(codec, "spans", counted)
    planned = plan(make_recipe(method, [model], base, parameters), max_memory=10**18)
    assert planned.tensors[0].nbytes == 10**12


def test_what_is_tried_for_its_memory_stays_small() -> None:
    from merganser.engine.kernels.peak_memory import _smaller

    assert _smaller((250_000_000_000, 1)) == (1024, 1)
    assert _smaller((100, 100)) == (91, 91)


NAMES: list[tuple[str, str]] = [
    ("a" * 60_000, "the name has 60,000 characters; at most 500 are accepted"),
    (".".join("1" * 30_000), "the name has 59,999 characters"),
    ("__metadata__", "safetensors keeps this name for itself"),
    ("model.\ud800.weight", "the name is not valid Unicode"),
]


@pytest.mark.parametrize(("name", "message"), NAMES, ids=["long", "deep", "metadata", "surrogate"])
def test_names_that_no_model_has(name: str, message: str, tmp_path: Path) -> None:
    torch.save({name: ONE}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: tensor '.*': {message}") as caught:
        open_checkpoint(str(tmp_path))
    assert len(str(caught.value)) < 400


def test_the_longest_name(tmp_path: Path) -> None:
    save_file({"a" * 500: ONE}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["a" * 500]
    save_file({"a" * 501: ONE}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has 501 characters"):
        open_checkpoint(str(tmp_path))


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_nested_tensors(tmp_path: Path) -> None:
    torch.save({"a": torch.nested.nested_tensor([ONE, torch.ones(3)])}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="tensor 'a': only dense tensors can be read, found nested"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_pipes_and_devices(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: .*(not a regular file|is a named pipe)"):
        open_checkpoint(str(tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=rf"{name}: .*(not a regular file|is a device)"):
        open_checkpoint(str(tmp_path))


def test_what_is_no_file_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(OSError, match="is a named pipe, where a regular file is needed"):
        open_regular(tmp_path / "pipe")


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    status = (tmp_path / "file").stat()
    monkeypatch.setattr(Path, "stat", lambda _: status)
    with pytest.raises(OSError, match="is a named pipe, where a regular file is needed"):
        open_regular(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "n" * 300])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no file can have this name|File name too long"):
        open_regular(tmp_path / name)
    assert not exists(tmp_path / name)


def twice(depth: int) -> bytes:
    return b'{"a": ' + b"[" * depth + b"]" * depth + b"}"


CONFIGS: list[tuple[bytes, str | None]] = [
    (twice(63), None),
    (twice(64), "is nested too deeply: at most 64 levels"),
    (twice(900), "is nested too deeply"),
    (twice(100_000), "is nested too deeply"),
    (b'{"hidden_size": ' + b"9" * 400 + b"}", "a number of 400 digits"),
    (b'{"hidden_size": ' + b"9" * 20 + b"}", None),
    (b'{"hidden_size": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
    (b'{"_hash": "' + b"9" * 400 + b'"}', None),
    (b'{"eps": 1e-05, "x": 0.' + b"1" * 400 + b"}", None),
    (b"\xef\xbb\xbf" + b'{"a": 1}', None),
    (b"\xff\xfe{\x00}\x00", "is not UTF-8 text"),
]


@pytest.mark.parametrize(("content", "message"), CONFIGS)
def test_configs(content: bytes, message: str | None, tmp_path: Path) -> None:
    save_file({"a": ONE}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    if message is None:
        assert plan(make_recipe("linear", [tmp_path], parameters={"weight": 1})).config
        return
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path))


LONG = ["x" * 1000] * 1000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors.index.json", {"weight_map": {"a": LONG}}),
        ("config.json", {"transformers_weights": LONG}),
        ("tokenizer_config.json", {"chat_template": {"a": LONG}}),
    ],
)
def test_what_others_wrote_is_cut_off_in_messages(name: str, content: Any, tmp_path: Path) -> None:
    if "index" not in name:
        save_file({"a": ONE}, tmp_path / "model.safetensors")
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        plan(make_recipe("linear", [tmp_path], parameters={"weight": 1}, chat_template="auto"))
    assert len(str(caught.value)) < 500
