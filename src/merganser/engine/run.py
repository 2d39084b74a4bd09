"""Run a plan: from the first task to the finished output folder."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ..checkpoint import Reader
from ..errors import MergeError, MethodError, OutputError, UnreachableError, UnsupportedError
from ..wording import html_table, plural, size_text
from .finish import side_file_bytes, write_rest
from .kernels.devices import resolve_devices
from .output.publish import replaced_folder, working_names, working_parent
from .output.staging import Staging, lies_in, resolve_target
from .plan.memory import fetched_memory
from .plan.plan import Plan
from .plan.work import keep_speeds
from .record import fingerprint, input_files
from .sidecars.make import Errors, make_sidecars
from .stream.buffers import InputCache
from .stream.groups import Group, Task, make_groups
from .stream.hashing import Hasher, spans, written_digest
from .stream.schedule import GroupState, KernelCache, Schedule, start_group
from .stream.threads import join, work_on_threads
from .stream.worker import Context, Done


class Interrupted(Exception):
    """Raised when a run is stopped by Ctrl-C; the same command continues it."""


class Progress(Protocol):
    """Receives reports of a run's progress, from several threads but one at a time.

    Work that an earlier run finished is reported before `start`.
    """

    def calibrating(self, model: str, done: int, blocks: int) -> None:
        """Report how many of a model's blocks are done, before a merge that lacks statistics from data."""

    def start(self, plan: Plan, continued: bool) -> None:
        """Report that the run starts; `continued`: from an earlier run's journal."""

    def advance(self, read: int, written: int, tensors: int) -> None:
        """Report additional bytes read, bytes written and tensors completed."""


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a run.

    Args:
        out: The output folder.
        record: The run record, as in `merge.json`.
    """

    out: Path
    record: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"<Result: {self.out}, {self.record.get('method', 'adapter')}>"

    def _repr_html_(self) -> str:
        outputs = self.record.get("outputs", [])
        rows = [["written", f"{plural(len(outputs), 'file')}, {size_text(sum(file['bytes'] for file in outputs))}"]]
        rows += [["warning", warning] for warning in self.record.get("warnings", [])]
        return html_table(repr(self)[1:-1], rows)


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
    """Run a plan.

    Args:
        plan: From `build_plan`.
        out: Target folder; it appears when the merge is complete.
        overwrite: Replace a target that merganser wrote before, unless something in it was added or changed.
        fresh: Start again even if an interrupted run could be continued.
        allow_nonfinite: Merge NaN and infinity instead of raising an error.
        cluster: Address of a Ray cluster whose nodes share storage with this machine; None to run locally.
        progress: Receives reports of the run's progress.

    Raises:
        OutputError: The target cannot be written.
        CheckpointError: An input is damaged or not finite, or integer buffers differ.
        UnreachableError: The Hub stopped answering; the same call continues the run.
        Interrupted: Ctrl-C was pressed.
    """
    if cluster is not None and any(checkpoint.remote for checkpoint in plan.checkpoints.values()):
        raise UnsupportedError("--stream: not with --cluster, whose nodes read inputs from storage that they share")
    devices = resolve_devices(plan.device)
    started, worked = time.monotonic(), time.process_time()
    _refuse_inputs(plan, out)
    inputs = input_files(plan)
    staging = Staging(
        out,
        plan.files,
        fingerprint(plan, {"allow_nonfinite": allow_nonfinite}),
        beside=side_file_bytes(plan),
        overwrite=overwrite,
        fresh=fresh,
    )
    plan = replace(plan, warnings=(*plan.warnings, *staging.warnings))
    with _keep_or_remove(staging):
        run = _Run(plan, staging, devices, allow_nonfinite, cluster, progress)
        entries = run.execute()
        merged = time.monotonic()
        if not staging.continued and cluster is None and plan.device == "cpu":
            keep_speeds(plan.tensors, time.process_time() - worked, plan.moving_seconds, fused=plan.fused)
        hashes = run.hasher.result()
        errors = run.sidecars()
        record = write_rest(
            plan,
            staging.folder,
            staging.target.name,
            claim=staging.claim,
            groups=run.groups,
            entries=entries,
            hashes=hashes,
            statistics=run.statistics,
            inputs=inputs,
            errors=errors,
            timings={
                "merge_seconds": round(merged - started, 3),
                "seconds": round(time.monotonic() - started, 3),
            },
            continued=staging.continued,
        )
        # the record on disk is written before
        record["warnings"] += staging.publish()
    return Result(out, record)


@contextmanager
def _keep_or_remove(staging: Staging) -> Iterator[None]:
    """Keep or remove the staging folder when a run fails."""
    try:
        yield
    except KeyboardInterrupt:
        staging.keep()
        raise Interrupted(f"{staging.out}: stopped; run the same command again to continue") from None
    except MergeError as error:
        # keep the folder after an error that may not repeat, so that the run can continue: of the disk, of the network, or of a
        # method, which its author mends
        (staging.keep if isinstance(error, OutputError | UnreachableError | MethodError) else staging.remove)()
        raise
    except OSError as error:
        staging.keep()
        raise staging.write_error(error) from None
    except BaseException:
        staging.keep()
        raise


def _refuse_inputs(plan: Plan, out: Path) -> None:
    """Refuse a target that is or holds an input, also through links."""
    target = resolve_target(out)
    places = [target, working_parent(target) / working_names(target)[0], replaced_folder(target)]
    for reference, checkpoint in plan.checkpoints.items():
        for path in [checkpoint.path, *checkpoint.weight_files]:
            place = next((each for each in places if lies_in(path, each)), None)
            if place is not None:
                shown = out if place == target else place
                raise OutputError(
                    f"{shown}: {reference}, an input of this merge, is in this folder; choose another target"
                )


class _Run:
    """The threads of one run, and its reports of progress."""

    def __init__(
        self,
        plan: Plan,
        staging: Staging,
        devices: Sequence[torch.device],
        allow_nonfinite: bool,
        cluster: str | None,
        progress: Progress | None,
    ) -> None:
        self.groups = make_groups(plan)
        self._plan = plan
        self._staging = staging
        self._allow = allow_nonfinite
        self._cluster = cluster
        self._progress = progress
        self._lock = threading.Lock()
        self.hasher = Hasher(plan, staging)
        self._kernels = [KernelCache(plan, device, check_finite=not allow_nonfinite) for device in devices]
        self._devices = devices
        self._entries: dict[tuple[int, int], Mapping[str, Any]] = {}
        self.statistics: Mapping[str, torch.Tensor] = {}

    def execute(self) -> dict[tuple[int, int], Mapping[str, Any]]:
        """Run all tasks; return the journal's entries by group and segment."""
        finished = self._trusted()
        # no cache on a cluster, as its nodes share no memory
        memory = InputCache(self._plan.workers, self._plan.kept if self._cluster is None else 0)
        schedule = Schedule(
            self.groups,
            lambda group: start_group(group, self._kernels[0], memory),
            whole_model=self._plan.whole_model,
            finished=finished,
            memory=memory,
        )
        if self._progress:
            self._progress.start(self._plan, self._staging.continued)
        self.hasher.start()
        try:
            if self._cluster is None:
                self._locally(schedule)
            else:
                self._on_cluster(schedule, self._cluster)
            if schedule.error is not None:
                raise schedule.error
            self.statistics = schedule.statistics
        except BaseException:
            self.hasher.stop()
            raise
        return self._entries

    def sidecars(self) -> dict[str, Errors]:
        """Make the sidecars if the method has them; return the errors of restoring each tensor."""
        if self._plan.sidecars is None:
            return {}
        return make_sidecars(
            self._plan,
            self._plan.sidecars,
            self._staging,
            first=len(self.groups),
            device=self._devices[0],
            allow_nonfinite=self._allow,
            advance=self._advance,
        )

    def _locally(self, schedule: Schedule) -> None:
        """Run all tasks on threads of this process."""
        with Reader(fetched=self._plan.workers * fetched_memory(self._plan.tensors)) as reader:
            contexts = [
                Context(reader, self._staging, device, self._advance, lambda: schedule.stopping, self._allow)
                for device in self._devices
            ]
            work_on_threads(schedule, contexts, self._kernels, self._plan.workers, partial(self._done, schedule))

    def _on_cluster(self, schedule: Schedule, address: str) -> None:
        """Run all tasks on a cluster; one thread here waits for each remote worker."""
        from .stream.cluster import Cluster

        cluster = Cluster(address)
        try:
            plan = cluster.share(self._plan)

            def done(state: GroupState, task: Task, result: Done, amounts: list[int]) -> None:
                self._advance(*amounts)
                self._done(schedule, state, task, result)

            def work() -> None:
                cluster.work(plan, self._staging.folder, self._allow, schedule, done)

            join([work] * cluster.n_workers(), schedule)
        finally:
            cluster.close()

    def _done(self, schedule: Schedule, state: GroupState, task: Task, done: Done) -> None:
        if done.entry is not None:
            self._finish(state.group, task, done.entry)
        schedule.done(state, task, done.sums)

    def _trusted(self) -> dict[int, set[int]]:
        """Compare the journal's hashes with the files on disk; return the segments, by group, that match."""
        trusted: dict[int, set[int]] = defaultdict(set)
        for (index, segment), entry in self._staging.finished.items():
            if index >= len(self.groups) or segment >= len(self.groups[index].segments):
                continue
            group = self.groups[index]
            if written_digest(self._staging, group, segment) != entry["out"]:
                continue
            trusted[index].add(segment)
            self._entries[index, segment] = entry
            written = spans(group, segment)
            for own in written:
                self.hasher.add(*own)
            tensors = len(group.tensors) if segment == len(group.segments) - 1 else 0
            self._advance(0, sum(nbytes for _, _, nbytes in written), tensors)
        return trusted

    def _finish(self, group: Group, task: Task, entry: dict[str, Any]) -> None:
        self._staging.note({"group": group.index, "segment": task.segment, **entry})
        with self._lock:
            self._entries[group.index, task.segment] = entry
        for own in spans(group, task.segment):
            self.hasher.add(*own)

    def _advance(self, read: int, written: int, tensors: int) -> None:
        if self._progress:
            with self._lock:
                self._progress.advance(read, written, tensors)
