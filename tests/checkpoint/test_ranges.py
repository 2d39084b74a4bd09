"""Remote tensors in pieces: what is fetched, what is kept, and what threads share."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest

from merganser.checkpoint.ranges import pieces
from merganser.checkpoint.ranges.fetch import open_remote
from merganser.checkpoint.ranges.file import RemoteFile
from merganser.checkpoint.ranges.pieces import Pieces
from merganser.errors import UnreachableError, UnsupportedError

FILE = RemoteFile("org/name", "0" * 40, "model.safetensors", 1_000, "e")
DATA = bytes(range(250)) * 4
OFFSET, SIZE = 100, 800


class Fetcher:
    """Stands for the network."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.failures = 0
        self.gate = threading.Event()
        self.gate.set()

    def fetch(self, file: RemoteFile, start: int, target: memoryview) -> None:
        self.ranges.append((start - OFFSET, start - OFFSET + len(target)))
        self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise UnreachableError("gone")
        target[:] = DATA[start : start + len(target)]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> tuple[Pieces, Fetcher]:
    """Room for four pieces of 100 bytes."""
    monkeypatch.setattr(pieces, "PIECE", 100)
    monkeypatch.setattr(pieces, "_LEAST", 400)
    made, fetcher = Pieces(1), Fetcher()
    monkeypatch.setattr(made, "_fetcher", fetcher)
    return made, fetcher


def test_an_old_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", ModuleType("huggingface_hub.utils"))
    with pytest.raises(UnsupportedError, match=r"--stream needs huggingface_hub 1\.0 or later; update it"):
        open_remote("org/name", "0" * 40, "model.safetensors")


def read(made: Pieces, start: int, end: int) -> bytes:
    buffer = bytearray(end - start)
    made.read_into(FILE, OFFSET, SIZE, start, memoryview(buffer))
    assert bytes(buffer) == DATA[OFFSET + start : OFFSET + end]
    return bytes(buffer)


def test_blocks_share_a_request_and_pieces_end_with_the_tensor(cache: tuple[Pieces, Fetcher]) -> None:
    made, fetcher = cache
    for start in range(0, SIZE, 40):
        read(made, start, start + 40)
    assert fetcher.ranges == [(at, at + 100) for at in range(0, SIZE, 100)]
    fetcher.ranges.clear()
    made.read_into(FILE, OFFSET, 50, 10, memoryview(bytearray(20)))
    assert fetcher.ranges == [(0, 50)]


def test_large_and_whole_reads_go_past_the_cache(cache: tuple[Pieces, Fetcher]) -> None:
    made, fetcher = cache
    read(made, 30, 250)
    made.read_into(FILE, OFFSET, 50, 0, memoryview(bytearray(50)))
    assert fetcher.ranges == [(30, 250), (0, 50)]
    plain = Pieces()
    plain._fetcher = fetcher  # type: ignore[assignment]
    read(plain, 10, 20)
    assert fetcher.ranges[2:] == [(10, 20)]


def test_what_was_read_to_its_end_goes_first(cache: tuple[Pieces, Fetcher]) -> None:
    made, fetcher = cache
    for start in (0, 190, 200, 300, 400, 210, 310, 410, 10):
        read(made, start, start + 10)
    # 190 to 200 was the end of its piece
    assert [first for first, _ in fetcher.ranges] == [0, 100, 200, 300, 400]


def test_threads_wait_for_one_request(cache: tuple[Pieces, Fetcher]) -> None:
    made, fetcher = cache
    fetcher.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(read, made, start, start + 20) for start in (0, 20, 40, 60)]
        fetcher.gate.set()
        assert b"".join(each.result() for each in found) == DATA[OFFSET : OFFSET + 80]
    assert fetcher.ranges == [(0, 100)]


def test_a_failed_request_is_made_again(cache: tuple[Pieces, Fetcher]) -> None:
    made, fetcher = cache
    fetcher.failures = 1
    with pytest.raises(UnreachableError):
        read(made, 0, 10)
    read(made, 0, 10)
    assert len(fetcher.ranges) == 2
