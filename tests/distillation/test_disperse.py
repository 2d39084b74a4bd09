"""Clusters of records: their points, their files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merganser.distillation import disperse
from merganser.distillation.clusters import k_means
from merganser.errors import DataError, MergeError, OutputError
from tests.cli.tiny import run
from tests.evaluation.tiny import load, make_model


def test_clusters_of_directions() -> None:
    torch.manual_seed(0)
    centres = torch.eye(4)[:3] * 9
    truth = torch.tensor([0, 1, 2] * 20)
    # lengths differ, directions do not
    points = centres[truth] * (0.5 + torch.rand(60, 1)) + 0.3 * torch.randn(60, 4)
    for seed in range(4):
        assert torch.equal(k_means(points, 3, seed), truth)


@pytest.mark.parametrize("points", [torch.ones(5, 2), torch.tensor([[1.0, 0]] * 4 + [[0, 1.0]])])
def test_no_cluster_is_empty(points: torch.Tensor) -> None:
    for clusters in (1, 2, 4, 5):
        found = k_means(points, clusters)
        assert sorted(set(found.tolist())) == list(range(clusters))
        assert int(found[0]) == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "embedder", 1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    records: list[dict[str, Any]] = []
    for i in range(4):
        records.append({"text": "the cat sat on the mat " * (i + 1)})
        records.append({"prompt": "def x", "completion": " = 1 ; return 1 def" * (i + 1)})
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def test_every_record_is_in_one_file(model: Path, data: Path, tmp_path: Path) -> None:
    done = run("fuse", "disperse", model, "--data", data, "--out", tmp_path / "out", "--clusters", "2")
    assert done.code == 0, done.err
    assert done.out == f"{tmp_path}/out/cluster-1.jsonl: 4 records\n{tmp_path}/out/cluster-2.jsonl: 4 records\n"
    given = [json.loads(line) for line in data.read_text().splitlines()]
    for number in range(2):
        lines = (tmp_path / "out" / f"cluster-{number + 1}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == given[number::2]
    about = json.loads((tmp_path / "out" / "clusters.json").read_text())
    assert about["clusters"] == {"cluster-1.jsonl": 4, "cluster-2.jsonl": 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out"]


def test_embeddings_are_means_of_hidden_states(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merganser.distillation import disperse as module

    seen: list[torch.Tensor] = []
    home = __import__("merganser.distillation.disperse", fromlist=["x"])
    monkeypatch.setattr(home, "k_means", lambda points, *own: seen.append(points) or k_means(points, *own))
    module(model, [data], tmp_path / "out", clusters=2, length=16)
    network, tokenizer = load(model)
    for row, line in enumerate(data.read_text().splitlines()):
        ids = tokenizer("".join(json.loads(line).values()))["input_ids"][:16]
        with torch.no_grad():
            states = network(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(seen[0][row], states.double().mean(0), rtol=1e-5, atol=1e-5)


def test_what_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    def refused(kind: type[MergeError], match: str, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            disperse(model, [data], tmp_path / "out", **options)
        assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]

    refused(DataError, "clusters: must be at least 1, found 0", clusters=0)
    refused(DataError, "clusters: 9 are asked for, and the data have 8 records", clusters=9)
    refused(DataError, "length: 99 tokens, but the model sees at most 64", length=99)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputError, match="out: exists"):
        disperse(model, [data], tmp_path / "out")
    none = run("fuse", "disperse", model, "--data", data)
    assert (none.code, none.err) == (2, "error: --out is missing: give the folder to write\n")
