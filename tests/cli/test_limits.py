"""What the system refuses ends in one message, with exit code 2, and without a traceback."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merganser import MergeError, load_recipe, merge, verify
from merganser.cli.printing.text import parse_size
from merganser.errors import MemoryLimitError, OutputError
from merganser.process import memory_here
from tests.cli.tiny import linear, names, recipe, run

FULL = Path("/dev/full")


def process(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "merganser", *map(str, arguments)]
    return subprocess.run(command, text=True, check=False, timeout=120, **more)


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", ["--help", "--version", "inspect a"])
def test_standard_output_on_a_full_disk(models: Path, arguments: str) -> None:
    with FULL.open("w") as full:
        done = process(*arguments.split(), stdout=full, stderr=subprocess.PIPE)
        assert done.stderr == "error: standard output: cannot be written: no space left on device\n"
        assert done.returncode == 2


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_standard_error_on_a_full_disk() -> None:
    """Nobody can be told."""
    with FULL.open("w") as full:
        assert process("merge", "nope.yaml", "out", stdout=full, stderr=full).returncode == 2


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_the_shell_closed(models: Path, closed: str) -> None:
    command = f"{sys.executable} -m merganser --version {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("target", ["/dev/full", "/dev/full/out", "/dev/null"])
def test_a_target_that_is_a_device(models: Path, target: str) -> None:
    found = run("merge", recipe(models / "r.yaml", linear("a", "b")), target, "--overwrite")
    assert found.code == 2
    assert found.err.startswith(f"error: {target}: ")
    assert Path("/dev/null").is_char_device()


def test_a_page_replaces_only_a_page(models: Path) -> None:
    assert run("merge", recipe(models / "r.yaml", linear("a", "b")), "out").code == 0
    (models / "thesis.html").write_text("mine")
    for target in ("thesis.html", "/dev/null"):
        found = run("report", "out", "--out", target, "--overwrite")
        assert (found.code, found.err) == (
            2,
            f"error: {target}: exists and is not a page by merganser; choose another file with --out\n",
        )
    assert (models / "thesis.html").read_text() == "mine"
    assert Path("/dev/null").is_char_device()


def test_the_current_folder_was_deleted(models: Path) -> None:
    recipe(models / "r.yaml", linear("a", "b"))
    (gone := models / "gone").mkdir()
    for arguments in (["merge", models / "r.yaml", models / "out"], ["verify", "out"]):
        command = [sys.executable, "-m", "merganser", *map(str, arguments)]
        script = f"cd {gone} && rmdir {gone} && exec {' '.join(command)}"
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (
            2,
            "error: the current folder was deleted; go to one that exists, with cd, and run the command again\n",
        )
        gone.mkdir()


def test_python_in_a_folder_that_was_deleted(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(models / "r.yaml", *(linear(str(models / "a"), str(models / "b")),))
    loaded = load_recipe(path)
    (gone := models / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(OutputError, match="out: cannot be written: No such file or directory"):
        merge(loaded, "out")
    assert merge(loaded, models / "out").out.is_dir()
    monkeypatch.chdir(models)


INTERRUPTED = """
import os, signal, sys
_, module, *arguments = sys.argv
sys.argv[1:] = arguments
class Finder:
    def find_spec(self, name, path, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from merganser.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["merganser.cli", "typer", "merganser.cli.report"])
def test_ctrl_c_while_modules_are_loaded(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: stopped\n")


def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    """As for what a shell script runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        command = [sys.executable, "-c", INTERRUPTED, "merganser.cli", "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def few_files() -> Any:
    """So many descriptors as are open, and 150 more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 150, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors cannot be counted")
def test_more_files_than_may_be_open(models: Path, few_files: None) -> None:
    count = 300
    for name in ("many", "others"):
        tensors = {f"t{i}": torch.ones(2) * i for i in range(count)}
        folder = models / name
        folder.mkdir()
        for i in range(count):
            save_file({f"t{i}": tensors[f"t{i}"]}, folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors")
        weights = {f"t{i}": f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    file = recipe(models / "r.yaml", linear("many", "others"))
    found = run("merge", file, "out", "--out-shard-size", "1")
    assert found.code == 0, found.err
    assert len(list((models / "out").glob("*.safetensors"))) == count
    assert run("merge", file, "out", "--out-shard-size", "1", "--overwrite").code == 0


@pytest.mark.parametrize("allowed", [0, 1])
def test_no_threads(models: Path, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    start, started = threading.Thread.start, []

    def refusing(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) > allowed:
            raise RuntimeError("can't start new thread")
        start(thread)

    file = recipe(models / "r.yaml", linear("a", "b"))
    monkeypatch.setattr(threading.Thread, "start", refusing)
    found = run("merge", file, "out")
    assert found.code == 2
    assert found.err.startswith("error: threads: the system starts no more of them; use fewer with --threads")
    assert names(models) == ["a", "b", "c", "r.yaml"]


def test_memory_of_the_process_is_limited(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_DATA: 210_000_000, resource.RLIMIT_AS: resource.RLIM_INFINITY}
    getrlimit = resource.getrlimit
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], -1) if kind in limits else getrlimit(kind))
    assert memory_here() == 210_000_000
    with pytest.raises(MemoryLimitError, match="210 MB are allowed"):
        merge(load_recipe(recipe(models / "r.yaml", linear("a", "b"))), "out")
    limits[resource.RLIMIT_AS] = 205_000_000
    assert memory_here() == 205_000_000


def test_too_little_memory_for_the_libraries() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (150_000_000, 150_000_000))

    done = process("plan", "r.yaml", capture_output=True, preexec_fn=limit)
    assert done.returncode == 2
    assert done.stderr.startswith("error: memory: this process may hold 150 MB (ulimit -d), and torch alone takes")


@pytest.mark.parametrize("size", ["9223372036854775808", "9" * 30 + "GB", "9" * 400, "9" * 5000 + "TiB"])
def test_a_size_beyond_64_bits(models: Path, size: str) -> None:
    found = run("merge", recipe(models / "r.yaml", linear("a", "b")), "out", "--out-shard-size", size)
    assert found.code == 2
    assert "expected a size below 8 EiB" in found.err
    assert len(found.err) < 1000
    assert parse_size("8000000TB") == 8 * 10**18


@pytest.mark.parametrize("name", ["n" * 300, "n" * 250, "x/" * 3000 + "out"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
@pytest.mark.parametrize("stages", [False, True])
def test_a_name_that_no_file_can_have(models: Path, name: str, more: list[str], stages: bool) -> None:
    documents = [linear("a", "b", name="first"), linear("first", "c")] if stages else [linear("a", "b")]
    found = run("merge", recipe(models / "r.yaml", *documents), name, *more)
    assert found.code == 2
    assert "cannot be written: " in found.err
    assert "Traceback" not in found.err
    assert names(models) in (["a", "b", "c", "r.yaml"], ["a", "b", "c", "r.yaml", "x"])


def test_a_name_that_is_not_utf_8(models: Path) -> None:
    out = os.fsdecode(b"o\xff\ntarget")
    made = merge(linear("a", "b"), out)
    assert made.out.is_dir()
    assert verify(out).ok
    done = process("merge", recipe(models / "r.yaml", linear("a", "b")), out, "--overwrite", capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert verify(out).ok


def test_a_parent_that_is_no_folder(models: Path) -> None:
    for stages in ([], [linear("a", "b", name="first")]):
        loaded = recipe(models / "r.yaml", *stages, linear("first" if stages else "a", "b"))
        with pytest.raises(MergeError, match="cannot be written: "):
            merge(loaded, models / "r.yaml" / "out")
