import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.merge.checkpoints import Shape
from benchmarks.spectral import peer, whole
from benchmarks.spectral.__main__ import main
from benchmarks.spectral.cases import METHODS, Case, best, extrapolated
from benchmarks.spectral.references import adam

HEAD = """import torch
from fusion_bench.utils import timeit_context
from fusion_bench.utils.type import StateDictType

print("loading")

def each(task_vectors, function):
    with timeit_context("merging"):
        print("merging")
        return {key: function([vector[key] for vector in task_vectors]) for key in task_vectors[0]}
"""

ISO = """
def iso(vectors):
    u, s, vh = torch.linalg.svd(sum(vectors), full_matrices=False)
    return s.mean() * u @ vh

def iso_c(task_vectors, accelerator="cuda"):
    return each(task_vectors, iso)

def iso_cts(task_vectors, common_space_fraction, accelerator="cuda"):
    return each(task_vectors, iso)
"""

TSV = """
def compute_and_sum_svd_mem_reduction(task_vectors, exclude_keys=None, accelerator="cuda"):
    return each(task_vectors, sum)
"""

WUDI = """
from fusion_bench import BaseAlgorithm, BaseModelPool, auto_register_config
from fusion_bench.mixins import LightningFabricMixin
from fusion_bench.utils.state_dict_arithmetic import state_dict_add, state_dict_sub

def wudi_merging(task_vectors, accelerator="cuda", iter_num=300):
    return each(task_vectors, lambda vectors: torch.nn.Parameter(sum(vectors) + 0 * iter_num))

@auto_register_config
class WUDIMerging(LightningFabricMixin, BaseAlgorithm):
    pass
"""


SVC = """
def subspace_consistency_spectral_calibration_accelerated(
    base_weight, task_weights, merged_weight, alpha=1.0, accelerator=None
):
    return merged_weight / alpha
"""


@pytest.fixture
def place(tmp_path):
    """Make a package with the files, names and imports of the other."""
    folder = tmp_path / "peer"
    for name, text in zip(peer._FILES, (ISO, TSV, WUDI, SVC), strict=True):
        file = folder / peer._FILES[name]
        file.parent.mkdir(parents=True)
        file.write_text(HEAD + text)
    info = folder / f"fusion_bench-{peer.VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fusion-bench\nVersion: {peer.VERSION}\n")
    return folder


def arguments(place, tmp_path, *more):
    out, folder = tmp_path / "out" / "spectral.json", tmp_path / "kept"
    given = ["--peer-folder", place, "--out", out, "--folder", folder, "--shapes", "24x30", "--models", "3"]
    return out, [str(argument) for argument in (*given, "--runs", "1", "--steps", "2", *more)]


@pytest.mark.parametrize("threads", [1, 2])
def test_measures_both_sides_and_says_how_far_they_are_off(place, tmp_path, capsys, threads):
    before = torch.get_num_threads()
    out, given = arguments(place, tmp_path, "--threads", str(threads))
    try:
        assert main(given) == 0
    finally:
        torch.set_num_threads(before)
    found = json.loads(out.read_text())
    assert found["threads"] == threads
    assert found["hardware"]["fusion_bench"] == peer.VERSION
    assert [case["method"] for case in found["cases"]] == list(METHODS)
    for case in found["cases"]:
        assert case["merganser"]["error"] < 1e-4
        assert {"ratio_of_seconds", "ratio_of_cpu_seconds", "load_before"} <= case.keys()
    by_method = {case["method"]: case for case in found["cases"]}
    assert by_method["iso_c"]["fusion_bench"]["error"] < 1e-5
    # the stand-in takes something else for it
    assert by_method["tsv_m"]["fusion_bench"]["error"] > 0.1
    assert by_method["svc"]["fusion_bench"]["error"] > 0.1
    assert by_method["wudi"]["filter"]["seconds"] > 0
    said = capsys.readouterr().out
    assert said.count("24 x 30, 3 models") == len(METHODS)
    assert "merging" not in said
    assert "fusion_bench" not in sys.modules


def test_keeps_references(place, tmp_path):
    out, given = arguments(place, tmp_path, "--methods", "iso_c")
    assert main(given) == 0
    (kept,) = (tmp_path / "kept" / "spectral").iterdir()
    torch.save(torch.ones(24, 30, dtype=torch.float64), kept)
    assert main(given) == 0
    assert json.loads(out.read_text())["cases"][0]["merganser"]["error"] > 0.1


def test_says_where_the_other_is_missing(place, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(peer.VARIABLE, raising=False)
    assert main(["--methods", "iso_c"]) == 2
    assert f"pip install --no-deps --target DIR fusion-bench=={peer.VERSION}" in capsys.readouterr().err
    monkeypatch.setenv(peer.VARIABLE, str(tmp_path))
    assert main(["--methods", "iso_c"]) == 2
    assert "FusionBench is not here" in capsys.readouterr().err
    metadata = next(place.glob("*.dist-info")) / "METADATA"
    metadata.write_text(metadata.read_text().replace(peer.VERSION, "0.1"))
    assert main(["--peer-folder", str(place)]) == 2
    assert "FusionBench is 0.1" in capsys.readouterr().err


def test_steps_are_extrapolated():
    one, five = {"seconds": 10.0, "cpu_seconds": 20.0}, {"seconds": 18.0, "cpu_seconds": 40.0}
    assert extrapolated(one, five, 5) == {"seconds": 10 + 2 * 299, "cpu_seconds": 20 + 5 * 299}
    runs = [({"seconds": 2.0}, torch.zeros(1)), ({"seconds": 1.0}, torch.ones(1))]
    assert best(runs)[0] == {"seconds": 1.0, "all_seconds": [2.0, 1.0]}


def test_the_reference_of_wudi_goes_down_its_loss():
    vectors = [vector.double() for vector in Case("wudi", (20, 10), 3).vectors()]

    def loss(merged):
        return sum(((merged - vector) @ vector.T).square().sum() / vector.square().sum() for vector in vectors)

    start = sum(vectors).requires_grad_()
    optimizer = torch.optim.Adam([start], lr=1e-5)
    for _ in range(3):
        optimizer.zero_grad()
        loss(start).backward()
        optimizer.step()
    found = adam([vector.float() for vector in vectors], 3)
    torch.testing.assert_close(found, start.detach(), rtol=0, atol=1e-9)
    assert loss(found) < loss(sum(vectors))


def test_models_of_whole_merges_differ_by_as_much_as_declared(tmp_path: Path) -> None:
    shape = Shape(64, 96, 2, 50, heads=2)
    models = whole.make_models(tmp_path, shape, 1)
    base, expert = (load_file(models / name / "model.safetensors") for name in ("base", "expert-0"))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        change = (expert[name].float() - base[name].float()).norm() / base[name].float().norm()
        # rounding to bfloat16 adds to it
        assert whole.RELATIVE <= float(change) < 2 * whole.RELATIVE
    assert torch.equal(expert["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_every_matrix_of_the_layers_is_counted() -> None:
    # a layer has two square matrices, keys and values, and three of the MLP
    assert whole.matrices(Shape(64, 96, 2, 50, heads=4)) == {(64, 64): 4, (32, 64): 4, (96, 64): 4, (64, 96): 2}
