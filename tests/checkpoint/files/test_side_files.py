"""Which files beside the weights are copied, and that nothing from outside of a checkpoint is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merganser.checkpoint import open_checkpoint
from merganser.engine.agreement.side_files import read_chat_template
from merganser.engine.merge import merge, plan
from merganser.errors import CheckpointError, MergeError
from merganser.inspection import inspect
from tests.making import llama, llama_config, make_recipe, write_model

SECRET = '{"token": "hf_secret"}'
LEAVES = "is a link that leaves the checkpoint's folder"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "credentials.json").write_text(SECRET)
    return write_model(tmp_path / "m", llama(0), llama_config())


def linear(*models: Path, **keys: object) -> dict:
    return make_recipe("linear", list(models), parameters={"weight": 1.0}, **keys)


def link(name: str) -> Callable[[Path], None]:
    """Make a file of the model a link to a file outside of it."""

    def make(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).symlink_to(model.parent / "credentials.json")

    return make


def twice(model: Path) -> None:
    (model / "here.json").symlink_to("../credentials.json")
    (model / "tokenizer.json").symlink_to("here.json")


def a_folder(model: Path) -> None:
    other = model.parent / "templates"
    other.mkdir()
    (other / "key.jinja").write_text(SECRET)
    (model / "additional_chat_templates").symlink_to(other)


def as_if_from_the_hub(model: Path) -> None:
    """Lay a folder out as the Hub's cache does, with blobs that are a link."""
    (model.parent / "blobs").symlink_to("/etc")
    (model.parent / "snapshots").mkdir()
    model.rename(model.parent / "snapshots" / "m")
    model.symlink_to("snapshots/m")
    (model / "tokenizer.json").symlink_to("../../blobs/hostname")


LINKS: list[tuple[str, Callable[[Path], None]]] = [
    ("config", link("config.json")),
    ("tokenizer", link("tokenizer.json")),
    ("template", link("chat_template.jinja")),
    ("licence", link("LICENSE")),
    ("code", link("modeling_x.py")),
    ("template in its folder", link("additional_chat_templates/x.jinja")),
    ("link to a link", twice),
    ("folder", a_folder),
    ("cache", as_if_from_the_hub),
]


