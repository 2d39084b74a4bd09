"""Hash the output: its files while they are written, and single tasks when a run is continued."""

from __future__ import annotations

import hashlib
import threading

import xxhash

from ...checkpoint import Shard
from ...process import start_thread
from ..output.staging import Staging
from ..plan.plan import Plan
from .groups import Group

_PIECE = 1 << 22
# number of bytes of a file after which the system is asked to start writing them to disk
_FLUSHED = 1 << 26


def spans(group: Group, segment: int) -> list[tuple[int, int, int]]:
    """Return the ranges of a task's output: shard, first byte, number of bytes; of a quantised tensor, also of its scales."""
    first, last = group.tensors[0], group.tensors[-1]
    if group.bundle:
        return [(first.shard, first.offset, last.offset + last.nbytes - first.offset)]
    start, end = (min(block * first.block, first.size) for block in group.segments[segment])
    found = [first.span(start, end)]
    return found if first.quantised is None else [*found, first.scale_span(start, end)]


def written_digest(staging: Staging, group: Group, segment: int) -> str:
    """Hash a task's range of the output file by blocks, as the task hashed what it wrote; scales as a whole."""
    tensor = group.tensors[0]
    found = b""
    for number, (shard, offset, nbytes) in enumerate(spans(group, segment)):
        whole = group.bundle or number > 0
        step = nbytes if whole else tensor.span(0, min(tensor.block, tensor.size))[2]
        buffer = memoryview(bytearray(min(_PIECE, nbytes)))
        for start in range(0, nbytes, step) if nbytes else [0]:
            block = xxhash.xxh3_128()
            end = min(start + step, nbytes)
            for at in range(start, end, _PIECE):
                piece = buffer[: min(_PIECE, end - at)]
                staging.read(shard, offset + at, piece)
                block.update(piece)
            found += block.digest()
    return found.hex()


def _unmerged(shard: Shard) -> dict[int, int]:
    """Return the ranges of a file that no tensor fills: its header, and padding."""
    found = {0: len(shard.header)}
    at = len(shard.header)
    for start, nbytes in sorted(shard.entries.values()):
        if start > at:
            found[at] = start
        at = start + nbytes
    return found if at >= shard.size else {**found, at: shard.size}


class Hasher:
    """Hashes the output's files from start to end while they are written, in a thread of its own."""

    def __init__(self, plan: Plan, staging: Staging) -> None:
        self._shards = plan.shards
        self._staging = staging
        self._changed = threading.Condition()
        self._done: list[dict[int, int]] = [_unmerged(shard) for shard in plan.shards]
        self._stopped = False
        self._hashes: list[str] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        start_thread(self._thread)

    def add(self, shard: int, offset: int, nbytes: int) -> None:
        """Report that a range is written."""
        if nbytes:
            with self._changed:
                self._done[shard][offset] = offset + nbytes
                self._changed.notify()

    def stop(self) -> None:
        """Stop the thread without a result."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def result(self) -> list[str]:
        """Wait for the sha256 of every file, in the order of the shards.

        Raises:
            OutputError: A file cannot be read.
        """
        while self._thread.is_alive():
            # a timeout, so that Ctrl-C is handled
            self._thread.join(0.1)
        if self._error is not None:
            raise self._error
        return self._hashes

    def _work(self) -> None:
        buffer = memoryview(bytearray(_PIECE))
        try:
            for index, shard in enumerate(self._shards):
                found = hashlib.sha256()
                position = flushed = 0
                while position < shard.size:
                    end = self._wait(index, position)
                    if end is None:
                        return
                    while position < end:
                        if self._stopped:
                            return
                        piece = buffer[: min(_PIECE, end - position)]
                        self._staging.read(index, position, piece)
                        found.update(piece)
                        position += len(piece)
                        if position - flushed >= _FLUSHED or position == shard.size:
                            self._staging.start_flush(index, flushed, position - flushed)
                            flushed = position
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
