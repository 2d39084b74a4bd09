"""Statistics that others hand on and that are damaged: one message, and nothing is merged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser
from merganser.errors import MergeError
from tests.calibration.families import save
from tests.evaluation.tiny import add_tokenizer, text

Change = Callable[[Path, dict[str, Any]], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two models, and statistics of both."""
    found = tmp_path_factory.mktemp("models")
    file = found / "d.jsonl"
    file.write_text("\n".join(json.dumps({"text": text(i, 12)}) for i in range(4)))
    for name in ("base", "one", "two"):
        add_tokenizer(save(found / name, "llama"))
    for name in ("one", "two"):
        merganser.calibrate(found / name, file, found / f"of-{name}", statistics=["gram", "fisher"])
    return found


def _sums(pattern: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(folder: Path, about: dict[str, Any]) -> None:
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            for name in tensors:
                if name.startswith(pattern):
                    tensors[name] = change(tensors[name]).contiguous()
            save_file(tensors, path)

    return apply


def _said(**keys: Any) -> Change:
    return lambda folder, about: about.update(keys)


def _lacks(*keys: str) -> Change:
    def apply(folder: Path, about: dict[str, Any]) -> None:
        for key in keys[:-1]:
            about = about[key]
        del about[keys[-1]]

    return apply


BAD: dict[str, tuple[str, Change, str]] = {
    "no parts": ("regmean", _lacks("parts"), "statistics.json: has no 'parts', which every such file has"),
    "parts are a text": ("regmean", _said(parts="x"), "statistics.json: parts: must be a list, found 'x'"),
    "parts are texts": ("regmean", _said(parts=["x"]), "statistics.json: parts[0]: must be an object"),
    "no part": ("regmean", _said(parts=[]), "parts: must be a list with an entry for each part of the data"),
    "no model": ("regmean", _lacks("model"), "statistics.json: has no 'model'"),
    "model is a text": ("regmean", _said(model="x"), "statistics.json: model: must be an object, found 'x'"),
    "no hash": ("regmean", _lacks("model", "hash"), "statistics.json: model: has no 'hash'"),
    "no tokenizer": ("fisher", _lacks("tokenizer"), "statistics.json: has no 'tokenizer'"),
    "a file twice": (
        "regmean",
        lambda folder, about: about["files"].append(about["files"][0]),
        "files: 'statistics-00001-of-00004.safetensors' is named twice",
    ),
    "a sum twice": (
        "regmean",
        lambda folder, about: about["files"].append(
            shutil.copy(folder / about["files"][0], folder / "more.safetensors").name
        ),
        "is in statistics-00001-of-00004.safetensors and in more.safetensors; calibrate again",
    ),
    "an axis that is not there": (
        "regmean",
        lambda folder, about: [own.update(axis=7) for own in about["tensors"].values()],
        "takes its inputs along axis 7, which is none of its last two; calibrate this model",
    ),
    "two halves": (
        "regmean",
        _sums("gram/", lambda own: torch.triu(own, 1) + torch.diag(own.diagonal())),
        "has two halves that differ, which no Gram matrix has; calibrate again",
    ),
    "no squares": (
        "regmean",
        _sums("gram/", lambda own: torch.full_like(own, float(own.diagonal().max())).fill_diagonal_(1e-3)),
        "has entries beyond the root of their squares, which no Gram matrix has; calibrate again",
    ),
    "NaN": ("regmean", _sums("gram/", lambda own: own * float("nan")), "holds NaN or infinity; calibrate again"),
    "infinity": ("fisher", _sums("fisher/", lambda own: own / 0), "holds NaN or infinity; calibrate again"),
    "negative squares": ("regmean", _sums("gram/", torch.neg), "which no sum of such values can be; calibrate again"),
    "negative Fisher": ("fisher", _sums("fisher/", torch.neg), "which no sum of such values can be; calibrate again"),
    "negative count": ("regmean", _sums("count/", torch.neg), "which no sum of such values can be; calibrate again"),
    "whole numbers": ("regmean", _sums("gram/", torch.Tensor.long), "is int64, not floating-point numbers"),
    "a count of floats": ("regmean", _sums("count/", torch.Tensor.float), "is float32, not whole numbers"),
    "a loss of two": (
        "fisher",
        _sums("loss", lambda own: torch.ones(2, 2)),
        "'loss' has shape [2, 2], expected 0 axes",
    ),
    "predictions": ("fisher", _sums("predictions", torch.Tensor.double), "'predictions' is float64, not whole numbers"),
}


@pytest.mark.parametrize("kind", BAD)
def test_damaged_statistics_end_in_one_message(kind: str, folder: Path, tmp_path: Path) -> None:
    method, change, message = BAD[kind]
    shutil.copytree(folder / "of-one", tmp_path / "given")
    about = json.loads((tmp_path / "given" / "statistics.json").read_text())
    change(tmp_path / "given", about)
    (tmp_path / "given" / "statistics.json").write_text(json.dumps(about))
    models = [
        {"model": str(folder / "one"), "statistics": str(tmp_path / "given")},
        {"model": str(folder / "two"), "statistics": str(folder / "of-two")},
    ]
    # fisher takes no base
    base = {} if method == "fisher" else {"base_model": str(folder / "base")}
    with pytest.raises(MergeError, match=re.escape(message)) as found:
        merganser.merge({"merge_method": method, **base, "models": models}, tmp_path / "out")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["no parts", "model is a text", "no hash", "predictions", "NaN", "two halves"])
def test_damaged_statistics_are_not_added(kind: str, folder: Path, tmp_path: Path) -> None:
    _, change, message = BAD[kind]
    shutil.copytree(folder / "of-one", tmp_path / "given")
    about = json.loads((tmp_path / "given" / "statistics.json").read_text())
    # as if of other data, which could be added
    about["parts"][0]["seed"] = 1
    change(tmp_path / "given", about)
    (tmp_path / "given" / "statistics.json").write_text(json.dumps(about))
    with pytest.raises(MergeError, match=re.escape(message)):
        merganser.add_statistics([folder / "of-two", tmp_path / "given"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


@pytest.mark.parametrize(("change", "merges"), [(_said(inputs="prefix", merge="0" * 32), False), (_said(), True)])
def test_statistics_of_one_merge_are_not_added(change: Change, merges: bool, folder: Path, tmp_path: Path) -> None:
    """What was measured within a merge depends on all its data, so it is no part of another sum."""
    for name in ("given", "other"):
        shutil.copytree(folder / "of-one", tmp_path / name)
    file = tmp_path / "given" / "statistics.json"
    about = json.loads(file.read_text())
    about["parts"][0]["seed"] = 1
    change(tmp_path / "given", about)
    file.write_text(json.dumps(about))
    given = [tmp_path / "other", tmp_path / "given"]
    if merges:
        assert merganser.add_statistics(given, tmp_path / "out").tensors
        return
    with pytest.raises(
        MergeError, match="given: was measured within one merge and belongs to its data; only statistics"
    ):
        merganser.add_statistics(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sums_in_sixteen_bits_are_gram_matrices(folder: Path, tmp_path: Path) -> None:
    """Others may store them so, to send less; rounding is no damage."""
    shutil.copytree(folder / "of-one", tmp_path / "given")
    _sums("gram/", torch.Tensor.bfloat16)(tmp_path / "given", {})
    models = [{"model": str(folder / "one"), "statistics": str(tmp_path / "given")}]
    merganser.merge({"merge_method": "regmean", "base_model": str(folder / "base"), "models": models}, tmp_path / "out")
