"""Run a plan: from tasks to a finished folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..checkpoint import INDEX_NAME, Reader, index_json
from ..errors import MergeError, OutputError, UnsupportedError
from .kernels import prepare_compiler_cache
from .plan import Plan
from .record import RECORD_NAME, file_hash, fingerprint, input_hashes, layer_summary, make_record, model_card
from .staging import Staging, digest
from .stream import Context, Done, Stopped, Worker
from .tasks import Group, GroupState, KernelCache, Schedule, Task, make_groups, start_group

_PIECE = 1 << 22


class Interrupted(Exception):
    """The run was stopped by Ctrl-C; the same command continues it."""


class Progress(Protocol):
    """Told how a run advances, from several threads."""

    def start(self, plan: Plan, continued: bool) -> None:
        """The run begins, or continues."""

    def advance(self, read: int, written: int, tensors: int) -> None:
        """So many more bytes were read and written, and tensors completed."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a run left.

    Args:
        out: The output folder.
        record: The run record, as in `merge.json`.
    """

    out: Path
    record: Mapping[str, Any]


def run_plan(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    allow_nonfinite: bool = False,
    cluster: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Carry out a plan.

    Args:
        plan: From `build_plan`.
        out: Target folder; it appears when the merge is complete.
        overwrite: Replace a target that merganser wrote before.
        fresh: Start again even where an interrupted run could be continued.
        allow_nonfinite: Merge NaN and infinity instead of refusing them.
        cluster: Address of a Ray cluster whose nodes share storage with this machine; None: work here.
        progress: Told how the run advances.

    Raises:
        OutputError: The target cannot be written.
        CheckpointError: An input is damaged, not finite, or integer buffers differ.
        Interrupted: Ctrl-C.
    """
    device = resolve_device(plan.device)
    started = time.monotonic()
    staging = Staging(
        out, plan.shards, fingerprint(plan, {"allow_nonfinite": allow_nonfinite}), overwrite=overwrite, fresh=fresh
    )
    try:
        run = _Run(plan, staging, device, allow_nonfinite, cluster, progress)
        entries = run.execute()
        merged = time.monotonic()
        outputs = _write_side_files(plan, staging.folder, out.name)
        hashes = run.hasher.result()
        weights = [
            {"file": shard.name, "bytes": shard.size, "sha256": found}
            for shard, found in zip(plan.shards, hashes, strict=True)
        ]
        record = make_record(
            plan,
            inputs=input_hashes(plan, _tensor_digests(run.groups, entries)),
            outputs=[*weights, *outputs],
            layers=layer_summary(plan.tensors, _samples(entries)),
            timings={"merge_seconds": round(merged - started, 3), "seconds": round(time.monotonic() - started, 3)},
            continued=staging.continued,
        )
        (staging.folder / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        staging.publish(overwrite=overwrite)
    except (KeyboardInterrupt, Interrupted):
        staging.keep()
        raise Interrupted(f"{out}: stopped; run the same command again to continue") from None
    except OutputError:
        staging.keep()
        raise
    except OSError as error:
        staging.keep()
        raise staging.write_error(error) from None
    except MergeError:
        staging.remove()
        raise
    except BaseException:
        staging.keep()
        raise
    return Result(out, record)


def resolve_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        UnsupportedError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UnsupportedError(f"--device {name}: unknown; use auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UnsupportedError(f"--device {name}: no such GPU here; torch sees {torch.cuda.device_count()}")
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"--device {name}: only cpu and cuda are supported")
    return device


class _Run:
    """The threads of one run, and what they tell."""

    def __init__(
        self,
        plan: Plan,
        staging: Staging,
        device: torch.device,
        allow_nonfinite: bool,
        cluster: str | None,
        progress: Progress | None,
    ) -> None:
        self.groups = make_groups(plan)
        self._plan = plan
        self._staging = staging
        self._device = device
        self._allow = allow_nonfinite
        self._cluster = cluster
        self._progress = progress
        self._lock = threading.Lock()
        self.hasher = Hasher(plan, staging)
        self._kernels = KernelCache(plan, device, check_finite=not allow_nonfinite)
        self._entries: dict[tuple[int, int], Mapping[str, Any]] = {}

    def execute(self) -> dict[tuple[int, int], Mapping[str, Any]]:
        """Do all tasks; return the journal's entries by group and segment."""
        finished = self._trusted()
        schedule = Schedule(
            self.groups,
            lambda group: start_group(group, self._kernels),
            whole_model=self._plan.whole_model,
            finished=finished,
        )
        if self._progress:
            self._progress.start(self._plan, self._staging.continued)
        threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        if self._plan.compiled:
            prepare_compiler_cache()
        self.hasher.start()
        try:
            if self._cluster is None:
                self._locally(schedule)
            else:
                self._on_cluster(schedule, self._cluster)
        finally:
            torch.set_num_threads(threads_before)
            if schedule.error is not None or schedule.stopping:
                self.hasher.stop()
        if schedule.error is not None:
            raise schedule.error
        return self._entries

    def _locally(self, schedule: Schedule) -> None:
        """Do all tasks on threads of this process."""
        with Reader() as reader:
            context = Context(
                reader, self._staging, self._device, self._advance, lambda: schedule.stopping, self._allow
            )

            def work() -> None:
                worker = Worker(context)
                while (taken := schedule.take()) is not None:
                    self._done(schedule, *taken, worker.do(*taken))

            self._join([work] * self._plan.workers, schedule)

    def _on_cluster(self, schedule: Schedule, address: str) -> None:
        """Do all tasks on the nodes of a cluster; each has a thread here that waits for it."""
        from .cluster import Cluster

        cluster = Cluster(address)
        try:
            plan = cluster.share(self._plan)

            def done(state: GroupState, task: Task, result: Done, amounts: list[int]) -> None:
                self._advance(*amounts)
                self._done(schedule, state, task, result)

            def work() -> None:
                cluster.work(plan, self._staging.folder, self._allow, schedule, done)

            self._join([work] * cluster.n_workers(), schedule)
        finally:
            cluster.close()

    def _done(self, schedule: Schedule, state: GroupState, task: Task, done: Done) -> None:
        if done.entry is not None:
            self._finish(state.group, task, done.entry)
        schedule.done(state, task, done.sums)

    def _join(self, works: Sequence[Callable[[], None]], schedule: Schedule) -> None:
        """Run functions on threads of their own until all have ended."""

        def guarded(work: Callable[[], None]) -> None:
            try:
                work()
            except Stopped:
                pass
            except BaseException as error:
                schedule.fail(error)

        threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                # with a timeout, so that Ctrl-C is heard
                while thread.is_alive():
                    thread.join(0.1)
        except KeyboardInterrupt:
            schedule.stop()
            deadline = time.monotonic() + 0.8
            for thread in threads:
                thread.join(max(deadline - time.monotonic(), 0))
            raise

    def _trusted(self) -> dict[int, set[int]]:
        """Compare what the journal says was written with what is there; return the segments that agree."""
        trusted: dict[int, set[int]] = defaultdict(set)
        for (index, segment), entry in self._staging.finished.items():
            if index >= len(self.groups) or segment >= len(self.groups[index].segments):
                continue
            group = self.groups[index]
            if _found(self._plan, self._staging, group, segment) != entry["out"]:
                continue
            trusted[index].add(segment)
            self._entries[index, segment] = entry
            self.hasher.add(*span(self._plan, group, segment))
            tensors = len(group.tensors) if segment == len(group.segments) - 1 else 0
            self._advance(0, span(self._plan, group, segment)[2], tensors)
        return trusted

    def _finish(self, group: Group, task: Task, entry: dict[str, Any]) -> None:
        self._staging.note({"group": group.index, "segment": task.segment, **entry})
        with self._lock:
            self._entries[group.index, task.segment] = entry
        self.hasher.add(*span(self._plan, group, task.segment))

    def _advance(self, read: int, written: int, tensors: int) -> None:
        if self._progress:
            with self._lock:
                self._progress.advance(read, written, tensors)


def span(plan: Plan, group: Group, segment: int) -> tuple[int, int, int]:
    """Return where a task's output lies: shard, first byte, number of bytes."""
    first, last = group.tensors[0], group.tensors[-1]
    if group.bundle:
        return first.shard, first.offset, last.offset + last.nbytes - first.offset
    from .blocks import block_step

    step = block_step(first.shape, plan.method.scope)
    start, end = (min(block * step, first.size) for block in group.segments[segment])
    size = first.dtype.itemsize
    return first.shard, first.offset + start * size, (end - start) * size


def _found(plan: Plan, staging: Staging, group: Group, segment: int) -> str:
    """Hash what lies at a task's place in the output, as the task hashed what it wrote."""
    shard, offset, nbytes = span(plan, group, segment)
    buffer = memoryview(bytearray(nbytes))
    staging.read(shard, offset, buffer)
    if group.bundle:
        return digest(buffer).hex()
    from .blocks import block_step

    step = block_step(group.tensors[0].shape, plan.method.scope) * group.tensors[0].dtype.itemsize
    return b"".join(digest(buffer[at : at + step]) for at in range(0, nbytes, step)).hex()


class Hasher:
    """Hashes the output's files from front to back while they are written, on a thread of its own."""

    def __init__(self, plan: Plan, staging: Staging) -> None:
        self._shards = plan.shards
        self._staging = staging
        self._changed = threading.Condition()
        self._done: list[dict[int, int]] = [{0: len(shard.header)} for shard in plan.shards]
        self._stopped = False
        self._hashes: list[str] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def add(self, shard: int, offset: int, nbytes: int) -> None:
        """Tell that a range is written."""
        if nbytes:
            with self._changed:
                self._done[shard][offset] = offset + nbytes
                self._changed.notify()

    def stop(self) -> None:
        """End without a result."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def result(self) -> list[str]:
        """Wait for the sha256 of every file, in the order of the shards."""
        while self._thread.is_alive():
            self._thread.join(0.1)
        if self._error is not None:
            raise self._error
        return self._hashes

    def _work(self) -> None:
        buffer = memoryview(bytearray(_PIECE))
        try:
            for index, shard in enumerate(self._shards):
                found = hashlib.sha256()
                position = 0
                while position < shard.size:
                    end = self._wait(index, position)
                    if end is None:
                        return
                    while position < end:
                        piece = buffer[: min(_PIECE, end - position)]
                        self._staging.read(index, position, piece)
                        found.update(piece)
                        position += len(piece)
                self._hashes.append(found.hexdigest())
        except BaseException as error:
            self._error = error

    def _wait(self, index: int, position: int) -> int | None:
        with self._changed:
            while position not in self._done[index]:
                if self._stopped:
                    return None
                self._changed.wait()
            return self._done[index].pop(position)


def _write_side_files(plan: Plan, folder: Path, title: str) -> list[dict[str, Any]]:
    """Write config, index, tokenizer and the rest; return them with their hashes."""
    names = []

    def put(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)
        names.append(name)

    for name, source in plan.side_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
        names.append(name)
    if plan.recipe.chat_template is not None:
        put("chat_template.jinja", plan.recipe.chat_template.encode())
    if plan.config:
        put("config.json", (json.dumps(plan.config, indent=2) + "\n").encode())
    if len(plan.shards) > 1:
        put(INDEX_NAME, index_json(plan.shards))
    put("README.md", model_card(plan, title).encode())
    return [
        {"file": name, "bytes": os.path.getsize(folder / name), "sha256": file_hash(folder / name)}  # noqa: PTH202
        for name in dict.fromkeys(names)
    ]


def _tensor_digests(
    groups: list[Group], entries: Mapping[tuple[int, int], Mapping[str, Any]]
) -> dict[tuple[Path, str], bytes]:
    """Put the digests of blocks together to those of the input tensors."""
    found: dict[tuple[Path, str], bytes] = {}
    for group in groups:
        if group.bundle:
            columns = entries[group.index, 0]["in"]
        else:
            parts = [entries[group.index, segment]["in"] for segment in range(len(group.segments))]
            columns = [["".join(column) for column in zip(*parts, strict=True)]]
        for tensor, column in zip(group.tensors, columns, strict=True):
            for source, text in zip(tensor.inputs, column, strict=True):
                found[source.file, source.name] = digest(bytes.fromhex(text))
    return found


def _samples(entries: Mapping[tuple[int, int], Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {name: sample for entry in entries.values() for name, sample in entry.get("sample", {}).items()}
