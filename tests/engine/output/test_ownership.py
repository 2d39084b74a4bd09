"""What is not ours is never removed, whatever its name and wherever it lies."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from merganser.engine.merge import merge
from merganser.engine.output.ownership import MARKER, claim, claimed, survey
from merganser.engine.run import Interrupted
from merganser.errors import OutputError
from tests.engine.interrupting import Stopper
from tests.making import make_recipe, read_files, write_llamas


@pytest.fixture
def recipe(tmp_path):
    return make_recipe("linear", write_llamas(tmp_path / "models", 2, layers=1), parameters={"weight": 0.5})


@pytest.fixture
def out(tmp_path, recipe):
    return merge(recipe, tmp_path / "out", out_shard_size=3000).out


def everything(folder):
    """Kind, content and time of all below a folder; links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        text = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path)] = (status.st_mode, text, status.st_mtime_ns if path.is_file() else None)
    return found


def refused(tmp_path, recipe, name, **options):
    """Merge into `out`, which is refused, naming what is in the way; nothing changes."""
    before = everything(tmp_path)
    with pytest.raises(OutputError) as caught:
        merge(recipe, tmp_path / "out", overwrite=True, **options)
    assert everything(tmp_path) == before
    assert name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "{",
        '{"outputs": []}',
        '{"outputs": [{"file": "thesis.txt"}]}',
        '{"outputs": {"thesis.txt": 1}}',
        '{"outputs": [{"file": "../thesis.txt", "bytes": 4, "sha256": "%s"}]}' % ("0" * 64),
        '{"a":' * 100_000,
        '{"left": "a.txt", "right": "b.txt", "strategy": "ours"}',
    ],
)
def test_any_other_merge_json_proves_nothing(tmp_path, recipe, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    (tmp_path / "out" / "merge.json").write_text(text)
    assert "was not written by merganser" in refused(tmp_path, recipe, "merge.json")


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "dead link"])
def test_a_merge_json_that_is_no_file(tmp_path, recipe, out, kind):
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    record = out / "merge.json"
    if kind == "folder":
        record.mkdir()
    elif kind == "fifo":
        os.mkfifo(record)
    else:
        real = merge(recipe, tmp_path / "other").out
        record.symlink_to(real / ("merge.json" if kind == "link" else "gone"))
    refused(tmp_path, recipe, "thesis.txt" if kind == "folder" else "'merge.json'")


@pytest.mark.parametrize(
    "name", ["notes.txt", "a/b/thesis.tex", ".hidden", "model.safetensors", "recipe.yaml", "report.html"]
)
def test_a_file_that_was_added(tmp_path, recipe, out, name):
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    refused(tmp_path, recipe, repr(name))


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "link to a folder", "dead link"])
def test_what_is_no_file(tmp_path, recipe, out, kind):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    added = out / "added"
    if kind == "folder":
        added.mkdir()
    elif kind == "fifo":
        os.mkfifo(added)
    else:
        added.symlink_to(tmp_path / {"link": "mine/thesis.txt", "link to a folder": "mine", "dead link": "gone"}[kind])
    refused(tmp_path, recipe, "'added'")


def test_the_recipe_lies_in_the_output(tmp_path, recipe, out):
    (out / "recipe.yaml").write_text(json.dumps(recipe))
    before = everything(tmp_path)
    with pytest.raises(OutputError, match=r"out: holds 'recipe\.yaml', which merganser did not write"):
        merge(out / "recipe.yaml", out, overwrite=True)
    assert everything(tmp_path) == before


def test_a_model_that_was_trained_further_and_saved_over_the_merged_one(tmp_path, recipe, out):
    """It has the same name and the same size."""
    file = next(out.glob("model-00001*"))
    size = file.stat().st_size
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    if file.stat().st_size != size:
        data = bytearray(file.read_bytes().ljust(size, b"\0")[:size])
        file.write_bytes(data)
    message = refused(tmp_path, recipe, repr(file.name))
    assert "sha256 differs" in message


def test_a_file_of_another_size_is_noticed_without_hashing(tmp_path, recipe, out, monkeypatch):
    (out / "README.md").write_text("my own words")
    monkeypatch.setattr("merganser.engine.output.ownership.sha256_of_file", lambda path: pytest.fail("was hashed"))
    assert "has 12 bytes, and was written with" in refused(tmp_path, recipe, "'README.md'")


