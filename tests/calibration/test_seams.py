"""Stacked models at their seams: where these are, what is seen there, and what healing fits."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from merganser.calibration.seams import heal, inspect_seams
from merganser.calibration.seams.fit import RIDGES, Sums
from merganser.calibration.seams.places import find_pieces, find_seams
from merganser.engine.merge import merge
from merganser.errors import OutputError
from merganser.record import verify
from tests.calibration.families import FAMILIES
from tests.calibration.merging import LENGTH, Family, make_family
from tests.cli.tiny import run
from tests.engine.interrupting import die, in_a_process
from tests.evaluation.tiny import add_tokenizer, text

Slices = list[list[tuple[str, int, int]]]


def recipe(slices: Slices, method: str = "passthrough") -> dict[str, Any]:
    listed = [{"sources": [{"model": m, "layer_range": [a, b]} for m, a, b in own]} for own in slices]
    return {"merge_method": method, "slices": listed, "dtype": "float32"}


def stacked(root: Path, *pieces: tuple[Path, int, int]) -> Path:
    merge(recipe([[(str(model), first, end)] for model, first, end in pieces]), root / "stack")
    return root / "stack"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("seams"), "llama")


@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        ([[("a", 0, 4)]], []),
        ([[("a", 0, 2)], [("a", 2, 4)]], []),
        ([[("a", 0, 3)], [("a", 1, 4)]], [(3, "a", 1)]),
        ([[("a", 0, 1)], [("a", 2, 4)]], [(1, "a", 2)]),
        ([[("a", 0, 2)], [("b", 2, 4)]], [(2, "b", 2)]),
        ([[("a", 1, 4)]], [(0, "a", 1)]),
        ([[("a", 0, 2)]], [(2, "a", 4)]),
        # the models of a slice continue on what was merged with them
        ([[("a", 0, 2), ("b", 0, 2)], [("b", 2, 4)]], []),
        ([[("a", 0, 2)], [("a", 2, 3), ("b", 0, 1)], [("b", 1, 3)]], [(5, "b", 4)]),
    ],
)
def test_seams(slices: Slices, expected: list[tuple[int, str, int]], tmp_path: Path) -> None:
    (tmp_path / "merge.json").write_text(json.dumps({"recipe": yaml.safe_dump(recipe(slices))}))
    found = find_seams(find_pieces(tmp_path), lambda model: 4)
    assert [(own.position, own.model, own.layer) for own in found] == expected


def states(family: Family, folder: Path) -> tuple[list[torch.Tensor], float]:
    """What each layer and the final norm receive, token by token, and the perplexity: the whole model at once."""
    model = family.open(folder)
    final: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda module, args: final.append(args[0]))
    layers: list[list[torch.Tensor]] = []
    nats = count = 0.0
    with torch.no_grad():
        for tokens in family.sequences(0):
            out = model(**tokens, output_hidden_states=True)
            layers.append([h[0] for h in (*out.hidden_states[:-1], final.pop())])
            scores = torch.log_softmax(out.logits[0, :-1].double(), -1)
            nats -= scores.gather(1, tokens["input_ids"][0, 1:, None]).sum().item()
            count += len(scores)
    boundaries = [torch.cat([own[i] for own in layers]).double() for i in range(len(layers[0]))]
    return boundaries, float(torch.tensor(nats / count).exp())


def test_numbers_are_those_of_whole_models(llama: Family, tmp_path: Path) -> None:
    a, b = llama.models
    out = stacked(tmp_path, (a, 0, 3), (b, 1, 3))
    found = inspect_seams(out, [llama.data[0]], length=LENGTH)
    (own, perplexity), (other, theirs) = states(llama, out), states(llama, b)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.models[str(b)] == pytest.approx(theirs, rel=1e-5)
    assert [(seam.seam.position, seam.seam.layer) for seam in found.seams] == [(3, 1), (5, 4)]
    for seam, (here, there, near, far) in zip(found.seams, [(3, 1, 1, 2), (5, 4, 3, 4)], strict=True):
        size = other[there].norm(dim=1)
        assert seam.norm == pytest.approx(own[here].norm(dim=1).median().item(), rel=1e-5)
        assert seam.expected_norm == pytest.approx(size.median().item(), rel=1e-5)
        assert seam.error == pytest.approx(((own[here] - other[there]).norm(dim=1) / size).median().item(), rel=1e-4)
        cosine = torch.cosine_similarity(own[here], other[there], dim=1).median().item()
        assert seam.cosine == pytest.approx(cosine, rel=1e-4)
        assert seam.step == pytest.approx(((other[far] - other[near]).norm(dim=1) / size).median().item(), rel=1e-4)
    assert found.seams[0].norm_after == pytest.approx(own[4].norm(dim=1).median().item(), rel=1e-5)
    assert found.seams[1].norm_after is None


def test_a_stack_without_seams(llama: Family, tmp_path: Path) -> None:
    a = llama.models[0]
    out = stacked(tmp_path, (a, 0, 2), (a, 2, 4))
    found = inspect_seams(out, [llama.data[0]], length=LENGTH)
    assert not found.seams
    assert found.perplexity == found.models[str(a)]
    assert heal(out, [llama.data[0]], tmp_path / "healed", length=LENGTH).out is None
    assert not (tmp_path / "healed").exists()


def test_layers_of_an_equal_model_make_no_difference(llama: Family, tmp_path: Path) -> None:
    a = llama.models[0]
    copy = shutil.copytree(a, tmp_path / "copy")
    out = stacked(tmp_path, (a, 0, 2), (copy, 2, 4))
    (seam,) = inspect_seams(out, [llama.data[0]], length=LENGTH).seams
    assert seam.error == 0
    assert seam.verdict == "none"
    found = heal(out, [llama.data[0]], tmp_path / "healed", length=LENGTH)
    assert found.tensors == []
    assert found.out is None


def test_sums_give_the_error_and_its_least() -> None:
    generator = torch.Generator().manual_seed(0)
    x, found, expected = (torch.randn(40, n, generator=generator, dtype=torch.float64) for n in (5, 3, 3))
    sums = Sums.empty(3, 5)
    sums.add(x[:7], found[:7], expected[:7])
    sums.add(x[7:], found[7:], expected[7:])
    size = torch.maximum(found.norm(dim=1), expected.norm(dim=1))[:, None]

    def error(change: torch.Tensor) -> float:
        return (((found + x @ change.T - expected) / size) ** 2).sum(1).mean().item()

    change = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    assert sums.error(change) == pytest.approx(error(change), rel=1e-12)
    assert sums.error() == pytest.approx(error(torch.zeros(3, 5, dtype=torch.float64)), rel=1e-12)
    least = torch.linalg.lstsq(x / size, (expected - found) / size).solution.T
    assert torch.linalg.solve(sums.gram, sums.pull.T).T.allclose(least)


def trained(family: Family, folder: Path, file: Path) -> Path:
    """A model that was trained for some steps, so that dropping a layer harms it."""
    import transformers

    model, tokenizer = family.open(family.base), transformers.AutoTokenizer.from_pretrained(family.base)
    ids = tokenizer(file.read_text())["input_ids"]
    windows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    descent = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(25):
        descent.zero_grad()
        model(input_ids=windows, labels=windows).loss.backward()
        descent.step()
    shutil.copytree(family.base, folder)
    model.save_pretrained(folder)
    return folder


def test_healing(llama: Family, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text(text(3, 250))
    a = trained(llama, tmp_path / "a", words)
    out = stacked(tmp_path, (a, 0, 1), (a, 2, 4))
    healed = tmp_path / "healed"
    shown = run("heal", out, healed, "--data", words, "--length", LENGTH)
    assert shown.code == 0, shown.err
    record = json.loads((healed / "merge.json").read_text())["healed"]
    old, new = record["perplexity_before"], record["perplexity_after"]
    assert new < old
    assert f"perplexity on held-out text: {old:.2f} before, {new:.2f} after\n" in shown.out
    assert all(own["after"] < own["before"] and own["ridge"] in RIDGES for own in record["tensors"])
    before, after = (load_file(folder / "model.safetensors") for folder in (out, healed))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {own["name"] for own in record["tensors"]}
    assert all(n.endswith("mlp.down_proj.weight") for n in changed)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert verify(healed).ok
    # the healed model is examined by the recipe of the stack
    seam, before_healing = (inspect_seams(folder, [words], length=LENGTH).seams[0] for folder in (healed, out))
    assert seam.seam == before_healing.seam
    assert seam.error < before_healing.error


def test_matrices_that_are_stored_by_inputs_are_fitted(tmp_path: Path) -> None:
    family = make_family(tmp_path, "gpt2", 1)
    a = family.models[0]
    out = stacked(tmp_path, (a, 0, 1), (a, 2, 4))
    (fitted,) = heal(out, family.data, tmp_path / "healed", length=LENGTH, blocks=0).tensors
    assert fitted["name"] == "transformer.h.0.mlp.c_proj.weight"
    assert fitted["after"] < fitted["before"]


def test_what_cannot_be_fitted_is_said(tmp_path: Path) -> None:
    """Gemma 2 has a norm behind its last matrix."""
    family = make_family(tmp_path, "gemma2", 1)
    a = family.models[0]
    out = stacked(tmp_path, (a, 0, 2), (a, 3, 4))
    found = heal(out, family.data, tmp_path / "healed", length=LENGTH)
    assert set(found.skipped.values()) == {"the product of its last matrix is not simply added to what it passes on"}
    assert found.out is None


def _heal_and_die(stack: Path, data: list[Path], out: Path) -> None:
    def told(done: int, blocks: int) -> None:
        if done > blocks // 2:
            die()

    heal(stack, data, out, length=LENGTH, progress=told)


def test_what_a_killed_healing_leaves_goes_with_the_next(llama: Family, tmp_path: Path) -> None:
    a = llama.models[0]
    stack = stacked(tmp_path, (a, 0, 2), (a, 3, 4))
    process = in_a_process(_heal_and_die, stack, llama.data[:1], tmp_path / "healed")
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    left = tmp_path / ".healed.healing"
    assert {path.name for path in left.iterdir()} == {".merganser", "work"}
    assert any((left / "work").rglob("*.bin"))
    (left / "mine").touch()
    with pytest.raises(OutputError, match="mine"):
        heal(stack, llama.data[:1], tmp_path / "healed", length=LENGTH)
    (left / "mine").unlink()
    heal(stack, llama.data[:1], tmp_path / "healed", length=LENGTH)
    assert {path.name for path in tmp_path.iterdir()} <= {"stack", "healed"}


def _whole(root: Path, family: Family) -> list[Any]:
    merge({"merge_method": "passthrough", "models": [{"model": str(family.base)}]}, root / "whole")
    return ["inspect", root / "whole", "--seams", "--data", family.data[0]]


def _changed(root: Path, family: Family) -> list[Any]:
    out = stacked(root, (family.base, 0, 2), (family.models[0], 2, 4))
    record = json.loads((out / "merge.json").read_text())
    sliced = recipe([[(str(family.base), 0, 2)], [(str(family.models[0]), 3, 4)]])
    record["recipe"] = yaml.safe_dump(sliced)
    (out / "merge.json").write_text(json.dumps(record))
    return ["inspect", out, "--seams", "--data", family.data[0], "--length", LENGTH]


def _gone(root: Path, family: Family) -> list[Any]:
    model = shutil.copytree(family.models[0], root / "model")
    out = stacked(root, (family.base, 0, 2), (model, 2, 4))
    shutil.rmtree(model)
    return ["inspect", out, "--seams", "--data", family.data[0]]


def _few(root: Path, family: Family) -> list[Any]:
    out = stacked(root, (family.base, 0, 2))
    return ["heal", out, root / "healed", "--data", family.data[0], "--sequences", 3, "--length", LENGTH]


def _there(root: Path, family: Family) -> list[Any]:
    (root / "healed").mkdir()
    (root / "healed/mine").write_text("")
    return ["heal", stacked(root, (family.base, 0, 2)), root / "healed", "--data", family.data[0]]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (_whole, "only stacked layers (slices in the recipe) have seams"),
        (lambda root, family: ["inspect", family.base, "--seams", "--data", family.data[0]], "has no merge.json"),
        (lambda root, family: ["inspect", root / "no", "--seams", "--data", family.data[0]], "no such folder"),
        (lambda root, family: ["inspect", family.base, "--seams"], "--seams needs text"),
        (lambda root, family: ["inspect", family.base, "--data", family.data[0]], "are for --seams"),
        (lambda root, family: ["inspect", family.base, "--length", 8], "are for --seams"),
        (lambda root, family: ["inspect", "a", "--seams", "--base", "b", "--data", "c"], "--base is for inspecting"),
        (lambda root, family: ["inspect", "a", "b", "--seams", "--data", "c"], "looks at one stacked model, got 2"),
        (_changed, "it was changed since"),
        (_gone, "model"),
        (lambda root, family: ["heal", family.base, root / "healed"], "--data is missing"),
        (_few, "healing needs 4 sequences at least"),
        (_there, "exists"),
    ],
)
def test_bad_input(command: Any, message: str, llama: Family, tmp_path: Path) -> None:
    found = run(*command(tmp_path, llama))
    assert found.code == 2, found.err
    assert message in found.err
    assert not (tmp_path / "healed/merge.json").exists()


def test_the_command(llama: Family, tmp_path: Path) -> None:
    a, b = llama.models
    out = stacked(tmp_path, (a, 0, 3), (b, 1, 4))
    shown = run("inspect", out, "--seams", "--data", llama.data[0], "--length", LENGTH)
    assert shown.code == 0, shown.err
    assert "1 seam · " in shown.out
    assert "model0 2 | model1 1" in shown.out
    assert "best of its models" in shown.out


def test_layers_after_merged_ones_are_fitted_to_the_model_that_they_are_of(llama: Family, tmp_path: Path) -> None:
    """The first model has too few layers to go on with."""
    torch.manual_seed(0)
    short = make_family(tmp_path, "llama", 0, base=_of_layers(tmp_path / "short", 3)).base
    slices: Slices = [
        [(str(short), 0, 2)],
        [(str(short), 1, 3), (str(llama.models[0]), 1, 3)],
        [(str(llama.models[0]), 3, 4)],
    ]
    merge(recipe(slices, "linear") | {"parameters": {"weight": 1.0}}, tmp_path / "stack")
    found = heal(tmp_path / "stack", [llama.data[0]], tmp_path / "healed", length=LENGTH)
    assert [seam.position for seam in found.seams] == [2]
    fitted = [own["name"] for own in found.tensors]
    assert {name.split(".")[2] for name in [*fitted, *found.skipped]} == {"1", "2", "3", "4"}


def _of_layers(folder: Path, count: int) -> Path:
    config = FAMILIES["llama"][0]()
    config.num_hidden_layers = count
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    add_tokenizer(folder)
    return folder
