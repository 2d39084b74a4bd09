"""The benchmark of fusion: every training has a control on the same batches, a killed run goes on, and the page has the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fusion import __main__ as command
from benchmarks.fusion import table
from benchmarks.fusion.jobs import Job, jobs, perform
from benchmarks.zoo import Zoo
from merganser.distillation import load_fusion

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "fusion"
CONFIG: dict[str, Any] = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    experts = {name: tmp_path / "experts" / name for name in CONFIG["experts"]}
    texts = {name: {"train": tmp_path / f"{name}.train.txt"} for name in experts}
    return Zoo(tmp_path, tmp_path / "base", experts, texts, "english")


def test_trainings_are_on_the_same_batches_as_their_controls(zoo: Zoo, tmp_path: Path) -> None:
    made = {job.name: job for job in jobs(CONFIG, zoo, tmp_path / "work", [*CONFIG["runs"]])}
    recipes = {name: load_fusion(made[name].arguments[2]) for name in CONFIG["runs"]}
    caches = [str(made[name].out) for name in CONFIG["experts"]]
    for name, run in CONFIG["runs"].items():
        recipe = recipes[name]
        # which sequences there are, and in which order, is that of the first cache
        assert [source.name for source in recipe.sources] == (caches[:1] if run["sources"] == "first" else caches)
        assert "--no-control" in made[name].arguments
        if "beside" in run:
            control = recipes[run["beside"]]
            assert (recipe.student, recipe.training, recipe.seed) == (control.student, control.training, control.seed)
            assert recipe.lambda_ < control.lambda_ == 1
        else:
            assert recipe.lambda_ == 1
    assert recipes["distilled"].student == str(tmp_path / "work" / "average")
    few = {job.name for job in jobs(CONFIG, zoo, tmp_path / "work", ["control"])}
    assert few == {*CONFIG["experts"], "average", "control"}


def test_commands_wait_for_what_they_need_and_are_not_repeated(tmp_path: Path) -> None:
    def job(name: str, *needs: str) -> Job:
        return Job(name, tmp_path / name, (), tuple(tmp_path / own for own in needs))

    done: list[str] = []

    def do(own: Job) -> None:
        assert all(path.exists() for path in own.needs)
        done.append(own.name)
        if own.name == "c" and done.count("c") == 1:
            raise command.CommandError("killed")
        own.out.mkdir()

    (tmp_path / "a").mkdir()
    wanted = [job("d", "c", "b"), job("a"), job("b"), job("c", "b")]
    with pytest.raises(command.CommandError, match="killed"):
        perform(wanted, 1, do)
    assert done == ["b", "c"]
    perform(wanted, 2, do)
    assert done == ["b", "c", "c", "d"]


def test_other_batches_are_noticed() -> None:
    alike = {"control": [{"text": 2.0}], "mince": [{"text": 2.0}]}
    command._check_alike(CONFIG, alike)
    with pytest.raises(command.WrongResultError, match=r"mince: the text of its first batch has 2\.1 nats"):
        command._check_alike(CONFIG, {**alike, "mince": [{"text": 2.1}]})


def test_what_cannot_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["run", "--runs", "control,minc"])
    assert "--runs: there is no minc; there are control, mince," in capsys.readouterr().err


def test_the_page_has_the_tables_of_the_results(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "fuse.md").read_text(encoding="utf-8")
    page, file = tmp_path / "fuse.md", FOLDER / "results.json"
    page.write_text(text.replace("<!-- fusion:start -->", "<!-- fusion:start -->something else"), encoding="utf-8")
    assert command.main(["table", "--docs", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == text
    assert not file.exists() or json.loads(file.read_text(encoding="utf-8"))["config"] == CONFIG
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="has no <!-- fusion:start -->"):
        command.main(["table", "--docs", str(page)])


def test_the_tables() -> None:
    tasks = (*CONFIG["experts"], "english")
    results = {
        "config": CONFIG,
        "windows": dict.fromkeys(tasks, 10),
        "trainings": {"control": {"continued": True}, "mince": {"continued": False}},
        "commands": {"control": {"cpu_seconds": 60.0}, "mince": {"cpu_seconds": 65.4}},
        "bits_per_byte": {
            name: {key: {"value": 1.25, "stderr": 0.1} for key in tasks}
            for name in ("base", *CONFIG["experts"], "average", "control", "mince")
        },
        "beside": {
            "mince": {
                "control": "control",
                **{key: {"value": -0.02, "stderr": 0.005} for key in tasks},
                "mean": {"value": 0.02, "stderr": 0.011},
            }
        },
    }
    lines = table.tables(results).splitlines()
    assert "| expert: Middle English |  | 1.2500 | 1.2500 | 1.2500 | 1.2500 |  |" in lines
    assert "| base, plain fine-tuning (control) | 1 | 1.2500 | 1.2500 | 1.2500 | 1.2500 | continued |" in lines
    assert "| base, FuseLLM's MinCE | 0.9 | 1.2500 | 1.2500 | 1.2500 | 1.2500 | 65 |" in lines
    # bold where it is above two standard errors
    sure = "**-0.0200 ± 0.0050**"
    expected = (
        f"| base, FuseLLM's MinCE | base, plain fine-tuning (control) | {' | '.join([sure] * 4)} | +0.0200 ± 0.0110 |"
    )
    assert lines[-1] == expected
