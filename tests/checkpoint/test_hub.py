"""Models of the Hub, against a small Hub of our own on this machine and against a cache without any."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from merganser.checkpoint import Checkpoint, open_checkpoint
from merganser.checkpoint.hub import is_hub_id
from merganser.errors import CheckpointError, MergeError, NotFoundError, UnsupportedError
from tests.checkpoint.making import Tensors, check_equal, write_shards
from tests.hub import SHA, TOKEN, Hub, serving

A: Tensors = {"a": torch.arange(4.0)}
B: Tensors = {"b": torch.ones(2, 3)}
SHARDS = {"model-00001-of-00002.safetensors": A, "model-00002-of-00002.safetensors": B}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path / "hub", monkeypatch) as found:
        yield found


def fill(folder: Path, shards: dict[str, Tensors], index: str | None = None, **others: str) -> None:
    write_shards(folder, shards, index)
    for name, text in {"config.json": '{"model_type": "llama"}', **others}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def fetch(tmp_path: Path, model: str = "org/name", revision: str | None = None) -> Checkpoint:
    return open_checkpoint(model, revision=revision, cache_dir=tmp_path / "cache")


OTHERS = {
    "tokenizer.json": "{}", "merges.txt": "", "chat_template.jinja": "{{ x }}", "modeling_x.py": "", "vocab.json": "{}",
    "additional_chat_templates/tool.jinja": "",
}  # fmt: skip
NOT_NEEDED = {
    "README.md": "", "tf_model.h5": "", "model.onnx": "", "x.gguf": "", "onnx/model.safetensors": "", "runs/x.json": "{}",
    "optimizer.pt": "", "figure.png": "",
}  # fmt: skip


def test_only_needed_files_are_fetched(hub: Hub, tmp_path: Path) -> None:
    more = {"pytorch_model.bin": B, "consolidated.safetensors": A}
    fill(hub.folder / "org" / "name", SHARDS | more, None, **OTHERS, **NOT_NEEDED)
    (hub.folder / "org" / "name" / INDEX).write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )
    checkpoint = fetch(tmp_path)
    check_equal(checkpoint, A | B)
    assert set(hub.fetched) == {"config.json", INDEX, *SHARDS, *OTHERS}
    assert {path.relative_to(checkpoint.path).as_posix() for path in checkpoint.side_files} == set(OTHERS)
    assert (checkpoint.reference, checkpoint.config) == ("org/name", {"model_type": "llama"})
    assert checkpoint.path.is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize("shards", [{"model.safetensors": A}, {"pytorch_model.bin": A}, {"my-own.safetensors": A}])
def test_single_file(shards: dict[str, Tensors], hub: Hub, tmp_path: Path) -> None:
    fill(hub.folder / "org" / "name", shards)
    check_equal(fetch(tmp_path), A)
    assert set(hub.fetched) == {"config.json", *shards}


def test_folders_of_modules_are_fetched(hub: Hub, tmp_path: Path) -> None:
    modules = {"modules.json": '[{"path": ""}, {"path": "1_Pooling"}]', "1_Pooling/config.json": "{}"}
    fill(hub.folder / "org" / "name", {"model.safetensors": A}, **modules, **NOT_NEEDED)
    checkpoint = fetch(tmp_path)
    assert {path.relative_to(checkpoint.path).as_posix() for path in checkpoint.side_files} == set(modules)
    assert set(hub.fetched) == {"config.json", "model.safetensors", *modules}


def test_revision_is_honoured(hub: Hub, tmp_path: Path) -> None:
    fill(hub.folder / "org" / "name", {"model.safetensors": A})
    check_equal(fetch(tmp_path, revision="v1"), A)
    assert hub.revisions == {"v1", SHA}


def test_second_time_needs_no_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(hub.folder / "org" / "name", SHARDS, INDEX, **NOT_NEEDED)
    fetch(tmp_path)
    hub.fetched.clear()
    check_equal(fetch(tmp_path), A | B)
    assert hub.fetched == []
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    check_equal(fetch(tmp_path), A | B)
    hub.refusal = 503, ""
    check_equal(fetch(tmp_path), A | B)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check_equal(fetch(tmp_path), A | B)


@pytest.mark.parametrize(
    ("refusal", "kind", "message"),
    [
        ((401, "RepoNotFound"), NotFoundError, "no such folder, and the Hub has no such model, or it is private"),
        ((403, "GatedRepo"), CheckpointError, "access is restricted; accept its terms on its page"),
        ((429, ""), CheckpointError, "the Hub answered with status 429"),
        ((500, ""), NotFoundError, "the cache does not have it, and the Hub cannot be reached"),
    ],
)
def test_refusals(
    refusal: tuple[int, str], kind: type[MergeError], message: str, hub: Hub, tmp_path: Path,
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    hub.refusal = refusal
    with pytest.raises(kind, match=message) as caught:
        fetch(tmp_path)
    assert "'org/name'" in str(caught.value)
    shown = (str(caught.value), caplog.text, *capfd.readouterr())
    assert all(TOKEN not in text for text in shown)


def test_unknown_model_and_revision(hub: Hub, tmp_path: Path) -> None:
    fill(hub.folder / "org" / "name", {"model.safetensors": A})
    with pytest.raises(
        NotFoundError, match="model 'org/nope' not found: no such folder, and the Hub has no such model"
    ):
        fetch(tmp_path, "org/nope")
    with pytest.raises(NotFoundError, match=r"model 'org/name' not found: .* no revision 'v9'"):
        fetch(tmp_path, revision="v9")


def test_bad_repositories_are_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    fill(hub.folder / "org" / "lora", {"adapter_model.safetensors": A}, **{"adapter_config.json": "{}"})
    fill(hub.folder / "org" / "none", {})
    fill(hub.folder / "org" / "gguf", {}, **{"x-Q4_K_M.gguf": "", "x-Q8_0.gguf": ""})
    with pytest.raises(UnsupportedError, match=r"org/lora on the Hub: .*a LoRA adapter"):
        fetch(tmp_path, "org/lora")
    with pytest.raises(
        CheckpointError, match=r"org/gguf on the Hub: .*2 weight files and no index, it is not clear which"
    ):
        fetch(tmp_path, "org/gguf")
    with pytest.raises(CheckpointError, match="org/none on the Hub: no weights"):
        fetch(tmp_path, "org/none")
    assert hub.fetched == []


def test_hostile_index_fetches_nothing_else(hub: Hub, tmp_path: Path) -> None:
    weight_map = {"a": "../../x.safetensors", "b": "README.md", "c": ["x"]}
    fill(hub.folder / "org" / "name", {}, **{INDEX: json.dumps({"weight_map": weight_map}), "README.md": ""})
    with pytest.raises(CheckpointError, match=r"file '\.\./\.\./x\.safetensors' is not inside the checkpoint's folder"):
        fetch(tmp_path)
    assert not list(tmp_path.glob("**/x.safetensors"))


def test_what_exists_is_never_looked_up(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(hub.folder / "org" / "name", {"model.safetensors": B})
    write_shards(tmp_path / "here" / "org" / "name", {"model.safetensors": A})
    monkeypatch.chdir(tmp_path / "here")
    check_equal(fetch(tmp_path), A)
    assert hub.revisions == set()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub lays it out, contents in blobs and links to them, and no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    home = tmp_path / "cache" / "models--org--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(SHA)
    write_shards(home / "blobs", SHARDS, INDEX)
    (home / "blobs" / "tokenizer.json").write_text("{}")
    folder = home / "snapshots" / SHA
    folder.mkdir(parents=True)
    for blob in list((home / "blobs").iterdir()):
        oid = Hub.oid(blob)
        (folder / blob.name).symlink_to(f"../../blobs/{oid}")
        blob.rename(home / "blobs" / oid)
    return folder


def test_links_into_the_blobs_of_a_cache_are_followed(offline: Path, tmp_path: Path) -> None:
    for checkpoint in fetch(tmp_path), open_checkpoint(str(offline)):
        check_equal(checkpoint, A | B)
        assert checkpoint.side_files == [offline / "tokenizer.json"]
    (tmp_path / "shortcut").symlink_to(offline)
    check_equal(open_checkpoint(str(tmp_path / "shortcut")), A | B)


def test_links_elsewhere_in_a_cache_are_not_followed(offline: Path, tmp_path: Path) -> None:
    write_shards(tmp_path, {"x.safetensors": A})
    (offline / "model-00001-of-00002.safetensors").unlink()
    (offline / "model-00001-of-00002.safetensors").symlink_to(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is a link that leaves the checkpoint's folder"):
        fetch(tmp_path)


def test_offline_and_not_cached(offline: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"model 'org/nope' not found: no such folder, the cache .* HF_HUB_OFFLINE"):
        fetch(tmp_path, "org/nope")
    with pytest.raises(NotFoundError, match="does not have it at revision 'v1'"):
        fetch(tmp_path, revision="v1")
    (offline / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"model-00002-of-00002\.safetensors: no such file"):
        fetch(tmp_path)
    (offline / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(NotFoundError, match="the cache has no weights of it"):
        fetch(tmp_path)


@pytest.mark.parametrize("reference", ["org/name", "gpt2", "meta-llama/Llama-3.1-8B", "a_b/c.d-e"])
def test_ids_of_the_hub(reference: str) -> None:
    assert is_hub_id(reference)


@pytest.mark.parametrize(
    "reference",
    ["./a", "../a", "~/a", "/a", "a/b/c", "a\\b", "C:\\a", "org/", "/org", "a b", "x/model.safetensors", "x.gguf"],
)
def test_paths_are_not_ids(reference: str) -> None:
    assert not is_hub_id(reference)


@pytest.mark.parametrize("reference", ["org/na--me", "org/name.", "a/" + "x" * 120])
def test_impossible_id(reference: str, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="not found: no such folder, and not a valid id of the Hub"):
        fetch(tmp_path, reference)
