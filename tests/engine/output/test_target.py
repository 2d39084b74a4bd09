"""What the target may be, and how it appears."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat

import pytest
from safetensors.torch import save_file

from merganser.engine.merge import merge
from merganser.engine.output import publish
from merganser.errors import CheckpointError, NonFiniteError, NotFoundError, OutputError
from tests.making import SIDE_FILES, llama, make_recipe, read_files, write_llamas

NOT_FOR_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


@pytest.fixture
def recipe(tmp_path):
    return make_recipe("linear", write_llamas(tmp_path / "models", 2), parameters={"weight": 0.5})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path, recipe):
    (tmp_path / "empty").mkdir()
    assert names(merge(recipe, tmp_path / "empty").out) == names(merge(recipe, tmp_path / "a" / "b" / "out").out)
    assert names(tmp_path) == ["a", "empty", "models"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_overwritten_that_merganser_did_not_write(tmp_path, recipe, overwrite):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    expected = "was not written by merganser" if overwrite else "exists; choose another target"
    with pytest.raises(OutputError, match=re.escape(f"{out}: {expected}")):
        merge(recipe, out, overwrite=overwrite)
    assert read_files(out) == {"mine.txt": b"precious"}
    assert names(tmp_path) == ["models", "out"]


def test_what_merganser_wrote_is_replaced_on_request_only(tmp_path, recipe):
    out = merge(recipe, tmp_path / "out", out_shard_size=3000).out
    before = read_files(out)
    with pytest.raises(OutputError, match="--overwrite"):
        merge(recipe, out)
    assert read_files(out) == before
    merge(recipe, out, overwrite=True)
    assert names(out) == ["README.md", "config.json", "merge.json", "model.safetensors"]
    assert names(tmp_path) == ["models", "out"]


@pytest.mark.parametrize("kind", ["file", "link", "dead link"])
def test_a_target_that_is_no_folder(tmp_path, recipe, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        (tmp_path / "real").mkdir(exist_ok=kind == "link")
        out.symlink_to(tmp_path / ("real" if kind == "link" else "gone"))
    with pytest.raises(OutputError, match="is not a folder" if kind == "file" else "is a link"):
        merge(recipe, out, overwrite=True)
    assert out.is_symlink() or out.read_text() == "mine"


def test_a_parent_that_is_a_file(tmp_path, recipe):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written: "):
        merge(recipe, tmp_path / "file" / "out")


@NOT_FOR_ROOT
def test_a_parent_that_cannot_be_written(tmp_path, recipe):
    parent = tmp_path / "parent"
    parent.mkdir(mode=0o555)
    with pytest.raises(OutputError, match="permission denied"):
        merge(recipe, parent / "out")


def test_the_current_folder_is_not_replaced(tmp_path, recipe, monkeypatch):
    here = tmp_path / "here"
    (here / "below").mkdir(parents=True)
    monkeypatch.chdir(here / "below")
    for out in (".", "..", here):
        with pytest.raises(OutputError, match="the current folder is in it"):
            merge(recipe, out)
    assert names(merge(recipe, "new").out) == names(merge(recipe, "new/../other").out)
    assert names(here / "below") == ["new", "other"]


def test_an_input_is_not_replaced(tmp_path, recipe):
    out = merge(recipe, tmp_path / "out").out
    again = make_recipe("linear", [out, tmp_path / "models" / "m0"], parameters={"weight": 1})
    with pytest.raises(OutputError, match="an input of this merge"):
        merge(again, out, overwrite=True)
    with pytest.raises(OutputError, match="an input of this merge"):
        merge(again, tmp_path, overwrite=True)


def test_the_target_appears_by_one_rename_when_all_is_in_it(tmp_path, recipe, monkeypatch):
    seen = []
    rename = publish.Path.rename

    def watched(folder, target):
        seen.append((target.exists(), names(folder)))
        rename(folder, target)
        seen.append((target.exists(), names(target)))

    monkeypatch.setattr(publish.Path, "rename", watched)
    out = merge(recipe, tmp_path / "out").out
    assert seen == [(False, names(out)), (True, names(out))]


def test_a_failing_rename_gives_the_old_folder_back(tmp_path, recipe, monkeypatch):
    out = merge(recipe, tmp_path / "out").out
    before = read_files(out)
    rename = publish.Path.rename

    def failing(self, target):
        if self.name == ".out.merging":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(publish.Path, "rename", failing)
    with pytest.raises(OutputError, match="cannot be written: input/output error"):
        merge(recipe, out, overwrite=True)
    assert read_files(out) == before


def test_what_a_run_left_that_was_killed_between_two_renames_goes_with_the_next(tmp_path, recipe):
    out = merge(recipe, tmp_path / "out").out
    before = read_files(out)
    out.rename(tmp_path / ".out.replaced")
    seen = []

    class Watcher:
        def start(self, plan, continued):
            seen.append(read_files(tmp_path / ".out.replaced"))

        def advance(self, read, written, tensors):
            pass

    merge(recipe, out, progress=Watcher())
    # it is the only complete output there is, until then
    assert seen == [before]
    assert read_files(out) == before
    assert names(tmp_path) == ["models", "out"]
    shutil.copytree(out, tmp_path / ".out.replaced")
    merge(recipe, out, overwrite=True)
    assert names(tmp_path) == ["models", "out"]
    (tmp_path / ".out.replaced").mkdir()
    merge(recipe, out, overwrite=True)
    assert names(tmp_path) == ["models", "out"]


def test_a_target_that_appears_meanwhile_is_kept(tmp_path, recipe):
    class Meddler:
        def start(self, plan, continued):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine.txt").write_text("precious")

        def advance(self, read, written, tensors):
            pass

    with pytest.raises(OutputError, match="out: exists"):
        merge(recipe, tmp_path / "out", progress=Meddler())
    assert names(tmp_path / "out") == ["mine.txt"]
    shutil.rmtree(tmp_path / "out")
    assert merge(recipe, tmp_path / "out").record["continued"]
    assert names(tmp_path) == ["models", "out"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, recipe, mask):
    before = os.umask(mask)
    try:
        out = merge(recipe, tmp_path / "out", out_shard_size=3000).out
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o666 & ~mask}


def test_nothing_is_left_when_an_input_is_at_fault(tmp_path, recipe):
    (model := tmp_path / "models" / "m1" / "model-00001-of-00002.safetensors").write_bytes(model.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        merge(recipe, tmp_path / "out")
    assert names(tmp_path) == ["models"]


class Saboteur:
    """Does something to the inputs between the plan and the first read."""

    def __init__(self, harm):
        self.harm = harm

    def start(self, plan, continued):
        self.harm()

    def advance(self, read, written, tensors):
        pass


def test_an_input_that_vanishes_is_named_and_not_taken_for_the_target(tmp_path, recipe):
    gone = tmp_path / "models" / "m0" / "model.safetensors"
    with pytest.raises(NotFoundError, match=re.escape(str(gone))):
        merge(recipe, tmp_path / "out", progress=Saboteur(gone.unlink))
    assert names(tmp_path) == ["models"]


def test_an_input_that_changes_during_the_run_is_noticed(tmp_path, recipe):
    file = tmp_path / "models" / "m0" / "model.safetensors"
    with pytest.raises(CheckpointError, match=f"{re.escape(str(file))}: was changed while it was merged"):
        merge(recipe, tmp_path / "out", progress=Saboteur(lambda: os.utime(file, ns=(1, 1))))
    assert names(tmp_path) == ["models"]


def test_a_side_file_that_vanishes_is_named(tmp_path):
    paths = write_llamas(tmp_path / "models", 2)
    (paths[0] / "tokenizer.json").write_text("{}")
    recipe = make_recipe("linear", paths, parameters={"weight": 0.5})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read: no such file"):
        merge(recipe, tmp_path / "out", progress=Saboteur((paths[0] / "tokenizer.json").unlink))


def test_errors_of_the_method_leave_nothing(tmp_path):
    paths = write_llamas(tmp_path / "models", 2)
    tensors = llama(0)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, paths[0] / "model.safetensors")
    with pytest.raises(NonFiniteError):
        merge(make_recipe("linear", paths, parameters={"weight": 1}), tmp_path / "out")
    assert names(tmp_path) == ["models"]


def test_side_files_are_the_donors_and_in_the_record(tmp_path):
    paths = write_llamas(tmp_path / "models", 2)
    for name, text in SIDE_FILES.items():
        (paths[0] / name).write_text(text)
    (paths[0] / "additional_chat_templates").mkdir()
    (paths[0] / "additional_chat_templates" / "tool.jinja").write_text("tools")
    (paths[1] / "vocab.txt").write_text("of the other")
    result = merge(make_recipe("linear", paths, parameters={"weight": 1}), tmp_path / "out")
    found = read_files(result.out)
    for name, text in {**SIDE_FILES, "additional_chat_templates/tool.jinja": "tools"}.items():
        assert found[name] == text.encode()
    assert "vocab.txt" not in found
    assert found.keys() == {output["file"] for output in result.record["outputs"]}
