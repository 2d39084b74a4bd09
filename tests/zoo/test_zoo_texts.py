import re
import struct

import pytest

from benchmarks.zoo import arithmetic, texts


def lines(count: int) -> str:
    return "".join(f"line {number}\n" for number in range(count))


def test_contiguous_split_joins_back_to_the_text() -> None:
    text = lines(1000)
    parts = texts.split_contiguous(text)
    assert "".join(parts[name] for name in texts.SPLITS) == text


def test_contiguous_split_cuts_at_line_ends_and_shares_no_line() -> None:
    parts = texts.split_contiguous(lines(1000))
    rows = [set(parts[name].splitlines()) for name in texts.SPLITS]
    assert all(part.endswith("\n") for part in parts.values())
    assert sum(map(len, rows)) == 1000
    assert not rows[0] & rows[1]
    assert not rows[1] & rows[2]
    assert len(rows[1]) == pytest.approx(80, abs=3)


def test_contiguous_split_refuses_a_text_too_short_to_cut() -> None:
    with pytest.raises(ValueError, match="tune range is empty"):
        texts.split_contiguous("one line only")


def test_split_by_id_keeps_order_and_is_disjoint() -> None:
    items = [f"problem {number}" for number in range(50)]
    parts = texts.split_by_id(items)
    assert [len(parts[name]) for name in texts.SPLITS] == [40, 5, 5]
    assert [*parts["train"], *parts["tune"], *parts["test"]] == items


def test_split_by_id_refuses_too_few() -> None:
    with pytest.raises(ValueError, match="found 3 problems"):
        texts.split_by_id(["a", "b", "c"])


def test_splits_are_written_as_they_are(tmp_path) -> None:
    paths = texts.write_splits(tmp_path, "french", {"train": "été\n", "tune": "b\n", "test": "c\n"})
    assert paths["train"].name == "french.train.txt"
    assert paths["train"].read_bytes() == "été\n".encode()


BIBLE = 'bible = Bible(\n    Version.X,\n    """In the beginning. God said. Let light be.""",\n    {\n 1001001: 0,\n 1001002: 18,\n },\n'


def test_bible_text_leaves_out_the_index() -> None:
    assert texts.bible_text(BIBLE) == "In the beginning.\nGod said.\nLet light be.\n"


def test_bible_verses_follow_the_index() -> None:
    assert texts.bible_verses(BIBLE) == {1001001: "In the beginning.", 1001002: "God said. Let light be."}


def compiled(pairs: dict[bytes, bytes], order: str) -> bytes:
    """A gettext catalogue as msgfmt writes it."""
    count = len(pairs)
    head = struct.pack(f"{order}7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    strings, ids, translations = b"", b"", b""
    start = 28 + 16 * count
    for table, values in (("ids", pairs.keys()), ("translations", pairs.values())):
        for value in values:
            entry = struct.pack(f"{order}2I", len(value), start + len(strings))
            strings += value + b"\0"
            if table == "ids":
                ids += entry
            else:
                translations += entry
    return head + ids + translations + strings


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogue_is_read_in_both_byte_orders(order: str) -> None:
    pairs = {b"": b"Content-Type: x", b"one\0many": b"un\0plusieurs", b"yes": "déjà".encode()}
    assert texts.catalogue(compiled(pairs, order)) == {"one": "un", "yes": "déjà"}


def test_translations_are_kept_once_and_only_when_translated() -> None:
    first = {"b": "une phrase assez longue", "a": "court", "c": "left in English as it was"}
    second = {"d": "une phrase assez longue", "a2": "la seconde phrase du texte"}
    first["left in English as it was"] = first.pop("c")
    expected = "la seconde phrase du texte\n\nune phrase assez longue\n"
    assert texts.translated_text([first, second], minimum=20) == expected


def test_python_source_is_python_of_about_the_wanted_length() -> None:
    source = texts.python_source(100_000)
    assert 90_000 < len(source) < 101_000
    assert "\ndef " in source


def test_every_arithmetic_answer_is_right() -> None:
    for text in arithmetic.problems(500):
        question, *steps = text.split("\n")
        answer = steps.pop().removeprefix("Answer: ")
        numbers = [int(number) for number in re.findall(r"-?\d+", question)]
        if "+ " in question and "x" not in question:
            assert int(answer) == sum(numbers)
        elif "*" in question:
            assert int(answer) == numbers[0] * numbers[1]
        elif "Solve" in question:
            assert numbers[0] * int(answer) + numbers[1] == numbers[2]
        elif "Divide" in question:
            quotient, rest = map(int, answer.split(" remainder "))
            assert quotient * numbers[1] + rest == numbers[0]
            assert 0 <= rest < numbers[1]
        else:
            assert int(answer) == numbers[0] * numbers[1] - numbers[2]
            assert int(answer) > 0


def test_every_written_step_is_right() -> None:
    checked = 0
    for text in arithmetic.problems(500):
        for left, right in re.findall(r"(?<![-\d])(-?\d+(?: [-+*] \d+)+) = (-?\d+)", text):
            assert eval(left) == int(right), text
            checked += 1
    assert checked > 800


def test_a_problem_depends_on_its_number_alone() -> None:
    assert arithmetic.problem(7) == arithmetic.problem(7)
    assert arithmetic.problems(300)[:100] == arithmetic.problems(100)
    assert len(set(arithmetic.problems(300))) == len(arithmetic.problems(300))
