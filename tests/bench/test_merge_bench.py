import json
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import merganser
from benchmarks.merge import __main__ as command
from benchmarks.merge import chart
from benchmarks.merge.check import FORMULAS, WrongResult, check_hashes, check_merge
from benchmarks.merge.checkpoints import (
    Models,
    Shape,
    from_bfloat16,
    make_headers,
    make_models,
    shape_of,
    tiny_of,
    to_bfloat16,
)
from benchmarks.merge.hardware import filesystem
from benchmarks.merge.measure import CommandError, Floor, KilledError, Usage, cached_share, forget, measure_floor, run
from benchmarks.merge.recipes import METHODS, recipe
from benchmarks.merge.scenarios import size_in_bytes
from benchmarks.merge.session import Report, Session, summary
from merganser.method.registry import get_method

SHAPE = Shape(hidden=32, ffn=64, layers=2, vocab=200, heads=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"), SHAPE.tensors, 3, SHAPE.config)


def test_bfloat16_is_rounded_as_torch_does() -> None:
    values = torch.cat([torch.randn(10_000), torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 1e-40, -3e38])])
    bits = to_bfloat16(values.numpy())
    torch.testing.assert_close(
        torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), values.bfloat16(), rtol=0, atol=0
    )
    torch.testing.assert_close(torch.from_numpy(from_bfloat16(bits)), values.bfloat16().float(), rtol=0, atol=0)


def test_models_have_the_names_shapes_and_spread_that_they_must(models: Models) -> None:
    base = load_file(models.base / "model.safetensors")
    expert = load_file(models.experts[1] / "model.safetensors")
    assert [(name, tuple(tensor.shape)) for name, tensor in base.items()] == sorted(SHAPE.tensors)
    assert {tensor.dtype for tensor in base.values()} == {torch.bfloat16}
    flat = torch.cat([tensor.reshape(-1) for tensor in base.values()]).float()
    delta = torch.cat([(expert[name].float() - base[name].float()).reshape(-1) for name in base])
    assert 0.019 < flat.std() < 0.021
    assert 0.00095 < delta.std() < 0.00105


def test_models_are_made_once_and_again_when_they_change(tmp_path: Path) -> None:
    first = make_models(tmp_path, SHAPE.tensors, 1, SHAPE.config)
    file = first.experts[0] / "model.safetensors"
    before, content = file.stat().st_mtime_ns, file.read_bytes()
    assert make_models(tmp_path, SHAPE.tensors, 2, SHAPE.config).experts[1].is_dir()
    assert file.stat().st_mtime_ns == before
    (first.experts[0] / "settings.json").unlink()
    make_models(tmp_path, SHAPE.tensors, 1, SHAPE.config)
    assert file.stat().st_mtime_ns != before
    assert file.read_bytes() == content


@pytest.mark.parametrize("size", [0.02, 0.1, 0.25, 0.54, 1.0, 2.0])
def test_shapes_have_the_size_that_they_are_named_by(size: float) -> None:
    shape = shape_of(size)
    assert abs(shape.parameters / 1e9 - size) < 0.06 * size
    assert [name for name, _ in tiny_of(shape).tensors] == [name for name, _ in shape.tensors]


def test_headers_of_a_large_model_can_be_planned_and_take_no_room(tmp_path: Path, models: Models) -> None:
    shape = Shape(hidden=1024, ffn=4096, layers=8, vocab=32000, heads=16)
    for name in ("base", "expert"):
        make_headers(tmp_path / name, shape, 10)
    large = Models(tmp_path / "base", (tmp_path / "expert",), shape.tensors)
    assert merganser.plan(recipe("ties", large)).n_parameters == shape.parameters
    assert len(list((tmp_path / "base").glob("*.safetensors"))) == 10
    assert sum(file.stat().st_blocks * 512 for file in tmp_path.rglob("*")) < shape.parameters / 100


def test_every_method_but_copies_is_measured_with_parameters_that_it_takes(models: Models) -> None:
    for name in METHODS:
        assert merganser.plan(recipe(name, models)).method is get_method(name)


@pytest.mark.parametrize("name", METHODS)
def test_merges_are_found_right(name: str, models: Models, tmp_path: Path) -> None:
    merganser.merge(recipe(name, models), tmp_path / "out")
    found = check_merge(name, models, tmp_path / "out")
    assert found["computed"] == (name in FORMULAS)
    if found["computed"]:
        # perfect rounding is 0.25 off on average; nearswap copies many elements
        assert 0.05 < found["mean_error_ulp"] < 0.3


