"""Recipes that name data for methods that use gradients or losses: planned before, and made by the merge."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser
from merganser.calibration import plan_calibration
from merganser.engine.merge import merge
from merganser.engine.plan.plan import Plan
from merganser.errors import OutputError, RecipeError, UnsupportedError
from tests.calibration.families import save
from tests.engine.downhill import downhill
from tests.engine.interrupting import Killed, end
from tests.engine.test_data_in_recipes import Steps
from tests.evaluation.tiny import add_tokenizer, text
from tests.making import register

CHOICE: dict[str, Any] = {"length": 24, "sequences": 2}
BASES = {"fisher": False, "lm_cocktail": False}


def _make(folder: Path, family: str) -> Path:
    base = save(folder / "base", family)
    add_tokenizer(base)
    for number in (1, 2):
        expert = shutil.copytree(base, folder / f"expert{number}")
        torch.manual_seed(number)
        tensors = load_file(base / "model.safetensors")
        moved = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in tensors.items()}
        save_file(moved, expert / "model.safetensors", {"format": "pt"})
        lines = [json.dumps({"text": text(number * 10 + i, 12)}) for i in range(3)]
        (folder / f"data{number}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("zoo"), "llama-tied")


def _recipe(zoo: Path, method: str, *models: dict[str, Any], **keys: Any) -> dict[str, Any]:
    given = models or tuple({"data": {"files": str(zoo / f"data{i}.jsonl"), **CHOICE}} for i in (1, 2))
    listed = [{"model": str(zoo / f"expert{i}"), **own} for i, own in enumerate(given, 1)]
    base = {"base_model": str(zoo / "base")} if BASES.get(method, True) else {}
    return {"merge_method": method, **base, "models": listed, **keys}


def _weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def _by_hand(zoo: Path, folder: Path, own: str, of_base: str) -> list[dict[str, str]]:
    """Calibrate with the command's function; return what the entries of the models then say."""
    entries: list[dict[str, str]] = []
    for i in (1, 2):
        entry = {}
        for key, model, wanted in (("statistics", f"expert{i}", own), ("base_statistics", "base", of_base)):
            if wanted:
                entry[key] = str(folder / f"{key}{i}")
                data = [zoo / f"data{i}.jsonl"]
                merganser.calibrate(zoo / model, data, entry[key], statistics=wanted.split(), **CHOICE)
        entries.append(entry)
    return entries


