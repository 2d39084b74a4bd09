"""The table of what methods keep: settings, averages over seeds, failures in plain sight."""

import json
import os
from json import dumps
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.quality import __main__ as quality
from benchmarks.quality import calibrated, chosen, factors, measured, restored, settings, table
from benchmarks.quality.calibrated import Statistics
from merganser.errors import NonFiniteError, OutputError
from merganser.method.registry import get_method_for_adapters, method_names, methods
from merganser.recipe import load_recipe

CONFIG = json.loads((Path(quality.__file__).parent / "config.json").read_text(encoding="utf-8"))


def result(method, mean, *, seed=0, label="default", worst=0.1, failed=None, setting=None):
    retention = {
        "recovered": {"french": None, "maths": None},
        "mean": None if mean is None else {"value": mean, "stderr": 0.02},
        "worst": None if mean is None else {"domain": "maths", "value": worst, "stderr": 0.03},
        "mean_forgotten": {"value": 0.01, "stderr": 0.001},
    }
    return {
        "method": method,
        "label": label,
        "split": "test",
        "setting": setting or settings.published(CONFIG, method),
        "seed": seed,
        "version": settings.method_of(method).version,
        "retention": retention,
        "seconds": {"load": 2.0},
        "failed": failed,
        "hardware": {"processor": "a processor", "processors": 2, "date": "2026-01-01"},
    }


def write(file, *results):
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(found) + "\n" for found in results), encoding="utf-8")


def test_every_method_is_measured_or_left_out_with_a_reason():
    known = set(method_names())
    assert set(CONFIG["left_out"]) <= known
    rows = settings.rows(CONFIG)
    assert known - set(CONFIG["left_out"]) <= set(rows)
    assert set(CONFIG["methods"]) <= set(rows)
    for name in rows:
        parameters = settings.method_of(name).parameters
        required = {p.name for p in parameters.values() if p.required}
        for setting in [settings.published(CONFIG, name), *settings.grid(CONFIG, name)]:
            assert required <= {*setting["each"], *setting["shared"]} <= set(parameters), name


def test_a_variant_of_a_method_is_a_row_of_its_own(tmp_path, capsys):
    """Its recipe is that of the method at other settings, and its results do not mix with those of the method."""
    experts = {name: tmp_path / name for name in ("french", "maths")}
    texts = {domain: {"train": f"{domain}.train.txt"} for domain in experts}
    zoo = SimpleNamespace(folder=tmp_path, base=tmp_path / "base", texts=texts, retained="novels")
    statistics = Statistics(CONFIG, zoo, experts, tmp_path / "statistics")
    bench = quality._Bench(CONFIG, zoo, experts, statistics, tmp_path / "two.jsonl", tmp_path / "work")
    assert bench.suits("featcal+wudi")
    made = {}
    bench.evaluate = lambda model, *_: (
        made.update({Path(model).name: Path(model).read_text()}) or result("featcal", 0.5)
    )
    for row in ("featcal", "featcal+wudi"):
        bench.measure(row, "default", "test", settings.published(CONFIG, row))
    # a plus would be read as a base and an adapter
    assert [*made] == ["featcal.yaml", "featcal-wudi.yaml"]
    recipe = load_recipe(made["featcal-wudi.yaml"])
    assert (recipe.merge_method, "start: wudi" in made["featcal-wudi.yaml"]) == ("featcal", True)
    assert "start" not in made["featcal.yaml"]
    assert sorted(shown(tmp_path, result("featcal", 0.4), result("featcal+wudi", 0.9))) == [
        "| featcal | 40 / 10 |",
        "| featcal+wudi | 90 / 10 |",
    ]
    assert "| featcal+wudi | published: start wudi | 90.0" in (tmp_path / "docs" / "quality.md").read_text()
    for name, why in (("featcal+wud", "is not a row of config.json"), ("emr", "is left out: its shared model")):
        with pytest.raises(SystemExit):
            quality.main(["run", "--methods", name])
        assert f"--methods: {name} {why}" in capsys.readouterr().err


