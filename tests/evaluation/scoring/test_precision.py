"""Which number format is chosen, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from merganser.evaluation.scoring import precision
from merganser.evaluation.scoring.precision import choose_formats, given_format

CPU = torch.device("cpu")


class Config:
    def __init__(self, dtype: Any = None) -> None:
        self.dtype, self.hidden_size, self.intermediate_size = dtype, 64, 128

    def get_text_config(self) -> Config:
        return self


@pytest.mark.parametrize(
    ("seconds", "dtype", "reason"),
    [
        ({torch.float32: 3.0, torch.bfloat16: 1.0}, "bfloat16", "products in bfloat16 take 1/3.0 of the time here"),
        ({torch.float32: 1.2, torch.bfloat16: 1.0}, "float32", "products in bfloat16 take 0.8 times as long here"),
        ({torch.float32: 1.0, torch.bfloat16: 5.0}, "float32", "products in bfloat16 take 5.0 times as long here"),
    ],
)
def test_texts(monkeypatch: pytest.MonkeyPatch, seconds: dict[torch.dtype, float], dtype: str, reason: str) -> None:
    monkeypatch.setattr(precision, "_seconds", lambda width, inner, dtype: seconds[dtype])
    found = choose_formats(Config(), CPU, {"text"})
    assert (found.text, found.reason, found.shown({"text"})) == (dtype, reason, dtype)


def test_it_takes_little_time() -> None:
    assert 0 < precision._seconds(576, 1536, torch.float32) < 1


def test_questions_and_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    # nothing is timed where there are no texts
    monkeypatch.setattr(precision, "_seconds", None)
    found = choose_formats(Config(), CPU, {"choices", "lm-eval"})
    assert found.of("choices", Config(torch.bfloat16)) == "float32"
    assert found.of("lm-eval", Config(torch.bfloat16)) == "bfloat16"
    assert found.of("lm-eval", Config("float16")) == "float16"
    assert found.of("lm-eval", Config()) == "float32"
    assert found.shown({"choices", "lm-eval"}) == "float32 for questions, each model's own for lm-eval"
    assert choose_formats(Config(), CPU, {"lm-eval"}).reason == "as lm-eval does"


def test_what_is_given_holds_for_everything() -> None:
    found = given_format("float16")
    assert {found.of(kind, Config(torch.float32)) for kind in ("text", "choices", "lm-eval")} == {"float16"}
    assert (found.shown({"text", "lm-eval"}), found.reason) == ("float16", "as given")
