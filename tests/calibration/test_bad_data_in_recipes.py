"""Data that a recipe names and that cannot be used: one message with its place, exit code 2, and nothing is left."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import merganser
from merganser.errors import DataError, MergeError, OutputError, UnsupportedError
from tests.calibration.families import save
from tests.calibration.test_bad_data import BAD, GOOD, OPTIONS, _run
from tests.evaluation.tiny import add_tokenizer, text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("models") / "model", "llama")
    add_tokenizer(folder)
    return folder


def recipe(model: Path, data: Any, **keys: Any) -> dict[str, Any]:
    base = str(model.with_name("base"))
    if not Path(base).exists():
        shutil.copytree(model, base)
    return {"merge_method": "regmean", "base_model": base, "data": data, "models": [{"model": str(model)}], **keys}


def refused(given: dict[str, Any], out: Path, kind: Any, message: str) -> None:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(kind, match=re.escape(message)) as found:
        merganser.merge(given, out)
    assert str(found.value).startswith("<recipe> models[0]: data: ")
    assert "\n" not in str(found.value)
    assert sorted(out.parent.rglob("*")) == before


# an empty list, and a name that YAML cannot hold, are refused when the recipe is read
@pytest.mark.parametrize("kind", sorted(BAD.keys() - {"nothing given", "NUL in the name"}))
def test_bad_files(kind: str, model: Path, tmp_path: Path) -> None:
    make, message = BAD[kind]
    files = [str(path) for path in make(tmp_path)]
    refused(recipe(model, files), tmp_path / "out", (DataError, UnsupportedError), message)


@pytest.mark.parametrize("kind", ["fewer than asked", "too long", "no completion"])
def test_options_that_do_not_fit_the_data(kind: str, model: Path, tmp_path: Path) -> None:
    make, options, message = OPTIONS[kind]
    files = [str(path) for path in make(tmp_path)]
    refused(recipe(model, {"files": files, **options}), tmp_path / "out", DataError, message)


def test_a_tokenizer_of_another_model(model: Path, tmp_path: Path) -> None:
    """Tokens beyond the embeddings are found before anything runs."""
    (tmp_path / "d.jsonl").write_text(GOOD)
    other = shutil.copytree(model, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: 1000 + i for token, i in vocabulary.items()}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    given = recipe(model, str(tmp_path / "d.jsonl"))
    given["models"].append({"model": str(other)})
    with pytest.raises(MergeError, match="use the tokenizer that the model was trained with") as found:
        merganser.merge(given, tmp_path / "out")
    assert "models[1]" in str(found.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "other"]


def test_a_model_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(GOOD)
    bare = shutil.copytree(model, tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    given = recipe(bare, str(tmp_path / "d.jsonl"), base_model=str(model))
    refused(given, tmp_path / "out", MergeError, "has no tokenizer")


def test_a_folder_to_keep_that_cannot_be_one(model: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(GOOD)
    given = recipe(model, str(tmp_path / "d.jsonl"), keep_statistics=str(tmp_path / "d.jsonl"))
    with pytest.raises(OutputError, match=r"d\.jsonl/model: cannot be written"):
        merganser.merge(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "kept" / "model").mkdir(parents=True)
    (tmp_path / "kept" / "model" / "mine.txt").write_text("mine")
    given = recipe(model, str(tmp_path / "d.jsonl"), keep_statistics=str(tmp_path / "kept"))
    with pytest.raises(OutputError, match="model: exists; choose another folder"):
        merganser.merge(given, tmp_path / "out")
    assert (tmp_path / "kept" / "model" / "mine.txt").read_text() == "mine"


def _rows(folder: Path, rows: list[dict[str, Any]]) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(folder)
    return str(folder)


def test_data_sets(model: Path, tmp_path: Path) -> None:
    """Rows of a data set are those of a file, and count as these."""
    rows = [{"text": text(i, 12), "other": i} for i in range(5)]
    name = _rows(tmp_path / "set", rows)
    single = str(tmp_path / "single")
    pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(single)
    assert merganser.calibrate(model, merganser.calibration.Dataset(single), tmp_path / "c", statistics="count").tensors
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": row["text"]}) for row in rows))
    by_file = merganser.calibrate(model, [tmp_path / "d.jsonl"], tmp_path / "a")
    by_set = merganser.calibrate(model, merganser.calibration.Dataset(name), tmp_path / "b")
    for file in by_file.about["files"]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    (data,) = by_set.about["parts"][0]["data"]
    assert data["file"] == "set (train)"
    merganser.merge(recipe(model, {"dataset": name}), tmp_path / "out")
    cases: list[tuple[Any, str]] = [
        (
            {"dataset": name, "split": "trian"},
            f"dataset {name} (trian): cannot be opened: has no split 'trian'; it has train",
        ),
        ({"dataset": single, "split": "test"}, "holds one split alone, and 'test' is asked for; leave it out"),
        ({"dataset": single, "subset": "en"}, "a folder that was saved has no subsets, and 'en' is asked for"),
        ({"dataset": str(tmp_path / "nowhere")}, "nowhere (train): cannot be opened: "),
        ({"dataset": _rows(tmp_path / "keys", [{"txt": "a"}])}, "Is 'txt' meant to be 'text'? Found: 'txt'"),
        ({"dataset": _rows(tmp_path / "blank", [{"text": "a"}, {"text": " "}])}, "(train): row 2: text is empty"),
    ]
    for data, message in cases:
        refused(recipe(model, data), tmp_path / "new", DataError, message)


def test_the_commands(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": text(i, 12)}) for i in range(5)))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(model, {"files": str(tmp_path / "d.jsonl"), "length": 16})))
    assert _run("plan", tmp_path / "r.yaml") == 0
    shown = capsys.readouterr().out
    lines = shown[shown.index("calibrates first") :].splitlines()
    assert re.fullmatch(r"  model  \d+ sequences of d.jsonl, \d+ tokens", lines[1])
    assert re.fullmatch(r"         count, gram: [\d.]+ KB, and [\d.]+ KB of disk for hidden states meanwhile", lines[2])
    assert re.fullmatch(
        r"         reads [\d.]+ KB, [\d.]+ GFLOP, peak memory about \d+ MB, about [\d.]+ s at the speed of a short measurement here",
        lines[3],
    )
    assert _run("plan", tmp_path / "r.yaml", "--json") == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    (planned,) = stage["calibrations"]
    assert planned["statistics"] == ["count", "gram"]
    assert _run("calibrate", model, "--data", tmp_path / "d.jsonl", "--length", 16, "--dry-run", "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    for key in ("tokens", "bytes_read", "forward_operations", "statistics_bytes", "spool_bytes", "files"):
        assert alone[key] == planned[key]
    (tmp_path / "d.jsonl").write_text(GOOD + "\n{")
    assert _run("merge", tmp_path / "r.yaml", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'r.yaml'}:")
    assert f"models[0]: data: {tmp_path / 'd.jsonl'}:2: is not JSON" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "r.yaml"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data", "a.txt", "--dataset", "d"], "give --data or --dataset, not both"),
        (["--data", "a.txt", "--split", "test"], "--subset and --split are for --dataset, which is missing"),
        (["--data", "a.txt"], "--out is missing"),
    ],
)
def test_options_that_contradict_each_other(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("calibrate", "model", *given) == 2
    assert message in capsys.readouterr().err
