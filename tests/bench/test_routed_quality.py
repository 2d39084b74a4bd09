"""Rows of mixtures and routed models: the table, and a run over tiny models that continues."""

import json
from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import load_file, save_file

from benchmarks.quality import routed, table
from benchmarks.quality.routed_table import tables
from merganser.errors import MergeError
from merganser.mixture import mix
from tests.bench.test_quality import CONFIG, result, write
from tests.mixture.making import LAYERS, make_models, recipe


def line(model, mean, **extra):
    retention = mean and {"mean": {"value": mean}, "worst": {"value": mean - 0.1}}
    return {"model": model, "retention": retention, **extra}


def test_the_table_has_a_column_for_each_set(tmp_path):
    rows = {
        "two": [line("mixture", 0.5), line("mixture", 0.934, router_right=0.987, sequences=16, length=256)],
        "four": [
            line("twin, routed", 0.9, right={"a": 1.0, "b": 0.9}, stored_share=0.12),
            line("twin, told", 0.9, right={"a": 1.0, "b": 1.0}, stored_share=0.12),
            line("mixture", None),
        ],
        "eight": [],
    }
    titles = {"two": "2 experts", "four": "4 experts", "eight": "8 experts"}
    [text] = tables(rows, titles)
    assert [row for row in text.splitlines() if row.startswith("| ")] == [
        "| | 2 experts | 4 experts |",
        "| mixture | 93 / 83; 99 right | failed |",
        "| twin, routed |  | 90 / 80; 95 right; 12 stored |",
        "| twin, told |  | 90 / 80; 12 stored |",
    ]
    assert text.splitlines()[0].endswith("made from 16 sequences of 256 tokens of each train text.")
    assert tables({"two": []}, titles) == []
    write(tmp_path / "two.jsonl", result("linear", 0.4))
    write(tmp_path / "routed" / "two.jsonl", *rows["two"])
    (tmp_path / "quality.md").write_text("<!-- quality:start --><!-- quality:end -->")
    table.write(tmp_path, tmp_path, CONFIG)
    assert "| mixture | 93 / 83; 99 right |" in (tmp_path / "quality.md").read_text(encoding="utf-8")


def test_a_run_continues_and_keeps_what_failed(tmp_path, monkeypatch):
    made = []

    def make(out, zoo, experts, data, drawn):
        made.append((sorted(data), drawn))
        if len(made) == 2:
            raise MergeError(f"{zoo.folder}/base: is damaged")
        out.mkdir()
        return str(out), {"stored_share": 0.5}

    monkeypatch.setattr(routed, "MODELS", {"one": make, "two": make})
    monkeypatch.setattr(routed, "_evaluated", lambda reference, *rest: {"retention": None, "failed": None})
    zoo = SimpleNamespace(folder=Path("/somewhere"), texts={"maths": {"train": "t"}}, base="b")
    for _ in range(2):
        routed.run(["one", "two"], CONFIG, zoo, {"maths": Path("e")}, tmp_path / "r" / "two.jsonl", tmp_path / "work")
    lines = [json.loads(text) for text in (tmp_path / "r" / "two.jsonl").read_text().splitlines()]
    assert [(each["model"], each["failed"]) for each in lines] == [("one", None), ("two", "zoo/base: is damaged")]
    assert made == [(["maths"], {"sequences": 64, "length": 256})] * 2
    assert lines[0]["stored_share"] == 0.5
    assert not (tmp_path / "work" / "out").exists()


def test_windows_of_a_mixture_whose_first_choice_is_right(tmp_path):
    """All routers are zero, so the first expert is always the first choice."""
    base, *experts = make_models(tmp_path, "llama")
    out = mix(recipe(base, experts), tmp_path / "out").out
    tensors = load_file(out / "model.safetensors")
    routers = [name for name in tensors if name.endswith("block_sparse_moe.gate.weight")]
    assert len(routers) == LAYERS
    save_file(tensors | {name: tensors[name] * 0 for name in routers}, out / "model.safetensors", {"format": "pt"})
    texts = {name: tmp_path / f"{name}.txt" for name in "ab"}
    for file in texts.values():
        file.write_text("the cat sat on a mat " * 9)
    assert routed.right_windows(out, texts, {"context": 16, "windows": 2}) == {"a": 1.0, "b": 0.0}
