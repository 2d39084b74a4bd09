"""Targets that cannot be renamed: folders that came with a container's image, and volumes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from merganser.engine.merge import merge
from merganser.engine.output import publish, staging
from merganser.engine.output.ownership import MARKER
from merganser.errors import OutputError
from merganser.record import verify
from tests.engine.interrupting import Counter, Killed, in_a_process, shrink_blocks
from tests.making import make_recipe, read_files, write_llamas

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def recipe(tmp_path):
    return make_recipe("linear", write_llamas(tmp_path / "models", 2, layers=1), parameters={"weight": 0.5})


@pytest.fixture
def expected(tmp_path, recipe):
    return read_files(merge(recipe, tmp_path / "elsewhere" / "out").out)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def mount(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr}")


@pytest.fixture
def overlay(tmp_path):
    """A container's root, and a function that bakes what is in it into the image."""
    root = tmp_path / "root"
    for name in ("root", "image", "upper", "work"):
        (tmp_path / name).mkdir()
    layers = [tmp_path / "image"]

    def start():
        below = ":".join(map(str, layers))
        mount(
            "-t",
            "overlay",
            "overlay",
            "-o",
            f"lowerdir={below},upperdir={tmp_path}/upper,workdir={tmp_path}/work",
            root,
        )

    def bake():
        subprocess.run(["umount", root], check=True)
        layers.insert(0, (tmp_path / "upper").rename(tmp_path / f"layer{len(layers)}"))
        shutil.rmtree(tmp_path / "work")
        (tmp_path / "upper").mkdir()
        (tmp_path / "work").mkdir()
        start()

    start()
    yield root, bake
    subprocess.run(["umount", root], check=True)


def test_an_empty_folder_of_the_image(overlay, recipe, expected):
    root, bake = overlay
    (root / "out").mkdir()
    bake()
    with pytest.raises(OSError, match="cross-device"):
        (root / "out").rename(root / "other")
    assert read_files(merge(recipe, root / "out").out) == expected
    assert names(root) == ["out"]
    assert verify(root / "out").ok


def test_an_output_of_the_image_is_replaced(overlay, recipe, expected):
    root, bake = overlay
    merge(recipe, root / "out", out_shard_size=3000)
    bake()
    with pytest.raises(OutputError, match="--overwrite"):
        merge(recipe, root / "out")
    assert read_files(merge(recipe, root / "out", overwrite=True).out) == expected
    assert names(root) == ["out"]
    # and once more, now that some of it is of an upper layer
    assert read_files(merge(recipe, root / "out", overwrite=True).out) == expected
    assert names(root) == ["out"]


def test_what_a_user_added_to_an_output_of_the_image_stays(overlay, recipe):
    root, bake = overlay
    merge(recipe, root / "out", out_shard_size=3000)
    (root / "out" / "notes.txt").write_text("mine")
    before = read_files(root / "out")
    bake()
    with pytest.raises(OutputError, match=r"holds 'notes\.txt'"):
        merge(recipe, root / "out", overwrite=True)
    assert read_files(root / "out") == before


@pytest.mark.parametrize("target", [False, True])
def test_a_run_that_was_interrupted_when_the_image_was_made(overlay, recipe, expected, target):
    root, bake = overlay
    if target:
        (root / "out").mkdir()
    process = in_a_process(merge_and_die, recipe, root / "out", 12)
    process.join(60)
    assert names(root) == [".out.merging", ".out.merging.lock", *(["out"] if target else [])]
    bake()
    progress = Counter()
    result = merge(recipe, root / "out", progress=progress)
    assert result.record["continued"]
    assert read_files(result.out) == expected
    assert names(root) == ["out"]


@pytest.fixture
def volume(tmp_path):
    """A mount point; its parent is on another file system."""
    (tmp_path / "out").mkdir()
    mount("-t", "tmpfs", "tmpfs", tmp_path / "out")
    yield tmp_path / "out"
    subprocess.run(["umount", tmp_path / "out"], check=True)


@pytest.fixture
def bound(tmp_path):
    """A mount point of the same file system as its parent."""
    (tmp_path / "out").mkdir()
    (tmp_path / "host" / "a b").mkdir(parents=True)
    mount("--bind", tmp_path / "host" / "a b", tmp_path / "out")
    yield tmp_path / "out"
    subprocess.run(["umount", tmp_path / "out"], check=True)


def test_an_input_that_is_mounted_under_another_name_is_not_replaced(tmp_path, recipe, bound):
    merge(recipe, bound)
    before = read_files(bound)
    host = tmp_path / "host" / "a b"
    again = make_recipe("linear", [host, tmp_path / "models" / "m1"], parameters={"weight": 0.5})
    with pytest.raises(OutputError, match=r"an input of this merge, is in this folder"):
        merge(again, bound, overwrite=True)
    assert read_files(bound) == before


