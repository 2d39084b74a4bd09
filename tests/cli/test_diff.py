"""`merganser diff`: distances against a plain calculation, and everything that cannot be compared."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser import diff
from merganser.errors import CheckpointError
from merganser.inspection import difference, side_by_side
from tests.cli.tiny import run, state, write


def test_identical(models: Path) -> None:
    found = run("diff", "a", "a")
    assert (found.code, found.err) == (0, "")
    assert found.out == "identical: 19 tensors, 1,576 parameters, equal byte for byte\n"
    assert run("diff", "a", "a", "--json").json["identical"] is True


def test_against_a_plain_calculation(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "BLOCK", 7)
    found = diff("a", "b")
    a, b = ({name: tensor.double() for name, tensor in state(seed).items()} for seed in (0, 1))
    assert {tensor.name for tensor in found.tensors} == set(a)
    for tensor in found.tensors:
        check(tensor.distance, a[tensor.name], b[tensor.name])
    for group in found.groups:
        members = [t.name for t in found.tensors if (t.layer, t.role) == (group.layer, group.role)]
        assert (group.tensors, group.parameters) == (len(members), sum(a[name].numel() for name in members))
        check(group.distance, *(torch.cat([each[name].flatten() for name in members]) for each in (a, b)))
    check(found.total, *(torch.cat([each[name].flatten() for name in a]) for each in (a, b)))
    assert len(found.groups) == 3 * 2 + 3


def check(distance: difference.Distance, a: torch.Tensor, b: torch.Tensor) -> None:
    a, b = a.flatten(), b.flatten()
    assert distance.relative_change == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-12)
    assert distance.cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-12)
    assert distance.largest == float((a - b).abs().max())
    assert distance.identical is False


def test_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a = {"model.norm.weight": torch.ones(4)}
    a |= {f"model.layers.{i}.{name}.weight": torch.ones(2, 2) for i in range(2) for name in ("mlp.up_proj", "attn.q")}
    b = {name: tensor.clone() for name, tensor in a.items()}
    b["model.layers.1.mlp.up_proj.weight"][0, 0] = 2.0
    b["model.norm.weight"] *= -0.5
    write(tmp_path / "a", a)
    write(tmp_path / "b", b)
    found = run("diff", "a", "b")
    assert found.err == ""
    assert found.out == (
        "5 tensors, 20 parameters compared: 2 differ, 3 are equal byte for byte\n"
        "  relative change |A - B| / |A|  0.707\n"
        "  cosine of A and B              0.750000\n"
        "  largest |A - B| of an element  1.5\n"
        "relative change by layer and role\n"
        "  layer  attention  mlp\n"
        "      0          =    =\n"
        "      1          =  0.5\n"
        "relative change outside the layers\n"
        "  norm  1.5\n"
        "most changed\n"
        "  tensor                             change     cosine  largest  dtype\n"
        "  model.norm.weight                     1.5  -1.000000      1.5  float32\n"
        "  model.layers.1.mlp.up_proj.weight     0.5   0.944911        1  float32\n"
        "25 % of the elements differ by more than 0.002. If A is the base of B: DARE's authors found the changes of "
        "fine-tuned models within 0.002, and dropping much less effective where they reach 0.03 (arXiv:2311.03099): "
        "compare the merge with one by task_arithmetic before trusting a sparsifying method\n"
    )
    every = run("diff", "a", "b", "--tensors").out
    assert "  model.layers.0.attn.q.weight            =          =        =  float32\n" in every


def test_missing_extra_and_misshapen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", {"w": torch.ones(2), "x": torch.ones(2), "y": torch.ones(2, 3)})
    write(tmp_path / "b", {"w": torch.ones(2), "y": torch.ones(3, 2), "z": torch.ones(2)})
    found = run("diff", "a", "b")
    assert found.code == 0
    assert found.out.endswith("only in A: x\nonly in B: z\nother shape: y is [2, 3] in A, [3, 2] in B\n")
    assert found.out.startswith("1 tensor, 2 parameters compared: 0 differ, 1 are equal")
    assert not diff("a", "b").identical


def test_nothing_to_compare(tmp_path: Path) -> None:
    write(tmp_path / "a", {"w": torch.ones(2), "x": torch.ones(2)})
    write(tmp_path / "b", {"w": torch.ones(3), "y": torch.ones(2)})
    with pytest.raises(CheckpointError, match="have no tensor of the same name and shape"):
        diff(tmp_path / "a", tmp_path / "b")


def test_a_tied_head_is_its_embedding(tmp_path: Path) -> None:
    tied = state(0, tied=True)
    write(tmp_path / "tied", tied, tie_word_embeddings=True)
    write(tmp_path / "free", tied | {"lm_head.weight": tied["model.embed_tokens.weight"].clone()})
    for pair in (("tied", "free"), ("free", "tied")):
        found = diff(*(tmp_path / name for name in pair))
        assert found.identical
        assert len(found.tensors) == 19


def test_dtypes_are_compared_by_value(tmp_path: Path) -> None:
    narrow = state(0)
    write(tmp_path / "a", narrow)
    write(tmp_path / "b", {name: tensor.float() for name, tensor in narrow.items()})
    found = diff(tmp_path / "a", tmp_path / "b")
    assert not found.identical
    assert (found.total.relative_change, found.total.largest) == (0.0, 0.0)
    assert found.total.cosine == pytest.approx(1.0, abs=1e-15)
    assert "bfloat16 and float32" in run("diff", tmp_path / "a", tmp_path / "b").out


def test_what_are_no_numbers(tmp_path: Path) -> None:
    a = {"w": torch.ones(2), "ids": torch.arange(4), "mask": torch.tensor([True]), "n": torch.arange(3)}
    b = a | {"ids": torch.arange(1, 5), "n": torch.arange(3, dtype=torch.int32)}
    write(tmp_path / "a", a)
    write(tmp_path / "b", b)
    found = diff(tmp_path / "a", tmp_path / "b")
    by_name = {tensor.name: tensor.distance for tensor in found.tensors}
    assert {name for name, distance in by_name.items() if distance.identical} == {"w", "mask"}
    assert by_name["ids"] == by_name["n"] == difference.Distance(False, None, None, None)
    # numbers still have a total
    assert found.total == difference.Distance(False, 0.0, pytest.approx(1.0), 0.0)


def test_zero_empty_and_not_finite(tmp_path: Path) -> None:
    nan = torch.tensor([1.0, torch.nan])
    a = {"zero": torch.zeros(2), "empty": torch.zeros(0), "nan": nan, "inf": torch.ones(2), "same": torch.zeros(2)}
    b = a | {"zero": torch.ones(2), "inf": torch.tensor([1.0, torch.inf])}
    write(tmp_path / "a", a)
    write(tmp_path / "b", b)
    found = {tensor.name: tensor.distance for tensor in diff(tmp_path / "a", tmp_path / "b").tensors}
    assert found["zero"] == difference.Distance(False, None, None, 1.0)
    assert found["empty"] == difference.Distance(True, 0.0, None, 0.0)
    assert found["same"] == difference.Distance(True, 0.0, None, 0.0)
    assert found["nan"] == difference.Distance(True, None, None, None)
    assert found["inf"] == difference.Distance(False, None, None, None)
    shown = run("diff", tmp_path / "a", tmp_path / "b")
    assert shown.code == 0
    rows = [line.split() for line in shown.out.splitlines()]
    assert ["inf", "-", "-", "-", "float32"] in rows
    assert ["zero", "-", "-", "1", "float32"] in rows
    assert run("diff", tmp_path / "a", tmp_path / "b", "--json").json["total"]["cosine"] is None


def test_fp8_is_compared_as_bytes(tmp_path: Path) -> None:
    weights = torch.ones(4, 4)
    write(tmp_path / "a", {"w": weights.to(torch.float8_e4m3fn), "v": weights.to(torch.float8_e4m3fn)})
    write(tmp_path / "b", {"w": weights.to(torch.float8_e4m3fn), "v": (2 * weights).to(torch.float8_e4m3fn)})
    found = {t.name: t.distance.identical for t in diff(tmp_path / "a", tmp_path / "b").tensors}
    assert found == {"w": True, "v": False}


def test_progress_tells_every_byte(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "BLOCK", 50)
    told: list[tuple[int, int]] = []
    diff("a", "b", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (2 * 2 * 1576, 2 * 2 * 1576)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    st.floats(-8, 8, width=16).filter(lambda factor: factor != 1),
)
def test_a_multiple_has_cosine_one(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], factor: float
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    a = torch.tensor(values, dtype=torch.float64)
    write(folder / "a", {"w": a})
    write(folder / "b", {"w": a * factor})
    (tensor,) = diff(folder / "a", folder / "b").tensors
    if a.any() and a.square().sum() > 1e-300:
        assert tensor.distance.relative_change == pytest.approx(abs(factor - 1), rel=1e-9)
    if tensor.distance.cosine is not None and abs(factor) > 1e-3 and a.abs().max() > 1e-100:
        assert tensor.distance.cosine == pytest.approx(math.copysign(1, factor), abs=1e-9)


def test_a_changed_dtype_is_no_changed_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = {name: tensor.bfloat16() for name, tensor in state(0).items()}
    write(tmp_path / "a", small)
    wide = {name: tensor.float() for name, tensor in small.items()}
    write(tmp_path / "wide", wide)
    found = run("diff", "a", "wide").out
    assert (
        "compared: 0 differ, 19 hold equal values in another dtype (bfloat16 and float32), 0 are equal byte for byte\n"
        in found
    )
    assert "most changed" not in found
    wide["model.norm.weight"] = wide["model.norm.weight"] + 1
    write(tmp_path / "other", wide)
    found = run("diff", "a", "other").out
    assert (
        "compared: 1 differ, 18 hold equal values in another dtype (bfloat16 and float32), 0 are equal byte for byte\n"
        in found
    )
    assert [line.split()[0] for line in found.partition("most changed\n")[2].splitlines()] == [
        "tensor",
        "model.norm.weight",
    ]
