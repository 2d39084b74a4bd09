"""Everything a user can get wrong: exit code 2, one message that names the place and the remedy, nothing left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.tiny import CONFIG, linear, names, recipe, run, state, write

Case = tuple[str, Callable[[Path], Any], str]


def text(words: str) -> Callable[[Path], Any]:
    """A recipe of these words."""

    def make(folder: Path) -> None:
        (folder / "r.yaml").write_text(words)

    return make


def document(**changes: Any) -> Callable[[Path], Any]:
    """A good recipe with changes."""

    def make(folder: Path) -> None:
        recipe(folder / "r.yaml", linear("a", "b") | changes)

    return make


def damaged(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A good recipe over a, and b with something done to its folder."""

    def make(folder: Path) -> None:
        change(folder / "b")
        recipe(folder / "r.yaml", linear("a", "b"))

    return make


def ties(**parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "base_model": "a",
        "models": [{"model": "b", "parameters": {"weight": 1.0} | parameters}],
    }


def changed(**changes: Any) -> Callable[[Path], Any]:
    """The recipe of `ties` with other parameters."""

    def make(folder: Path) -> None:
        recipe(folder / "r.yaml", ties(**changes))

    return make


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Rewrite the header of a shard."""

    def make(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        found = json.loads(data[8 : 8 + length])
        change(found)
        told = json.dumps(found).encode()
        file.write_bytes(len(told).to_bytes(8, "little") + told + data[8 + length :])

    return damaged(make)


def weights(data: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """Rewrite the bytes of a shard."""

    def make(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(data(file.read_bytes()))

    return damaged(make)


def index(weight_map: dict[str, str]) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damaged(make)


def state_with(**options: Any) -> Callable[[Path], Any]:
    return damaged(lambda folder: write(folder, state(5, **options), vocab_size=options.get("vocab", 32)))


def tensors_with(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        found = state(1)
        change(found)
        save_file(found, folder / "model.safetensors")

    return damaged(make)


def overlap(found: dict[str, Any]) -> None:
    found["model.norm.weight"]["data_offsets"] = found["model.embed_tokens.weight"]["data_offsets"][:1] * 2
    found["model.norm.weight"]["data_offsets"][1] += 16


def past_the_end(found: dict[str, Any]) -> None:
    last = max((e for name, e in found.items() if name != "__metadata__"), key=lambda e: e["data_offsets"][1])
    last["data_offsets"][1] += 4096


def wrong_dtype(found: dict[str, Any]) -> None:
    found["model.norm.weight"]["dtype"] = "BF17"


def set_nan(found: dict[str, torch.Tensor]) -> None:
    found["model.layers.1.mlp.up_proj.weight"][3, 2] = torch.nan


def set_inf(found: dict[str, torch.Tensor]) -> None:
    found["lm_head.weight"][0, 0] = -torch.inf


RANGES = {"sources": [{"model": "a", "layer_range": [0, 1]}]}


def sliced(first: int, last: int) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        piece = {"sources": [{"model": "a", "layer_range": [first, last]}]}
        recipe(folder / "r.yaml", {"merge_method": "passthrough", "slices": [piece]})

    return make


BOMB = "merge_method: linear\na: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
)

RECIPES: list[Case] = [
    ("no file", lambda folder: None, "r.yaml: there is no such recipe file"),
    ("empty", text(""), "the recipe is empty; it needs at least merge_method and models"),
    ("not YAML", text("merge_method: [\n"), "r.yaml:2: not valid YAML"),
    ("tab", text("models:\n\t- model: a\n"), "a tab cannot indent a line; use spaces"),
    ("not a mapping", text("- a\n- b\n"), "a recipe is a mapping"),
    ("object tag", text("merge_method: !!python/object/apply:os.system ['true']\n"), "the tag "),
    ("bomb", text(BOMB), "100,000"),
    ("twice", text("merge_method: linear\nmerge_method: ties\n"), "merge_method"),
    ("binary", lambda folder: (folder / "r.yaml").write_bytes(b"\xff\xfe\x00"), "is not UTF-8 text"),
    ("folder", lambda folder: (folder / "r.yaml").mkdir(), "this is a folder; give the recipe file in it"),
    ("no method", text("models: [{model: a}]\n"), "'merge_method' is missing"),
    ("misspelt method", document(merge_method="liner"), "unknown merge method 'liner'. Did you mean 'linear'?"),
    ("misspelt key", document(base_modle="a"), "unknown key 'base_modle'. Did you mean 'base_model'?"),
    ("misspelt parameter", changed(denisty=0.5), "unknown parameter 'denisty' of ties. Did you mean 'density'?"),
    ("out of range", changed(density=7.5), "density must be a number between 0 and 1, got 7.5"),
    ("mistyped", changed(density="much"), "density must be a number between 0 and 1, got 'much'"),
    ("not finite", changed(weight=float("inf")), "is not a finite number"),
    ("missing parameter", document(models=[{"model": "a"}, {"model": "b"}]), "linear needs weight"),
    ("missing base", document(merge_method="task_arithmetic"), "task_arithmetic needs a base; name it in 'base_model'"),
    ("models and slices", document(slices=[RANGES]), "exactly one of models, slices and modules"),
    ("too few", document(merge_method="slerp", base_model="a", models=[{"model": "a"}]), "exactly 1 model and a base"),
    ("listed twice", document(models=linear("a", "a")["models"]), "a is listed twice"),
    ("unknown dtype", document(dtype="bf16"), "Did you mean 'bfloat16'?"),
    ("reversed range", sliced(2, 1), "[2, 1] runs backwards. Did you mean [1, 2]?"),
    ("empty range", sliced(1, 1), "[1, 1] holds no layer"),
    ("too long range", sliced(0, 3), "is too long: a has 2 layers"),
    ("no such adapter", document(models=linear("a+./lora")["models"]), "adapter './lora' not found: no such folder"),
    ("no vocabulary", document(tokenizer_source="union"), "the vocabulary of a is not known"),
    (
        "modules",
        text("merge_method: linear\nmodules: {text: {models: []}}\n"),
        "the list is empty; write at least one entry, or leave the key out",
    ),
]

CHECKPOINTS: list[Case] = [
    ("no model", document(models=linear("a", "./z")["models"]), "model './z' not found: no such file or folder"),
    ("not on the Hub", document(models=linear("a", "org/z")["models"]), "model 'org/z' not found"),
    ("empty folder", damaged(lambda folder: [path.unlink() for path in folder.iterdir()]), "b: "),
    ("truncated", weights(lambda data: data[:-100]), "model.safetensors: "),
    ("cut in the header", weights(lambda data: data[:40]), "model.safetensors: "),
    ("random", weights(lambda data: os.urandom(500)), "model.safetensors: "),
    ("empty shard", weights(lambda data: b""), "model.safetensors: "),
    ("header too long", weights(lambda data: (1 << 62).to_bytes(8, "little") + data[8:]), "model.safetensors: "),
    ("overlap", header(overlap), "model.safetensors: "),
    ("past the end", header(past_the_end), "model.safetensors: "),
    ("unknown dtype", header(wrong_dtype), "BF17"),
    ("index leaves", index({"model.norm.weight": "../a/model.safetensors"}), "is not inside the checkpoint's folder"),
    ("index, no shard", index({"model.norm.weight": "model-2.safetensors"}), "model-2.safetensors: no such file"),
    (
        "broken config",
        damaged(lambda folder: (folder / "config.json").write_text("{")),
        "config.json: is not valid JSON",
    ),
    ("config is a list", damaged(lambda folder: (folder / "config.json").write_text("[]")), "must be a JSON object"),
    ("other width", state_with(width=16), "shapes differ"),
    ("other vocabulary", state_with(vocab=40), "vocabularies differ"),
    ("other depth", state_with(layers=3), "do not hold the same tensors"),
    ("missing tensor", tensors_with(lambda t: t.pop("model.norm.weight")), "1 missing in b: model.norm.weight"),
    ("extra tensor", tensors_with(lambda t: t.update(extra=torch.ones(2))), "1 only in b: extra"),
    ("NaN", tensors_with(set_nan), "model.layers.1.mlp.up_proj.weight"),
    ("infinity", tensors_with(set_inf), "lm_head.weight"),
    (
        "quantised",
        damaged(
            lambda folder: (folder / "config.json").write_text(
                json.dumps(CONFIG | {"quantization_config": {"quant_method": "gptq"}})
            )
        ),
        "b: its weights are quantised (gptq",
    ),
    ("fp8", tensors_with(lambda t: t.update({n: v.to(torch.float8_e4m3fn) for n, v in t.items()})), "float8_e4m3fn"),
    (
        "unequal integers",
        lambda folder: [
            write(folder / "a", state(0) | {"ids": torch.arange(3)}),
            write(folder / "b", state(1) | {"ids": torch.arange(1, 4)}),
            recipe(folder / "r.yaml", linear("a", "b")),
        ],
        "ids",
    ),
]


@pytest.mark.parametrize(("make", "message"), [pytest.param(*case[1:], id=case[0]) for case in RECIPES + CHECKPOINTS])
def test_bad_input(models: Path, make: Callable[[Path], Any], message: str) -> None:
    make(models)
    before = names(models)
    found = run("merge", "r.yaml", "out")
    assert found.code == 2, found.err
    assert found.out == ""
    error = found.err[found.err.index("error: ") :]
    assert message in error
    assert "Traceback" not in found.err
    assert len(error.splitlines()) == 1
    assert names(models) == before


@pytest.mark.parametrize(
    ("make", "message"), [pytest.param(*case[1:], id=case[0]) for case in [*RECIPES, *CHECKPOINTS[:-5]]]
)
def test_plan_refuses_what_headers_tell(models: Path, make: Callable[[Path], Any], message: str) -> None:
    if message in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        pytest.skip("weights are not read for a plan")
    make(models)
    found = run("plan", "r.yaml")
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("error: ")
    assert message in found.err


def test_a_message_names_file_line_and_key(models: Path) -> None:
    changed(denisty=0.5)(models)
    found = run("merge", "r.yaml", "out")
    line = next(n for n, line in enumerate((models / "r.yaml").read_text().splitlines(), 1) if "denisty" in line)
    assert found.err.startswith(f"error: r.yaml:{line} models[0].parameters: unknown parameter")


def test_parent_of_the_target_is_a_file(models: Path) -> None:
    document()(models)
    found = run("merge", "r.yaml", "r.yaml/out")
    assert found.code == 2
    assert found.err.startswith("error: r.yaml/out: cannot be written: ")


def test_target_is_a_file(models: Path) -> None:
    document()(models)
    (models / "out").write_text("mine")
    for options in ([], ["--overwrite"]):
        found = run("merge", "r.yaml", "out", *options)
        assert (found.code, found.err) == (2, "error: out: is not a folder; choose another target\n")
    assert (models / "out").read_text() == "mine"


def test_target_that_we_did_not_write(models: Path) -> None:
    document()(models)
    before = sorted((models / "c").iterdir())
    found = run("merge", "r.yaml", "c", "--overwrite")
    assert found.code == 2
    assert "was not written by merganser" in found.err
    assert sorted((models / "c").iterdir()) == before


def test_no_room_on_the_disk(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document()(models)
    import shutil

    usage = shutil.disk_usage(models)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    before = names(models)
    found = run("merge", "r.yaml", "out")
    assert found.code == 2
    assert "too little disk space" in found.err
    assert "room" in found.err
    assert names(models) == before


def test_memory_that_cannot_do(models: Path) -> None:
    document()(models)
    before = names(models)
    found = run("merge", "r.yaml", "out", "--max-memory", "1MB")
    assert found.code == 2
    assert "MB" in found.err
    assert names(models) == before


@pytest.mark.parametrize("kind", ["python", "torch"])
def test_memory_that_runs_out_is_no_defect(models: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def combine(*_: object) -> None:
        if kind == "python":
            raise MemoryError
        torch.empty(1 << 60)

    monkeypatch.setattr("merganser.engine.kernels.blocks.TensorRun.combine", combine)
    found = run("merge", recipe(models / "r.yaml", linear("a", "b")), "out")
    assert (found.code, found.out) == (2, "")
    assert found.err.endswith(
        "error: memory ran out; the same command continues, with fewer --threads or a lower --max-memory it takes less\n"
    )
    assert "Traceback" not in found.err
    monkeypatch.undo()
    monkeypatch.chdir(models)
    assert run("merge", "r.yaml", "out", "-q").code == 0
    assert ".out.merging" not in names(models)