@pytest.mark.parametrize("name", FORMULAS)
def test_wrong_numbers_are_found(name: str, models: Models, tmp_path: Path) -> None:
    other = {"linear": "task_arithmetic"}.get(name, "linear")
    merganser.merge(recipe(other, models), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    if name in ("linear", "task_arithmetic"):
        # these two are the same here; two units in the last place of one tensor are not
        tensors = load_file(file)
        tensors["model.norm.weight"] *= 1.02
        save_file(tensors, file)
    with pytest.raises(WrongResult, match="further off"):
        check_merge(name, models, tmp_path / "out")


def test_only_mergekit_may_write_float32(models: Models, tmp_path: Path) -> None:
    merganser.merge(recipe("slerp", models), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file)
    with pytest.raises(WrongResult, match="other tensors"):
        check_merge("slerp", models, tmp_path / "out")
    found = check_merge("slerp", models, tmp_path / "out", strict=False)
    assert (found["dtype"], found["wrong_share"]) == ("F32", 0)


def test_a_copy_of_an_input_a_missing_tensor_and_changed_bytes_are_found(models: Models, tmp_path: Path) -> None:
    with pytest.raises(WrongResult, match="away from input"):
        check_merge("della", models, models.experts[0])
    merganser.merge(recipe("della", models), tmp_path / "out")
    check_hashes(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(WrongResult, match=r"model\.norm\.weight"):
        check_merge("della", models, tmp_path / "out")
    with pytest.raises(WrongResult, match=r"merge\.json"):
        check_hashes(tmp_path / "out")


def test_usage_is_that_of_the_command_and_not_of_this_process(tmp_path: Path) -> None:
    held = bytearray(os.urandom(1 << 20)) * 200
    python = [sys.executable, "-I", "-S", "-c"]
    small = run([*python, "pass"], tmp_path / "log")
    large = run([*python, "b = bytearray(1 << 20) * 120"], tmp_path / "log")
    assert small.peak_bytes < 60e6 < len(held)
    assert 120e6 < large.peak_bytes < 200e6
    busy = run([*python, "import time\nwhile time.process_time() < 0.3: pass"], tmp_path / "log")
    assert busy.cpu_seconds >= 0.3
    assert busy.seconds >= 0.3


def test_commands_that_fail_or_hang_are_told(tmp_path: Path) -> None:
    python = [sys.executable, "-I", "-S", "-c"]
    with pytest.raises(CommandError, match=r"(?s)ended with 3.*so it is"):
        run([*python, "print('so it is'); raise SystemExit(3)"], tmp_path / "log")
    with pytest.raises(KilledError, match="was killed"):
        run([*python, "while True: pass"], tmp_path / "log", timeout=0.3)


def test_the_floor_reads_all_and_leaves_nothing(models: Models, tmp_path: Path) -> None:
    files = [models.base / "model.safetensors"]
    floor = measure_floor(files, 10_000_000, tmp_path)
    assert floor.seconds == floor.read + floor.write > 0
    assert floor.cached == cached_share(files) == 1.0
    assert not list(tmp_path.iterdir())


def test_a_file_can_be_taken_out_of_the_page_cache(tmp_path: Path) -> None:
    if filesystem(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("this filesystem lives in memory")
    file = tmp_path / "data"
    file.write_bytes(os.urandom(1 << 24))
    assert cached_share([file]) == 1.0
    forget([file])
    assert cached_share([file]) == 0.0


def test_ratios_are_of_time_above_start_up_to_the_floor_around_it() -> None:
    def floor(read: float, write: float) -> Floor:
        return Floor(read=read, write=write, sync=1.0, cached=1.0)

    usage = [Usage(seconds=s, cpu_seconds=1.0, peak_bytes=500_000_000, elsewhere=0.0, stolen=0.0) for s in (5.0, 8.0)]
    runs = [(usage[0], floor(1, 1), floor(2, 2), 1.0), (usage[1], floor(1, 0), floor(0, 1), 0.5)]
    found = summary(runs, startup=2.0)
    assert found["ratio"] == {"median": 3.5, "min": 1.0, "max": 6.0}
    assert found["ratio_synced"] == {"median": 1.875, "min": 0.75, "max": 3.0}
    assert found["above_startup"] == {"median": 4.5, "min": 3.0, "max": 6.0}
    assert (found["peak_mb"], found["cached"]) == (500.0, 0.5)


def test_sizes_are_read_as_the_command_line_reads_them() -> None:
    assert [size_in_bytes(text) for text in ("600MB", "1GiB", "5b", "7")] == [600_000_000, 1 << 30, 5, 7]


def test_a_failure_is_kept_without_its_words_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report(tmp_path / "r" / "x.json", "methods", {}, {})

    def fail() -> dict[str, object]:
        raise CommandError(f"{tmp_path}: broken")

    report.add({"method": "ties"}, fail)
    report.add({"method": "linear"}, lambda: {"seconds": {"median": 1.0}})
    text = (tmp_path / "r" / "x.json").read_text()
    assert [entry["method"] for entry in json.loads(text)["results"]] == ["ties", "linear"]
    assert str(tmp_path) not in text
    assert report.failed == 1
    assert "broken" in capsys.readouterr().err


def _result(**more: object) -> dict[str, object]:
    times = {"median": 2.0, "min": 1.0, "max": 3.0}
    entry = {"seconds": times, "startup": times, "above_startup": times, "floor": times, "ratio": times}
    return {**entry, "first": {"seconds": 9.0}, "peak_mb": 700.0, "read_bytes": 10**9, "cached": 1.0, **more}


def test_drawings_and_tables_come_from_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hardware = {
        "processor": "Some <CPU>",
        "processors": 2,
        "memory_gb": 25.0,
        "filesystem": "ext4",
        "date": "2026-01-01",
        "versions": {"torch": "2.13.0"},
        "peer_versions": {"mergekit": "0.1.5"},
    }
    config = {"models": 4, "runs": 3, "shape": {"parameters": 538_800_000}}
    compared = _result(method="ties", bar=2, peer=_result(), faster=21.0)
    failed = {"method": "della", "error": "CommandError"}
    points = [
        _result(method="linear", axis=axis, value=value, models=4, parameters=10**9)
        for axis in ("size", "models", "threads")
        for value in (1, 2)
    ]
    results = tmp_path / "results"
    results.mkdir()
    killed = _result(method="slerp", killed_after=[0.51, 2.0], continued=2, last=1.25)
    own = [compared, _result(method="sce", bar=2), failed]
    found = {"methods": own, "peer": [compared], "scaling": points, "kills": [killed, failed]}
    for name, entries in found.items():
        content = {"hardware": hardware, "config": config, "results": entries}
        (results / f"{name}.json").write_text(json.dumps(content))
    page = tmp_path / "speed.md"
    page.write_text("before\n<!-- bench:start -->\nold\n<!-- bench:end -->\nafter\n")
    chart.draw(results, tmp_path / "images", page)
    for name in ("merge-speed-methods", "merge-speed-peer", "merge-memory-methods", "scaling-time", "scaling-memory"):
        assert ElementTree.parse(tmp_path / "images" / f"{name}.svg").getroot().tag.endswith("svg")
    text = page.read_text()
    assert text.startswith("before\n<!-- bench:start -->")
    assert text.endswith("<!-- bench:end -->\nafter\n")
    assert "old" not in text
    assert "| ties | 2.0 | 2.0 | 2.00 (1.00–3.00) | 2 | 700 | 9.0 | 2.0 | 2.0 | 21.0 x | 700 |" in text
    assert "| della | failed (CommandError) |" in text
    assert "| slerp | 2.0 | 0.5, 2.0 | 1.2 |" in text
    assert "threads: 2" in capsys.readouterr().out
    page.write_text("no markers\n")
    with pytest.raises(ValueError, match="no lines"):
        chart.draw(results, tmp_path / "images", page)


@pytest.mark.slow
def test_kills_are_survived_and_other_bytes_are_found(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(tmp_path)
    found = session.kill("slerp", models, [0.3, 0.95, 0.97])
    assert len(found["killed_after"]) >= 1
    assert found["continued"] <= 3
    assert not session.out.exists()
    hashes = iter(["expected", "other"])
    monkeypatch.setattr("benchmarks.merge.session.check_hashes", lambda out: next(hashes))
    with pytest.raises(WrongResult, match="slerp: after a kill it wrote other bytes"):
        session.kill("slerp", models, [])
    (tmp_path / ".out.left").mkdir()
    monkeypatch.setattr("benchmarks.merge.session.check_hashes", lambda out: "expected")
    with pytest.raises(WrongResult, match=r"slerp: \.out\.left stayed behind"):
        session.kill("slerp", models, [])


@pytest.mark.slow
def test_the_command_measures_a_small_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.merge.scenarios.shape_of", lambda size: SHAPE)
    out = tmp_path / "result.json"
    arguments = ["--size", "0.1", "--models", "2", "--methods", "linear", "--runs", "1", "--threads", "1"]
    assert command.main([*arguments, "--folder", str(tmp_path / "work"), "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    (entry,) = content["results"]
    assert entry["seconds"]["median"] > entry["floor"]["median"]
    assert entry["read_bytes"] > 2 * entry["written_bytes"] * 0.9
    assert entry["check"]["wrong_share"] == 0
    assert str(tmp_path) not in out.read_text()
    assert content["hardware"]["versions"]["merganser"] == merganser.__version__
    assert "linear" in capsys.readouterr().out
    with safe_open(tmp_path / "work/models/0.1B/base/model.safetensors", "pt") as file:
        assert len(file.keys()) == len(SHAPE.tensors)
