"""`merganser transplant --text --train-steps`: rows of merged tokens from a network that is trained, on small models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from merganser.transplant import training
from merganser.transplant.hypernetwork import Hypernetwork
from tests.cli.tiny import names, run
from tests.engine.vocabulary.by_hand import EMBEDDING, HEAD
from tests.making import read_json, read_model
from tests.transplant.test_merged import FIRST, make

TEXT = "abcd abcd ab dd abcd dd cab dab\n" * 60
NEW = 4


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(training, "LENGTH", 12)


def made(folder: Path, **options: Any) -> Path:
    own = make(folder, text=TEXT, **options)
    (own / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return own


def trained(folder: Path, out: str = "out", steps: int = 6) -> Any:
    text, own = folder / "t.txt", folder / "own"
    arguments = ["--text", text, "--new-tokens", NEW, "--train-steps", steps, "--out", folder / out, "--json"]
    found = run("transplant", own, *arguments)
    assert found.code == 0, found.err
    return found.json["record"]["vocabulary"]["made_by"]


def loss_of(folder: Path, text: str) -> float:
    """The loss of a model as it is loaded, on the sequences that the command measures."""
    from transformers import AutoModelForCausalLM

    from merganser.transplant.merged import _pieces

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [tokenizer.encode(piece).ids for piece in [*_pieces(text)][9::10]]
    cut = [each[at : at + 12] for each in ids for at in range(0, len(each) - 11, 12)][:8]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = []
    for sequence in cut:
        logits = model(torch.tensor([sequence])).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(sequence[1:])).item())
    return sum(losses) / len(losses)


def test_a_network_begins_at_the_mean() -> None:
    table = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    parts = [(1, 2), (3,), (4, 4, 8, 0)]
    first, again, other = (Hypernetwork(table, parts, seed) for seed in (0, 0, 1))
    expected = torch.stack([table[list(own)].mean(0) for own in parts])
    torch.testing.assert_close(first(), expected)
    assert torch.equal(first.inward.weight, again.inward.weight)
    assert not torch.equal(first.inward.weight, other.inward.weight)
    # what is not there does not count: a token alone and beside longer ones has the same row
    torch.nn.init.ones_(first.outward.weight)
    alone = Hypernetwork(table, parts[:1], 0)
    alone.inward, alone.layer, alone.outward = first.inward, first.layer, first.outward
    alone.places.data = first.places.data[:2]
    assert not torch.allclose(first(), expected)
    torch.testing.assert_close(alone()[0], first()[0])


@pytest.mark.parametrize(("rows", "head"), [(FIRST + 6, True), (FIRST + 2, False)])
def test_rows_are_those_that_were_measured(tmp_path: Path, rows: int, head: bool) -> None:
    """The model as it is written has the losses that were measured while its rows were only put in place."""
    own = made(tmp_path, rows=rows, head=head, dtype=torch.float32)
    found = trained(tmp_path)
    assert found["loss_of_trained"] < found["loss_of_mean"]
    assert found["loss_of_trained"] == pytest.approx(loss_of(tmp_path / "out", TEXT), rel=1e-5)
    arguments = ["--text", tmp_path / "t.txt", "--new-tokens", NEW, "--out", tmp_path / "mean"]
    assert run("transplant", own, *arguments).code == 0
    assert found["loss_of_mean"] == pytest.approx(loss_of(tmp_path / "mean", TEXT), rel=1e-5)
    before, after, mean = (
        load_file(own / "model.safetensors"),
        read_model(tmp_path / "out"),
        read_model(tmp_path / "mean"),
    )
    for name in before:
        if name in (EMBEDDING, HEAD):
            assert torch.equal(after[name][:FIRST], before[name][:FIRST])
            new = slice(FIRST, FIRST + NEW)
            assert not torch.isclose(after[name][new], mean[name][new]).all(1).any()
            assert torch.equal(after[name][new.stop :], mean[name][new.stop :])
        else:
            assert torch.equal(after[name], before[name])


def test_the_same_call_gives_the_same_bytes(tmp_path: Path) -> None:
    made(tmp_path, head=False, dtype=torch.bfloat16)
    assert trained(tmp_path) == trained(tmp_path, "again")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == other
    record = read_json(tmp_path / "out", "merge.json")
    assert "4 new tokens, parts mean, 6 steps of training" in record["recipe"]
    assert run("verify", tmp_path / "out").code == 0


def test_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, head=False)
    monkeypatch.chdir(tmp_path)
    arguments = ["transplant", "own", "--text", "t.txt", "--new-tokens", NEW, "--train-steps", 6, "--out", "out"]
    found = run(*arguments)
    assert found.code == 0, found.err
    made_by = read_json(tmp_path / "out", "merge.json")["vocabulary"]["made_by"]
    before, after = made_by["loss_of_mean"], made_by["loss_of_trained"]
    said = f"  loss per token on a part of that: {before:.3f} with the mean of the parts, {after:.3f} after 6 steps of training"
    assert "4 made of their parts by a trained network" in found.out
    assert said in found.out.splitlines()
    # the mean is kept where training does not help
    shutil.rmtree("out")
    monkeypatch.setattr(training, "RATE", 5.0)
    found = run(*arguments)
    assert found.code == 0, found.err
    assert "4 made of their parts\n" in found.out
    assert "steps of training; the mean is kept" in found.out
    assert run("transplant", "own", "--text", "t.txt", "--new-tokens", NEW, "--out", "mean").code == 0
    one, other = read_model(tmp_path / "out"), read_model(tmp_path / "mean")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("given", "arguments", "message"),
    [
        ({}, ["--train-steps", "-1"], "--train-steps -1: at least 0 is needed"),
        ({}, ["--train-steps", "2", "--parts", "last"], "--train-steps: begins at the mean of the parts, so leave --parts last out"),
        ({"text": "abcd abcd\n" * 8}, ["--train-steps", "2"], "--text: is too short to train on: sequences of 12 tokens"),
        ({"poisoned": True}, ["--train-steps", "2"], "own: the loss is not finite after 0 steps of training"),
    ],
)  # fmt: skip
def test_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], arguments: list[str], message: str
) -> None:
    from safetensors.torch import save_file

    own = made(tmp_path, head=False)
    if "text" in given:
        (tmp_path / "t.txt").write_text(given["text"])
    if "poisoned" in given:
        tensors = load_file(own / "model.safetensors")
        tensors["model.norm.weight"][0] = float("nan")
        save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    found = run("transplant", "own", "--text", "t.txt", *arguments, "--out", "out")
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert names(tmp_path) == ["own", "t.txt"]


def test_an_embedding_that_is_no_table_is_refused() -> None:
    class Doubled(torch.nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(ids)

    from merganser.errors import UnsupportedError

    head = torch.nn.Linear(4, 9, bias=False)
    assert training._scale_of(torch.nn.Embedding(9, 4), head, "m") == 1.0
    for embedding in (Doubled(9, 4), torch.nn.Linear(9, 4), torch.nn.Embedding(9, 5)):
        with pytest.raises(
            UnsupportedError, match=r"m: rows cannot be trained: its embedding .*; leave --train-steps out"
        ):
            training._scale_of(embedding, head, "m")
