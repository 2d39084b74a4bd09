"""Sizes, counts, times and tables as people read them."""

from __future__ import annotations

import contextlib
import io
import logging

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from merganser.cli.printing.text import fitted, parse_size, table, telling
from merganser.wording import count_text, digits_text, number_text, plural, setting_text, size_text, some, time_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_are_broken_between_words_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    line = "  all  272 tensors  weight 0.5, 0.3, density 0.5 each, lambda 1"
    broken = "  all  272 tensors  weight 0.5, 0.3,\n      density 0.5 each, lambda 1"
    assert fitted(line, Terminal()) == broken
    assert fitted(f"short\n{line}", Terminal()) == f"short\n{broken}"
    assert fitted(line, io.StringIO()) == line
    told = "r.yaml:4: unknown parameter 'weigth'. Did you mean 'weight'?"
    assert fitted(told, Terminal(), 7) == "r.yaml:4: unknown parameter\n       'weigth'. Did you mean 'weight'?"
    path = "/" + "x" * 50
    assert fitted(path, Terminal()) == path
    monkeypatch.setenv("COLUMNS", "20")
    assert fitted(line, Terminal()) == line


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("5GB", 5_000_000_000),
        ("5gb", 5_000_000_000),
        (" 1.5 GB ", 1_500_000_000),
        ("500MB", 500_000_000),
        ("2KB", 2_000),
        ("1TB", 10**12),
        ("1KiB", 1024),
        ("3MiB", 3 * 2**20),
        ("1GiB", 2**30),
        ("0.5TiB", 2**39),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a size such as 5GB, 500MB, 1GiB or a number of bytes, got ''."),
        ("5B", "got '5B'. Did you mean 5GB, as mergekit means it?"),
        ("500M", "Did you mean 500MB?"),
        ("1g", "Did you mean 1GB?"),
        ("5XB", "got '5XB'."),
        ("GB", "got 'GB'."),
        ("-5GB", "got '-5GB'."),
        ("1e9", "got '1e9'."),
        ("nan", "got 'nan'."),
        ("0", "at least 1 byte, got '0'"),
        ("0.0001KB", "at least 1 byte, got '0.0001KB'"),
    ],
)
def test_what_is_no_size(text: str, message: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        parse_size(text)
    assert message in str(caught.value)


@given(st.text())
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with contextlib.suppress(typer.BadParameter):
        assert parse_size(text) >= 1


@given(st.integers(1, 10**15))
def test_sizes_are_read_back(count: int) -> None:
    assert parse_size(str(count)) == count
    text = size_text(count).replace(" bytes", "")
    assert parse_size(text) == pytest.approx(count, rel=0.006)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1.00 KB"),
        (999_499, "999 KB"),
        (999_500, "1.00 MB"),
        (1_084_000_000, "1.08 GB"),
        (9_996_000, "10.0 MB"),
        (99_960_000, "100 MB"),
        (140_000_000_000, "140 GB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_size_text(count: int, text: str) -> None:
    assert size_text(count) == text


def test_counts_and_times() -> None:
    assert [count_text(n) for n in (7, 9_999, 12_345, 494_032_768, 6_740_000_000)] == [
        "7",
        "9,999",
        "12.3 K",
        "494 M",
        "6.74 B",
    ]
    assert [time_text(s) for s in (0, 7.24, 9.96, 59.4, 59.6, 130, 3_900)] == [
        "0.0 s",
        "7.2 s",
        "10 s",
        "59 s",
        "1 min 0 s",
        "2 min 10 s",
        "1 h 5 min",
    ]
    assert [plural(n, "file") for n in (0, 1, 1_200)] == ["0 files", "1 file", "1,200 files"]
    assert [number_text(v) for v in (None, 0.0, 0.012345, 1.2e-7, 55.5)] == ["-", "0", "0.0123", "1.2e-07", "55.5"]
    # no exponents where people expect digits
    assert [number_text(v) for v in (999.6, 1_234, -20_480.0, float("inf"))] == ["1000", "1230", "-20500", "inf"]
    assert [digits_text(v) for v in (0.0124, 3.84, 99.6, 124.0)] == ["0.012", "3.8", "100", "120"]
    assert [setting_text(v) for v in (0.12345, 12_345.0, 20_000, "ties")] == ["0.1235", "12340", "20000", "ties"]


def test_some() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some(list("abcdef"), 2) == "a, b and 4 more"


def test_table_aligns_and_cuts_nothing() -> None:
    long = "x" * 300
    assert table([["a", "1", long], ["bcd", "23"]], right=[1]) == [f"  a     1  {long}", "  bcd  23"]
    assert table([]) == []


def test_what_is_logged_is_told_as_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("merganser.engine")
    with telling():
        logger.warning("%s: slower than it might be", "toy")
        logger.info("nothing of interest")
    logger.warning("nobody listens")
    assert capsys.readouterr().err == "warning: toy: slower than it might be\n"
