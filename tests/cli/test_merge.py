"""`merganser merge`: the checkpoint, and what is said about it and where."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.tiny import linear, names, recipe, run, state, write


def test_merge(models: Path) -> None:
    found = run("merge", recipe(models / "r.yaml", linear("a", "b")), "out")
    assert (found.code, found.err) == (0, "")
    first, *rest = found.out.splitlines()
    figures = r"linear · 2 models · 19 tensors · 1,576 parameters · \d+\.\d s · peak (\d+ MB|\d\.\d\d GB)"
    assert re.fullmatch(figures, first)
    size = (models / "out" / "model.safetensors").stat().st_size / 1000
    assert rest == [
        "38 tensors of the inputs: 38 merged",
        f"wrote out (1 file, {size:.2f} KB) and out/merge.json",
        "check it:  merganser verify out",
        'load it:   transformers.AutoModelForCausalLM.from_pretrained("out")',
    ]
    merged = load_file(models / "out" / "model.safetensors")
    a, b = state(0), state(1)
    for name, tensor in merged.items():
        expected = ((a[name].double() + b[name].double()) / 2).to(torch.bfloat16)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    assert names(models) == ["a", "b", "c", "out", "r.yaml"]


def test_the_base_is_counted_apart(models: Path) -> None:
    document = {"merge_method": "slerp", "base_model": "a", "models": [{"model": "b"}], "parameters": {"t": 0.5}}
    assert run("merge", recipe(models / "r.yaml", document), "out").out.startswith("slerp · a base and 1 model · ")


def test_other_architectures_are_loaded_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", state(0), architectures=["NewModel"], model_type="new")
    file = recipe(tmp_path / "r.yaml", linear("a"))
    assert run("merge", file, "out").out.endswith('transformers.NewModel.from_pretrained("out")\n')
    (tmp_path / "a" / "config.json").unlink()
    found = run("merge", file, "bare")
    assert found.out.endswith("merganser verify bare\n")
    assert found.err == "warning: the donor has no config.json, so the output has none\n"


@pytest.mark.parametrize(
    ("config", "loader"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ({"architectures": ["BertForSequenceClassification"]}, "BertForSequenceClassification"),
        ({"architectures": ["GPT2LMHeadModel"]}, "AutoModelForCausalLM"),
        ({"architectures": None}, "AutoModel"),
        (
            {"architectures": ["OwnLM"], "auto_map": {"AutoConfig": "c.OwnConfig", "AutoModelForCausalLM": "m.OwnLM"}},
            "AutoModelForCausalLM",
        ),
    ],
)
def test_the_class_that_loads_the_head_too_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, object], loader: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", state(0), **config)
    found = run("merge", recipe(tmp_path / "r.yaml", linear("a")), "out").out
    assert found.endswith(f'load it:   transformers.{loader}.from_pretrained("out")\n')


def test_stacked_models_are_counted(models: Path) -> None:
    slices = [{"sources": [{"model": model, "layer_range": [0, 1]}]} for model in ("a", "b", "a")]
    file = recipe(models / "r.yaml", {"merge_method": "passthrough", "slices": slices})
    assert run("merge", file, "out").out.startswith("passthrough · 2 models · ")


def test_warnings_and_differences_go_to_stderr(models: Path) -> None:
    document = linear("a", "b", parameters={"int8_mask": True})
    document["models"][0]["parameters"]["weight"] = [0.2, 0.8]
    file = recipe(models / "r.yaml", document)
    found = run("merge", file, "out")
    warning, note = found.err.splitlines()
    assert warning.startswith(f"warning: {file}:")
    assert "int8_mask has no effect on linear" in warning
    assert note.startswith("note: differs from mergekit: weight: tensors after the layers")
    assert "warning" not in found.out


def test_json_is_one_document(models: Path) -> None:
    found = run("merge", recipe(models / "r.yaml", linear("a", "b")), "out", "--json")
    assert found.code == 0
    assert found.json["out"] == "out"
    assert found.json["record"] == json.loads((models / "out" / "merge.json").read_text())


def test_quiet(models: Path) -> None:
    document = linear("a", "b", parameters={"int8_mask": True})
    found = run("merge", recipe(models / "r.yaml", document), "out", "--quiet")
    assert (found.code, found.out, found.err) == (0, "", "")
    assert (models / "out").is_dir()


def test_shards_threads_and_seed(models: Path) -> None:
    document = {
        "merge_method": "dare_linear",
        "base_model": "a",
        "models": [{"model": "b"}],
        "parameters": {"weight": 1.0, "density": 0.5},
    }
    file = recipe(models / "r.yaml", document)
    options = ["--json", "--threads", "1", "--out-shard-size", "1KiB"]
    first = run("merge", file, "one", *options, "--seed", "1").json["record"]
    again = run("merge", file, "again", *options, "--seed", "1").json["record"]
    other = run("merge", file, "two", *options, "--seed", "2").json["record"]
    assert (first["seed"], other["seed"], first["workers"]) == (1, 2, 1)
    weights = [
        [entry["sha256"] for entry in record["outputs"] if entry["file"].endswith(".safetensors")]
        for record in (first, again, other)
    ]
    assert weights[0] == weights[1] != weights[2]
    assert len(weights[0]) > 2


def test_seed_of_the_recipe_and_of_the_command(models: Path) -> None:
    file = recipe(models / "r.yaml", linear("a", random_seed=7))
    assert run("merge", file, "one", "--json").json["record"]["seed"] == 7
    assert run("merge", file, "two", "--json", "--seed", "0").json["record"]["seed"] == 0


def test_an_output_is_replaced_only_when_asked(models: Path) -> None:
    file = recipe(models / "r.yaml", linear("a", "b"))
    assert run("merge", file, "out").code == 0
    before = (models / "out" / "merge.json").read_bytes()
    found = run("merge", file, "out")
    assert found.code == 2
    assert found.err == "error: out: exists; choose another target, or allow it to be replaced with --overwrite\n"
    assert (models / "out" / "merge.json").read_bytes() == before
    assert run("merge", recipe(models / "r.yaml", linear("a", "c")), "out", "--overwrite").code == 0
    assert (models / "out" / "merge.json").read_bytes() != before
    assert run("merge", file, "a", "--overwrite").code == 2


def test_not_finite(models: Path) -> None:
    tensors = state(3)
    tensors["model.norm.weight"][3] = torch.nan
    write(models / "n", tensors)
    file = recipe(models / "r.yaml", linear("a", "n"))
    found = run("merge", file, "out")
    assert found.code == 2
    assert "model.norm.weight" in found.err
    assert names(models) == ["a", "b", "c", "n", "r.yaml"]
    assert run("merge", file, "out", "--allow-nonfinite").code == 0
    merged = load_file(models / "out" / "model.safetensors")["model.norm.weight"]
    assert merged.isnan().tolist() == [i == 3 for i in range(8)]


def test_a_defect_of_ours_says_so(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr("merganser.engine.merge.merge", broken)
    found = run("merge", recipe(models / "r.yaml", linear("a")), "out")
    assert found.code == 1
    assert "ZeroDivisionError: inside" in found.err
    assert "error: this is a defect of merganser" in found.err.splitlines()[-1]


def test_a_traceback_only_where_it_is_wanted(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run("merge", "nope.yaml", "out")
    assert (plain.code, plain.err) == (2, "error: nope.yaml: there is no such recipe file\n")
    monkeypatch.setenv("MERGANSER_DEBUG", "1")
    long = run("merge", "nope.yaml", "out")
    assert long.code == 2
    assert "Traceback (most recent call last)" in long.err
    assert long.err.endswith(plain.err)


def test_models_that_some_tensors_do_without_are_counted(models: Path) -> None:
    """What is not a matrix stays as it is in the base; and a stack takes each layer from one model."""
    document = {"merge_method": "wudi", "base_model": "a", "models": [{"model": "b"}, {"model": "c"}]}
    assert run("merge", recipe(models / "r.yaml", document), "out").out.startswith("wudi · a base and 2 models · ")
    slices = [{"sources": [{"model": name, "layer_range": [i, i + 1]}]} for i, name in enumerate("ab")]
    document = {"merge_method": "passthrough", "slices": slices}
    assert run("merge", recipe(models / "r.yaml", document), "stacked").out.startswith("passthrough · 2 models · ")


def test_the_length_of_the_merged_task_vector_is_told(models: Path) -> None:
    document = {
        "merge_method": "task_arithmetic",
        "base_model": "a",
        "models": [{"model": name, "parameters": {"weight": 1.0}} for name in "bc"],
    }
    found = run("merge", recipe(models / "r.yaml", document), "out")
    total = json.loads((models / "out" / "merge.json").read_text())["movement"]["total"]
    told = (
        f"moved {total['length']:.2g} times as far from the base as the models (unrelated models: 0.71 averaged, 1.4 added); "
        f"{min(total['rounding']):.1%}"
    )
    assert found.out.splitlines()[2].startswith(told)
    assert found.err == ""
    longer = run("merge", recipe(models / "r.yaml", {**document, "parameters": {"lambda": 9.0}}), "longer")
    assert longer.err.startswith("warning: the merged task vector is ")
    assert "which is long" in longer.err