@pytest.fixture(scope="module")
def by_hand(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """All statistics that the methods below take, made once: what is measured together is the same as alone."""
    folder = tmp_path_factory.mktemp("statistics")
    own = "fisher gram gradient_gram absolute_gradient sensitivity loss"
    return _by_hand(zoo, folder, own, "absolute_gradient gradient")


@dataclass
class Merge:
    """A merge by `led`, which makes the statistics of both experts and of the base on the data of each, and keeps them.

    Args:
        folder: Holds its output, `out`, and its statistics, `kept`.
        record: Its run record.
        steps: What it told while it calibrated.
    """

    folder: Path
    record: dict[str, Any]
    steps: list[tuple[str, int]]


@pytest.fixture(scope="module")
def led(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Merge:
    folder = tmp_path_factory.mktemp("led")
    steps = Steps()
    recipe = _recipe(zoo, "led", keep_statistics=str(folder / "kept"))
    return Merge(folder, merge(recipe, folder / "out", progress=steps).record, steps.seen)


def test_base_statistics_are_those_made_by_hand(
    zoo: Path, by_hand: list[dict[str, str]], led: Merge, tmp_path: Path
) -> None:
    merge(_recipe(zoo, "led", *by_hand), tmp_path / "expected")
    assert _weights(led.folder / "out") == _weights(tmp_path / "expected")
    _check_kept(merganser.plan(_recipe(zoo, "led")), led.folder / "kept", "absolute_gradient", "absolute_gradient")


@pytest.mark.parametrize(
    ("method", "own", "of_base"),
    [
        ("fisher", "fisher", ""),
        ("mats", "gram gradient_gram", ""),
        ("downhill", "", "gradient"),
        ("sens", "sensitivity", ""),
        ("lm_cocktail", "loss", ""),
    ],
)
def test_a_merge_makes_statistics_of_gradients(
    method: str,
    own: str,
    of_base: str,
    zoo: Path,
    by_hand: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plan says what it will make, and the merge gives what it gives with folders that were made before."""
    register(monkeypatch, downhill=downhill)
    plan = merganser.plan(_recipe(zoo, method))
    names = [f"expert{i}" for i in (1, 2) if own] + [f"base-on-expert{i}" for i in (1, 2) if of_base]
    assert sorted(each.name for each in plan.calibrations) == sorted(names)
    kinds = [kind for kind, wanted in (("statistics", own), ("base_statistics", of_base)) if wanted]
    entries = [{kind: each[kind] for kind in kinds} for each in by_hand]
    kept = tmp_path / "kept"
    merge(_recipe(zoo, method, keep_statistics=str(kept)), tmp_path / "out")
    merge(_recipe(zoo, method, *entries), tmp_path / "expected")
    assert _weights(tmp_path / "out") == _weights(tmp_path / "expected")
    _check_kept(plan, kept, own, of_base)


def _check_kept(plan: Plan, kept: Path, own: str, of_base: str) -> None:
    """The statistics that a merge has kept are those that its plan said."""
    assert {path.name for path in kept.iterdir() if path.is_dir()} == {each.name for each in plan.calibrations}
    for each in plan.calibrations:
        assert set(each.files) == {path.name for path in (kept / each.name).iterdir()}
        found = merganser.statistics.open_statistics(kept / each.name)
        assert each.statistics == found.statistics
        assert {*(of_base if each.name.startswith("base") else own).split()} <= {*found.statistics}
        assert each.statistics_bytes == found.nbytes


# Mixtral's experts are joined and stacked, GPT-2 and T5 have other heads, and T5 two stacks
@pytest.mark.parametrize("family", ["mixtral", "gpt2", "t5"])
def test_the_plan_knows_every_sum(family: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", family)
    add_tokenizer(base)
    line = {"prompt": text(1, 6), "completion": text(2, 6)}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    given: dict[str, Any] = {"statistics": ["fisher", "sensitivity", "gradient_gram"], "length": 16}
    plan = plan_calibration(base, [tmp_path / "data.jsonl"], **given)
    made = merganser.calibrate(base, [tmp_path / "data.jsonl"], tmp_path / "out", **given)
    assert set(plan.files) == {path.name for path in (tmp_path / "out").iterdir()}
    assert (plan.statistics, plan.statistics_bytes) == (made.statistics, made.nbytes)


def test_what_gradients_take(zoo: Path) -> None:
    """Llama with blocks of 3 * 32 * 80 weights and a tied embedding: the work of the reverse pass is counted."""

    def planned(*statistics: str) -> Any:
        return plan_calibration(zoo / "expert1", [zoo / "data1.jsonl"], statistics=statistics, **CHOICE)

    forward, loss, fisher, both = planned("count"), planned("loss"), planned("fisher"), planned("fisher", "gradient")
    head = 2 * load_file(zoo / "base/model.safetensors")["model.embed_tokens.weight"].numel() * fisher.tokens
    assert loss.forward_operations == pytest.approx(forward.forward_operations + head)
    assert fisher.forward_operations == pytest.approx(4 * forward.forward_operations + 3 * head)
    # blocks' outputs, two files of gradients, and rows of the embedding, in place of what is before and behind one block
    hidden = 4 * 32 * forward.tokens
    stored = load_file(zoo / "base/model.safetensors")
    sums = 8 * (stored["model.embed_tokens.weight"].numel() + stored["model.norm.weight"].numel())
    assert (forward.spool_bytes, loss.spool_bytes) == (2 * hidden, 4 * hidden)
    assert (fisher.spool_bytes, both.spool_bytes) == (7 * hidden + sums, 7 * hidden + 2 * sums)
    assert fisher.bytes_read - loss.bytes_read > load_file(zoo / "base/model.safetensors")["model.norm.weight"].nbytes
    weights = sum(own.numel() for own in load_file(zoo / "base/model.safetensors").values())
    assert fisher.statistics_bytes - loss.statistics_bytes == 4 * weights
    assert both.statistics_bytes - fisher.statistics_bytes == 4 * weights
    assert loss.peak_memory < fisher.peak_memory < both.peak_memory


def test_a_killed_reverse_pass_continues(zoo: Path, led: Merge, tmp_path: Path) -> None:
    """Killed in the backward of the base; what is finished is not done again."""
    recipe = _recipe(zoo, "led")
    # a model takes its blocks, the head, and its blocks once more
    each = len(led.steps) // 4
    after = 3 * each - 1
    # test_data_in_recipes kills a process
    with pytest.raises(Killed):
        merge(recipe, tmp_path / "killed", progress=Steps(after, end))
    rest = Steps()
    merge(recipe, tmp_path / "killed", progress=rest)
    assert rest.seen == led.steps[after - 1 :]
    assert _weights(tmp_path / "killed") == _weights(led.folder / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed"]


def test_base_statistics_that_are_there_are_taken(
    zoo: Path, led: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = led.folder / "kept"
    assert [Path(own["model"]["reference"]).name for own in led.record["calibrations"]] == [
        "expert1",
        "expert2",
        "base",
        "base",
    ]
    assert sorted(path.name for path in kept.iterdir()) == [
        "base-on-expert1",
        "base-on-expert2",
        "expert1",
        "expert2",
    ]
    entries = [
        {
            "data": {"files": str(zoo / f"data{i}.jsonl"), **CHOICE},
            "base_statistics": str(kept / f"base-on-expert{i}"),
        }
        for i in (1, 2)
    ]
    recipe = _recipe(zoo, "led", *entries)
    assert [each.name for each in merganser.plan(recipe).calibrations] == ["expert1", "expert2"]
    merge(recipe, tmp_path / "out")
    assert _weights(tmp_path / "out") == _weights(led.folder / "out")
    assert all(each.present for each in merganser.plan(_recipe(zoo, "led", keep_statistics=str(kept))).calibrations)
    register(monkeypatch, downhill=downhill)
    with pytest.raises(RecipeError, match="downhill takes 'base_statistics' alone; leave the data out"):
        merganser.plan(_recipe(zoo, "downhill", *entries))
    # the experts' in place of the base's
    experts = [str(kept / f"expert{i}") for i in (1, 2)]
    swapped = [{"statistics": own, "base_statistics": own} for own in experts]
    with pytest.raises(
        RecipeError, match=r"models\[0\] base_statistics: .*expert1 is of other weights than .*base: of .*expert1"
    ):
        merganser.plan(_recipe(zoo, "led", *swapped))
    assert merganser.plan(_recipe(zoo, "led", *swapped, check_statistics=False)).calibrations == ()
    with pytest.raises(OutputError, match="the statistics there are of other kinds"):
        merganser.plan(_recipe(zoo, "fisher", keep_statistics=str(kept)))


def test_models_and_data_without_a_loss(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a")
    one = {"data": {"files": str(tmp_path / "one.txt"), "length": 2}}
    with pytest.raises(merganser.MergeError, match=r"models\[0\]: data: .*no token that counts follows another one"):
        merge(_recipe(zoo, "fisher", one, one), tmp_path / "out")
    encoder = save(tmp_path / "encoder", "bert")
    add_tokenizer(encoder)
    recipe = {
        "merge_method": "fisher",
        "models": [{"model": str(own), "data": str(zoo / "data1.jsonl")} for own in (encoder, zoo / "expert1")],
    }
    with pytest.raises(UnsupportedError, match=r"models\[0\]: data: .*does not predict the next token"):
        merge(recipe, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "one.txt"]


def test_labels_sampled_from_the_model(zoo: Path, by_hand: list[dict[str, str]], tmp_path: Path) -> None:
    """A recipe's `labels: sampled` gives what folders give that were calibrated with them, and not what the text gives."""
    own = [{"data": {"files": str(zoo / f"data{i}.jsonl"), **CHOICE, "labels": "sampled"}} for i in (1, 2)]
    merge(_recipe(zoo, "fisher", *own), tmp_path / "out")
    entries = []
    for i in (1, 2):
        folder = tmp_path / f"statistics{i}"
        data = [zoo / f"data{i}.jsonl"]
        merganser.calibrate(zoo / f"expert{i}", data, folder, statistics=["fisher"], labels="sampled", **CHOICE)
        entries.append({"statistics": str(folder)})
    merge(_recipe(zoo, "fisher", *entries), tmp_path / "expected")
    merge(_recipe(zoo, "fisher", *({"statistics": each["statistics"]} for each in by_hand)), tmp_path / "text")
    assert _weights(tmp_path / "out") == _weights(tmp_path / "expected")
    assert _weights(tmp_path / "out") != _weights(tmp_path / "text")


@pytest.mark.parametrize(
    ("method", "labels", "message"),
    [
        ("regmean", "data", r"labels: regmean uses no gradients of a loss; leave the key out"),
        ("lm_cocktail", "sampled", r"labels: lm_cocktail compares losses on the data"),
    ],
)
def test_labels_that_have_no_effect_or_no_sense(method: str, labels: str, message: str, zoo: Path) -> None:
    own = [{"data": {"files": str(zoo / f"data{i}.jsonl"), "labels": labels}} for i in (1, 2)]
    with pytest.raises(RecipeError, match=message):
        merganser.plan(_recipe(zoo, method, *own))
