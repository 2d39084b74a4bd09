"""`merganser eval`: the tables, the options, and what goes wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.tiny import Output, run
from tests.evaluation.tiny import make_model, text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eval")
    make_model(root / "base", 0)
    make_model(root / "fr", 1, like=root / "base")
    make_model(root / "merged", 2, like=root / "base")
    for seed, name in enumerate(("french", "english")):
        (root / f"{name}.test.txt").write_text(text(seed, 200))
    lines = [{"context": text(i, 6).strip(), "choices": [" cat", " on a mat"], "gold": i % 2} for i in range(8)]
    (root / "quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(autouse=True)
def _here(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)


TASKS = ("--tasks", "french.test.txt", "english.test.txt", "quiz.jsonl")


def evaluated(*arguments: object) -> Output:
    return run("eval", *arguments, "--dtype", "float32", "--limit", 8)


def test_tables(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    found = evaluated("merged", *TASKS, "--base", "base", "--experts", "french=fr", "--json", out)
    assert found.code == 0, found.err
    lines = found.out.splitlines()
    assert lines[0].startswith("3 models · 3 tasks · float32 (as given) · ")
    assert " · peak " in lines[0]
    assert lines[1] == "results (↑ higher is better, ↓ lower is better; ± standard error)"
    assert lines[2].split() == ["model", "french", "english", "quiz"]
    assert lines[3].split() == ["bits_per_byte", "↓", "bits_per_byte", "↓", "accuracy", "↑"]
    results = json.loads(out.read_text())["results"]
    for line, model in zip(lines[4:7], ("base", "fr", "merged"), strict=True):
        cells = line.split()
        assert cells[0] == model
        for place, (task, metric) in enumerate((("french", "bits_per_byte"), ("english", "bits_per_byte"))):
            figure = results[model][task]["metrics"][metric]
            assert cells[1 + 2 * place : 3 + 2 * place] == [f"{figure['value']:.4f}", f"±{figure['stderr']:.4f}"]
    assert lines[7].split() == ["items", "8", "windows", "8", "windows", "8", "questions"]
    assert lines[8] == "other metrics"
    assert lines[10].split() == ["token_accuracy", "↑", "token_accuracy", "↑", "accuracy_norm", "↑"]
    assert lines[-1] == f"wrote {out}, and out.json.items.jsonl with the measurements of every item"


def test_retention(made: Path, tmp_path: Path) -> None:
    # an expert that is far better: the base with noise is worse by construction
    base, noisy = load_file(made / "base" / "model.safetensors"), load_file(made / "base" / "model.safetensors")
    noisy["lm_head.weight"] = noisy["lm_head.weight"] * 3
    folder = make_model(tmp_path / "noisy", 0)
    save_file(noisy, folder / "model.safetensors", {"format": "pt"})
    half = make_model(tmp_path / "half", 0)
    middle = {name: (base[name] + noisy[name]) / 2 for name in base}
    save_file(middle, half / "model.safetensors", {"format": "pt"})
    less = make_model(tmp_path / "less", 0)
    save_file({n: base[n] / 4 + 3 * noisy[n] / 4 for n in base}, less / "model.safetensors", {"format": "pt"})
    given = ("--base", folder, "--experts", "french=base", "--json", tmp_path / "out.json")
    found = evaluated(half, less, *TASKS, *given)
    assert found.code == 0, found.err
    kept = json.loads((tmp_path / "out.json").read_text())["retention"]
    assert kept["domains"]["french"]["counted"]
    own = kept["models"]["half"]
    assert 0.2 < own["mean"]["value"] < 0.8
    start = found.out.splitlines().index(
        "recovered: share of the expert's gain over the base; forgotten: loss as a share of the base's figure"
    )
    header, _, row, _, best, leader = found.out.splitlines()[start + 1 : start + 7]
    assert header.split() == [
        *("model", "french", "mean", "worst", "forgotten", "english", "forgotten", "quiz", "against", "best", "single")
    ]
    share = f"{100 * own['mean']['value']:.1f} ±{100 * own['mean']['stderr']:.1f} %"
    assert row.split()[0] == "half"
    assert row.count(share) == 3
    assert f"{100 * own['worst']['value']:.1f} ±{100 * own['worst']['stderr']:.1f} % french" in row
    assert f"{100 * own['forgotten']['english']['relative']:+.1f}" in row
    assert best.startswith("  best single model: base, mean recovered 100.0")
    assert re.fullmatch(
        r"  best merge: half, \+\d+\.\d ±\d\.\d % ahead of less \(sure: more than two standard errors\)", leader
    )


def test_a_domain_that_does_not_count() -> None:
    found = evaluated("merged", "--tasks", "french.test.txt", "--base", "fr", "--experts", "french=fr")
    assert found.code == 0
    assert "note: french does not count: fr does not beat the base by two standard errors: 0 ± 0" in found.err
    assert "note: every task has an expert, so forgetting cannot be measured" in found.err


def test_json_to_stdout() -> None:
    found = evaluated("merged", "--tasks", "quiz.jsonl", "--json", "-")
    assert found.code == 0
    assert found.json["results"]["merged"]["quiz"]["items"] == 8
    assert found.json["items"] is None


def test_quiet() -> None:
    assert evaluated("merged", "--tasks", "quiz.jsonl", "--quiet").out == ""


def test_a_model_that_fails(made: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "broken", 0)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = evaluated(folder, "merged", "--tasks", "french.test.txt")
    assert found.code == 2
    assert "error: broken: french: NaN or infinity in the logits" in found.err
    rows = {line.split()[0]: line.split()[1:] for line in found.out.splitlines()[1:]}
    assert rows["broken"] == ["failed"]
    assert len(rows["merged"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merged", "--tasks", "frensh.test.txt"], "there is no such file. Did you mean 'french.test.txt'?"),
        (["merged", "--tasks", "quiz.jsonl", "--experts", "quiz=fr"], "experts: need a base (--base)"),
        (["merged", "--tasks", "quiz.jsonl", "--base", "base", "--experts", "qiz=fr"], "Did you mean 'quiz'?"),
        (["merged", "--tasks", "quiz.jsonl", "--json", "quiz.jsonl"], "exists and is not an evaluation by merganser"),
        (["nowhere", "--tasks", "quiz.jsonl"], "nowhere"),
        (["merged"], "Missing option '--tasks'"),
        (["--tasks", "quiz.jsonl", "merged"], "Missing argument 'CKPT'"),
        (["merged", "--tasks", "quiz.jsonl", "--device", "cuda:99"], "no such GPU here"),
        (["merged", "--tasks", "quiz.jsonl", "--dtype", "int8"], "dtype: 'int8' is not known"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    found = run("eval", *arguments)
    assert found.code == 2
    assert message in found.err
    assert "Traceback" not in found.err
    assert found.out == ""


def test_help_names_the_order() -> None:
    found = run("eval", "--help")
    assert found.out.startswith("Usage: merganser eval [OPTIONS] {CKPT}...")
    assert "The checkpoints come first" in found.out
