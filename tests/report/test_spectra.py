"""Singular values of task vectors, against a decomposition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merganser.errors import CheckpointError
from merganser.inspection import spectra
from merganser.inspection.spectra import decay, measure_spectra
from tests.cli.tiny import run, state, write
from tests.report.conftest import moved


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (7, 7), (2, 90)])
def test_against_a_decomposition(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(matrix)
    found = decay(matrix)
    assert (found.ranks[0], found.ranks[-1]) == (1, min(shape))
    assert list(found.values) == pytest.approx([float(values[rank - 1] / values[0]) for rank in found.ranks])
    held = (values**2).cumsum(0) / (values**2).sum()
    assert list(found.needed) == [int((held < share).sum()) + 1 for share in (0.5, 0.9, 0.99)]


def test_many_values_are_thinned_out() -> None:
    found = decay(torch.diag(torch.linspace(200, 1, 200, dtype=torch.float64)))
    assert len(found.ranks) <= spectra.POINTS
    assert list(found.ranks[:4]) == [1, 2, 3, 4]
    assert found.ranks[-1] == 200
    assert found.values[1] == pytest.approx(199 / 200)


def test_low_rank_zero_and_not_finite() -> None:
    generator = torch.Generator().manual_seed(2)
    one, two = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((20, 3), (3, 40)))
    assert decay(one @ two).needed[2] <= 3
    for nothing in (torch.zeros(4, 4).double(), torch.full((4, 4), torch.nan).double()):
        assert decay(nothing) == spectra.Decay([], [], [])
    assert list(decay(torch.ones(5, 5).double()).needed) == [1, 1, 1]


def test_which_matrices_are_measured(tmp_path: Path) -> None:
    base = state(0, layers=9, dtype=torch.float32)
    write(tmp_path / "base", base, num_hidden_layers=9)
    for name in ("one", "out"):
        write(tmp_path / name, {key: tensor + 0.1 for key, tensor in base.items()}, num_hidden_layers=9)
    told: list[tuple[int, int]] = []
    found = measure_spectra(
        tmp_path / "out", str(tmp_path / "base"), [str(tmp_path / "one")], progress=lambda a, b: told.append((a, b))
    )
    assert {matrix.layer for matrix in found.matrices} == {0, 4, 8}
    # no norms, no embedding, no head
    assert len(found.matrices) == 3 * 6
    assert all(len(matrix.decays) == 2 and len(matrix.shape) == 2 for matrix in found.matrices)
    assert told == [(i + 1, 18) for i in range(18)]
    # adding a constant moves in one direction
    assert all(list(decay.needed) == [1, 1, 1] for matrix in found.matrices for decay in matrix.decays)


def test_nothing_shared(tmp_path: Path) -> None:
    write(tmp_path / "a", {"w": torch.ones(4, 4)})
    with pytest.raises(CheckpointError, match="shares no matrix in a layer"):
        measure_spectra(tmp_path / "a", str(tmp_path / "a"), [str(tmp_path / "a")])


def test_in_the_report(out: Path) -> None:
    text = run("report", "out", "--text", "--spectra").out
    section = text.partition("Singular values of task vectors\n")[2].partition("\nRecipe\n")[0]
    base, one = state(0, dtype=torch.float32), moved(1, 0.01)
    name = "model.layers.1.mlp.up_proj.weight"
    expected = decay(one[name].double() - base[name].double()).needed[1]
    rows = [line.split() for line in section.splitlines()]
    (row,) = [row for row in rows if row[0] == name and len(row) == 6]
    assert row[1:3] == ["8", str(expected)]
    assert "every matrix of 2 layers" in section
    assert "Singular values" not in run("report", "out", "--text").out
