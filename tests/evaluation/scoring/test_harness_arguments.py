"""Arguments of lm-eval: which are passed on, as what, and which are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from merganser.errors import TaskError
from merganser.evaluation import evaluate
from merganser.evaluation.scoring.harness_arguments import parse_arguments
from tests.cli.tiny import run


def test_what_is_passed_on() -> None:
    found = parse_arguments(
        [
            "num_fewshot=5",
            "apply_chat_template=true",
            "system_instruction=no: yes = 1",
            "gen_kwargs={max_gen_toks: 8}",
            "max_length=128",
            "enable_thinking=false",
        ]
    )
    assert found.evaluation == {
        "num_fewshot": 5,
        "apply_chat_template": True,
        "system_instruction": "no: yes = 1",
        "gen_kwargs": {"max_gen_toks": 8},
    }
    assert found.model == {"max_length": 128, "enable_thinking": False}
    assert parse_arguments({"apply_chat_template": "tool_use"}).evaluation == {"apply_chat_template": "tool_use"}
    assert not parse_arguments(())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["num_fewshots=5"], "lm-eval: 'num_fewshots' is not passed on. Did you mean 'num_fewshot'?"),
        (["num_fewshot"], "lm-eval: expected NAME=VALUE, got 'num_fewshot'"),
        (["=5"], "lm-eval: expected NAME=VALUE, got '=5'"),
        (["num_fewshot=five"], "lm-eval: num_fewshot: expected a whole number from 0, got 'five'"),
        (["num_fewshot=-1"], "lm-eval: num_fewshot: expected a whole number from 0, got '-1'"),
        (["num_fewshot=true"], "lm-eval: num_fewshot: expected a whole number from 0, got 'true'"),
        (["num_fewshot=1", "num_fewshot=2"], "lm-eval: num_fewshot is given twice"),
        (["truncation=1"], "lm-eval: truncation: expected true or false, got '1'"),
        (["gen_kwargs={a: "], "lm-eval: gen_kwargs: expected a mapping, such as {max_gen_toks: 64}, got '{a: '"),
        ({"gen_kwargs": {1: 2}}, "lm-eval: gen_kwargs: expected a mapping"),
        ({"system_instruction": 3}, "lm-eval: system_instruction: expected a text, got 3"),
        (["limit=5"], "lm-eval: limit is given by --limit"),
        (["batch_size=5"], "lm-eval: batch_size is given by --batch-tokens"),
    ],
)
def test_what_is_refused(given: Sequence[str] | Mapping[str, Any], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        parse_arguments(given)
    assert str(caught.value).startswith(message)


def test_arguments_without_a_task(zoo: Any, tmp_path: Any) -> None:
    (tmp_path / "a.txt").write_text("a text")
    message = "lm-eval: arguments are given (num_fewshot), and no task is of lm-eval"
    with pytest.raises(TaskError) as caught:
        evaluate([zoo / "a"], [tmp_path / "a.txt"], lm_eval={"num_fewshot": 1})
    assert str(caught.value).startswith(message)
    found = run("eval", zoo / "a", "--tasks", tmp_path / "a.txt", "--lm-eval", "limit=1")
    assert (found.code, "lm-eval: limit is given by --limit" in found.err) == (2, True)