def test_weights_of_an_input_that_are_links_into_the_target(tmp_path, out):
    """A user keeps another model's weights beside our output; a checkpoint of links leads there."""
    (out / "b.safetensors").write_bytes((tmp_path / "models" / "m0" / "model.safetensors").read_bytes())
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(out / "b.safetensors")
    (linked / "config.json").write_bytes((tmp_path / "models" / "m0" / "config.json").read_bytes())
    recipe = make_recipe("linear", [tmp_path / "models" / "m0", linked], parameters={"weight": 0.5})
    refused(tmp_path, recipe, "an input of this merge, is in this folder")


def test_an_output_that_lost_a_file_is_replaced(tmp_path, recipe, out):
    (out / "README.md").unlink()
    merge(recipe, out, overwrite=True)
    assert (out / "README.md").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "out"]


def test_our_own_page_goes_with_the_output(tmp_path, recipe, out):
    (out / "report.html").write_text('<!doctype html>\n<html>\n<meta name="generator" content="merganser 1.0">\n')
    merge(recipe, out, overwrite=True)
    assert not (out / "report.html").exists()


def test_a_file_that_is_changed_while_a_merge_runs(tmp_path, recipe, out):
    class Meddler:
        def start(self, plan, continued):
            (out / "config.json").write_text("{}" + " " * ((out / "config.json").stat().st_size - 2))

        def advance(self, read, written, tensors):
            pass

    with pytest.raises(OutputError, match=r"out: holds 'config\.json', which was changed during the run"):
        merge(recipe, out, overwrite=True, progress=Meddler())
    assert (out / "config.json").read_text().strip() == "{}"
    assert (out / "merge.json").exists()


def test_a_file_that_is_added_while_a_merge_runs(tmp_path, recipe, out):
    class Meddler:
        def start(self, plan, continued):
            (out / "notes.txt").write_text("mine")

        def advance(self, read, written, tensors):
            pass

    with pytest.raises(OutputError, match=r"out: holds 'notes\.txt', which merganser did not write"):
        merge(recipe, out, overwrite=True, progress=Meddler())
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert merge(recipe, out, overwrite=True).record["continued"]


def test_what_was_changed_since_it_was_looked_at_is_not_removed(tmp_path, out):
    found = survey(out)
    (out / "config.json").write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(OutputError, match=r"'config\.json', which was changed during the run"):
        found.remove()
    assert everything(tmp_path) == before
    found = survey(out, hashing=False, skip={"config.json"})
    (out / "notes.txt").write_text("mine")
    found.remove()
    assert {path.name for path in out.iterdir()} == {"config.json", "notes.txt"}


def test_an_old_output_that_cannot_be_removed_is_said(tmp_path, recipe, out, monkeypatch):
    unlink = Path.unlink

    def refuse(path, missing_ok=False):
        if path.parent.name == ".out.replaced" and path.name == "config.json":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        (warning,) = merge(recipe, out, overwrite=True).record["warnings"]
    left = tmp_path / ".out.replaced"
    assert warning == (
        f"{left}: the replaced output could not be removed ({left / 'config.json'}: Operation not permitted); "
        "the new output is complete"
    )
    assert left.exists()
    # the next run removes it
    assert merge(recipe, out, overwrite=True).record["warnings"] == []
    assert not left.exists()


PLACES = [".out.merging", ".out.replaced"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["file in it", "folder in it", "link in it", "link", "file", "record"])
@pytest.mark.parametrize("fresh", [False, True])
def test_what_a_user_put_beside_the_target(tmp_path, recipe, out, place, kind, fresh):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    planted = tmp_path / place
    if kind == "file":
        planted.write_text("mine")
    elif kind == "link":
        planted.symlink_to(mine)
    else:
        planted.mkdir()
        if kind == "file in it":
            (planted / "thesis.txt").write_text("mine")
        elif kind == "folder in it":
            (planted / "a" / "b").mkdir(parents=True)
            (planted / "a" / "b" / "thesis.txt").write_text("mine")
        elif kind == "link in it":
            (planted / "thesis").symlink_to(mine)
        elif kind == "record":
            shutil.copy(out / "merge.json", planted)
            (planted / "model-00001-of-00002.safetensors").write_text("mine")
    refused(tmp_path, recipe, place, fresh=fresh)