def test_the_grid_varies_one_value():
    published = settings.published(CONFIG, "task_arithmetic")
    assert published == {"each": {"weight": 1.0}, "shared": {"lambda": 0.3}}
    assert settings.grid(CONFIG, "task_arithmetic") == [
        {"each": {"weight": 1.0}, "shared": {"lambda": value}} for value in (0.3, 0.5, 1.0)
    ]
    assert settings.grid(CONFIG, "star") == [
        {"each": {}, "shared": shared} for shared in ({}, {"lambda": 0.5}, {"lambda": 1.5})
    ]
    assert settings.grid(CONFIG, "linear") == []


def test_the_table_has_the_best_first_and_keeps_what_failed(tmp_path):
    write(
        tmp_path / "results" / "two.jsonl",
        result("linear", 0.9),
        result("linear", 0.4),
        result("dare_ties", 0.5, seed=0, worst=0.2),
        result("dare_ties", 0.7, seed=1, worst=-0.1),
        result("svc", None, failed="NaN in the logits"),
    )
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "quality.md").write_text("before\n<!-- quality:start -->\nold\n<!-- quality:end -->\nafter\n")
    table.write(tmp_path / "results", docs, CONFIG)
    text = (docs / "quality.md").read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "method" not in line]
    assert rows == [
        "| dare_ties | 60 / -10 |",
        "| linear | 40 / 10 |",
        "| svc | failed |",
        "| dare_ties | published: weight 1, density 0.8, normalize true | 60.0 ± 2.0 % (2 seeds, spread 20.0) | -10.0 ± 3.0 % maths "
        "| 1.0 ± 0.1 % | 2 |",
        "| linear | published: weight 1 | 40.0 ± 2.0 % | 10.0 ± 3.0 % maths | 1.0 ± 0.1 % | 2 |",
        "| svc | published | failed: NaN in the logits | | | |",
    ]
    assert "<svg" in (docs / "images" / "quality-two.svg").read_text(encoding="utf-8")


def part(value, error, lost):
    return {
        "retention": {
            "recovered": {"own": {"value": value, "stderr": error}},
            "mean_forgotten": {"value": lost, "stderr": lost / 10},
        },
        "gains": {"own": {"value": 1.0, "stderr": 0.1}},
        "seconds": {"load": 1.0, "score": 2.0},
        "peak_memory": 5,
        "failed": None,
        "bits_per_byte": {"merge": {"own": 1.5}},
    }


def test_restored_tasks_count_on_their_own_domains():
    parts = {"own": part(0.9, 0.03, 0.01), "other": part(0.5, 0.04, 0.03)}
    parts["other"]["retention"]["recovered"] = {"other": {"value": 0.5, "stderr": 0.04}}
    parts["other"]["gains"] = {"other": {"value": 2.0, "stderr": 0.1}}
    tasks = [{"bytes": 10, "full_bytes": 100}, {"bytes": 20, "full_bytes": 100}]
    found = restored.combined(parts, {"shared_bytes": 6, "tasks": tasks, "needs_base": True})
    assert found["retention"]["mean"] == {"value": 0.7, "stderr": pytest.approx(0.025), "domains": 2}
    assert found["retention"]["worst"] == {"domain": "other", "value": 0.5, "stderr": 0.04}
    assert found["retention"]["mean_forgotten"] == {"value": 0.02, "stderr": 0.003}
    assert found["stored_share"] == 0.18
    assert found["seconds"] == {"load": 2.0, "score": 4.0}
    assert found["gains"]["other"]["value"] == 2.0


def test_a_restored_task_without_figures_is_said_and_not_averaged():
    parts = {"own": part(0.9, 0.03, 0.01), "other": {**part(0.5, 0.04, 0.03), "failed": "NaN in the logits"}}
    parts["other"]["retention"] = {"recovered": {"other": None}, "mean": None, "worst": None, "mean_forgotten": None}
    found = restored.combined(parts, {"shared_bytes": 6, "tasks": [], "needs_base": True})
    assert (found["retention"], found["failed"]) == (None, "other: NaN in the logits")
    assert found["seconds"] == {"load": 2.0, "score": 4.0}
    assert found["bits_per_byte"] == {"own": {"own": 1.5}, "other": {"own": 1.5}}


