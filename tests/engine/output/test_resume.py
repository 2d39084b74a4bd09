"""A run that was cut off is continued by the same command, and by nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merganser.engine.merge import merge, plan
from merganser.engine.output.lock import acquire_lock
from merganser.engine.record import fingerprint
from merganser.engine.run import Interrupted
from merganser.errors import NonFiniteError, OutputError
from tests.engine.interrupting import Counter, Stopper, in_a_process, merge_and_die, merge_slowly, stop
from tests.making import make_recipe, read_files, write_llamas, write_model

pytestmark = pytest.mark.usefixtures("small_blocks")

RECIPES = {
    "ties": {"weight": 0.6, "density": 0.4},
    "dare_ties": {"weight": 0.6, "density": 0.4},
    "whole model": {"weight": 0.6, "density": 0.4, "trim_over": "model"},
}


@pytest.fixture
def paths(tmp_path):
    return write_llamas(tmp_path / "models", 3, layers=1)


def recipe_of(name, paths):
    return make_recipe("ties" if name == "whole model" else name, paths[1:], paths[0], RECIPES[name])


@pytest.fixture
def recipe(paths):
    return recipe_of("ties", paths)


@pytest.fixture
def expected(tmp_path, recipe):
    """Bytes of an undisturbed run, and what it tells."""
    counter = Counter()
    out = merge(recipe, tmp_path / "elsewhere" / "out", progress=counter, threads=1).out
    return read_files(out), counter


def beside(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("ties", 0.1),
        ("ties", 0.5),
        ("ties", 0.8),
        ("ties", 0.97),
        ("dare_ties", 0.6),
        ("whole model", 0.5),
        ("whole model", 0.9),
    ],
)
def test_kill_and_continue(tmp_path, paths, name, share):
    recipe = recipe_of(name, paths)
    counter = Counter()
    files = read_files(merge(recipe, tmp_path / "elsewhere" / "out", progress=counter).out)
    out = tmp_path / "out"
    process = in_a_process(merge_and_die, recipe, out, int(share * counter.calls), {"threads": 2})
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    progress = Counter()
    result = merge(recipe, out, progress=progress)
    assert result.record["continued"] is progress.continued is (progress.written_before > 0)
    assert result.record["continued"] or share < 0.5 or (name, share) == ("whole model", 0.5)
    assert read_files(out) == files
    assert progress.written == counter.written
    assert progress.tensors == counter.tensors
    assert beside(tmp_path) == ["elsewhere", "models", "out"]


@pytest.mark.parametrize("moment", ["before the side files", "before the rename"])
def test_kill_near_the_end(tmp_path, recipe, expected, moment):
    process = in_a_process(merge_and_die, recipe, tmp_path / "out", moment, {})
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert read_files(merge(recipe, tmp_path / "out").out) == expected[0]
    assert beside(tmp_path) == ["elsewhere", "models", "out"]


def test_stops_at_every_moment(tmp_path, recipe, expected):
    """The same target is stopped again and again, a little later each time, until it is done."""
    files, counter = expected
    out = tmp_path / "out"
    for after in range(1, counter.calls, 7):
        stopper = Stopper(after)
        with contextlib.suppress(Interrupted):
            merge(recipe, out, progress=stopper, threads=1)
        if out.exists():
            break
        assert beside(tmp_path) == [".out.merging", "elsewhere", "models"]
    assert read_files(out) == files
    assert beside(tmp_path) == ["elsewhere", "models", "out"]


def test_interrupt_of_a_process(tmp_path, recipe, expected):
    note = tmp_path / "note"
    process = in_a_process(merge_slowly, recipe, tmp_path / "out", note)
    while not note.exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    (tmp_path / "note.sent").touch()
    process.join(30)
    assert process.exitcode == 130
    said = (tmp_path / "note.said").read_text()
    assert said == f"{tmp_path / 'out'}: stopped; run the same command again to continue"
    assert not (tmp_path / "out").exists()
    assert read_files(merge(recipe, tmp_path / "out").out) == expected[0]
    assert beside(tmp_path) == ["elsewhere", "models", "note", "note.said", "note.sent", "out"]


def test_only_what_is_missing_is_done(tmp_path, recipe, expected):
    files, counter = expected
    stopped = stop(recipe, tmp_path / "out", counter.calls * 2 // 3, threads=1)
    progress = Counter()
    result = merge(recipe, tmp_path / "out", progress=progress)
    assert result.record["continued"]
    assert 0 < progress.written_before <= stopped.written
    assert progress.read < counter.read
    assert progress.tensors == counter.tensors == result.record["tensors"]
    assert progress.written == counter.written
    assert read_files(result.out) == files


def test_a_large_tensor_is_continued_in_its_middle(tmp_path):
    """Segments that are done are not done again, though they are measured again."""
    generator = torch.Generator().manual_seed(0)
    paths = [write_model(tmp_path / f"m{i}", {"w": torch.randn(72, 16, generator=generator)}) for i in range(3)]
    recipe = make_recipe("ties", paths[1:], paths[0], {"weight": 1, "density": 0.5})
    counter = Counter()
    files = read_files(merge(recipe, tmp_path / "elsewhere" / "out", progress=counter, threads=1).out)
    # two passes measure; two of four segments are written then
    stop(recipe, tmp_path / "out", counter.calls * 5 // 6, threads=1)
    progress = Counter()
    assert read_files(merge(recipe, tmp_path / "out", progress=progress).out) == files
    assert progress.written_before == 2 * counter.written // 4
    assert progress.written == counter.written
    assert progress.read == counter.read - counter.read // 3 // 2
    assert progress.tensors == 1


def staged(tmp_path):
    return tmp_path / ".out.merging"


@pytest.mark.parametrize("harm", ["zeros", "one byte", "header", "shorter", "gone"])
def test_damage_in_the_finished_part_is_noticed(tmp_path, recipe, expected, harm):
    files, counter = expected
    stop(recipe, tmp_path / "out", counter.calls * 2 // 3, threads=1)
    file = staged(tmp_path) / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    before = data[header : header + 64]
    if harm == "zeros":
        data[header:] = bytes(len(data) - header)
    elif harm == "one byte":
        data[header] ^= 1
    elif harm == "header":
        data[:header] = bytes(header)
    elif harm == "shorter":
        del data[header + (len(data) - header) // 3 :]
    assert any(before)
    file.write_bytes(data)
    if harm == "gone":
        file.unlink()
    progress = Counter()
    result = merge(recipe, tmp_path / "out", progress=progress)
    assert result.record["continued"]
    # a damaged header costs nothing
    assert (progress.written_before > 0) is (harm in ("one byte", "header", "shorter"))
    assert read_files(result.out) == files


@pytest.mark.parametrize(
    ("harm", "continued"),
    [
        (lambda data: data[:-20], True),
        (lambda data: data + b'{"group": 0, "segm', True),
        (lambda data: data + b"\0" * 100, True),
        (lambda data: data + b"[]\nnull\n", True),
        (lambda data: data[5:], False),
        (lambda data: data.partition(b"\n")[2], False),
        (lambda data: b"", False),
        (lambda data: b"\xff\xfe" + data, False),
    ],
)
def test_a_damaged_journal(tmp_path, recipe, expected, harm, continued):
    files, counter = expected
    stop(recipe, tmp_path / "out", counter.calls * 2 // 3, threads=1)
    journal = staged(tmp_path) / "journal.jsonl"
    journal.write_bytes(harm(journal.read_bytes()))
    # what is written behind the damage must be sound
    second = Stopper(counter.calls // 8)
    with pytest.raises(Interrupted):
        merge(recipe, tmp_path / "out", progress=second, threads=1)
    assert (second.written_before > 0) is continued
    lines = journal.read_bytes().splitlines()
    assert {type(json.loads(line)) for line in lines} == {dict}
    result = merge(recipe, tmp_path / "out")
    assert read_files(result.out) == files


VALUES = st.sampled_from(
    [None, True, -1, 0, 1, 10**30, 1.5, "", "00", "x", [], {}, [[]], [0], {"a": 1}, float("nan"), "\ud800"]
)


def broken(draw, entry):
    """Return an entry of the journal without a key, with another value somewhere, or nested deeply."""
    key = draw(st.sampled_from(sorted(entry)))
    kind = draw(st.sampled_from(["gone", "other", "deep", "digit"]))
    if kind == "gone":
        del entry[key]
    elif kind == "other":
        entry[key] = draw(VALUES)
    elif kind == "digit":
        text = entry[key] if isinstance(entry[key], str) else "0"
        at = draw(st.integers(0, len(text) - 1))
        entry[key] = text[:at] + draw(st.sampled_from("01f")) + text[at + 1 :]
    text = json.dumps(entry, separators=(",", ":")).encode()
    return text[:-1] + b',"deep":' + b"[" * 5000 + b"]" * 5000 + b"}" if kind == "deep" else text


@st.composite
def harmed(draw, journal):
    """Return the text of a journal with some harm done to it."""
    lines = journal.splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["broken", "byte", "twice", "moved", "gone", "more", "cut"]))
        if kind == "broken":
            with contextlib.suppress(ValueError):
                lines[at] = broken(draw, json.loads(lines[at])) + b"\n"
        elif kind == "byte":
            position = draw(st.integers(0, len(lines[at]) - 1))
            lines[at] = lines[at][:position] + draw(st.binary(min_size=1, max_size=1)) + lines[at][position + 1 :]
        elif kind == "twice":
            lines.insert(at, lines[at])
        elif kind == "moved":
            lines.insert(draw(st.integers(0, len(lines) - 1)), lines.pop(at))
        elif kind == "gone" and len(lines) > 1:
            del lines[at]
        elif kind == "more":
            lines.insert(at, draw(st.binary(max_size=20)) + b"\n")
        elif kind == "cut":
            lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))] or b"\n"
    return b"".join(lines)


@settings(max_examples=25, deadline=None, suppress_health_check=[*HealthCheck])
@given(data=st.data())
def test_whatever_a_journal_holds_the_bytes_are_the_same(tmp_path, recipe, expected, data):
    """And those of the record's hashes of inputs, which come from the journal, too."""
    out, kept = tmp_path / "out", tmp_path / "kept"
    if not kept.exists():
        stop(recipe, out, expected[1].calls * 2 // 3, threads=1)
        staged(tmp_path).rename(kept)
        whole = json.loads((tmp_path / "elsewhere" / "out" / "merge.json").read_text())
        (tmp_path / "inputs.json").write_text(json.dumps(whole["inputs"]))
    shutil.rmtree(staged(tmp_path), ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(kept, staged(tmp_path))
    journal = staged(tmp_path) / "journal.jsonl"
    journal.write_bytes(data.draw(harmed(journal.read_bytes())))
    result = merge(recipe, out)
    assert read_files(out) == expected[0]
    assert result.record["inputs"] == json.loads((tmp_path / "inputs.json").read_text())


@pytest.mark.parametrize(
    ("line", "continued"),
    [(0, False), (1, False), (3, True)],
)
def test_a_journal_that_does_not_read_as_ours_is_said(tmp_path, recipe, expected, line, continued):
    stop(recipe, tmp_path / "out", expected[1].calls * 2 // 3, threads=1)
    journal = staged(tmp_path) / "journal.jsonl"
    lines = journal.read_bytes().splitlines()
    entry = json.loads(lines[line])
    entry.popitem()
    lines[line] = json.dumps(entry, separators=(",", ":")).encode()
    journal.write_bytes(b"\n".join(lines) + b"\n")
    warned = []

    class Listener(Counter):
        def start(self, plan, continued):
            super().start(plan, continued)
            warned.extend(plan.warnings)

    result = merge(recipe, tmp_path / "out", progress=(listener := Listener()))
    assert listener.continued is continued
    (warning,) = warned
    assert warning == (
        f"{journal}: line {line + 1} is damaged; the work of this line and of those after it is repeated"
    )
    assert warning in result.record["warnings"]
    assert read_files(result.out) == expected[0]


def test_how_a_tensor_is_made_belongs_to_the_fingerprint(recipe):
    """Layers that are counted differently have another schedule under the same recipe; sums depend on the blocks."""
    planned = plan(recipe)
    marks = {fingerprint(planned, {})}
    first, *others = planned.tensors
    for change in (
        {"parameters": first.parameters | {"density": 0.41}},
        {"located": {"depth": 0.5}},
        {"layer": 7},
        {"role": "another"},
        {"models": first.models[::-1]},
        {"base": None},
        {"copy": True},
    ):
        changed = dataclasses.replace(planned, tensors=[dataclasses.replace(first, **change), *others])
        marks.add(fingerprint(changed, {}))
    marks.add(fingerprint(dataclasses.replace(planned, block=planned.block - 8), {}))
    assert len(marks) == 9


@pytest.mark.parametrize(
    "change",
    [
        "recipe",
        "seed",
        "shards",
        "nonfinite",
        "time",
        "content",
        "version",
        "config",
        "side file",
        "method",
        "processor",
    ],
)
def test_what_is_not_the_same_merge_is_not_continued(tmp_path, paths, monkeypatch, change):
    recipe = recipe_of("dare_ties", paths)
    options = {}
    stop(recipe, tmp_path / "out", 60, threads=1)
    if change == "recipe":
        recipe["parameters"]["density"] = 0.41
    elif change == "seed":
        options["seed"] = 1
    elif change == "shards":
        options["out_shard_size"] = 3000
    elif change == "nonfinite":
        options["allow_nonfinite"] = True
    elif change == "time":
        file = paths[1] / "model-00001-of-00002.safetensors"
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "content":
        write_llamas(tmp_path / "others", 3, layers=1)
        paths[2].rename(tmp_path / "away")
        (tmp_path / "others" / "m1").rename(paths[2])
    elif change == "config":
        config = json.loads((paths[0] / "config.json").read_text())
        (paths[0] / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 7}))
    elif change == "side file":
        (paths[0] / "tokenizer.json").write_text("{}")
    elif change == "method":
        monkeypatch.setattr("merganser.engine.record._source", lambda method: "another")
    elif change == "processor":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    elif change == "version":
        monkeypatch.setattr("merganser.engine.record.__version__", "0.0.0")
    expected = read_files(merge(recipe, tmp_path / "elsewhere" / "out", **options).out)
    result = merge(recipe, tmp_path / "out", **options)
    assert not result.record["continued"]
    assert read_files(result.out) == expected


def test_fresh_starts_again(tmp_path, recipe, expected):
    stop(recipe, tmp_path / "out", 60, threads=1)
    progress = Counter()
    result = merge(recipe, tmp_path / "out", fresh=True, progress=progress)
    assert not result.record["continued"]
    assert progress.written_before == 0
    assert read_files(result.out) == expected[0]


def test_threads_and_memory_may_change_in_between(tmp_path, recipe, expected):
    stop(recipe, tmp_path / "out", 60, threads=1)
    result = merge(recipe, tmp_path / "out", threads=3, max_memory=10**9)
    assert result.record["continued"]
    assert read_files(result.out) == expected[0]


def test_a_second_run_into_the_target_is_refused(tmp_path, recipe, expected):
    refused = []

    class Rival(Counter):
        def start(self, plan, continued):
            with pytest.raises(OutputError, match="out: another run is writing it") as caught:
                merge(recipe, tmp_path / "out", fresh=True)
            refused.append(caught)

    assert read_files(merge(recipe, tmp_path / "out", progress=Rival()).out) == expected[0]
    assert len(refused) == 1


def test_a_lock_has_one_holder_at_a_time(tmp_path):
    """Its file is deleted by each holder, which must not let two in."""
    path = tmp_path / "lock"
    holders, most = [], []

    def work():
        while len(most) < 500:
            lock = acquire_lock(path)
            if lock is not None:
                holders.append(lock)
                most.append(len(holders))
                holders.remove(lock)
                lock.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}