@pytest.mark.usefixtures("small_blocks")
def test_what_was_done_is_kept_when_something_else_is_in_the_way(tmp_path, recipe):
    stop(recipe, tmp_path / "out")
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "thesis.txt").write_text("mine")
    refused(tmp_path, recipe, "thesis.txt")
    shutil.rmtree(tmp_path / ".out.replaced")
    assert merge(recipe, tmp_path / "out").record["continued"]


@pytest.mark.parametrize("place", [".out.merging.lock"])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "fifo"])
def test_a_lock_that_is_not_ours(tmp_path, recipe, place, kind):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    planted = tmp_path / place
    if kind == "file":
        planted.write_text("mine")
    elif kind == "folder":
        planted.mkdir()
    elif kind == "fifo":
        os.mkfifo(planted)
    else:
        planted.symlink_to(mine)
    refused(tmp_path, recipe, place)


def stop(recipe, out):
    with pytest.raises(Interrupted):
        merge(recipe, out, progress=Stopper(9), threads=1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("kind", ["added", "folder", "link", "fifo", "hard link", "journal"])
def test_what_a_user_put_into_the_growing_output(tmp_path, recipe, kind, fresh):
    stop(recipe, tmp_path / "out")
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    folder = tmp_path / ".out.merging"
    shard = folder / ("journal.jsonl" if kind == "journal" else "model.safetensors")
    if kind == "added":
        shard = folder / "notes.txt"
        shard.write_text("mine")
    else:
        shard.unlink()
    if kind == "folder":
        shard.mkdir()
        (shard / "notes.txt").write_text("mine")
    elif kind == "fifo":
        os.mkfifo(shard)
    elif kind == "hard link":
        os.link(mine, shard)
    elif kind in ("link", "journal"):
        shard.symlink_to(mine)
    refused(tmp_path, recipe, "notes.txt" if kind == "folder" else shard.name, fresh=fresh)


def test_a_failed_run_removes_only_what_it_made(tmp_path, recipe):
    class Meddler:
        def start(self, plan, continued):
            (tmp_path / ".out.merging" / "notes.txt").write_text("mine")
            os.utime(tmp_path / "models" / "m0" / "model.safetensors", ns=(1, 1))

        def advance(self, read, written, tensors):
            pass

    with pytest.raises(Exception, match="was changed while it was merged"):
        merge(recipe, tmp_path / "out", progress=Meddler())
    assert (tmp_path / ".out.merging" / "notes.txt").read_text() == "mine"


def test_a_marker_that_was_cut_off_lists_the_whole_lines(tmp_path):
    claim(tmp_path, ["a.txt", "b\n\udcff.txt", "deep/"])
    assert claimed(tmp_path) == {MARKER, "a.txt", "b\n\udcff.txt", "deep/"}
    for name in ("a.txt", "b\n\udcff.txt", "deep/er/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("ours")
    found = survey(tmp_path)
    assert [*found.files][-1] == MARKER
    marker = tmp_path / MARKER
    whole = marker.read_bytes()
    marker.write_bytes(whole[:-2])
    with pytest.raises(OutputError, match=re.escape(r"'deep/er/c.txt', which merganser did not write")):
        survey(tmp_path)
    claim(tmp_path, ["deep/"])
    assert claimed(tmp_path) == {MARKER, "a.txt", "b\n\udcff.txt", "deep/"}
    for cut in (0, 5):
        marker.write_bytes(whole[:cut])
        assert claimed(tmp_path) == {MARKER}
        claim(tmp_path, ["a.txt", "b\n\udcff.txt", "deep/"])
        assert marker.read_bytes() == whole


def test_a_marker_that_another_program_wrote(tmp_path, recipe):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text('"thesis.txt"\n')
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    refused(tmp_path, recipe, MARKER)
    (tmp_path / "out" / "thesis.txt").unlink()
    refused(tmp_path, recipe, MARKER)


NAMES = st.sampled_from(["a", "b", "deep/c", "deep/er/d", "merge.json", ".merganser", ".stage.json"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.dictionaries(NAMES, st.binary(max_size=40), max_size=5))
def test_arbitrary_folders_are_never_ours(tmp_path_factory, files):
    """Whatever the files hold: without a record or marker of ours, none of them is removed."""
    folder = tmp_path_factory.mktemp("any")
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    before = read_files(folder)
    try:
        survey(folder).remove()
    except OutputError:
        assert read_files(folder) == before
    else:
        assert not any(files.values())
        assert set(files) <= {MARKER}