def test_restored_tasks_have_a_table_of_their_own(tmp_path):
    whole = {**result("skillpack", 0.98, label="restored", worst=0.97), "stored_share": 0.123}
    write(tmp_path / "results" / "two.jsonl", result("skillpack", 0.4), whole)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "quality.md").write_text("<!-- quality:start --><!-- quality:end -->")
    table.write(tmp_path / "results", docs, CONFIG)
    text = (docs / "quality.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("| skillpack |")] == [
        "| skillpack | 40 / 10 |",
        "| skillpack | 98 / 97; 12 |",
        "| skillpack | published | 40.0 ± 2.0 % | 10.0 ± 3.0 % maths | 1.0 ± 0.1 % | 2 |",
    ]


def test_what_tuning_chose_has_a_table_of_its_own(tmp_path):
    def tried(method, *means, tuned=None):
        grid = settings.grid(CONFIG, method)
        found = [result(method, 0.4) | {"setting": grid[0]}]
        for i, mean in enumerate(means):
            found.append(result(method, mean, label=f"grid-{i}") | {"setting": grid[i], "split": "tune"})
        best = max(range(len(means)), key=lambda i: means[i] or -9)
        return found if tuned is None else [*found, result(method, tuned, label="tuned") | {"setting": grid[best]}]

    write(
        tmp_path / "results" / "two.jsonl",
        *tried("star", 0.2, 0.3, None, tuned=0.6),
        *tried("ties", 0.5, 0.4, 0.3),
        *tried("svc", 0.1, 0.2),
        *tried("iso_c", 0.1, 0.2, 0.3),
        result("linear", 0.9),
    )
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "quality.md").write_text("<!-- quality:start --><!-- quality:end -->")
    table.write(tmp_path / "results", docs, CONFIG)
    text = (docs / "quality.md").read_text(encoding="utf-8")
    rows = text.partition("after one parameter was tuned")[2].partition("![")[0].splitlines()
    # svc: one value was not tried yet; iso_c: the best was not measured on the test texts; linear has nothing to tune
    assert [line for line in rows if line.startswith("| ")][1:] == ["| star | 60 / 10 |", "| ties | 40 / 10* |"]


def shown(tmp_path, *results):
    """Return the rows of the first table."""
    write(tmp_path / "results" / "two.jsonl", *results)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "quality.md").write_text("<!-- quality:start --><!-- quality:end -->")
    table.write(tmp_path / "results", docs, CONFIG)
    text = (docs / "quality.md").read_text(encoding="utf-8")
    return [line for line in text.partition("![")[0].splitlines() if line.startswith("| ")][1:]


def test_an_earlier_version_is_marked_and_gives_way_to_a_later_one(tmp_path):
    assert min(methods()["tsv_m"].version, methods()["iso_c"].version) > 1
    old = [result(name, 0.2) for name in ("tsv_m", "iso_c")]
    for line in old:
        del line["version"]
    tuned = result("iso_c", 0.3, label="tuned", setting=settings.grid(CONFIG, "iso_c")[1])
    del tuned["version"]
    rows = shown(tmp_path, *old, tuned, result("iso_c", 0.6))
    assert rows == ["| iso_c | 60 / 10 |", "| tsv_m | 20 / 10† |"]
    assert "30.0" not in (tmp_path / "docs" / "quality.md").read_text(encoding="utf-8")


def test_what_was_measured_at_other_settings_or_is_left_out_is_not_shown(tmp_path):
    other = result("dare_ties", 0.9, setting={"each": {"weight": 1.0, "density": 0.2}, "shared": {}})
    assert shown(tmp_path, other, result("emr", 0.8), result("linear", 0.4)) == ["| linear | 40 / 10 |"]


