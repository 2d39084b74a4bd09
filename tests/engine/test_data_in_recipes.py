"""Recipes that name data: a merge makes the statistics that it lacks, and takes those that are there."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser
from merganser.engine.merge import merge
from merganser.engine.output import ownership
from merganser.engine.run import Interrupted
from merganser.errors import MergeError, NonFiniteError, OutputError, RecipeError
from tests.calibration.families import save
from tests.engine.interrupting import Killed, die, in_a_process, press_ctrl_c
from tests.evaluation.tiny import add_tokenizer, text

LENGTH = 40


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two experts and a text of each."""
    folder = tmp_path_factory.mktemp("zoo")
    base = save(folder / "base", "llama")
    add_tokenizer(base)
    for number in (1, 2):
        expert = folder / f"expert{number}"
        shutil.copytree(base, expert)
        torch.manual_seed(number)
        tensors = load_file(base / "model.safetensors")
        moved = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in tensors.items()}
        save_file(moved, expert / "model.safetensors", {"format": "pt"})
        lines = [json.dumps({"text": text(number * 10 + i, 20)}) for i in range(5)]
        (folder / f"data{number}.jsonl").write_text("\n".join(lines))
    return folder


def written(zoo: Path, *models: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A recipe of both experts, each with data of its own unless other keys are given."""
    given = models or tuple({"data": {"files": str(zoo / f"data{i}.jsonl"), "length": LENGTH}} for i in (1, 2))
    listed = [{"model": str(zoo / f"expert{i}"), **own} for i, own in enumerate(given, 1)]
    return {"merge_method": "regmean", "base_model": str(zoo / "base"), "models": listed, **keys}


def by_hand(zoo: Path, folder: Path) -> bytes:
    """The weights of the same merge with statistics that were made before."""
    for i in (1, 2):
        merganser.calibrate(zoo / f"expert{i}", [zoo / f"data{i}.jsonl"], folder / f"s{i}", length=LENGTH)
    recipe = written(zoo, *({"statistics": str(folder / f"s{i}")} for i in (1, 2)))
    merge(recipe, folder / "by-hand")
    return (folder / "by-hand" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def expected(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return by_hand(zoo, tmp_path_factory.mktemp("by-hand"))


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_a_merge_makes_the_statistics_that_it_lacks(zoo: Path, expected: bytes, tmp_path: Path) -> None:
    record = merge(written(zoo), tmp_path / "out").record
    assert weights(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    for i, own in enumerate(record["calibrations"], 1):
        (part,) = own["parts"]
        (data,) = part["data"]
        assert data["file"] == f"data{i}.jsonl"
        assert len(data["hash"]) == len(own["model"]["hash"]) == 32
        assert own["statistics"] == ["count", "gram"]
        assert part["tokens"] == part["counted"] > 0
        assert part["length"] == LENGTH


def test_data_for_all_models_and_for_one(zoo: Path, tmp_path: Path) -> None:
    """What is said for one model comes first; its files replace those for all, and other keys stay."""
    common = {"files": [str(zoo / "data1.jsonl")], "length": LENGTH, "sequences": 3}
    merge(
        written(zoo, {}, {"data": {"files": [str(zoo / "data2.jsonl")], "sequences": 2}}, data=common), tmp_path / "a"
    )
    merge(
        written(
            zoo,
            {"data": {"files": str(zoo / "data1.jsonl"), "length": LENGTH, "sequences": 3}},
            {"data": {"files": str(zoo / "data2.jsonl"), "length": LENGTH, "sequences": 2}},
        ),
        tmp_path / "b",
    )
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_statistics_that_are_there_are_taken(zoo: Path, expected: bytes, tmp_path: Path) -> None:
    merganser.calibrate(zoo / "expert1", [zoo / "data1.jsonl"], tmp_path / "s1", length=LENGTH)
    second = {"data": {"files": str(zoo / "data2.jsonl"), "length": LENGTH}}
    plan = merganser.plan(written(zoo, {"statistics": str(tmp_path / "s1")}, second))
    assert [each.name for each in plan.calibrations] == ["expert2"]
    merge(written(zoo, {"statistics": str(tmp_path / "s1")}, second), tmp_path / "out")
    assert weights(tmp_path / "out") == expected


def test_the_plan_says_what_calibrating_takes(zoo: Path, tmp_path: Path) -> None:
    recipe = written(zoo)
    plan = merganser.plan(recipe)
    assert [each.name for each in plan.calibrations] == ["expert1", "expert2"]
    first = plan.calibrations[0]
    assert (first.data, first.statistics, first.present) == (("data1.jsonl",), ("count", "gram"), False)
    made = merganser.calibrate(zoo / "expert1", [zoo / "data1.jsonl"], tmp_path / "s1", length=LENGTH)
    (part,) = made.about["parts"]
    assert (first.sequences, first.tokens, first.counted) == (part["sequences"], part["tokens"], part["counted"])
    assert first.statistics_bytes == made.nbytes
    assert set(first.files) == {path.name for path in (tmp_path / "s1").iterdir()}
    # 4 blocks of 2 x 32 x 32 + 2 x 32 x 16 weights of attention and 3 x 32 x 48 of the MLP, and norms
    block = 3 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert first.forward_operations == pytest.approx(4 * 2 * block * first.tokens, rel=0.35)
    # hidden states of width 32 in float32, before and behind a block
    assert first.spool_bytes == 2 * 4 * 32 * first.tokens
    # and the merge is planned as with statistics that are there
    kept = [{"statistics": str(tmp_path / "s1")}] * 2
    other = merganser.plan(written(zoo, *kept, check_statistics=False))
    assert plan.bytes_read == other.bytes_read
    assert {t.name: sorted(t.data) for t in plan.tensors} == {t.name: sorted(t.data) for t in other.tensors}


def test_stages_are_calibrated_when_they_are_made(zoo: Path, tmp_path: Path) -> None:
    first = {**written(zoo), "name": "first"}
    data = {"files": str(zoo / "data1.jsonl"), "length": LENGTH}
    second = {
        "merge_method": "regmean",
        "base_model": str(zoo / "base"),
        "data": data,
        "models": [{"model": "first"}, {"model": str(zoo / "expert2")}],
    }
    import yaml

    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump_all([first, second]))
    plan = merganser.plan(recipe)
    names = [[each.name for each in one.calibrations] for one in (*plan.stages, plan)]
    assert names == [["expert1", "expert2"], ["first", "expert2-2"]]
    record = merge(recipe, tmp_path / "out").record
    assert [own["model"]["reference"] for own in record["calibrations"]] == ["first", "expert2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "r.yaml"]


def test_kept_statistics_are_taken_the_next_time(zoo: Path, expected: bytes, tmp_path: Path) -> None:
    recipe = written(zoo, keep_statistics=str(tmp_path / "kept"))
    merge(recipe, tmp_path / "out")
    assert weights(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "out"]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*")}
    assert [each.present for each in merganser.plan(recipe).calibrations] == [True, True]
    merge(recipe, tmp_path / "again")
    assert weights(tmp_path / "again") == expected
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*")} == files
    other = written(
        zoo, *({"data": str(zoo / f"data{i}.jsonl")} for i in (2, 1)), keep_statistics=str(tmp_path / "kept")
    )
    for run in (merganser.plan, lambda each: merge(each, tmp_path / "third")):
        with pytest.raises(OutputError, match=r"expert1: the statistics there are of other data"):
            run(other)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*")} == files


def test_kept_statistics_of_other_weights_are_refused(zoo: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(zoo, models)
    recipe = written(models, keep_statistics=str(tmp_path / "kept"))
    merge(recipe, tmp_path / "out")
    tensors = load_file(models / "expert1" / "model.safetensors")
    save_file({name: 1.01 * own for name, own in tensors.items()}, models / "expert1" / "model.safetensors")
    with pytest.raises(OutputError, match=r"expert1: the statistics there are of other weights"):
        merge(recipe, tmp_path / "again")


class Steps:
    """Counts the blocks of calibrations; does something, by default presses Ctrl-C, after some."""

    def __init__(self, after: int | None = None, what: Callable[[], None] = press_ctrl_c) -> None:
        self.seen: list[tuple[str, int]] = []
        self._after, self._what = after, what

    def calibrating(self, model: str, done: int, blocks: int) -> None:
        self.seen.append((model, done))
        if len(self.seen) == self._after:
            self._what()

    def start(self, plan: Any, continued: bool) -> None:
        pass

    def advance(self, read: int, written: int, tensors: int) -> None:
        pass


def _die(recipe: dict[str, Any], out: Path, after: int) -> None:
    torch.set_num_threads(1)
    merge(recipe, out, progress=Steps(after, die))


def test_a_killed_merge_continues_at_its_block(zoo: Path, expected: bytes, tmp_path: Path) -> None:
    process = in_a_process(_die, written(zoo), tmp_path / "out", 7)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / ".out.statistics" / "expert1" / "statistics.json").exists()
    steps = Steps()
    merge(written(zoo), tmp_path / "out", progress=steps)
    # the first model is done; of the second, two blocks are
    assert steps.seen == [("expert2", 2), ("expert2", 3)]
    assert weights(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_statistics_that_a_kill_left_beside_a_finished_merge_go_with_the_next_call(
    zoo: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = ownership.Owned.remove

    def killed(self: Any) -> None:
        if self.folder.name == ".out.statistics.done" and self.files:
            # in the midst of the removal
            next(self.folder.rglob("*.safetensors")).unlink()
            raise Killed
        remove(self)

    with monkeypatch.context() as patch:
        patch.setattr(ownership.Owned, "remove", killed)
        with pytest.raises(Killed):
            merge(written(zoo), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.statistics.done", "out"]
    (tmp_path / ".out.statistics.lock").touch()
    # of others, and of another target
    (tmp_path / ".out.mine.done").mkdir()
    (tmp_path / ".out.mine.done" / "mine").touch()
    with pytest.raises(OutputError, match="out: exists"):
        merge(written(zoo), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.mine.done", "out"]
    assert weights(tmp_path / "out") == expected


def test_an_interrupted_merge_says_so_and_may_start_afresh(zoo: Path, expected: bytes, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped while expert1 was calibrated; run the same command again"):
        merge(written(zoo), tmp_path / "out", progress=Steps(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.statistics"]
    steps = Steps()
    merge(written(zoo), tmp_path / "out", progress=steps, fresh=True)
    assert len(steps.seen) == 8
    assert weights(tmp_path / "out") == expected


def test_other_files_in_the_folder_stay(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        merge(written(zoo), tmp_path / "out", progress=Steps(6))
    mine = tmp_path / ".out.statistics" / "expert1" / "notes.txt"
    mine.write_text("mine")
    for fresh in (False, True):
        with pytest.raises(OutputError, match=r"notes\.txt"):
            merge(written(zoo), tmp_path / "out", fresh=fresh)
    assert mine.read_text() == "mine"


def test_changed_data_are_calibrated_anew(zoo: Path, expected: bytes, tmp_path: Path) -> None:
    swapped = written(zoo, *({"data": {"files": str(zoo / f"data{i}.jsonl"), "length": LENGTH}} for i in (2, 1)))
    with pytest.raises(Interrupted):
        merge(swapped, tmp_path / "out", progress=Steps(7))
    steps = Steps()
    merge(written(zoo), tmp_path / "out", progress=steps)
    assert len(steps.seen) == 8
    assert weights(tmp_path / "out") == expected


def test_a_model_that_gives_nan_leaves_nothing(zoo: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(zoo, models)
    tensors = load_file(models / "expert2" / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, models / "expert2" / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"models\[1\]: data: .*model.layers.2 gives NaN or infinity"):
        merge(written(models), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def test_slices_take_data_and_statistics(zoo: Path, tmp_path: Path) -> None:
    def sliced(**each: Any) -> dict[str, Any]:
        pieces = [
            {"sources": [{"model": str(zoo / f"expert{i}"), "layer_range": layers, **_of(each, i)} for i in (1, 2)]}
            for layers in ([0, 2], [1, 4])
        ]
        return {"merge_method": "regmean", "base_model": str(zoo / "base"), "slices": pieces}

    def _of(each: dict[str, Any], i: int) -> dict[str, Any]:
        return {key: value[i] for key, value in each.items()}

    data = {i: {"files": str(zoo / f"data{i}.jsonl"), "length": LENGTH} for i in (1, 2)}
    plan = merganser.plan(sliced(data=data))
    # each model is calibrated once, though two slices take layers of it
    assert [each.name for each in plan.calibrations] == ["expert1", "expert2"]
    merge(sliced(data=data), tmp_path / "a")
    for i in (1, 2):
        merganser.calibrate(zoo / f"expert{i}", [zoo / f"data{i}.jsonl"], tmp_path / f"s{i}", length=LENGTH)
    merge(sliced(statistics={i: str(tmp_path / f"s{i}") for i in (1, 2)}), tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    merge(written(zoo, *({"statistics": str(tmp_path / f"s{i}")} for i in (1, 2))), tmp_path / "whole")
    whole, stacked = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "a"))
    for layer, origin in enumerate([0, 1, 1, 2, 3]):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert torch.equal(stacked[name.format(layer)], whole[name.format(origin)])


def test_an_evaluation_of_a_recipe_with_data(zoo: Path, expected: bytes, tmp_path: Path) -> None:
    from contextlib import ExitStack

    from merganser.inference.sources import open_source

    with ExitStack() as stack:
        state = open_source(merganser.load_recipe(written(zoo)), stack).read()
    merge(written(zoo), tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(state[name], tensor), name


def test_a_target_that_exists_is_refused_before_anything_runs(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    steps = Steps()
    with pytest.raises(MergeError, match="exists; choose another target"):
        merge(written(zoo), tmp_path / "out", progress=steps)
    assert steps.seen == []


def test_statistics_of_other_weights_are_refused(zoo: Path, expected: bytes, tmp_path: Path) -> None:
    for i in (1, 2):
        merganser.calibrate(zoo / f"expert{i}", [zoo / f"data{i}.jsonl"], tmp_path / f"s{i}", length=LENGTH)
    crossed = written(zoo, *({"statistics": str(tmp_path / f"s{i}")} for i in (2, 1)))
    with pytest.raises(
        RecipeError, match=r"models\[0\] statistics: .*s2 is of other weights than .*expert1: of .*expert2"
    ):
        merganser.plan(crossed)
    assert merganser.plan({**crossed, "check_statistics": False}).calibrations == ()
    # a copy elsewhere has the same weights
    moved = shutil.copytree(zoo, tmp_path / "moved")
    merge(written(moved, *({"statistics": str(tmp_path / f"s{i}")} for i in (1, 2))), tmp_path / "out")
    assert weights(tmp_path / "out") == expected
