"""`merganser plan`: everything that will happen, in words and in JSON, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from merganser import plan as make_plan
from merganser.engine.plan.tensor_groups import value_text
from merganser.engine.planner import planner as planning
from merganser.wording import size_text
from tests.cli.tiny import linear, names, recipe, run, state, write


def slerp(**more: object) -> dict[str, object]:
    return {"merge_method": "slerp", "base_model": "a", "models": [{"model": "b"}], **more}


def test_plan_of_equal_parameters(models: Path) -> None:
    file = recipe(models / "r.yaml", linear("a", "b", dtype="bfloat16"))
    found = run("plan", file, "--threads", 2)
    assert (found.code, found.err) == (0, "")
    plan = make_plan(file, threads=2)
    size = size_text(plan.bytes_written)
    assert found.out == (
        "linear → 19 tensors, 1,576 parameters\n"
        "reads\n"
        "  model  a  1 file  3.15 KB  19 tensors  bfloat16\n"
        "  model  b  1 file  3.15 KB  19 tensors  bfloat16\n"
        "  a gives config.json, tokenizer.json\n"
        "makes\n"
        "  all  19 tensors  weight 1 each, normalize true\n"
        "writes\n"
        f"  model.safetensors  {size}  bfloat16\n"
        "expects\n"
        "  read         6.30 KB in 1 pass\n"
        f"  written      {size}\n"
        f"  peak memory  about {size_text(plan.peak_memory)}, at most {size_text(plan.max_memory)}\n"
        "  time         about 2.0 s on cpu, 2 threads\n"
    )
    assert names(models) == ["a", "b", "c", "r.yaml"]


def test_what_the_files_beside_the_weights_say(models: Path) -> None:
    write(models / "c", state(2), rope_theta=500000.0)
    for name, token in (("a", "<|reserved_special_token_0|>"), ("c", "<tool>")):
        vocabulary = {"added_tokens": [{"id": 1, "content": token}], "model": {"vocab": {"word": 0}}}
        (models / name / "tokenizer.json").write_text(json.dumps(vocabulary))
    file = recipe(models / "r.yaml", linear("a", "c"))
    said = [
        "c: config.json differs from that of a, whose settings the output gets: rope_theta is 500000.0, where it is not set",
        "c: 1 row of the embedding belongs to another token than in a: 1 is '<tool>', not "
        "'<|reserved_special_token_0|>'; merged all the same; 'tokenizer_source: base' or 'tokenizer_source: union' in "
        "the recipe matches rows by token",
    ]
    found = run("plan", file)
    assert found.code == 0
    assert [line.strip() for line in found.out.split("warns\n")[1].splitlines()] == said
    assert run("plan", file, "--json").json["stages"][0]["warnings"] == said
    run("merge", file, models / "out")
    assert json.loads((models / "out" / "merge.json").read_text())["warnings"] == said
    report = " ".join(run("report", models / "out", "--text").out.split())  # lines are wrapped
    assert all(line in report for line in said)


def test_plan_of_schedules_and_filters(models: Path) -> None:
    t = [{"filter": "self_attn", "value": [0, 0.5, 0.3]}, {"filter": "q_proj", "value": 1}, {"value": 0.5}]
    found = run("plan", recipe(models / "r.yaml", slerp(parameters={"t": t})))
    assert found.code == 0
    assert (
        "makes\n"
        "  embedding, norm, head  3 tensors  t 0.5\n"
        "  layers 0-1 norm, mlp   8 tensors  t 0.5\n"
        "  layers 0-1 attention   8 tensors  t 0 → 0.3\n"
        "writes\n"
    ) in found.out


def test_kinds_of_one_role_that_differ_are_named(models: Path) -> None:
    t = [{"filter": "q_proj", "value": 1}, {"value": 0.5}]
    found = run("plan", recipe(models / "r.yaml", slerp(parameters={"t": t})))
    (line,) = [line for line in found.out.splitlines() if "t 1" in line]
    assert line == "  layers 0-1 attention (model.layers.*.self_attn.q_proj.weight)" + line[63:]
    assert "2 tensors  t 1" in line


def test_what_holds_everywhere_is_said_once(models: Path) -> None:
    parameters = {"weight": [0.0, 1.0], "normalize": False}
    document = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": parameters}
    found = run("plan", recipe(models / "r.yaml", document))
    lines = found.out.splitlines()
    rows = [line.split() for line in lines[lines.index("makes") + 1 : lines.index("writes")]]
    assert rows == [
        ["embedding", "1", "tensor", "weight", "0", "each"],
        ["layers", "0-1", "16", "tensors", "weight", "0", "→", "1", "each"],
        ["norm,", "head", "2", "tensors", "weight", "1", "each"],
        ["everywhere", "normalize", "false"],
    ]
    assert "differs from mergekit\n  weight: tensors after the layers" in found.out


def test_integers_mixed_dtypes_and_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = {"model.ids": torch.arange(4)}
    write(tmp_path / "a", state(0) | ids)
    write(tmp_path / "b", state(1, dtype=torch.float32) | ids)
    write(tmp_path / "c", state(2))
    found = run("plan", recipe(tmp_path / "r.yaml", linear("a", "b", base_model="c")))
    assert found.code == 2  # c lacks the buffer
    write(tmp_path / "c", state(2) | ids)
    found = run("plan", recipe(tmp_path / "r.yaml", linear("a", "b", base_model="c")))
    rows = [line.split() for line in found.out.splitlines()]
    assert ["files", "only", "c", "1", "file", "3.18", "KB", "20", "tensors", "bfloat16,", "int64"] in rows
    assert ["model", "b", "1", "file", "6.34", "KB", "20", "tensors", "float32,", "int64"] in rows
    assert ["integers", "1", "tensor", "copied,", "equal", "in", "all", "inputs"] in rows
    assert [row[-2:] for row in rows if row[0] == "model.safetensors"] == [["float32,", "int64"]]


def test_slices_say_how_much_of_a_model_is_read(models: Path) -> None:
    document = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "b", "layer_range": [1, 2]}]},
        ],
    }
    found = run("plan", recipe(models / "r.yaml", document))
    rows = [line.split() for line in found.out.splitlines()]
    assert ["model", "a", "1", "file", "3.15", "KB", "17", "of", "19", "tensors", "bfloat16"] in rows
    assert ["model", "b", "1", "file", "3.15", "KB", "10", "of", "19", "tensors", "bfloat16"] in rows


def test_json(models: Path) -> None:
    file = recipe(models / "r.yaml", slerp(parameters={"t": [0.2, 0.8]}))
    found = run("plan", file, "--json", "--out-shard-size", "2KB")
    assert (found.code, found.err) == (0, "")
    (stage,) = found.json["stages"]
    assert stage["method"] == "slerp"
    assert [entry["used_as"] for entry in stage["inputs"]] == ["base", "model"]
    assert len(stage["files"]) == 2
    layers = [group for group in stage["groups"] if group["layers"]]
    assert layers == [
        {
            "layers": [0, 1],
            "roles": [],
            "names": [],
            "tensors": 16,
            "method": "slerp",
            "parameters": {"t": "0.2 → 0.8"},
            "copied": False,
        }
    ]
    assert "each_tensor" not in stage
    plan = make_plan(file, out_shard_size=2000)
    assert stage["files"] == {shard.name: shard.size for shard in plan.shards}
    assert (stage["bytes_read"], stage["bytes_written"]) == (plan.bytes_read, plan.bytes_written)
    assert (stage["peak_memory"], stage["seconds"], stage["warnings"]) == (plan.peak_memory, plan.seconds, [])
    assert stage["differences"] == list(plan.differences) != []


def test_many_files_are_summed_up(models: Path) -> None:
    file = recipe(models / "r.yaml", linear("a", "b"))
    plan = make_plan(file, out_shard_size=100)
    found = run("plan", file, "--out-shard-size", "100")
    (line,) = [line for line in found.out.splitlines() if ".safetensors" in line]
    first, last, largest = plan.shards[0].name, plan.shards[-1].name, max(shard.size for shard in plan.shards)
    sizes = f"{size_text(plan.bytes_written)}  bfloat16, each {size_text(largest)} or less"
    assert line == f"  {first} to {last}  {sizes}"


def test_every_tensor(models: Path) -> None:
    file = recipe(models / "r.yaml", slerp(parameters={"t": [0.2, 0.8]}))
    found = run("plan", file, "--tensors")
    rows = [line.split() for line in found.out.splitlines()]
    for layer, t in ((0, "0.2"), (1, "0.8")):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert [name, "[16,", "8]", "bfloat16", "mlp", "model.safetensors", "t", t] in rows
    each = run("plan", file, "--tensors", "--json").json["stages"][0]["each_tensor"]
    assert {entry["name"]: entry["parameters"] for entry in each} == {
        name: {"t": 0.2 if ".0." in name or "embed" in name else 0.8} for name in state(0)
    }


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.5], "0.5"),
        ([0.5, 0.5, 0.5], "0.5"),
        ([0.0, 0.25, 0.5], "0 → 0.5"),
        ([0.0, 0.5, 1.0, 0.5, 0.25], "0 → 1 → 0.25"),
        ([0.0, 0.0, 1.0, 1.0], "0 → 1"),
        ([0.0, 1.0] * 4, "between 0 and 1"),
        ([True, True, False], "true → false"),
        (["a", "b"] * 4, "a or b"),
        ([3, 1], "3 → 1"),
    ],
)
def test_series_are_told_by_their_turning_points(values: list[object], text: str) -> None:
    assert value_text(values) == text


def test_plan_of_a_device_that_is_not_there(models: Path) -> None:
    file = recipe(models / "r.yaml", linear("a", "b"))
    found = run("plan", file, "--device", "tpu")
    assert (found.code, found.err) == (2, "error: --device tpu: unknown; use auto, cpu, cuda or cuda:0\n")
    assert run("plan", file, "--device", "auto").code == 0


def test_without_machine_code(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = recipe(models / "r.yaml", linear("a", "b"))
    assert make_plan(file).warnings == []
    monkeypatch.setattr(planning, "why_not", lambda: "this process may not map executable memory")
    slow = "this process may not map executable memory: operations run one by one, several times slower"
    assert make_plan(file).warnings == [slow]
    assert not make_plan(file).fused
    assert slow in " ".join(run("plan", file).out.split())


def test_slices_of_different_numbers_of_models(models: Path) -> None:
    """A series of parameters over the layers has as many columns as there are models."""
    both = [{"model": model, "layer_range": [0, 1]} for model in ("a", "b")]
    slices = [{"sources": both}, {"sources": [{"model": "b", "layer_range": [1, 2]}]}]
    document = {"merge_method": "linear", "slices": slices, "parameters": {"weight": 1}}
    found = run("plan", recipe(models / "r.yaml", document))
    assert found.code == 0, found.err
    rows = [line.split() for line in found.out.splitlines()]
    told = {tuple(row[:2]): row[-2:] for row in rows if row[0] in ("layer", "layers")}
    assert told == {("layer", "0"): ["1", "each"], ("layer", "1"): ["weight", "1"]}