def test_tuning_goes_on_beyond_the_edge_of_its_grid():
    def tried(*pairs, method="star"):
        first = settings.published(CONFIG, method)
        made = [(settings._with(first, "lambda", value) if value else first, score) for value, score in pairs]
        found = settings.wider(CONFIG, method, made)
        return found and found["shared"]["lambda"]

    # the published value of star is 1
    assert tried((None, 0.4), (0.5, 0.3), (1.5, 0.5)) == 2.2
    assert tried((None, 0.4), (0.5, 0.3), (1.5, 0.5), (2.2, 0.6)) == 3.2
    assert tried((None, 0.4), (0.5, 0.3), (1.5, 0.5), (2.2, 0.45)) is None
    assert tried((None, 0.4), (0.5, 0.6), (1.5, 0.5)) == 0.25
    assert tried((None, 0.4), (0.5, 0.3), (1.5, 0.1)) is None
    # of the published value, too
    assert tried((None, 0.4), (0.5, 0.3), (1.0, 0.1), method="task_arithmetic") == 0.18


def test_tuning_stays_in_the_range_of_the_parameter():
    first = settings.published(CONFIG, "slerp")
    made = [(settings._with(first, "t", value), score) for value, score in ((0.3, 0.1), (0.5, 0.2), (0.9, 0.3))]
    assert settings.wider(CONFIG, "slerp", made) is None


def test_tuning_tries_what_is_wider_until_the_best_is_inside(tmp_path, monkeypatch):
    bench = object.__new__(quality._Bench)
    bench._config = CONFIG
    asked = []

    def measure(method, label, split, setting, sequences=None):
        asked.append(setting["shared"].get("lambda", 1.0))
        return -abs(asked[-1] - best)

    monkeypatch.setattr(bench, "measure", measure)
    for best, expected in ((2.0, [1, 0.5, 1.5, 2.2, 3.2]), (0.9, [1, 0.5, 1.5])):
        asked.clear()
        found = bench.tuned("star")
        assert asked == expected
        assert found["shared"].get("lambda", 1.0) == min(expected, key=lambda value: abs(value - best))
    best = 1e9
    asked.clear()
    bench.tuned("star")
    assert len(asked) == 3 + CONFIG["most_wider"]
    assert bench.tuned("linear") is None


def test_sets_of_different_size_stand_side_by_side(tmp_path):
    write(tmp_path / "results" / "two.jsonl", result("linear", 0.4), result("slerp", 0.45), result("ties", 0.5))
    tuned = settings.grid(CONFIG, "ties")[1]
    others = result("linear", 0.3), result("ties", 0.2, label="tuned", setting=tuned)
    write(tmp_path / "results" / "four.jsonl", *others)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "quality.md").write_text("<!-- quality:start --><!-- quality:end -->")
    table.write(tmp_path / "results", docs, CONFIG)
    text = (docs / "quality.md").read_text(encoding="utf-8")
    assert "| method | 2 experts | 4 experts |" in text
    assert "| linear | 40 / 10 | 30 / 10 |" in text
    assert "| slerp | 45 / 10 |  |" in text
    assert "| ties | 50 / 10 |  |" in text
    assert sorted(path.name for path in (docs / "images").iterdir()) == [
        "quality-four.svg",
        "quality-number.svg",
        "quality-two.svg",
        "quality-worst.svg",
    ]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    file = tmp_path / "two.jsonl"
    write(file, result("linear", 0.4))
    with file.open("a", encoding="utf-8") as lines:
        lines.write('{"method": "ti')
    assert [found["method"] for found in table.read(file)] == ["linear"]
    whole = file.read_bytes()
    table.drop_rest(file)
    assert file.read_bytes() == whole[: whole.index(b"\n") + 1]
    table.drop_rest(tmp_path / "none.jsonl")
    assert table.read(tmp_path / "none.jsonl") == []


ADAPTERS = {name: Path(f"adapters/{name}") for name in CONFIG["sets"]["adapters"]["adapters"]}


