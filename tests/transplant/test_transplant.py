"""`merganser transplant` on small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merganser.errors import MergeError
from merganser.transplant import transplant
from tests.cli.tiny import run
from tests.engine.vocabulary.by_hand import EMBEDDING, HEAD, bpe, model
from tests.making import llama, llama_config, read_model, write_model
from tests.transplant import literal

WORDS = [f"Ġw{i}" for i in range(24)]
LEVEL = {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}
OWN = bpe([*WORDS, "a", "b", "ab"], ["<s>", "</s>"], ["a b"], **LEVEL)
DONOR = bpe([*WORDS[::-1], "a", "abab", "Ġc"], ["<|end|>", "<|user|>"], **LEVEL)
SPOKEN = {"eos_token": "<|end|>", "chat_template": "{{ messages }}<|end|>"}


def make(root: Path, *, head: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A model of 32 rows, and a donor of 30 rows and another width."""
    own = model(root / "own", 0, OWN, head=head, dtype=dtype)
    (own / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    donor = write_model(
        root / "donor",
        llama(1, vocab=30, hidden=24),
        llama_config(vocab=30, hidden=24) | {"eos_token_id": 27},
        side_files={"tokenizer.json": json.dumps(DONOR), "tokenizer_config.json": json.dumps(SPOKEN)},
    )
    return own, donor


SHARED = {i: 23 - i for i in range(24)} | {24: 24, 27: 28}
"""The donor's tokens that the model has, too: the words, `a`, and the end of a text."""
NEW = [25, 26, 28]


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", ["omp", "interpolate", "barycentric", "wechsel"])
def test_rows(tmp_path: Path, name: str, head: bool) -> None:
    own, donor = make(tmp_path, head=head)
    found = transplant(str(own), str(donor), tmp_path / "out", method=name, k=6)
    merged, before, theirs = (
        read_model(found.out),
        load_file(own / "model.safetensors"),
        load_file(donor / "model.safetensors"),
    )
    for key in (EMBEDDING, HEAD) if head else (EMBEDDING,):
        shared = list(SHARED)
        assert torch.equal(merged[key][shared], before[key][list(SHARED.values())])
        rows = theirs[key][shared].double().numpy()
        for number in NEW:
            terms = getattr(literal, name)(theirs[key][number].double().numpy(), rows, 6)
            wanted = sum(weight * before[key][SHARED[shared[i]]].double() for i, weight in terms.items())
            torch.testing.assert_close(merged[key][number].double(), wanted, rtol=1e-4, atol=1e-6)
    assert merged.keys() == before.keys()
    assert all(torch.equal(merged[key], before[key]) for key in before if key not in (EMBEDDING, HEAD))


@pytest.mark.parametrize(("name", "wanted"), [
    ("zero", {25: [], 28: []}),
    ("mean", {25: range(29), 28: range(29)}),
    ("subword", {25: [26, 26], 26: range(29), 28: range(29)}),
])  # fmt: skip
def test_rows_that_need_no_weights_of_the_donor(tmp_path: Path, name: str, wanted: dict[int, Any]) -> None:
    own, donor = make(tmp_path)
    (donor / "model.safetensors").unlink()
    merged = read_model(transplant(str(own), str(donor), tmp_path / "out", method=name).out)
    before = load_file(own / "model.safetensors")
    assert merged[EMBEDDING].shape == (29, 16)
    for number, rows in wanted.items():
        mean = before[HEAD][list(rows)].double().mean(0) if len(rows) else torch.zeros(16, dtype=torch.float64)
        torch.testing.assert_close(merged[HEAD][number].double(), mean, rtol=1e-6, atol=1e-8)


def test_files_follow_the_donor(tmp_path: Path) -> None:
    own, donor = make(tmp_path)
    found = transplant(str(own), str(donor), tmp_path / "out", k=4)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (found.out / name).read_bytes() == (donor / name).read_bytes()
    config = json.loads((found.out / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["hidden_size"]) == (30, 27, 16)
    assert found.record["vocabulary"]["made_by"] == {"method": "omp", "k": 4}
    [counts] = found.record["vocabulary"]["models"]
    # row 29 has no token in either model
    assert (counts["kept"], counts["moved"], counts["made"]) == (2, 25, {"combined": 3})
    listed = json.loads((found.out / "merge.vocabulary.json").read_text())
    assert {each["token"] for each in listed["lost"][str(own)]} == {"b", "ab", "<s>"}


def test_made_rows_are_rounded_once(tmp_path: Path) -> None:
    own, donor = make(tmp_path, dtype=torch.bfloat16)
    merged = read_model(transplant(str(own), str(donor), tmp_path / "out", method="mean").out)
    rows = load_file(own / "model.safetensors")[EMBEDDING][:29].double()
    assert torch.equal(merged[EMBEDDING][25], rows.mean(0).bfloat16())


def test_the_donors_own_model_stays_as_it_is(tmp_path: Path) -> None:
    own, _ = make(tmp_path)
    merged = read_model(transplant(str(own), str(own), tmp_path / "out").out)
    assert all(torch.equal(merged[name], tensor) for name, tensor in load_file(own / "model.safetensors").items())


SENTENCE = {
    "added_tokens": [],
    "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
    "model": {"type": "BPE", "vocab": {**{f"▁w{i}": i for i in range(24)}, "<0x61>": 24, "▁w5w6": 25}, "merges": []},
}


def test_tokens_are_told_by_their_bytes(tmp_path: Path) -> None:
    """▁w3 and Ġw3 are the same token, and so are <0x61> and a."""
    own, donor = make(tmp_path)
    (donor / "tokenizer.json").write_text(json.dumps(SENTENCE))
    merged = read_model(transplant(str(own), str(donor), tmp_path / "out", k=2).out)
    before = load_file(own / "model.safetensors")
    assert torch.equal(merged[EMBEDDING][:25], before[EMBEDDING][:25])


BAD: list[tuple[list[str], str]] = [
    (["--tokenizer"], "Option '--tokenizer' requires an argument"),
    (["--method", "opm"], "--method opm: is not known. Did you mean 'omp'? Known: omp, interpolate, barycentric, focus, "
     "wechsel, subword, mean, zero"),
    (["--method", "mean", "--k", "3"], "--k 3: mean combines no chosen rows"),
    (["--k", "0"], "--k 0: at least 1 is needed"),
    (["--tokenizer", "no"], "error: --tokenizer: model 'no' not found: no such folder"),
    (["--tokenizer", "bare"], "error: --tokenizer: bare: has no files of a tokenizer"),
    (["--tokenizer", "words"], "words: has no weights, and --method omp looks at its embedding; --method subword does not"),
    (["--tokenizer", "others"], "others and own share 0 tokens, too few to tell what the others mean; --method subword "
     "needs none"),
    (["--tokenizer", "broken"], "broken/tokenizer.json: is not valid JSON"),
    (["--tokenizer", "nan"], "nan/model.safetensors: tensor 'model.embed_tokens.weight' holds NaN or infinity"),
    (["--tokenizer", "old"], "old: has no tokenizer.json (its tokens are in vocab.txt)"),
    (["--tokenizer", "empty"], "empty: has no tokenizer whose tokens can be read; a tokenizer.json is needed"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_cannot_be_transplanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    foreign = json.dumps(bpe([f"x{i}" for i in range(30)], **LEVEL))
    write_model(tmp_path / "bare", llama(2), llama_config())
    nan = llama(2)
    nan[EMBEDDING][3, 3] = torch.nan
    for name, tensors, files in (
        ("others", llama(2), {"tokenizer.json": foreign}),
        ("broken", llama(2), {"tokenizer.json": '{"model": '}),
        ("nan", nan, {"tokenizer.json": json.dumps(DONOR)}),
        ("old", llama(2), {"vocab.txt": "a\nb\n"}),
        ("empty", llama(2), {"tokenizer.json": "{}"}),
    ):
        write_model(tmp_path / name, tensors, llama_config(), side_files=files)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(DONOR))
    donor = [] if "--tokenizer" in arguments else ["--tokenizer", "donor"]
    found = run("transplant", "own", *donor, "--out", "out", *arguments)
    assert found.code == 2
    assert found.out == ""
    assert message in found.err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = run("transplant", "own", "--tokenizer", "donor", "--out", "out", "--k", "4")
    assert found.code == 0
    assert found.out.splitlines()[1:] == [
        "  29 tokens of donor, in 30 rows",
        "  own  32 rows  2 kept, 25 moved, 3 combined from shared tokens, 3 tokens left out",
        "wrote out and out/merge.json; out/merge.vocabulary.json lists every token",
        "measure it: merganser eval out",
    ]
    assert "merganser transplant: method omp, k 4" in (tmp_path / "out" / "README.md").read_text()
    assert run("verify", "out").code == 0
    again = run("transplant", "own", "--tokenizer", "donor", "--out", "out")
    assert again.code == 2


def test_the_library_refuses_what_is_there(tmp_path: Path) -> None:
    own, donor = make(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(MergeError, match="out"):
        transplant(str(own), str(donor), tmp_path / "out")