def test_an_error_of_an_input_ends_a_continued_run_without_traces(tmp_path, recipe, paths):
    stop(recipe, tmp_path / "out", 60, threads=1)

    class Poison(Counter):
        def start(self, plan, continued):
            for file in paths[2].glob("*.safetensors"):
                data = bytearray(file.read_bytes())
                data[-4:] = b"\0\0\xc0\x7f"
                file.write_bytes(data)

    with pytest.raises(NonFiniteError, match=r"model\.safetensors: tensor .* holds NaN"):
        merge(recipe, tmp_path / "out", progress=Poison())
    assert beside(tmp_path) == ["models"]


def test_a_full_disk(tmp_path, recipe, expected, monkeypatch):
    files = expected[0]
    calls = []
    pwrite = os.pwrite

    def full(descriptor, data, offset):
        calls.append(1)
        if len(calls) > 12:
            # some of it still fits
            if len(calls) == 13:
                return pwrite(descriptor, data[:10], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="out: the disk is full; free some room and run the same command again"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(os, "pwrite", pwrite)
    progress = Counter()
    result = merge(recipe, tmp_path / "out", progress=progress)
    assert result.record["continued"]
    assert progress.written_before > 0
    assert read_files(result.out) == files
    assert beside(tmp_path) == ["elsewhere", "models", "out"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_and_then_has_room_again(small_disk, recipe, expected):
    class Ballast(Counter):
        def start(self, plan, continued):
            with contextlib.suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with pytest.raises(OutputError, match="the disk is full"):
        merge(recipe, small_disk / "out", progress=Ballast())
    (small_disk / "ballast").unlink()
    result = merge(recipe, small_disk / "out")
    assert read_files(result.out) == expected[0]
    assert beside(small_disk) == ["out"]


def test_a_disk_that_is_full_from_the_beginning(small_disk, recipe, expected):
    with contextlib.suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(OutputError, match=r"too little disk space: .* are to be written, 0 bytes are free"):
        merge(recipe, small_disk / "out")
    (small_disk / "ballast").unlink()
    assert read_files(merge(recipe, small_disk / "out").out) == expected[0]
    assert beside(small_disk) == ["out"]


def test_a_disk_without_room_is_refused_before_anything_is_written(small_disk, tmp_path):
    recipe = make_recipe("linear", write_llamas(tmp_path / "large", 2, layers=30), parameters={"weight": 1})
    with pytest.raises(OutputError, match=r"too little disk space: \d+ KB are to be written, \d+ KB are free"):
        merge(recipe, small_disk / "out")
    assert beside(small_disk) == []


def test_a_limit_on_the_size_of_files(tmp_path, recipe):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OutputError, match="out: cannot be written: file too large"):
            merge(recipe, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert beside(tmp_path) == ["models"]
