"""Whole evaluations: results and their JSON, interruption, and targets that cannot be written."""

from __future__ import annotations

import fcntl
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import merganser
from merganser.errors import OutputError
from merganser.evaluation import Evaluation, evaluate
from merganser.evaluation import run as run_module
from merganser.evaluation.scoring import precision, text
from merganser.evaluation.scoring.journal import Journal
from tests.evaluation.tiny import text as words


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    (tmp_path / "french.txt").write_text(words(1, 300))
    (tmp_path / "english.txt").write_text(words(2, 300))
    questions = [{"context": words(i, 6).strip(), "choices": [" cat", " mat", " x"], "gold": i % 3} for i in range(9)]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    return [tmp_path / name for name in ("french.txt", "english.txt", "quiz.jsonl")]


def measure(zoo: Path, tasks: list[Path], **options: Any) -> Evaluation:
    settings = {"base": zoo / "base", "experts": {"french": zoo / "a"}, "dtype": "float32", "batch_tokens": 300}
    return evaluate([zoo / "b"], tasks, **settings | options)


class Calls:
    """Counts the batches that are scored, and stops at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> None:
        self.count, self._stop, self._score = 0, stop, text.score
        monkeypatch.setattr(text, "score", self)

    def __call__(self, *given: Any) -> Any:
        if self.count == self._stop:
            raise KeyboardInterrupt
        self.count += 1
        return self._score(*given)


def test_the_json(zoo: Path, tasks: list[Path], tmp_path: Path) -> None:
    found = measure(zoo, tasks, json=tmp_path / "out.json", limit=8)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == json.loads(json.dumps(found.to_json()))
    assert [*written] == [
        *("format", "kind", "created", "versions", "hardware", "settings", "base", "experts", "models", "tasks"),
        *("results", "differences", "retention", "seconds", "peak_memory", "items", "warnings"),
    ]
    assert (written["format"], written["kind"], written["base"]) == (1, "evaluation", "base")
    assert written["experts"] == {"french": "a"}
    assert [*written["models"]] == [*written["results"]] == ["base", "a", "b"]
    assert [*written["models"]["b"]] == [
        *("reference", "kind", "role", "hash", "tokenizer", "parameters", "seconds", "peak_memory", "failed")
    ]
    assert [task["role"] for task in written["tasks"].values()] == ["domain", "retained", "retained"]
    assert written["tasks"]["quiz"]["metrics"] == ["accuracy", "accuracy_norm"]
    assert [task["items"] for task in written["tasks"].values()] == [8, 8, 8]
    assert [task["higher_is_better"] for task in written["tasks"].values()] == [False, False, True]
    assert written["settings"]["dtype"] == "float32"
    assert written["items"] == "out.json.items.jsonl"
    assert written["results"]["b"]["french"]["metrics"]["bits_per_byte"]["value"] == found.metric("b", "french").value
    assert [*written["retention"]["models"]] == ["a", "b"]


def test_the_documented_json_has_the_keys_of_the_real_one(zoo: Path, tasks: list[Path]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    documented = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])
    found = measure(zoo, tasks).to_json()

    assert [*documented] == [*found]
    for name in ("versions", "settings", "hardware", "differences"):
        assert [*documented[name]] == [*found[name]], name
    one = {name: next(iter(documented[name].values())) for name in ("models", "tasks")}
    assert [*one["models"]] == [*found["models"]["b"]]
    assert [*one["tasks"]] == [*found["tasks"]["french"]]
    result, real = documented["results"]["ties"]["french"], found["results"]["b"]["french"]
    assert [*result] == [*real]
    assert [*result["metrics"]] == [*real["metrics"]]
    assert [*documented["differences"]["models"]["ties"]["french"]] == [*found["differences"]["models"]["b"]["french"]]
    kept, real = documented["retention"], found["retention"]
    assert [*kept] == [*real]
    assert [*kept["domains"]["french"]] == [*real["domains"]["french"]]
    own, real = kept["models"]["ties"], real["models"]["b"]
    assert [*own] == [*real]
    assert [*own["forgotten"]["english"]] == [*real["forgotten"]["english"]]


def test_differences_are_paired(zoo: Path, tasks: list[Path]) -> None:
    found = measure(zoo, tasks)
    bits, base = found.items("b", "french"), found.items("base", "french")
    nbytes = bits["bytes"]
    scatter = (bits["bits"] - base["bits"]) - nbytes * (bits["bits"] - base["bits"]).sum() / nbytes.sum()
    n = len(nbytes)
    difference = found.difference("b", "base", "french")
    assert difference.value == pytest.approx(bits["bits"].sum() / nbytes.sum() - base["bits"].sum() / nbytes.sum())
    assert difference.stderr == pytest.approx(math.sqrt(n / (n - 1) * (scatter**2).sum()) / nbytes.sum())
    assert difference.stderr < 0.5 * found.metric("b", "french").stderr
    written = found.to_json()["differences"]
    assert written["reference"] == "base"
    assert written["models"]["b"]["french"] == {
        "metric": "bits_per_byte", "value": difference.value, "stderr": difference.stderr, "paired": True
    }  # fmt: skip


def test_other_tokenizers_are_not_paired(zoo: Path, tasks: list[Path]) -> None:
    found = evaluate([zoo / "base", zoo / "bos"], tasks, dtype="float32")
    assert "different tokenizers" in found.warnings[0]
    written = found.to_json()["differences"]["models"]["bos"]
    assert not written["french"]["paired"]
    assert written["quiz"]["paired"]
    errors = [found.metric(name, "french").stderr for name in ("base", "bos")]
    assert written["french"]["stderr"] == pytest.approx(math.hypot(*errors))


def test_an_interrupted_evaluation_continues(
    zoo: Path, tasks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(zoo, tasks, json=tmp_path / "whole.json")
    with monkeypatch.context() as patch:
        first = Calls(patch, stop=5)
        with pytest.raises(KeyboardInterrupt):
            measure(zoo, tasks, json=tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    # the last line of a run that was killed may be cut off
    journal = tmp_path / "out.json.items.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    with monkeypatch.context() as patch:
        second = Calls(patch)
        found = measure(zoo, tasks, json=tmp_path / "out.json")
    total = sum(
        1
        for line in (tmp_path / "whole.json.items.jsonl").read_text().splitlines()
        if json.loads(line).get("task") in ("french", "english")
    )
    assert first.count == 5
    assert second.count == total - 4
    assert found.to_json()["results"] == whole.to_json()["results"]
    with monkeypatch.context() as patch:
        third = Calls(patch)
        monkeypatch.setattr(run_module.LanguageModel, "load", None)
        again = measure(zoo, tasks, json=tmp_path / "out.json")
    assert third.count == 0
    assert again.to_json()["results"] == whole.to_json()["results"]


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"{}",
        b'{"key": "key"}',
        b'{"key": ["key"], "batch": 1, "content": {}}',
        b'{"key": "key", "batch": 1, "content": {"bits": [7.0]}}',
        b'{"note": "text dtype"}',
        b'{"a":' * 100_000,
    ],
)
def test_a_journal_with_a_line_that_is_not_ours(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "items.jsonl"
    with Journal(path) as journal:
        for batch in range(3):
            journal.add("key", batch, {"bits": [batch + 0.5]})
    lines = path.read_bytes().splitlines()
    lines[2] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    with Journal(path) as journal:
        assert [journal.get("key", batch) for batch in range(3)] == [{"bits": [0.5]}, None, None]


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_journal_that_was_cut_off_is_mended(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "items.jsonl"
    with Journal(path) as journal:
        for batch in range(3):
            journal.add("key", batch, {"bits": [batch + 0.5]})
    path.write_bytes(path.read_bytes()[:-cut])
    for _ in range(2):
        with Journal(path) as journal:
            assert [journal.get("key", batch) for batch in range(2)] == [{"bits": [0.5]}, {"bits": [1.5]}]
            last = journal.get("key", 2)
            journal.add("key", 2, {"bits": [2.5]})
    assert last == {"bits": [2.5]}
    for line in path.read_text().splitlines():
        json.loads(line)


def test_what_changed_is_measured_again(
    zoo: Path, tasks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(zoo, tasks, json=tmp_path / "out.json")
    for change in ({"context": 32}, {"limit": 3}, {"dtype": "bfloat16"}, {"batch_tokens": 301}):
        with monkeypatch.context() as patch:
            calls = Calls(patch)
            measure(zoo, tasks, json=tmp_path / "out.json", **change)
        assert calls.count >= 3, change
    tasks[0].write_text(words(7, 300))
    with monkeypatch.context() as patch:
        calls = Calls(patch)
        found = measure(zoo, tasks, json=tmp_path / "out.json")
    assert calls.count > 0
    fresh = measure(zoo, tasks)
    assert found.metric("b", "french").value == fresh.metric("b", "french").value


def test_another_model_is_added_to_what_is_there(
    zoo: Path, tasks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(zoo, tasks, json=tmp_path / "out.json")
    with monkeypatch.context() as patch:
        calls = Calls(patch)
        found = evaluate(
            [zoo / "b", zoo / "bos"], tasks[:1], dtype="float32", batch_tokens=300, json=tmp_path / "out.json"
        )
    assert [*found.models] == ["b", "bos"]
    assert found.models["b"].parameters is None
    assert 0 < calls.count < 10


def test_number_formats(zoo: Path, tasks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setattr(precision, "_for_texts", lambda *_: ("bfloat16", "fast"))
    first = measure(zoo, tasks, json=out, dtype=None, limit=2)
    assert first.settings["dtype"] == "bfloat16 for texts, float32 for questions"
    assert first.settings["dtype_reason"] == "fast; single answers depend on rounding"
    given_bfloat16, given_float32 = (measure(zoo, tasks, dtype=each, limit=2) for each in ("bfloat16", "float32"))
    assert given_bfloat16.settings["dtype"] == "bfloat16"
    for task, same in (("french", given_bfloat16), ("quiz", given_float32)):
        other = given_float32 if same is given_bfloat16 else given_bfloat16
        name = "bits" if task == "french" else "loglikelihood"
        assert [*first.items("b", task)[name]] == [*same.items("b", task)[name]]
        assert [*first.items("b", task)[name]] != [*other.items("b", task)[name]]
    # another mood of the machine does not change a run that is continued
    monkeypatch.setattr(precision, "_for_texts", lambda *_: ("float32", "slow"))
    again = measure(zoo, tasks, json=out, dtype=None, limit=2)
    assert again.settings["dtype"] == first.settings["dtype"]
    assert again.settings["dtype_reason"] == "as in the run that is continued; single answers depend on rounding"
    assert again.models["b"].parameters is None
    assert measure(zoo, tasks, dtype=None, limit=2).settings["dtype"] == "float32"


def test_targets_that_cannot_be_written(zoo: Path, tasks: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"a": 1}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling.json").symlink_to("nowhere")
    for name, message in (
        ("dangling.json", "exists and is not an evaluation by merganser"),
        ("mine.json", "exists and is not an evaluation by merganser"),
        ("list.json", "exists and is not an evaluation by merganser"),
        ("folder", "is a folder; give the name of a file"),
        ("no/out.json", "there is no folder"),
    ):
        with pytest.raises(OutputError, match=message):
            measure(zoo, tasks, json=tmp_path / name)
    assert (tmp_path / "mine.json").read_text() == '{"a": 1}'
    (tmp_path / "out.json.items.jsonl").write_text("something else\n")
    with pytest.raises(OutputError, match="is not a file of measurements"):
        measure(zoo, tasks, json=tmp_path / "out.json")
    assert (tmp_path / "out.json.items.jsonl").read_text() == "something else\n"


def test_two_evaluations_into_one_file(zoo: Path, tasks: list[Path], tmp_path: Path) -> None:
    with (tmp_path / "out.json.items.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another evaluation is writing it"):
            measure(zoo, tasks, json=tmp_path / "out.json")


def test_choices_without_a_space_are_warned_of(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "quiz.jsonl").write_text('{"context": "the", "choices": ["cat", "mat"], "gold": 0}\n')
    assert "no choice begins with a space" in evaluate([zoo / "a"], [tmp_path / "quiz.jsonl"]).warnings[0]


def test_progress_is_told(zoo: Path, tasks: list[Path]) -> None:
    told: list[tuple[Any, ...]] = []

    class Progress:
        def loading(self, *given: Any) -> None:
            told.append(given)

        def scoring(self, *given: Any) -> None:
            told.append(given)

    measure(zoo, tasks, progress=Progress())
    assert told[0] == ("base", 0, 3)
    assert [each for each in told if len(each) == 3] == [("base", 0, 3), ("a", 1, 3), ("b", 2, 3)]
    last = [each for each in told if each[:2] == ("b", "quiz")][-1]
    assert last[2] == last[3] > 0


def test_it_is_public() -> None:
    assert merganser.evaluate is evaluate


def test_items_of_the_result(zoo: Path, tasks: list[Path]) -> None:
    found = measure(zoo, tasks)
    items = found.items("b", "french")
    assert sorted(items) == ["bits", "bytes", "correct", "tokens"]
    assert np.asarray(items["bits"]).shape == (found.tasks["french"].items,)
    assert len(found.items("b", "quiz")["loglikelihood"]) == 9
