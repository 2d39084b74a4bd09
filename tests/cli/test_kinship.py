"""`merganser inspect --base`: how models of one base are related, against a plain calculation, and what is said of it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from merganser import diff, kinship
from merganser.errors import CheckpointError, NotFoundError
from merganser.inspection import side_by_side
from merganser.inspection.findings import difference_findings, kinship_findings
from merganser.inspection.task_vectors import Kin, mean_of_pairs
from tests.cli.tiny import run, state, write

Tensors = dict[str, torch.Tensor]


def near(base: Tensors, seed: int, size: float) -> Tensors:
    """A model that moved from the base by noise."""
    generator = torch.Generator().manual_seed(seed)
    return {name: t + size * torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in base.items()}


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, and three models that moved from it by less than DARE's range."""
    base = state(0, dtype=torch.float32)
    write(tmp_path / "base", base)
    for seed, name in enumerate(("one", "two", "three"), 1):
        write(tmp_path / name, near(base, seed, 2e-4 * seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flat(folder: str, names: list[str]) -> np.ndarray:
    from safetensors.torch import load_file

    tensors = load_file(Path(folder) / "model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in names]).numpy()


def check(kin: Kin, base: np.ndarray, models: list[np.ndarray]) -> None:
    deltas = [model - base for model in models]
    assert kin.parameters == len(base)
    for i, delta in enumerate(deltas):
        assert kin.norm[i] == pytest.approx(np.linalg.norm(delta), rel=1e-12)
        assert kin.change[i] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(base), rel=1e-12)
        assert kin.base_cosine[i] == pytest.approx(cosine(base, models[i]), abs=1e-12)
        assert kin.changed[i] == np.mean(delta != 0)
        assert kin.far[i] == np.mean(np.abs(delta) > 0.002)
        assert kin.largest[i] == np.abs(delta).max()
    for i, j in itertools.product(range(len(models)), repeat=2):
        a, b = deltas[i], deltas[j]
        assert kin.cosine[i][j] == pytest.approx(cosine(a, b), abs=1e-12)
        assert kin.weight_cosine[i][j] == pytest.approx(cosine(models[i], models[j]), abs=1e-12)
        assert kin.correlation[i][j] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-10)
        assert kin.distance[i][j] == pytest.approx(np.linalg.norm(a - b), rel=1e-9, abs=1e-9)
        both = (a != 0) & (b != 0)
        assert kin.sign_conflict[i][j] == pytest.approx(np.mean((a * b)[both] < 0), abs=1e-15)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_against_a_plain_calculation(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "BLOCK", 7)
    models = ["one", "two", "three"]
    found = kinship(models, "base")
    everything = [tensor.name for tensor in found.tensors]
    assert set(everything) == set(state(0))
    check(found.total, flat("base", everything), [flat(model, everything) for model in models])
    wide = [name for name in everything if "norm" not in name]
    check(found.matrices, flat("base", wide), [flat(model, wide) for model in models])
    for tensor in found.tensors:
        check(tensor.kin, flat("base", [tensor.name]), [flat(model, [tensor.name]) for model in models])
    for group in found.groups:
        members = [t.name for t in found.tensors if (t.layer, t.role) == (group.layer, group.role)]
        assert group.kin.tensors == len(members)
        check(group.kin, flat("base", members), [flat(model, members) for model in models])
    assert len(found.groups) == 3 * 2 + 3
    assert found.left_out == []
    assert found.same == []


def test_blocks_do_not_matter(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kinship(["one", "two"], "base").total
    monkeypatch.setattr(side_by_side, "BLOCK", 5)
    cut = kinship(["one", "two"], "base").total
    assert whole.changed == cut.changed
    assert whole.sign_conflict == cut.sign_conflict
    assert whole.cosine[0][1] == pytest.approx(cut.cosine[0][1], rel=1e-12)


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_how_much_of_a_task_vector_is_rounding(saved: torch.dtype, tmp_path: Path) -> None:
    """Rounding is that of the values, also where bfloat16 was saved as float32; then it is told as what it is."""
    base = {name: t.float() for name, t in state(0, width=64, vocab=256).items()}
    moved = near(base, 1, 0.01)
    write(tmp_path / "base", base)
    write(tmp_path / "one", {name: t.to(torch.bfloat16).to(saved) for name, t in moved.items()})
    found = kinship([tmp_path / "one"], tmp_path / "base").total
    noise = sum(float((t.bfloat16().double() - t.double()).square().sum()) for t in moved.values()) ** 0.5
    assert found.rounding[0] == pytest.approx(noise / found.norm[0], rel=0.02)
    assert 0.1 < found.rounding[0] < 0.5


def test_a_tensor_that_was_not_trained_adds_no_rounding(tmp_path: Path) -> None:
    base = state(0, dtype=torch.float32)
    moved = near(base, 1, 0.01)
    write(tmp_path / "base", base)
    one = {name: moved[name] if "mlp" in name else t for name, t in base.items()}
    write(tmp_path / "one", one)
    found = kinship([tmp_path / "one"], tmp_path / "base")
    parts = [tensor.kin for tensor in found.tensors if "mlp" in (tensor.name or "")]
    noise = sum((kin.rounding[0] or 0) ** 2 * kin.norm[0] ** 2 for kin in parts) ** 0.5
    assert found.total.rounding[0] == pytest.approx(noise / found.total.norm[0])


def test_a_copy_has_no_task_vector_to_be_rounded(tmp_path: Path) -> None:
    write(tmp_path / "base", state(0))
    write(tmp_path / "one", state(0))
    assert kinship([tmp_path / "one"], tmp_path / "base").total.rounding == [None]


def test_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.attn.q.weight"]
    base = {name: torch.full((2, 2), 1.0) for name in names} | {"lm_head.weight": torch.ones(2, 2)}
    one, two = ({name: tensor.clone() for name, tensor in base.items()} for _ in range(2))
    one[names[1]] = torch.tensor([[1.5, 1.0], [1.0, 1.0]])
    two[names[1]] = torch.tensor([[0.5, 1.5], [1.0, 1.0]])
    two[names[2]] = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    del two["lm_head.weight"]
    write(tmp_path / "base", base)
    write(tmp_path / "one", one)
    write(tmp_path / "two", two)
    found = run("inspect", "one", "two", "--base", "base")
    assert (found.code, found.err) == (0, "")
    assert found.out == (
        "2 models · base base · 3 tensors, 12 parameters\n"
        "  model  change  rounding    cosine  changed  beyond 0.002  largest\n"
        "      1   0.144      0.9%  0.991314     8.3%          8.3%      0.5  one\n"
        "      2   0.354      0.6%  0.953206    25.0%         25.0%        1  two\n"
        "cosine of task vectors\n"
        "  model        1        2\n"
        "      1   1.0000  -0.4082\n"
        "      2  -0.4082   1.0000\n"
        "correlation of task vectors (Pearson)\n"
        "  model        1        2\n"
        "      1   1.0000  -0.5119\n"
        "      2  -0.5119   1.0000\n"
        "distance between models (Euclidean)\n"
        "  model    1    2\n"
        "      1    0  1.5\n"
        "      2  1.5    0\n"
        "sign conflict: share of the elements that both changed, changed in opposite directions\n"
        "  model       1       2\n"
        "      1    0.0%  100.0%\n"
        "      2  100.0%    0.0%\n"
        "mean of pairs: cosine -0.408, correlation -0.512, distance 1.5\n"
        "mean cosine by layer and role\n"
        "  layer  attention     mlp\n"
        "      0             -0.707\n"
        "      1          -\n"
        "mean cosine outside the layers\n"
        "  norm  -\n"
        "not compared\n"
        "  lm_head.weight  missing in two\n"
        "in words\n"
        "  25 % of the elements of model 2 changed by more than 0.002. "
        "DARE's authors found the changes of fine-tuned models within 0.002, and dropping much less effective where they "
        "reach 0.03 (arXiv:2311.03099): compare the merge with one by task_arithmetic before trusting a sparsifying method\n"
    )


def test_words_for_a_healthy_family(family: Path) -> None:
    assert kinship_findings(kinship(["one", "two", "three"], "base")) == []
    assert "in words" not in run("inspect", "one", "two", "--base", "base").out


def test_copies(family: Path) -> None:
    base = state(0, dtype=torch.float32)
    write(family / "again", base)
    write(family / "uno", near(base, 1, 2e-4))
    found = kinship(["one", "again", "uno", "two"], "base")
    assert found.same == [[0, 2], [1, 3]]
    assert [(f.kind, list(f.models), f.text) for f in kinship_findings(found)] == [
        ("copy", [0, 2], "model 2 is a copy of the base: every value that was compared is equal"),
        ("copy", [1, 3], "model 3 is a copy of model 1: every value that was compared is equal"),
    ]
    # one value apart is not a copy
    base["model.norm.weight"][3] += 1e-6
    write(family / "again", base)
    assert kinship(["again"], "base").same == []


def test_nearly_the_same(family: Path) -> None:
    one = near(state(0, dtype=torch.float32), 1, 2e-4)
    write(family / "rounded", near(one, 9, 1e-5))
    (finding,) = kinship_findings(kinship(["one", "rounded", "two"], "base"))
    assert (finding.kind, list(finding.models)) == ("nearly the same", [1, 2])
    assert finding.text.startswith("models 1 and 2 are nearly the same: they are 4.8 % of a task vector apart")


def test_no_shared_base(family: Path) -> None:
    # norms are alike in all models, and may be all that is
    base, stranger = (state(seed, dtype=torch.float32) for seed in (0, 7))
    for tensors in (base, stranger):
        tensors.update({key: torch.full((8,), 100.0) for key in tensors if "norm" in key})
    write(family / "base", base)
    write(family / "stranger", stranger)
    write(family / "friend", near(stranger, 8, 1e-4))
    write(family / "one", near(base, 1, 1e-4))
    found = kinship(["stranger", "one", "friend"], "base")
    assert found.total.base_cosine[0] is not None
    assert found.total.base_cosine[0] > 0.9
    texts = {tuple(finding.models): finding.text for finding in kinship_findings(found)}
    assert texts[1,].startswith("model 1 seems to share no base with the others: the cosine of its weight matrices")
    assert texts[1, 3].startswith("models 1 and 3 may share another base: the cosine of their weight matrices is 1")
    assert set(texts) == {(1,), (3,), (1, 3)}
    (said,) = difference_findings(diff("base", "stranger"))
    assert said.text.startswith("A and B seem to share no base: the cosine of their weight matrices is ")
    assert run("diff", "base", "stranger").out.endswith(said.text + "\n")
    assert run("diff", "base", "stranger", "--json").json["findings"][0]["kind"] == "no shared base"


def test_large_deltas(family: Path) -> None:
    write(family / "far", near(state(0, dtype=torch.float32), 4, 0.02))
    (finding,) = kinship_findings(kinship(["one", "far"], "base"))
    assert (finding.kind, list(finding.models)) == ("large deltas", [2])
    assert finding.text.startswith("92 % of the elements of model 2 changed by more than 0.002. DARE's authors found")
    (said,) = difference_findings(diff("base", "far"))
    assert said.text.startswith("92 % of the elements differ by more than 0.002. If A is the base of B: DARE's")
    assert difference_findings(diff("base", "one")) == []
    assert run("diff", "base", "one").out.splitlines()[-1].startswith("  model.")


def test_dtypes(family: Path) -> None:
    write(family / "half", {name: t.bfloat16() for name, t in near(state(0, dtype=torch.float32), 1, 2e-4).items()})
    (finding,) = [f for f in kinship_findings(kinship(["one", "half"], "base")) if f.kind == "mixed dtypes"]
    assert finding.text == "model 2 is bfloat16, the base float32: what rounding moved counts as its task vector"
    write(family / "wide", {name: tensor.double() for name, tensor in state(0, dtype=torch.float32).items()})
    (said,) = difference_findings(diff("base", "wide"))
    assert said.text == "A and B are copies of each other in different dtypes: every value is equal"


def test_what_cannot_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = {"w": torch.ones(2), "x": torch.ones(2), "y": torch.ones(2, 3), "ids": torch.arange(4)}
    base |= {"nan": torch.ones(3), "empty": torch.ones(0)}
    write(tmp_path / "base", base)
    write(tmp_path / "a", base | {"y": torch.ones(3, 2), "z": torch.ones(2), "nan": torch.tensor([1, torch.nan, 2])})
    write(tmp_path / "b", {name: tensor for name, tensor in base.items() if name != "x"})
    found = run("inspect", "a", "b", "--base", "base")
    assert found.code == 0
    assert found.out.partition("not compared\n")[2].partition("in words")[0].splitlines() == [
        "  ids  holds int64",
        "  x    missing in b",
        "  y    [2, 3] in the base, [3, 2] in a",
        "  z    missing in base, b",
        "  nan  holds NaN or infinity",
    ]
    assert found.out.startswith("2 models · base base · 1 tensor, 2 parameters\n")


def test_nothing_to_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", {"w": torch.ones(2)})
    write(tmp_path / "b", {"w": torch.ones(3)})
    write(tmp_path / "n", {"w": torch.full((2,), torch.nan)})
    found = run("inspect", "a", "--base", "b")
    assert (found.code, found.out) == (2, "")
    assert found.err == "error: b, a: have no tensor of the same name and shape, so none is compared\n"
    with pytest.raises(CheckpointError, match="every tensor they share holds NaN or infinity"):
        kinship(["n"], "a")
    with pytest.raises(NotFoundError):
        kinship(["a"], "./nothing")


def test_zero_and_constant_task_vectors(tmp_path: Path) -> None:
    base = {"w": torch.zeros(4, 4), "v": torch.zeros(3)}
    write(tmp_path / "base", base)
    write(tmp_path / "up", {name: tensor + 0.3 for name, tensor in base.items()})
    kin = kinship([tmp_path / "base", tmp_path / "up"], tmp_path / "base").total
    assert kin.change == [None, None]
    assert kin.cosine == [[None, None], [None, pytest.approx(1.0)]]
    # what is the same everywhere correlates with nothing
    assert kin.correlation == [[None, None], [None, None]]
    assert kin.sign_conflict == [[None, None], [None, 0.0]]
    assert kin.distance[0][1] == pytest.approx(0.3 * math.sqrt(19))
    assert mean_of_pairs(kin.cosine) is None


def test_one_model(family: Path) -> None:
    found = run("inspect", "one", "--base", "base")
    assert found.out.startswith("1 model · base base · 19 tensors, 1,576 parameters\n")
    assert "cosine of task vectors" not in found.out


def test_a_tied_head_is_its_embedding(tmp_path: Path) -> None:
    tied = state(0, tied=True, dtype=torch.float32)
    free = near(tied, 1, 3e-4)
    free["lm_head.weight"] = free["model.embed_tokens.weight"] + 1e-3
    write(tmp_path / "tied", tied, tie_word_embeddings=True)
    write(tmp_path / "free", free)
    found = kinship([tmp_path / "free"], tmp_path / "tied")
    assert len(found.tensors) == 19
    assert found.left_out == []


def test_json_and_every_tensor(family: Path) -> None:
    found = run("inspect", "one", "two", "--base", "base", "--json").json
    assert found["tensors"] == 19
    assert found["findings"] == []
    assert len(found["total"]["cosine"]) == 2
    every = run("inspect", "one", "two", "--base", "base", "--json", "--tensors").json
    assert {tensor["name"] for tensor in every["tensors"]} == set(state(0))
    rows = [line.split() for line in run("inspect", "one", "two", "--base", "base", "--tensors").out.splitlines()]
    assert [row for row in rows if row[0] == "model.norm.weight" and len(row) == 5]


def test_several_without_a_base(family: Path) -> None:
    found = run("inspect", "one", "two")
    assert (found.code, found.out) == (2, "")
    assert found.err == (
        "error: inspect: describes one checkpoint, got 2; compare several with --base BASE, two with diff\n"
    )


def test_progress_tells_every_byte(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "BLOCK", 50)
    told: list[tuple[int, int]] = []
    kinship(["one", "two"], "base", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (3 * 4 * 1576, 3 * 4 * 1576)
