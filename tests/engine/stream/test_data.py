"""Statistics from data, read a block at a time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merganser.checkpoint import Reader
from merganser.checkpoint.formats.safetensors import read_header
from merganser.engine.plan.tensor import SumFromData
from merganser.engine.stream.data import block_data


def _read(folder: Path, tensors: dict[str, Tensor], elementwise: bool, range_: tuple[int, int], run: Any) -> Tensor:
    save_file(tensors, folder / "sums.safetensors")
    infos = {info.name: info for info in read_header(folder / "sums.safetensors")[0]}
    planned: Any = SimpleNamespace(data={"own": (SumFromData(infos["sum"], infos["count"], elementwise),)})
    with Reader() as reader:
        return block_data(planned, run, range_, reader)["own"][0]


def _run(scope: str, shape: tuple[int, ...], own: tuple[int, ...], *, turned: bool = False) -> Any:
    kernels = SimpleNamespace(method=SimpleNamespace(scope=scope), device=torch.device("cpu"), compute=torch.float32)
    size = shape[-2] * shape[-1]
    return SimpleNamespace(
        kernels=kernels, shape=shape, turned=turned, own_shape=lambda range_: own, matrix=lambda start: start // size
    )


def test_a_block_of_elements_is_read_from_its_place(tmp_path: Path) -> None:
    total = torch.arange(24.0).view(4, 6)
    tensors = {"sum": total, "count": torch.tensor(2)}
    found = _read(tmp_path, tensors, True, (6, 18), _run("row", (4, 6), (2, 6)))
    assert torch.equal(found, total[1:3] / 2)
    assert torch.equal(_read(tmp_path, tensors, True, (5, 9), _run("element", (4, 6), (4,))), total.view(-1)[5:9] / 2)


@pytest.mark.parametrize("turned", [False, True])
def test_a_matrix_gets_its_own_the_right_way_round(turned: bool, tmp_path: Path) -> None:
    total = torch.arange(48.0).view(2, 4, 6)
    tensors = {"sum": total, "count": torch.tensor(1)}
    found = _read(tmp_path, tensors, True, (24, 48), _run("matrix", (2, 4, 6), (4, 6), turned=turned))
    assert torch.equal(found, total[1].T if turned else total[1])
    # sums over the tokens of each expert, which are divided by their number, and stay 0 without any
    grams = {"sum": torch.stack([torch.zeros(6, 6), torch.ones(6, 6)]), "count": torch.tensor([0, 4])}
    run = _run("matrix", (2, 4, 6), (4, 6), turned=turned)
    assert torch.equal(_read(tmp_path, grams, False, (24, 48), run), torch.full((6, 6), 0.25))
    assert torch.equal(_read(tmp_path, grams, False, (0, 24), run), torch.zeros(6, 6))
