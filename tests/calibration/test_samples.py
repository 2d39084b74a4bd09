"""Which sequences data give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merganser.calibration.data.data import read_data
from merganser.calibration.data.samples import first_samples
from merganser.errors import DataError
from merganser.inference.language_model import LanguageModel, open_model
from merganser.inference.stored import open_stored
from merganser.statistics import Choice
from tests.calibration.families import save
from tests.evaluation.tiny import add_tokenizer, text


@pytest.fixture
def model(tmp_path: Path) -> LanguageModel:
    add_tokenizer(save(tmp_path / "model", "llama"))
    return open_model(open_stored(str(tmp_path / "model")))


def write(file: Path, *pairs: tuple[str, str]) -> Path:
    file.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in pairs))
    return file


def test_the_beginning_of_a_record_is_its_first_window(model: LanguageModel, tmp_path: Path) -> None:
    """Where no token of it counts, none of the record is taken, and not a later window without what is before it."""
    file = write(tmp_path / "d.jsonl", (text(0, 40), text(1, 6)), ("a", text(2, 20)))
    (sample,) = first_samples(read_data(file), model.tokenizer, model.config, Choice(None, 8, 0, "completions"))
    assert sample.where.endswith(":2")
    (tokens,) = sample.stacks
    prefix = model.tokenizer.prefix
    assert tokens.ids[len(prefix) :][: len(model.tokenizer.ids("a"))] == tuple(model.tokenizer.ids("a"))
    assert not tokens.counted[0]
    assert tokens.counted[-1]
    file = write(tmp_path / "long.jsonl", (text(0, 40), text(1, 6)))
    with pytest.raises(DataError, match=r"long\.jsonl: no token counts within the first 8 of any record"):
        first_samples(read_data(file), model.tokenizer, model.config, Choice(None, 8, 0, "completions"))


def test_the_record_with_a_token_that_the_model_lacks_is_named(model: LanguageModel, tmp_path: Path) -> None:
    ids = [model.tokenizer.ids(text(i, 6)) for i in range(3)]
    largest = max(range(3), key=lambda i: max(ids[i]))
    file = write(tmp_path / "d.jsonl", *(("a", text(i, 6)) for i in range(3)))
    model.config.vocab_size = max(ids[largest])
    with pytest.raises(DataError, match=rf"d\.jsonl:{largest + 1}: the tokenizer does not match the model"):
        first_samples(read_data(file), model.tokenizer, model.config, Choice(None, 64, 0))
