"""Kernels compiled ahead of time: kept, found again, and done without where the cache is of no use."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from merganser.engine.kernels import compiled as ahead
from merganser.engine.kernels.devices import has_compiler
from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.method.registry import get_method

needs_compiler = pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="needs a C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "merganser" / "compiled" / "ahead"
    ahead.end_compiler()


def merge(compiled, shape=(50, 40)):
    generator = torch.Generator().manual_seed(0)
    models = [torch.randn(shape, generator=generator) for _ in range(2)]
    return merge_tensor(get_method("linear"), None, models, {"weight": [0.3, 0.7]}, compiled=compiled)


@pytest.mark.slow
@needs_compiler
def test_a_kernel_is_compiled_once_and_serves_all_sizes(cache, monkeypatch):
    assert torch.equal(merge(True), merge(False))
    (library,) = cache.glob("*.so")
    ahead.end_compiler()
    monkeypatch.setattr(subprocess, "Popen", None)
    assert torch.equal(merge(True, (7, 300)), merge(False, (7, 300)))
    assert list(cache.iterdir()) == [library]


@pytest.mark.slow
@needs_compiler
def test_a_kernel_with_custom_operators_is_a_package(cache):
    base, *models = torch.randn((3, 64, 50), generator=torch.Generator().manual_seed(0))
    fused, eager = (
        merge_tensor(get_method("della"), base, models, {"weight": 0.5, "density": 0.5}, compiled=compiled)
        for compiled in (True, False)
    )
    torch.testing.assert_close(fused, eager, rtol=1e-6, atol=1e-6)
    assert [path.suffix for path in cache.iterdir()] == [".pt2"]


@pytest.mark.slow
@needs_compiler
def test_kernels_take_statistics_over_rows(cache):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 70, generator=generator)
    model = base + torch.randn(300, 70, generator=generator) * 0.01
    method = get_method("arcee_fusion")
    # the last block has one row, and is computed eagerly
    fused, eager = (merge_tensor(method, base, [model], compiled=compiled, block=13 * 70) for compiled in (True, False))
    assert {path.suffix for path in cache.iterdir()} == {".so"}
    assert torch.equal(fused, eager)
    assert 0.01 < (fused != base).float().mean() < 0.3


@pytest.mark.slow
@needs_compiler
def test_a_changed_source_makes_another_kernel(cache, monkeypatch):
    merge(True)
    monkeypatch.setattr(ahead, "_surroundings", lambda: ["another version"])
    merge(True)
    assert len(list(cache.glob("*.so"))) == 2


def test_nothing_is_compiled_where_the_cache_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "merganser").write_text("a file in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ahead.compile_ahead({"method": "linear"}) is None


def test_a_damaged_library_is_not_used(cache, monkeypatch):
    def damage(self, order, place):
        place.with_suffix(".so").write_bytes(b"no library")

    monkeypatch.setattr(ahead._Compiler, "compile", damage)
    assert ahead.compile_ahead({"method": "linear"}) is None


def test_what_cannot_be_compiled_is_not_tried_again(cache, monkeypatch):
    tried = []

    def give_up(self, order, place):
        tried.append(order)
        place.with_suffix(".unsuited").write_bytes(b"")

    monkeypatch.setattr(ahead._Compiler, "compile", give_up)
    assert [ahead.compile_ahead({"method": "linear"}) for _ in range(2)] == [None, None]
    assert len(tried) == 1


@pytest.mark.slow
def test_the_compiler_says_what_it_cannot_do_and_goes_on(tmp_path):
    lines = f'["{tmp_path}/a", "{{}}"]\n["{tmp_path}/b", "{{}}"]\n'
    run = subprocess.run(
        [sys.executable, "-m", "merganser.engine.kernels.compiler"],
        input=lines,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert run.stdout == "done\ndone\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.unsuited", "b.unsuited"]


def test_a_kernel_that_fails_is_asked_eagerly_why(monkeypatch):
    def fail(tensors):
        raise ahead.KernelError("a compiled kernel failed with code 1")

    monkeypatch.setattr("merganser.engine.kernels.kernels.compile_ahead", lambda order: fail)
    with pytest.raises(ahead.KernelError, match="code 1"):
        merge(True)
    monkeypatch.setattr("merganser.engine.kernels.kernels.Kernels.run_eagerly", lambda *_: torch.empty(1 << 60))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        merge(True)


def test_the_time_that_compiling_takes_is_known(monkeypatch, tmp_path):
    compiler = ahead._Compiler()
    seen = []

    def ask(order, place):
        seen.append(compiler.busy)
        time.sleep(0.02)
        if order == "bad":
            raise BrokenPipeError

    monkeypatch.setattr(compiler, "_ask", ask)
    assert not compiler.busy
    compiler.compile("good", tmp_path)
    with pytest.raises(BrokenPipeError):
        compiler.compile("bad", tmp_path)
    assert seen == [True, True]
    assert not compiler.busy
    assert compiler.end() >= 0.04
    assert compiler.end() == 0


BROKEN = """#!/bin/sh
case "$*" in *-fPIC*|*-shared*) echo "x.cpp:1: fatal error: omp.h: No such file or directory" >&2; exit 1;; esac
exec %s "$@"
"""


@pytest.mark.slow
@needs_compiler
def test_a_broken_compiler_is_told_and_works_when_it_is_mended(cache, tmp_path, monkeypatch):
    compiler = tmp_path / "g++"
    compiler.write_text(BROKEN % shutil.which("g++"))
    compiler.chmod(0o755)
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[3])!r})\n"
    code += "from tests.engine.kernels.test_compiled import merge; merge(True)"
    command, broken = [sys.executable, "-c", code], {**os.environ, "CXX": str(compiler)}
    found = subprocess.run(command, env=broken, capture_output=True, text=True, check=False)
    assert found.stderr.splitlines()[-1] == (
        "merganser.errors.UnsupportedError: linear: a kernel cannot be compiled here (x.cpp:1: fatal error: omp.h: No such "
        "file or directory). Check the C++ compiler, memory and disk space; or merge with --no-compile"
    )
    assert not list(cache.glob("*"))
    subprocess.run(command, check=True)
    assert [path.suffix for path in cache.iterdir()] == [".so"]