@pytest.mark.parametrize("name", CONFIG["factors"])
def test_recipes_from_factors_are_recipes(name):
    row = CONFIG["factors"][name]
    found = factors.recipe(row, Path("base"), ADAPTERS, 0)
    loaded = load_recipe(found)
    joined = [f"base+{path}" for path in ADAPTERS.values()]
    assert [entry["model"] for entry in found["models"]] == (
        joined if row["as"] == "models" else [str(path) for path in ADAPTERS.values()]
    )
    known = methods() if row["as"] == "models" else {loaded.merge_method: get_method_for_adapters(loaded.merge_method)}
    assert {*row["setting"]["each"], *row["setting"]["shared"]} <= {
        p.name for p in known[row["method"]].parameters.values()
    }


def test_what_is_merged_from_factors_has_a_table_of_its_own(tmp_path, monkeypatch):
    """Each row is measured once, an adapter on its base, a recipe as it is; beside it stands what rounding left."""
    asked = []
    rows = {
        "linear": {"method": "linear", "as": "models", "setting": {"each": {}, "shared": {}}},
        "iso_c": {"method": "iso_c", "as": "adapters", "rank": 8, "setting": {"each": {}, "shared": {}}},
        "svc": {"method": "svc", "as": "models", "setting": {"each": {}, "shared": {}}},
    }
    config = {**CONFIG, "factors": rows}

    def fake(model, experts, zoo, config, split, folder):
        asked.append((Path(model).name, experts["maths"], split))
        if len(asked) == 3:
            raise NonFiniteError("NaN")
        found = result("linear", 0.5 + len(asked) / 10)
        return {key: found[key] for key in ("retention", "seconds", "failed")}

    def merge(recipe, out, *, overwrite):
        return SimpleNamespace(record={"timings": {"seconds": 1.5}})

    monkeypatch.setattr(factors, "measured", fake)
    monkeypatch.setattr(factors, "merge", merge)
    zoo = SimpleNamespace(base=tmp_path / "base", adapters={})
    for _ in range(2):
        factors.run(config, zoo, tmp_path / "results", tmp_path / "work")
    maths = f"{tmp_path / 'base'}+{factors.shipped.FOLDER / 'maths'}"
    assert asked == [(name, maths, "test") for name in ("recipe.yaml", "merged", "recipe.yaml")]
    assert factors.table(tmp_path / "results", config, {"linear": "49 / 45"}).splitlines()[2:] == [
        "| method | merged as | from factors | forgotten | from rounded experts |",
        "|---|---|---|---|---|",
        "| iso_c | adapters, rank 8 | 70 / 10 | 1.0 % |  |",
        "| linear | models | 60 / 10 | 1.0 % | 49 / 45 |",
        "| svc | models | failed: NaN | |  |",
    ]
    rows["linear"]["setting"]["each"] = {"weight": 2.0}
    assert "linear" not in factors.table(tmp_path / "results", config, {})


def test_no_results_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="measure first"):
        table.write(tmp_path, tmp_path, CONFIG)


@pytest.mark.parametrize(
    "error", [OutputError("zoo/x: another evaluation is writing it"), NonFiniteError("HERE/x: NaN")]
)
def test_what_a_method_cannot_help_is_no_result(tmp_path, monkeypatch, error):
    def fail(*args, **options):
        raise type(error)(str(error).replace("HERE", str(tmp_path)))

    monkeypatch.setattr(measured, "evaluate", fail)
    experts = {"french": tmp_path / "french", "maths": tmp_path / "maths"}
    texts = {domain: {"test": tmp_path / "t.txt"} for domain in (*experts, "novels")}
    zoo = SimpleNamespace(folder=tmp_path, base=tmp_path / "base", texts=texts, retained="novels")
    file = tmp_path / "results" / "two.jsonl"
    file.parent.mkdir()
    statistics = Statistics(CONFIG, zoo, experts, tmp_path / "statistics")
    bench = quality._Bench(CONFIG, zoo, experts, statistics, file, tmp_path / "work")
    setting = settings.published(CONFIG, "linear")
    if isinstance(error, OutputError):
        with pytest.raises(OutputError):
            bench.measure("linear", "default", "test", setting)
        assert not file.exists()
    else:
        bench.measure("linear", "default", "test", setting)
        (found,) = table.read(file)
        assert (found["failed"], found["retention"]) == ("zoo/x: NaN", None)


