"""Merge DTensors on two ranks and compare with the merge of whole tensors; run as a program by test_state_dicts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from merganser import Average, merge_state_dicts
from merganser.errors import CheckpointError

SHAPES = {"weight": (5, 6), "bias": (3,), "scale": (4,)}
PLACEMENTS = {"weight": Shard(0), "bias": Shard(0), "scale": Replicate()}
# local shards, gathered for a statistic, gathered for random draws, gathered as a matrix
CASES = [
    ("linear", False, {"weight": [0.3, 0.7]}),
    ("ties", True, {"weight": 1.0, "density": 0.5}),
    ("dare_linear", True, {"weight": 1.0, "density": 0.5}),
    ("iso_c", True, {}),
]


def rank(number: int, folder: str) -> None:
    store = distributed.FileStore(str(Path(folder) / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(1)
    states = [{name: torch.randn(shape) for name, shape in SHAPES.items()} for _ in range(3)]
    sharded = [
        {name: distribute_tensor(tensor, mesh, [PLACEMENTS[name]]) for name, tensor in state.items()}
        for state in states
    ]
    for method, with_base, parameters in CASES:
        whole = merge_state_dicts(method, states[1:], base=states[0] if with_base else None, **parameters)
        merged = merge_state_dicts(method, sharded[1:], base=sharded[0] if with_base else None, **parameters)
        compare(method, merged, whole)
    average = Average()
    for state in sharded:
        average.update(state)
    compare("average", average.state_dict(), merge_state_dicts("linear", states, weight=1.0))
    for other, message in [
        (states[1], "some models have a DTensor"),
        ({n: t.redistribute(mesh, [Replicate()]) for n, t in sharded[1].items()}, "sharded differently"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            merge_state_dicts("linear", [sharded[0], other], weight=1.0)
    distributed.destroy_process_group()


def compare(what: str, merged: dict, whole: dict) -> None:
    assert list(merged) == list(whole)
    for name, tensor in merged.items():
        assert tensor.placements == (PLACEMENTS[name],), what
        assert torch.equal(tensor.full_tensor(), whole[name]), (what, name)


if __name__ == "__main__":
    torch.multiprocessing.start_processes(rank, (sys.argv[1],), nprocs=2, start_method="fork")
