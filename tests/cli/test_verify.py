"""`merganser verify`: every change of an output is found and named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from merganser import verify
from merganser.errors import CheckpointError, NotFoundError
from tests.cli.tiny import linear, recipe, run

NEW = "is new: it was not written by this merge, and loading may read it"
OTHER = "is new: it was not written by this merge; what loads a model does not read it"


@pytest.fixture
def out(models: Path) -> Path:
    assert run("merge", recipe(models / "r.yaml", linear("a", "b")), "out", "--quiet").code == 0
    return models / "out"


def test_as_written(out: Path) -> None:
    size = sum(file.stat().st_size for file in out.iterdir() if file.name != "merge.json")
    found = run("verify", "out")
    assert (found.code, found.err) == (0, "")
    assert found.out == f"out: 4 files, {size / 1000:.2f} KB, all as they were written\n"
    assert run("verify", "out", "--json").json["ok"] is True


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_one_bit(out: Path) -> None:
    flip(out / "model.safetensors")
    found = run("verify", "out")
    assert found.code == 2
    assert found.out.startswith("model.safetensors: has sha256 ")
    assert ", was written with " in found.out
    assert found.err == "error: out: not as written: 1 changed; merge again, or remove what does not belong there\n"


def test_every_kind_of_change_at_once(out: Path) -> None:
    (out / "tokenizer.json").unlink()
    (out / "config.json").write_text("{}")
    (out / "README.md").unlink()
    (out / "README.md").mkdir()
    shutil.copy(out / "model.safetensors", out / "model-00001-of-00002.safetensors")
    found = run("verify", "out")
    assert found.code == 2
    lines = dict(line.split(": ", 1) for line in found.out.splitlines())
    assert lines["tokenizer.json"] == "is missing"
    assert lines["README.md"] == "is not a file"
    assert lines["config.json"].startswith("has 2 bytes, was written with ")
    assert lines["model-00001-of-00002.safetensors"] == NEW
    assert "out: not as written: 2 changed, 1 missing, 1 new; merge again" in found.err
    described = run("verify", "out", "--json")
    assert described.code == 2
    assert described.json["ok"] is False
    assert described.json["extra"] == ["model-00001-of-00002.safetensors"]
    assert {file["file"]: file["state"] for file in described.json["files"]} == {
        "model.safetensors": "intact",
        "README.md": "changed",
        "config.json": "changed",
        "tokenizer.json": "missing",
    }


def test_progress_ends_at_all_bytes(out: Path) -> None:
    (out / "tokenizer.json").unlink()
    told: list[tuple[int, int]] = []
    verify(out, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0


LOADED = [
    "adapter_config.json", "adapter_model.safetensors", "modeling_own.py", "tokenizer_config.json", "vocab.txt",
    "special_tokens_map.json", "tokenizer.model", "chat_template.jinja", "model.safetensors.index.json", "consolidated.00.pth",
    "pytorch_model.bin", "generation_config.json", "model.gguf", "additional_chat_templates/tool.jinja", "library.so",
    "custom_generate/generate.py", "sidecars/index.json", "sidecars/m/parts.safetensors", "sidecars/notes", "bpe.codes",
    "my_vocabulary.txt", "params.json", "modules.json",
]  # fmt: skip
NOT_LOADED = ["notes.txt", "LICENSE", "figure.png", "recipe.yaml", "card.md", ".gitattributes"]


@pytest.mark.parametrize("name", LOADED)
def test_what_loading_may_read_is_found(name: str, out: Path) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("{}")
    found = verify(out)
    assert (found.ok, found.extra, found.beside) == (False, [name], [])
    shown = run("verify", "out")
    assert (shown.code, shown.out) == (2, f"{name}: {NEW}\n")
    assert shown.err == "error: out: not as written: 1 new; merge again, or remove what does not belong there\n"


def test_other_files_are_listed(out: Path) -> None:
    for name in NOT_LOADED:
        (out / name).write_text("mine")
    for folder in (".git/objects", "runs/weights", "checkpoint-500"):
        (out / folder).mkdir(parents=True)
        (out / folder / "model.safetensors").write_text("mine")
    found = verify(out)
    assert found.ok
    assert found.beside == sorted([*NOT_LOADED, ".git/", "runs/", "checkpoint-500/"])
    lines = run("verify", "out").out.splitlines()
    assert lines[0].endswith("all as they were written")
    assert lines[1:] == [f"{name}: {OTHER}" for name in found.beside]


def test_links_are_told(out: Path) -> None:
    elsewhere = out.parent / "elsewhere"
    elsewhere.mkdir()
    for name in ("config.json", "model.safetensors"):
        (out / name).rename(elsewhere / name)
    (out / "config.json").symlink_to(elsewhere / "config.json")
    (out / "model.safetensors").symlink_to("../nowhere")
    (out / "additional_chat_templates").symlink_to(elsewhere)
    (out / "pictures").symlink_to(elsewhere)
    found = verify(out)
    told = {file.file: (file.state, file.problem) for file in found.files if file.problem}
    assert told == {
        "config.json": ("link", f"is a link to {elsewhere / 'config.json'}, and was written as a file"),
        "model.safetensors": ("link", f"is a link to {out.parent / 'nowhere'}, and was written as a file"),
    }
    assert (found.extra, found.beside) == (["additional_chat_templates/"], ["pictures/"])
    assert "not as written: 2 replaced by links, 1 new" in run("verify", "out").err


def test_the_cache_of_the_hub_may_link_to_its_contents(out: Path) -> None:
    repository = out.parent / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "abc").mkdir(parents=True)
    for file in list(out.iterdir()):
        file.rename(repository / "blobs" / f"{file.name}-blob")
        (repository / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{file.name}-blob")
    assert verify(repository / "snapshots" / "abc").ok


@pytest.mark.parametrize("name", ["merge.json", "config.json"])
def test_a_pipe_is_no_file(name: str, out: Path) -> None:
    (out / name).unlink()
    os.mkfifo(out / name)
    found = run("verify", "out")
    assert found.code == 2
    if name == "merge.json":
        assert found.err == "error: out/merge.json: cannot be read: is a named pipe, where a regular file is needed\n"
    else:
        assert found.out == "config.json: is not a file\n"


def test_the_record_may_not_be_a_link_elsewhere(out: Path) -> None:
    (out / "merge.json").rename(out.parent / "record")
    (out / "merge.json").symlink_to("../record")
    with pytest.raises(CheckpointError, match=r"'merge\.json' is a link that leaves"):
        verify(out)


def test_records_of_earlier_versions_name_less(out: Path) -> None:
    record = json.loads((out / "merge.json").read_text())
    (out / "merge.json").write_text(json.dumps({"outputs": record["outputs"]}))
    assert verify(out).ok


def entry(**changes: Any) -> dict[str, Any]:
    return {"file": "model.safetensors", "bytes": 1, "sha256": "0" * 64} | changes


BROKEN = [
    ("{", "is not valid JSON"),
    ("[]", "must be a JSON object"),
    ("{}", "must have a list 'outputs'"),
    ({"outputs": {}}, "must have a list 'outputs'"),
    ({"outputs": []}, "must have a list 'outputs'"),
    ({"outputs": ["model.safetensors"]}, r"outputs\[0\]: must be an object with file, bytes and sha256"),
    ({"outputs": [entry(file=3)]}, "file must be the name of a file, got 3"),
    ({"outputs": [entry(file="")]}, "file must be the name of a file"),
    ({"outputs": [entry(file="a\0b")]}, "file must be the name of a file"),
    ({"outputs": [entry(file="\ud800")]}, "file must be the name of a file"),
    ({"outputs": [entry(file="../a/config.json")]}, "is not inside the folder"),
    ({"outputs": [entry(file="/etc/passwd")]}, "is not inside the folder"),
    ({"outputs": [entry(), entry(bytes="1")]}, r"outputs\[1\]: bytes must be a whole number"),
    ({"outputs": [entry(bytes=-1)]}, "bytes must be a whole number of at least 0, got -1"),
    ({"outputs": [entry(bytes=True)]}, "bytes must be a whole number"),
    ({"outputs": [entry(sha256="00")]}, "sha256 must be 64 hexadecimal digits, got '00'"),
    ({"outputs": [entry(sha256="g" * 64)]}, "sha256 must be 64 hexadecimal digits"),
]


@pytest.mark.parametrize(("record", "message"), BROKEN)
def test_broken_record(tmp_path: Path, record: Any, message: str) -> None:
    (tmp_path / "merge.json").write_text(record if isinstance(record, str) else json.dumps(record))
    with pytest.raises(CheckpointError, match=message) as caught:
        verify(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'merge.json'}: ")


def test_no_output(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing: no such folder"):
        verify(tmp_path / "nothing")
    with pytest.raises(NotFoundError, match=r"has no merge\.json; only what merganser wrote can be verified"):
        verify(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotFoundError, match="file: is not a folder"):
        verify(tmp_path / "file")
