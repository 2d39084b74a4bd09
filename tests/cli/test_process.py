"""The command as users run it: a process of its own, with pipes, signals and exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

from merganser import __version__, verify
from tests.cli.tiny import linear, names, recipe, run, write

SCRIPT = Path(sysconfig.get_path("scripts")) / "merganser"


def process(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "merganser", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | more, timeout=120)


def test_script_and_module_are_one() -> None:
    assert process("--version").stdout == f"merganser {__version__}\n"
    if not SCRIPT.exists():
        pytest.skip("merganser is not installed in this environment")
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout == process("--help").stdout


def test_exit_codes_of_verify(models: Path) -> None:
    assert run("merge", recipe(models / "r.yaml", linear("a", "b")), "out").code == 0
    done = process("verify", "out")
    assert (done.returncode, done.stderr) == (0, "")
    (models / "out" / "model.safetensors").write_bytes(b"")
    assert process("verify", "out").returncode == 2


def test_wrong_recipe(models: Path) -> None:
    done = process("merge", "nope.yaml", "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nope.yaml: there is no such recipe file\n"
    assert process("merge").returncode == 2


def test_a_reader_that_has_enough(models: Path) -> None:
    """`merganser inspect --tensors | head` says nothing on stderr."""
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(1) for i in range(5000)}
    write(models / "long", tensors)
    command = [sys.executable, "-m", "merganser", "inspect", "long", "--tensors"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline().startswith("ArceeForCausalLM")
        running.stdout.close()
        assert running.stderr.read() == ""
        assert running.wait(60) == 141


def test_a_terminal_without_our_letters(models: Path) -> None:
    done = process("inspect", "a", PYTHONIOENCODING="iso8859-5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ArceeForCausalLM ? 19 tensors")


def test_progress_is_shown_on_a_terminal_only(models: Path) -> None:
    pty = pytest.importorskip("pty")
    file = recipe(models / "r.yaml", linear("a", "b"))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "merganser", "merge", str(file), "out"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as running:
        assert running.stdout is not None
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not piece:
                break
            shown += piece
        os.close(ours)
        told = running.stdout.read().decode()
        assert running.wait(60) == 0
    assert b"tensors" in shown
    assert told.startswith("linear · 2 models")
    assert "\x1b" not in told


def test_ctrl_c_and_on(models: Path) -> None:
    """The first run is stopped in the middle; the same command continues it, to the bytes of an undisturbed one."""
    for seed, name in enumerate("xyz"):
        generator = torch.Generator().manual_seed(seed)
        shape = (1024, 1024)
        big = {f"model.layers.{i}.dense.weight": torch.randn(shape, generator=generator) for i in range(8)}
        write(models / name, {key: tensor.bfloat16() for key, tensor in big.items()})
        (models / name / "config.json").write_text('{"model_type": "new", "num_hidden_layers": 8}')
    file = recipe(
        models / "r.yaml",
        {
            "merge_method": "ties",
            "base_model": "x",
            "models": [{"model": "y"}, {"model": "z"}],
            "parameters": {"weight": 1.0, "density": 0.5},
        },
    )
    command = [sys.executable, "-m", "merganser", "merge", str(file), "out", "--threads", "1"]
    journal = models / ".out.merging" / "journal.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
            assert running.poll() is None
            time.sleep(0.005)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert err == "error: out: stopped; run the same command again to continue\n"
    assert not (models / "out").exists()
    again = run("merge", file, "out", "--threads", "2")
    assert again.code == 0
    assert again.err.startswith("note: continuing an interrupted run: ")
    assert run("merge", file, "undisturbed", "--quiet").code == 0
    one, other = (models / name / "model.safetensors" for name in ("out", "undisturbed"))
    assert one.read_bytes() == other.read_bytes()
    assert verify(models / "out").ok
    assert not [name for name in names(models) if name.startswith(".")]


LEAVING = """
import atexit, os, sys, threading, types
class Torn:
    def __del__(self, write=os.write):
        write(1, b"taken apart\\n")
sys.modules["torch"] = types.ModuleType("torch")
sys.modules["torch"].torn = Torn()
def late():
    threading.main_thread().join()
    os.write(1, b"waited for\\n")
if sys.argv.pop(1) == "thread":
    threading.Thread(target=late).start()
atexit.register(print, "registered")
from merganser.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("kind", "argument", "code", "end"),
    [
        ("alone", "--version", 0, ["registered"]),
        ("alone", "--nonsense", 2, ["registered"]),
        ("thread", "--version", 0, ["waited for", "registered", "taken apart"]),
    ],
)
def test_torch_is_not_taken_apart_at_the_end(kind: str, argument: str, code: int, end: list[str]) -> None:
    """That takes half a second; but nothing that Python would wait for or call is left out."""
    command = [sys.executable, "-c", LEAVING, kind, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    said = [f"merganser {__version__}"] if code == 0 else []
    assert (done.returncode, done.stdout.splitlines()) == (code, said + end)
    assert ("No such option" in done.stderr) == (code == 2)


def test_libraries_are_loaded_without_a_search_for_garbage(models: Path) -> None:
    """All that importing torch makes stays alive; going through it took a twentieth of a short merge."""
    file = recipe(models / "r.yaml", linear("a", "b"))
    code = """
import atexit, gc, sys
found = []
gc.callbacks.append(lambda phase, told: found.append(phase) if "torch" in sys.modules else None)
atexit.register(lambda: print("searches", len(found), "torch" in sys.modules))
from merganser.__main__ import main
main()
"""
    command = [sys.executable, "-c", code, "merge", str(file), "out", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "searches 0 True\n"