@pytest.mark.parametrize("make", [case[1] for case in LINKS], ids=[case[0] for case in LINKS])
def test_links_out_of_a_checkpoint_are_refused(make: Callable[[Path], None], model: Path, tmp_path: Path) -> None:
    make(model)
    for act in (lambda: inspect(model), lambda: plan(linear(model))):
        with pytest.raises(CheckpointError, match=LEAVES):
            act()
    with pytest.raises(CheckpointError, match=LEAVES):
        merge(linear(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_template_is_not_read_through_a_link(name: str, model: Path, tmp_path: Path) -> None:
    donor = write_model(tmp_path / "donor", llama(1), llama_config())
    (tmp_path / "key").write_text('{"chat_template": "secret"}')
    (model / name).symlink_to(tmp_path / "key")
    with pytest.raises(CheckpointError, match=LEAVES):
        plan(linear(donor, model, chat_template="auto"))
    # the files of a model that gives nothing but its weights are not looked at
    assert plan(linear(donor, model)).side_files == {}


def test_what_lies_beside_a_single_file_is_not_the_models(model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        (model / name).write_text("{}")
    file = model / "model.safetensors"
    assert set(plan(linear(file)).side_files) == {"tokenizer.json", "chat_template.jinja"}
    # a folder of downloads, say
    (model / "config.json").unlink()
    (model / "client_secret.json").write_text(SECRET)
    planned = plan(linear(file, chat_template="auto"))
    assert (planned.side_files, planned.chat_template) == ({}, None)
    assert any("has no config.json, so the output has none, and none of the other files" in w for w in planned.warnings)
    assert "client_secret.json" in plan(linear(model)).side_files


def test_links_inside_of_a_checkpoint_are_followed(model: Path) -> None:
    (model / "real.json").write_text("{}")
    (model / "tokenizer.json").symlink_to("real.json")
    assert [path.name for path in open_checkpoint(str(model)).side_files] == ["real.json", "tokenizer.json"]


def test_a_model_may_be_a_subfolder_of_a_repository_in_the_cache(model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "abc").write_text('{"x": 1}')
    (repository / "snapshots" / "main").mkdir(parents=True)
    moved = model.rename(repository / "snapshots" / "main" / "part")
    (moved / "tokenizer.json").symlink_to("../../../blobs/abc")
    assert open_checkpoint(str(moved)).side_files == [moved / "tokenizer.json"]
    (tmp_path / "models--org--other" / "blobs").mkdir(parents=True)
    (tmp_path / "models--org--other" / "blobs" / "abc").write_text(SECRET)
    (moved / "vocab.json").symlink_to("../../../../models--org--other/blobs/abc")
    with pytest.raises(CheckpointError, match=LEAVES):
        _ = open_checkpoint(str(moved)).side_files


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_what_is_no_file_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(
        CheckpointError, match=rf"{name}: cannot be read: is a named pipe, where a regular file is need"
    ):
        plan(linear(model))
    (model / name).unlink()
    (model / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=LEAVES):
        merge(linear(model), tmp_path / "out")
    (model / name).unlink()
    (model / name).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=f"file '{name}' is a link to a file that is not there; fetch"):
        merge(linear(model), tmp_path / "out")
    (model / name).unlink()
    (model / name).symlink_to(name)
    with pytest.raises(MergeError, match=name):
        merge(linear(model), tmp_path / "out")


def with_modules(model: Path) -> None:
    """Add what sentence-transformers puts behind a model."""
    kinds = ["", "1_Pooling", "2_Dense", "3_Normalize"]
    modules = [{"idx": i, "name": str(i), "path": path, "type": "x"} for i, path in enumerate(kinds)]
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (model / "2_Dense").mkdir()
    (model / "2_Dense" / "config.json").write_text("{}")
    save_file({"linear.weight": torch.ones(2, 2)}, model / "2_Dense" / "model.safetensors")
    (model / "onnx").mkdir()
    (model / "onnx" / "config.json").write_text("{}")


MODULES = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json"}


def test_modules_that_are_named_are_copied_and_said(model: Path, tmp_path: Path) -> None:
    with_modules(model)
    planned = plan(linear(model))
    assert set(planned.side_files) == MODULES
    assert any(
        text.startswith("2_Dense/model.safetensors: weights of modules that follow") for text in planned.warnings
    )
    out = merge(linear(model), tmp_path / "out").out
    for name in MODULES:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert set(plan(linear(out)).side_files) == MODULES


def test_routes_are_copied(model: Path) -> None:
    (model / "router_config.json").write_text(json.dumps({"types": {"query_0_Static": "x"}, "structure": {}}))
    (model / "query_0_Static").mkdir()
    (model / "query_0_Static" / "tokenizer.json").write_text("{}")
    assert set(plan(linear(model)).side_files) == {"query_0_Static/tokenizer.json", "router_config.json"}


def test_the_tokenizer_of_a_module_stays_with_it(model: Path, tmp_path: Path) -> None:
    test_routes_are_copied(model)
    other = write_model(tmp_path / "other", llama(1), llama_config(), side_files={"tokenizer.json": "{}"})
    planned = plan(linear(model, other, tokenizer_source=str(other)))
    assert planned.side_files["query_0_Static/tokenizer.json"].is_relative_to(model)
    assert planned.side_files["tokenizer.json"] == other / "tokenizer.json"


@pytest.mark.parametrize("content", [[], {}, 3, None, [3, {"path": 4}, {}], {"types": [1]}, "x", [[["x"]]]])
def test_other_files_of_these_names_name_nothing(content: object, model: Path) -> None:
    for name in ("modules.json", "router_config.json"):
        (model / name).write_text(json.dumps(content))
    assert set(plan(linear(model)).side_files) == {"modules.json", "router_config.json"}


@pytest.mark.parametrize("path", ["..", "../x", "/etc", "a/../../b", "C:\\x", "\\\\host\\x", "a\0b"])
def test_a_module_may_not_lie_elsewhere(path: str, model: Path) -> None:
    (model / "modules.json").write_text(json.dumps([{"path": path}]))
    with pytest.raises(
        CheckpointError, match=r"modules\.json: folder .* of a module is not inside the checkpoint's fol"
    ):
        plan(linear(model))


def test_names_of_modules_are_not_read_through_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("no JSON")
    (model / "modules.json").symlink_to(tmp_path / "key")
    with pytest.raises(CheckpointError, match=LEAVES):
        plan(linear(model))


def test_a_module_may_not_be_a_link_elsewhere(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text(SECRET)
    (model / "modules.json").write_text('[{"path": "1_Pooling"}]')
    (model / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=LEAVES):
        plan(linear(model))


TEMPLATES: list[tuple[bytes, str | None]] = [
    (b"\xef\xbb\xbf" + b'{"chat_template": "t"}', "t"),
    (b'{"chat_template": [{"name": "tool", "template": "a"}, {"name": "default", "template": "t"}]}', "t"),
    (b'{"chat_template": [{"name": "tool", "template": "a"}]}', None),
    (b'{"chat_template": null}', None),
]


@pytest.mark.parametrize(("content", "expected"), TEMPLATES)
def test_templates_of_a_tokenizer(content: bytes, expected: str | None, model: Path) -> None:
    (model / "tokenizer_config.json").write_bytes(content)
    assert read_chat_template(open_checkpoint(str(model))) == expected


BAD_TEMPLATES: list[tuple[str, bytes, str]] = [
    ("tokenizer_config.json", b"[]", "must be a JSON object, found a list"),
    ("tokenizer_config.json", b"{", "is not valid JSON"),
    ("tokenizer_config.json", b"\xff", "is not UTF-8 text"),
    ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template: must be a text, found 3"),
    ("tokenizer_config.json", b'{"chat_template": {"default": "x"}}', "chat_template: must be a text"),
    ("tokenizer_config.json", b'{"chat_template": [3]}', r"chat_template\[0\]: must be an object"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}]}', r"chat_template\[0\]: has no 'template'"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": [], "template": "x"}]}', "name: must be a text"),
    ("tokenizer_config.json", b'{"chat_template": "\\ud800"}', "half of a surrogate pair"),
    ("tokenizer_config.json", b'{"x": ' + b"[" * 300 + b"]" * 300 + b"}", "is nested too deeply"),
    ("tokenizer_config.json", b'{"x": ' + b"[" * 99_999, "is nested too deeply"),
    ("tokenizer_config.json", b'{"x": ' + b"1" * 400 + b"}", "a number of 400 digits"),
    ("chat_template.json", b"3", "must be a JSON object, found a number"),
    ("chat_template.jinja", b"\xff", "is not UTF-8 text"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_TEMPLATES)
def test_bad_templates(name: str, content: bytes, message: str, model: Path) -> None:
    (model / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        plan(linear(model, chat_template="auto"))
    assert str(caught.value).startswith(f"{model / name}: ")