def test_methods_with_data_are_calibrated_once_on_train_texts(tmp_path, monkeypatch):
    calls = []

    def calibrate(model, files, out, **options):
        calls.append((model.name, [str(file) for file in files], options))
        out.mkdir()
        (out / "statistics.json").write_text("{}")

    monkeypatch.setattr(calibrated, "calibrate", calibrate)
    experts = {name: tmp_path / "experts" / name for name in ("french", "maths")}
    for path in experts.values():
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"")
    texts = {domain: {split: f"{domain}.{split}.txt" for split in ("train", "test")} for domain in experts}
    zoo = SimpleNamespace(folder=tmp_path, base=tmp_path / "base", texts=texts, retained="novels")
    statistics = Statistics(CONFIG, zoo, experts, tmp_path / "statistics")
    bench = quality._Bench(CONFIG, zoo, experts, statistics, tmp_path / "two.jsonl", tmp_path / "work")
    setting = settings.published(CONFIG, "regmean")
    first = bench._recipe("regmean", setting, 0, None)
    assert bench._recipe("regmean", setting, 0, None) == first
    assert [Path(entry["statistics"]).name for entry in first["models"]] == [
        "experts-french-64x256-gram",
        "experts-maths-64x256-gram",
    ]
    bench._recipe("regmean", setting, 0, 4)
    drawn = {"statistics": ["gram"], "length": 256}
    assert calls == [
        (name, [f"{name}.train.txt"], {**drawn, "sequences": sequences})
        for sequences in (64, 4)
        for name in ("french", "maths")
    ]
    # an expert that was trained again
    later = (tmp_path / "statistics" / "experts-french-64x256-gram" / "statistics.json").stat().st_mtime + 10
    os.utime(experts["french"] / "model.safetensors", (later, later))
    bench._recipe("regmean", setting, 0, None)
    assert [call[0] for call in calls[4:]] == ["french"]
    # those of the base are made once, too, not again for every value that tuning tries
    zoo.base.mkdir()
    (zoo.base / "model.safetensors").write_bytes(b"")
    os.utime(experts["french"] / "model.safetensors", (0, 0))
    led = [bench._recipe("led", settings.published(CONFIG, "led"), 0, 4) for _ in range(2)]
    assert [Path(entry["base_statistics"]).name for entry in led[0]["models"]] == [
        f"base-on-{name}-4x256-absolute_gradient" for name in experts
    ]
    assert [Path(entry["statistics"]).name for entry in led[1]["models"]] == [
        f"experts-{name}-4x256-absolute_gradient" for name in experts
    ]
    assert [(call[0], *call[1]) for call in calls[5:]] == [
        ("french", "french.train.txt"),
        ("base", "french.train.txt"),
        ("maths", "maths.train.txt"),
        ("base", "maths.train.txt"),
    ]
    # what is measured within the merge gets the data
    within = bench._recipe("regmean_plus", settings.published(CONFIG, "regmean_plus"), 0, None)
    assert within["models"][0]["data"] == {"files": "french.train.txt", "sequences": 64, "length": 256}
    # and all texts where every model must read the same
    together = bench._recipe("zipit", settings.published(CONFIG, "zipit"), 0, 16)
    texts = {"files": ["french.train.txt", "maths.train.txt"], "sequences": 32, "length": 256}
    assert [entry["data"] for entry in together["models"]] == [texts, texts]
    assert "statistics" not in bench._recipe("linear", settings.published(CONFIG, "linear"), 0, None)["models"][0]


def test_the_table_of_tokens(tmp_path):
    def row(label, sequences, value):
        drawn = {"sequences": sequences, "length": 256}
        return {**result("regmean", value), "label": label, "calibration": drawn}

    rows = [row("default", 64, 0.8), row("16 sequences", 16, 0.7), row("4 sequences", 4, 0.6), row("tuned", 64, 0.9)]
    found = table._by_tokens([*rows, result("linear", 0.5)])
    assert {count: text.split(" / ")[0] for count, text in found["regmean"].items()} == {
        16384: "80",
        4096: "70",
        1024: "60",
    }
    lines = table._tokens({"four": found}).splitlines()
    assert lines[3] == "| | method | 16,384 | 4,096 | 1,024 |"
    assert lines[5].startswith("| 4 experts | regmean | 80 / ")
    assert table._by_tokens([row("default", 64, 0.8)]) == {}
    best = row("tuned, 16 sequences", 16, 0.9) | {"setting": {"each": {}, "shared": {"alpha": 0.1}}}
    assert list(table._by_tokens([row("16 sequences", 16, 0.8), best])) == ["regmean, tuned: alpha 0.1", "regmean"]
    assert list(table._by_tokens([row("16 sequences", 16, 0.8)])["regmean"]) == [4096]


