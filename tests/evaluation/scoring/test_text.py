"""Bits per byte and next-token accuracy, against a literal calculation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merganser.errors import TaskError
from merganser.evaluation import evaluate
from merganser.evaluation.scoring.tasks import TextTask
from merganser.evaluation.scoring.text import cut, windows
from merganser.inference.language_model import open_model
from merganser.inference.sources import open_source
from tests.evaluation.tiny import literal_bits_per_byte, text


@given(count=st.integers(0, 60), prefix=st.integers(0, 2), context=st.integers(3, 20), stride=st.integers(1, 20))
def test_every_token_is_scored_once_with_all_the_context_there_is(
    count: int, prefix: int, context: int, stride: int
) -> None:
    stride = min(stride, context - max(prefix - 1, 0))
    scored = []
    for begin, first, end in cut(count, prefix, context, stride):
        assert begin <= first < end <= count
        # one token before each that is scored, be it the prefix
        assert begin < first or prefix
        assert prefix + (end - 1 - begin) <= context
        # no context is left out that there was room for
        assert begin == 0 or prefix + (end - 1 - begin) == context
        scored += range(first, end)
    assert scored == [*range(0 if prefix else 1, count)]


@pytest.mark.parametrize(
    ("model", "context", "stride"),
    [("base", 16, 8), ("base", 13, 13), ("base", 64, 1), ("bos", 16, 5), ("bos", 16, 16), ("bos", 2, 1)],
)
def test_bits_per_byte(zoo: Path, tmp_path: Path, model: str, context: int, stride: int) -> None:
    content = text(1, 60)
    (tmp_path / "words.test.txt").write_text(content, encoding="utf-8")
    found = evaluate([zoo / model], [tmp_path / "words.test.txt"], context=context, stride=stride, dtype="float32")
    bits, accuracy = literal_bits_per_byte(zoo / model, content, context, stride)
    figure = found.metric(model, "words")
    assert figure is not None
    assert figure.value == pytest.approx(bits, rel=1e-6)
    assert found.metric(model, "words", "token_accuracy").value == accuracy


def test_bytes_of_items_add_up(zoo: Path) -> None:
    content = "  größer 東京 ẞ\u0301 end  \n"
    tokenizer = open_model(open_source(zoo / "bos", None)).tokenizer  # type: ignore[arg-type]
    found, items = windows(TextTask("t", "t", "", (content,)), tokenizer, context=4, stride=3)
    assert sum(window.nbytes for window in found) == len(content.encode())
    assert items == sorted(items)
    assert items[0] == 0


class Pieces:
    """A tokenizer that drops white space at the end, and says of the pieces of a letter what some do."""

    prefix = ()

    def ids_and_ends(self, text: str) -> tuple[list[int], list[int]]:
        assert text == "aé東 b \n"
        # a, two pieces of é, the second of which says where the letter begins, 東, space and b
        return [1, 2, 3, 4, 5], [1, 2, 1, 3, 5]


def test_bytes_of_pieces_and_of_what_is_dropped() -> None:
    found, items = windows(TextTask("t", "t", "", ("aé東 b \n",)), Pieces(), context=1, stride=1)  # type: ignore[arg-type]
    # the first token is not scored
    assert [window.nbytes for window in found] == [2, 0, 3, 4]
    assert items == [1, 3, 3, 6]


def test_batches_change_nothing(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(text(1))
    columns = [
        evaluate([zoo / "base"], [tmp_path / "words.txt"], batch_tokens=budget, dtype="float32").items("base", "words")
        for budget in (1, 100, 100_000)
    ]
    assert len(columns[0]["bits"]) > 10
    for other in columns[1:]:
        np.testing.assert_allclose(other["bits"], columns[0]["bits"], rtol=1e-5)
        for name in ("tokens", "bytes"):
            np.testing.assert_array_equal(other[name], columns[0][name])


def test_documents_begin_without_context(zoo: Path, tmp_path: Path) -> None:
    documents = [text(seed, 5 + 20 * seed) for seed in range(3)]
    lines = [json.dumps({"text": document, "id": i}) for i, document in enumerate(documents)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    for i, document in enumerate(documents):
        (tmp_path / f"one{i}.txt").write_text(document)
    tasks = [tmp_path / "many.jsonl", *(tmp_path / f"one{i}.txt" for i in range(3))]
    found = evaluate([zoo / "base"], tasks, dtype="float32")
    assert found.tasks["many"].unit == "document"
    assert found.tasks["one1"].unit == "window"
    many = found.items("base", "many")
    assert len(many["bits"]) == 3
    for i in range(3):
        alone = found.items("base", f"one{i}")
        for name in ("bits", "bytes", "tokens", "correct"):
            assert many[name][i] == pytest.approx(alone[name].sum(), rel=1e-6)


def test_limit_counts_items(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(text(1))
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps({"text": text(i, 90)}) for i in range(9)))
    given_all, three = (
        evaluate([zoo / "base"], [tmp_path / "words.txt", tmp_path / "many.jsonl"], limit=limit, dtype="float32")
        for limit in (None, 3)
    )
    for task in ("words", "many"):
        assert three.tasks[task].items == 3
        np.testing.assert_allclose(
            three.items("base", task)["bits"], given_all.items("base", task)["bits"][:3], rtol=1e-6
        )


def test_a_text_of_one_token_is_too_short_without_a_token_in_front(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(TaskError, match=r"one\.txt: is too short"):
        evaluate([zoo / "base"], [tmp_path / "one.txt"])
    assert evaluate([zoo / "bos"], [tmp_path / "one.txt"]).tasks["one"].items == 1


def test_bfloat16_is_near_float32(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(text(1))
    wide, narrow = (
        evaluate([zoo / "base"], [tmp_path / "words.txt"], dtype=dtype).metric("base", "words").value
        for dtype in ("float32", "bfloat16")
    )
    assert wide != narrow
    # the weights alone are rounded by up to 0.4 %
    assert narrow == pytest.approx(wide, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 65}, "context: 65 tokens, and base can see 64 at once; give at most 64"),
        ({"context": 8, "stride": 9}, "stride: 9 tokens, more than the context of 8"),
        ({"limit": 0}, "limit: must be a whole number of at least 1, got 0"),
        ({"dtype": "fp8"}, "dtype: 'fp8' is not known; allowed: float32, bfloat16, float16"),
    ],
)
def test_settings_that_make_no_sense(zoo: Path, tmp_path: Path, options: dict[str, int], message: str) -> None:
    (tmp_path / "words.txt").write_text(text(1))
    with pytest.raises(TaskError, match=message):
        evaluate([zoo / "base"], [tmp_path / "words.txt"], **options)