@pytest.mark.parametrize("place", ["volume", "bound"])
def test_a_volume(request, tmp_path, recipe, expected, place):
    out = request.getfixturevalue(place)
    process = in_a_process(merge_and_die, recipe, out, 12)
    process.join(60)
    assert names(out) == [".out.merging", ".out.merging.lock"]
    progress = Counter()
    merge(recipe, out, progress=progress)
    assert progress.continued
    assert read_files(out) == expected
    assert names(out) == sorted(expected | {"merge.json": b""})
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds 'notes\.txt'"):
        merge(recipe, out, overwrite=True)
    (out / "notes.txt").unlink()
    merge(recipe, out, overwrite=True, out_shard_size=3000)
    assert verify(out).ok
    assert MARKER not in names(out)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_folder_whose_parent_is_read_only(tmp_path, recipe, expected):
    (tmp_path / "parent" / "out").mkdir(parents=True)
    mount("--bind", tmp_path / "parent", tmp_path / "parent")
    try:
        mount("-o", "remount,bind,ro", tmp_path / "parent")
        with pytest.raises(OutputError, match="cannot be written: read-only file system"):
            merge(recipe, tmp_path / "parent" / "new")
        with pytest.raises(OutputError, match="cannot be written: read-only file system"):
            merge(recipe, tmp_path / "parent" / "out")
        mount("-t", "tmpfs", "tmpfs", tmp_path / "parent" / "out")
        try:
            assert read_files(merge(recipe, tmp_path / "parent" / "out").out) == expected
        finally:
            subprocess.run(["umount", tmp_path / "parent" / "out"], check=True)
    finally:
        subprocess.run(["umount", tmp_path / "parent"], check=True)


def refuse_folders(patch: pytest.MonkeyPatch, code: int = errno.EXDEV) -> None:
    """Let the system refuse to rename folders, as overlayfs does for those of its lower layers."""
    rename = Path.rename

    def refusing(self: Path, target: Path) -> Path:
        if self.is_dir():
            raise OSError(code, os.strerror(code))
        return rename(self, target)

    patch.setattr(Path, "rename", refusing)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EBUSY])
@pytest.mark.parametrize("before", ["nothing", "empty", "output"])
def test_folders_that_cannot_be_renamed(tmp_path, recipe, expected, monkeypatch, code, before):
    out = tmp_path / "out"
    if before == "empty":
        out.mkdir()
    elif before == "output":
        merge(recipe, out, out_shard_size=3000)
    refuse_folders(monkeypatch, code)
    merge(recipe, out, overwrite=True)
    assert read_files(out) == expected
    assert verify(out).ok
    assert names(tmp_path) == ["elsewhere", "models", "out"]


def merge_and_die(recipe, out, after):
    """Merge with small blocks and die after so many calls."""

    class Killer(Counter):
        def told(self):
            if self.calls == after:
                os.kill(os.getpid(), signal.SIGKILL)

    shrink_blocks(pytest.MonkeyPatch())
    merge(recipe, out, progress=Killer())


def stop_publishing(patch, after):
    """Stop at the change of this number that publishing makes to the names of files."""
    calls = []

    def counting(name, before):
        def call(self, *arguments, **keys):
            calls.append(name)
            if len(calls) == after:
                raise Killed
            return before(self, *arguments, **keys)

        return call

    publishing = staging.publish

    def watched(*arguments):
        for name in ("rename", "unlink", "rmdir"):
            patch.setattr(Path, name, counting(name, getattr(Path, name)))
        return publishing(*arguments)

    patch.setattr(staging, "publish", watched)


@pytest.mark.parametrize("before", ["nothing", "output"])
def test_a_kill_at_every_step_of_moving_files_is_continued(tmp_path, recipe, expected, monkeypatch, before):
    # what a killed process wrote is there, whether it reached the disk or not; waiting for it takes a third of the time
    monkeypatch.setattr(os, "fsync", lambda file: None)
    out, old = tmp_path / "out", tmp_path / "elsewhere" / "old"
    if before == "output":
        merge(recipe, old, out_shard_size=3000)
    continued = []
    for step in range(1, 40):
        if before == "output":
            shutil.copytree(old, out)
        with pytest.MonkeyPatch.context() as patch:
            refuse_folders(patch)
            stop_publishing(patch, step)
            try:
                merge(recipe, out, overwrite=True)
                break
            except Killed:
                pass
        # what has a record is complete, and what has none says that it is not
        if (out / "merge.json").exists():
            assert verify(out).ok
        elif out.exists() and names(out):
            assert MARKER in names(out)
        # there is none for a moment before a rename is tried, and when all is in its place
        journal = (tmp_path / ".out.merging" / "journal.jsonl").exists()
        published = not (tmp_path / ".out.merging" / "model.safetensors").exists() and MARKER not in names(out)
        with pytest.MonkeyPatch.context() as patch:
            refuse_folders(patch)
            progress = Counter()
            assert merge(recipe, out, overwrite=True, progress=progress).record["continued"] is journal
        # not a byte was merged again, but where all was in its place before
        assert progress.written_before == (progress.written if journal and not published else 0)
        continued.append(journal)
        assert read_files(out) == expected
        assert names(tmp_path) == ["elsewhere", "models", "out"]
        shutil.rmtree(out)
    assert 8 < step < 39
    assert sum(continued) >= 8


def test_a_file_that_cannot_be_moved_leaves_the_old_output(tmp_path, recipe, monkeypatch):
    out = merge(recipe, tmp_path / "out", out_shard_size=3000).out
    before = read_files(out)
    refused = OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def refusing(self, target):
        raise refused

    monkeypatch.setattr(publish.Path, "rename", refusing)
    with pytest.raises(OutputError, match="cannot be written: invalid cross-device link"):
        merge(recipe, out, overwrite=True)
    assert read_files(out) == before
    monkeypatch.undo()
    assert merge(recipe, out, overwrite=True, out_shard_size=3000).record["continued"] is False
