"""A merge on a real Ray cluster of two nodes, one of which dies midway."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merganser.engine.merge import merge
from merganser.errors import MergeError, NonFiniteError

pytestmark = pytest.mark.slow
cluster_utils = pytest.importorskip("ray.cluster_utils")

ROWS, COLUMNS, TENSORS = 1024, 2048, 20


class Killer:
    """Kills a node when so many bytes were written."""

    def __init__(self, kill: Any, after: int) -> None:
        self._kill = kill
        self._left = after
        self.killed = False

    def start(self, plan: object, continued: bool) -> None:
        pass

    def advance(self, read: int, written: int, tensors: int) -> None:
        self._left -= written
        if self._left <= 0 and not self.killed:
            self.killed = True
            threading.Thread(target=self._kill).start()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    started = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield started
    started.shutdown()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    for model in ("base", "a", "b"):
        (folder / model).mkdir()
        tensors = {f"t{i}": torch.randn(ROWS, COLUMNS, generator=generator).bfloat16() for i in range(TENSORS)}
        save_file(tensors, folder / model / "model.safetensors")
    return {
        "merge_method": "ties",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name), "parameters": {"density": 0.3}} for name in ("a", "b")],
        "parameters": {"weight": 0.5},
    }


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_same_bytes_though_a_node_dies(cluster: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    local = merge(recipe, tmp_path / "local")
    node = cluster.add_node(num_cpus=1)
    total = local.record["outputs"][0]["bytes"]
    killer = Killer(lambda: cluster.remove_node(node, allow_graceful=False), after=total // 3)
    merge(recipe, tmp_path / "spread", cluster=cluster.address, progress=killer)
    assert killer.killed
    assert weights(tmp_path / "spread") == weights(tmp_path / "local")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "spread"]


def test_statistic_over_the_whole_model(cluster: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    whole = {**recipe, "parameters": {**recipe["parameters"], "trim_over": "model"}}
    merge(whole, tmp_path / "local")
    merge(whole, tmp_path / "spread", cluster=cluster.address)
    assert weights(tmp_path / "spread") == weights(tmp_path / "local")


def test_statistic_over_rows(cluster: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = {
        "merge_method": "arcee_fusion",
        "base_model": recipe["base_model"],
        "models": [{"model": recipe["models"][0]["model"]}],
    }
    merge(rows, tmp_path / "local")
    merge(rows, tmp_path / "spread", cluster=cluster.address)
    assert weights(tmp_path / "spread") == weights(tmp_path / "local")


def test_a_users_error_comes_back(cluster: Any, tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", float("nan"))):
        (tmp_path / name).mkdir()
        save_file({"t": torch.full((4, 4), value)}, tmp_path / name / "model.safetensors")
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1.0}} for name in ("a", "b")]
    with pytest.raises(NonFiniteError, match="tensor 't' holds NaN"):
        merge({"merge_method": "linear", "models": models}, tmp_path / "out", cluster=cluster.address)
    assert not (tmp_path / "out").exists()


def test_no_cluster_there(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="no Ray cluster answers"):
        merge(recipe, tmp_path / "out", cluster="127.0.0.1:1")