def test_a_method_measured_with_fewer_tokens_alone_is_in_the_tables_with_a_mark(tmp_path):
    def row(method, label, sequences, value):
        return {**result(method, value), "label": label, "calibration": {"sequences": sequences, "length": 256}}

    lines = shown(
        tmp_path,
        row("regmean", "default", 64, 0.8),
        row("regmean", "16 sequences", 16, 0.9),
        row("fisher", "4 sequences", 4, 0.6),
        row("fisher", "16 sequences", 16, 0.5),
        result("linear", 0.55),
    )
    assert lines[:3] == ["| regmean | 80 / 10 |", "| linear | 55 / 10 |", "| fisher | 50 / 10‡ |"]
    page = (tmp_path / "docs" / "quality.md").read_text()
    assert "| fisher | published‡ | 50.0 ± 2.0 %" in page
    assert "| 2 experts | fisher |  | 50 / 10 | 60 / 10 |" in page


def test_with_sequences_methods_with_data_are_tuned_on_so_many_alone(tmp_path, monkeypatch):
    measured_with = []

    def measure(self, method, label, split, setting, sequences=None):
        measured_with.append((label, split, sequences))
        return float(setting["shared"].get("lambda", 0.0) == 0.3)

    monkeypatch.setattr(quality._Bench, "measure", measure)
    monkeypatch.setattr(quality, "experts_of", lambda zoo, chosen: {"french": tmp_path, "maths": tmp_path})
    zoo = SimpleNamespace(base=tmp_path, folder=tmp_path)
    wanted = {"tune": True, "restored_too": False, "only": 16}
    quality.run("two", CONFIG | {"most_wider": 0}, ["cat", "lines"], zoo, tmp_path, tmp_path / "work", **wanted)
    assert measured_with == [
        ("16 sequences", "test", 16),
        *((f"grid-{i}", "tune", 16) for i in range(3)),
        ("tuned, 16 sequences", "test", 16),
        ("default", "test", None),
    ]


def test_a_check_measures_anew_beside_the_results_and_prints_both(tmp_path, monkeypatch, capsys):
    means = {"ties": 0.71234, "svc": None}

    def evaluate(models, texts, *, json, **options):
        method = Path(models["merge"]).stem
        found = result(method, means[method], failed=None if means[method] else "NaN in the logits")
        retention = {"models": {"merge": found["retention"]}, "domains": {}}
        json.write_text(dumps({"retention": retention}))
        merged = SimpleNamespace(seconds={"load": 1.0, "score": 1.0}, failed=found["failed"])
        return SimpleNamespace(models={"merge": merged}, peak_memory=1, outcomes={})

    for name in ("french", "haskell"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
    experts = {name: tmp_path / "zoo" / name for name in ("french", "haskell")}
    texts = {domain: {"test": tmp_path / "t.txt"} for domain in (*experts, "novels")}
    zoo = SimpleNamespace(folder=tmp_path / "zoo", base=tmp_path, experts=experts, texts=texts, retained="novels")
    monkeypatch.setattr(measured, "evaluate", evaluate)
    monkeypatch.setattr(quality, "load_zoo", lambda *arguments, **options: zoo)
    monkeypatch.setattr(quality, "_HERE", tmp_path)
    before = [
        result(name, 0.7, worst=0.6) | {"setting": settings.published(CONFIG, name)} for name in ("ties", "linear")
    ]
    write(tmp_path / "results" / "two.jsonl", *before)
    kept = (tmp_path / "results" / "two.jsonl").read_bytes()
    assert quality.main(["check", "--set", "two", "--methods", "ties,svc"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "ties, default, seed 0: mean / worst in percent: now 71.23 / 10.00 · before 70.00 / 60.00",
        "svc, default, seed 0: mean / worst in percent: now failed: NaN in the logits · before not measured",
    ]
    assert (tmp_path / "results" / "two.jsonl").read_bytes() == kept
    assert not (tmp_path / "zoo" / "quality" / "check").exists()


def test_an_adapter_is_put_on_its_base_again_when_it_was_trained_anew(tmp_path, monkeypatch):
    adapter = tmp_path / "adapters" / "maths"
    adapter.mkdir(parents=True)
    (adapter / "weights").write_text("")
    os.utime(adapter / "weights", (1, 1))
    zoo = SimpleNamespace(folder=tmp_path, base=tmp_path / "base", adapters={"maths": adapter})
    applied = []

    def apply(base, adapter, target):
        applied.append(adapter)
        target.mkdir(parents=True)

    monkeypatch.setattr(quality, "apply", apply)
    expected = {"maths": tmp_path / "applied" / "maths"}
    assert quality.experts_of(zoo, {"adapters": ["maths"]}) == expected
    assert quality.experts_of(zoo, {"adapters": ["maths"]}) == expected
    assert len(applied) == 1
    os.utime(adapter / "weights", (2**33, 2**33))
    assert quality.experts_of(zoo, {"adapters": ["maths"]}) == expected
    assert len(applied) == 2


def test_what_auto_and_search_keep():
    entries = [
        {"method": "iso_c", "label": "default", "mean": 0.68, "worst": {"value": 0.54}},
        {"method": "iso_c", "label": "tuned", "mean": 0.9, "worst": {"value": 0.8}},
        {"method": "linear", "label": "default", "mean": 0.49, "worst": {"value": 0.45}},
        {"method": "twin", "label": "default", "mean": None},
    ]
    line = {
        "set": "adapters",
        "kind": "auto",
        "minutes": 60.0,
        "items": 420,
        "windows": 10,
        "winner": "regmean",
        "method": "regmean",
        "recommended": "winner",
        "failed": None,
        "retention": {"mean": {"value": 0.85, "stderr": 0.02}, "worst": {"value": 0.74, "stderr": 0.03}},
    }
    other = line | {"kind": "search", "winner": "trial-0007", "method": "task_arithmetic", "recommended": "maths"}
    failed = line | {"minutes": 5.0, "retention": None, "failed": "no memory"}
    text = chosen.section([line | {"items": 1}, other, line, failed], {"adapters": entries}, table._SETS, 10)
    rows = [row for row in text.splitlines() if row.startswith("| 4 adapters")]
    assert rows == [
        "| 4 adapters | auto | 5 | 420 | regmean | failed: no memory | 49 / 45 | iso_c 68 / 54 |",
        "| 4 adapters | auto | 60 | 420 | regmean | 85 ± 2 / 74 ± 3 | 49 / 45 | iso_c 68 / 54 |",
        "| 4 adapters | search | 60 | 420 | trial-0007 (task_arithmetic) | 85 ± 2 / 74 ± 3 (maths was recommended) | 49 / 45 | "
        "iso_c 68 / 54 |",
    ]
    # of other test windows, and so not to be compared with the other rows
    assert "Not measured yet" in chosen.section([line], {"adapters": entries}, table._SETS, 2)


def test_where_auto_finds_what_it_recommends(tmp_path):
    zoo = SimpleNamespace(base=tmp_path / "base")
    experts = {"maths": tmp_path / "m", "haskell": tmp_path / "h"}
    where = lambda name, merged=None: chosen._recommended(name, merged, tmp_path / "out", zoo, experts)  # noqa: E731
    assert where("winner", tmp_path / "out" / "merged") == str(tmp_path / "out" / "merged")
    assert where("average") == str(tmp_path / "out" / "recipes" / "average.yaml")
    assert where("h") == str(tmp_path / "h")
    assert where("base") == str(tmp_path / "base")
