"""The logit cache: its values, its files, a kill in the middle, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merganser.calibration.forward import stream
from merganser.distillation import cache, cache_logits, open_cache
from merganser.distillation.likelihoods import likelihoods
from merganser.errors import DataError, MergeError, NonFiniteError, OutputError, UnsupportedError
from tests.calibration.interrupting import killed_after_removing
from tests.cli.tiny import run
from tests.evaluation.tiny import load, make_model, text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "source", 1, bos=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"text": text(i, 6 + 5 * i)}) for i in range(5)))
    return file


def sequences(shard: dict[str, Tensor], name: str) -> list[Tensor]:
    ends = [0, *shard["sequence_ends"].tolist()]
    return [shard[name][a:b] for a, b in pairwise(ends)]


def test_values_are_those_of_the_whole_model(model: Path, data: Path, tmp_path: Path) -> None:
    found = cache_logits(model, [data], tmp_path / "out", k=7, length=24, batch_tokens=60)
    shard = found.shard(0)
    network, tokenizer = load(model)
    start = 0
    nats = 0.0
    for number, ids in enumerate(sequences(shard, "token_ids")):
        ids = ids.long()
        with torch.no_grad():
            expected = network(ids[None]).logits[0].double().log_softmax(-1)
        own = {
            name: sequences(shard, name)[number] for name in shard if name not in ("text", "sequence_ends", "records")
        }
        assert (own["ids"].long() == expected.topk(7).indices).all()
        torch.testing.assert_close(own["log_probabilities"], expected.topk(7).values.float(), rtol=1e-5, atol=1e-5)
        left = 1 - expected.topk(7).values.exp().sum(-1)
        torch.testing.assert_close(own["rest"].exp(), left.float(), rtol=1e-4, atol=1e-6)
        # a space and a line break begin words, and so do the special tokens
        begins = [i for i in range(300) if i < 2 or tokenizer.decode([i])[:1] in (" ", "\t", "\n")]
        words = expected[:, begins].logsumexp(-1).float()
        torch.testing.assert_close(own["word_log_probabilities"], words, rtol=1e-5, atol=1e-5)
        following = expected[:-1].gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(own["token_log_probabilities"][1:], following.float(), rtol=1e-5, atol=1e-5)
        assert own["token_log_probabilities"][0] == 0
        nats -= float(following.sum())
        size = int(own["byte_ends"][-1])
        written = bytes(shard["text"][start : start + size].tolist())
        assert written.decode(errors="replace") == tokenizer.decode(ids, skip_special_tokens=True)
        start += size
    assert start == len(shard["text"])
    assert found.total("nats") == pytest.approx(nats, rel=1e-5)
    vocabulary = found.vocabulary()
    spelled = ["" if i in tokenizer.all_special_ids else tokenizer.decode([i]) for i in range(len(vocabulary))]
    assert len(vocabulary) == 300
    for token, expected in zip(vocabulary.tokens, spelled, strict=True):
        assert token is not None
        assert token.decode(errors="replace") == expected
    assert (vocabulary.special, vocabulary.roles) == ({"<s>": 0, "</s>": 1}, {"bos": 0, "eos": 1})
    # a special token at the start takes no bytes, so that all bytes are predicted
    assert found.total("predicted_bytes") == found.total("bytes") == start


def test_all_tokens_leave_no_rest(model: Path, data: Path, tmp_path: Path) -> None:
    found = cache_logits(model, [data], tmp_path / "out", k=320, sequences=1, length=8).shard(0)
    assert (found["rest"] == -torch.inf).all()
    torch.testing.assert_close(
        found["log_probabilities"].double().logsumexp(-1), torch.zeros(8).double(), rtol=0, atol=1e-6
    )


def test_equal_logits_are_taken_in_the_order_of_tokens() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 2.0, 1.0]]).repeat(100, 1)
    found, given = likelihoods(logits, 4, torch.full((100,), 3))
    assert found.ids.tolist() == [[1, 4, 2, 3]] * 100
    expected = logits[0].double().log_softmax(-1)
    torch.testing.assert_close(given, expected[3].float().expand(100))
    torch.testing.assert_close(found.rest, expected[[0, 5]].logsumexp(0).float().expand(100))
    torch.testing.assert_close(found.log_probabilities + found.log_sum_exp[:, None], logits[:, [1, 4, 2, 3]])


class _Stop(BaseException):
    """As a kill: no code of ours runs after it but `finally`."""


@pytest.mark.parametrize(("what", "calls"), [("blocks", 4), ("shards", 1), ("shards", 2)])
def test_a_killed_run_continues(
    what: str, calls: int, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_SHARD_TOKENS", 30)
    options: dict[str, Any] = {"length": 24, "batch_tokens": 24, "k": 3}
    whole = cache_logits(model, [data], tmp_path / "whole", **options)
    assert len(whole.files) > 2
    place, name = (stream, "run_on_text") if what == "blocks" else (cache, "write_sums")
    original, seen = getattr(place, name), []

    def counting(*args: Any) -> Any:
        seen.append(args)
        if len(seen) == calls:
            raise _Stop
        return original(*args)

    monkeypatch.setattr(place, name, counting)
    with pytest.raises(_Stop):
        cache_logits(model, [data], tmp_path / "cut", **options)
    assert not (tmp_path / "cut").exists()
    found = cache_logits(model, [data], tmp_path / "cut", **options)
    if what == "shards":
        # what was stored is not computed again: only the call that was cut short is repeated, and the vocabulary is a file
        assert len(seen) == len(whole.files) + 2
    assert not list(tmp_path.glob(".cut*"))
    for file in whole.path.iterdir():
        assert (found.path / file.name).read_bytes() == file.read_bytes()


def test_a_run_killed_at_its_very_end_runs_nothing_again(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after_removing(1):
        cache_logits(model, [data], tmp_path / "cut", length=24)
    monkeypatch.setattr(stream.Stream, "advance", None)
    monkeypatch.setattr(stream.Stream, "logits", None)
    found = cache_logits(model, [data], tmp_path / "cut", length=24)
    assert found.total("sequences") > 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "data.jsonl"]


def test_what_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    def refused(kind: type[MergeError], match: str, folder: Path = model, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            cache_logits(folder, [data], tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))

    refused(DataError, "top: must be at least 1, found 0", k=0)
    refused(DataError, "top: 321 tokens are asked for, the vocabulary of .* has 320; ask for fewer", k=321)
    refused(DataError, "tokens: must be all or completions, found 'some'", tokens="some")
    broken = make_model(tmp_path / "broken", 2)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][5] = torch.inf
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    refused(NonFiniteError, r"data.jsonl:\d: the model's logits are NaN or infinite for this text", broken)
    config = json.loads((broken / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    (broken / "config.json").write_text(json.dumps(config))
    refused(UnsupportedError, "LlamaForSequenceClassification does not predict the next token", broken)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    with pytest.raises(OutputError, match="there: exists"):
        cache_logits(model, [data], tmp_path / "there")


def test_tokens_that_do_not_spell_the_text_are_refused(data: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "source", 1)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UnsupportedError, match='the tokens of its tokenizer do not spell the text: "The  naïve'):
        cache_logits(folder, [data], tmp_path / "out")


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        about = json.loads((folder / "logits.json").read_text())
        change(about)
        (folder / "logits.json").write_text(json.dumps(about))

    return apply


def shard(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "logits-00001-of-00001.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no description": (lambda f: (f / "logits.json").unlink(), "is not a logit cache (no logits.json); merganser fuse"),
    "no JSON": (lambda f: (f / "logits.json").write_text("{"), "logits.json: "),
    "another kind": (edit(lambda a: a.update(kind="x")), "is not a description of a logit cache"),
    "another version": (edit(lambda a: a.update(format=9)), "has format 9, this version reads 3"),
    "no vocabulary": (edit(lambda a: a.pop("vocabulary")), "logits.json: has no 'vocabulary'"),
    "no k": (edit(lambda a: a.pop("k")), "logits.json: has no 'k'"),
    "a number that is text": (edit(lambda a: a["shards"][0].update(nats="x")), "nats"),
    "a shard elsewhere": (edit(lambda a: a["shards"][0].update(file="../x")), "'../x' leaves the folder"),
    "no shard": (
        lambda f: (f / "logits-00001-of-00001.safetensors").unlink(),
        "there is no such file; write the cache",
    ),
    "a shard cut short": (lambda f: (f / "logits-00001-of-00001.safetensors").write_bytes(b"x"), "safetensors: "),
    "no tensor": (shard(lambda t: t.pop("rest")), "tensor 'rest' is missing; write the cache again"),
    "a wrong dtype": (
        shard(lambda t: t.update(rest=t["rest"].double())),
        "'rest' is torch.float64, expected torch.float32",
    ),
    "a wrong shape": (
        shard(lambda t: t.update(ids=t["ids"][:, :2].clone())),
        "'ids' has shape [8, 2], expected [8, 3]",
    ),
    "no parts": (edit(lambda a: a.pop("parts")), "logits.json: has no 'parts'"),
    "an end that is not there": (shard(lambda t: t["sequence_ends"].fill_(9)), "do not fit its tokens"),
    "an empty sequence": (shard(lambda t: t["sequence_ends"].zero_()), "do not fit its tokens"),
    "bytes that go back": (shard(lambda t: t["byte_ends"][0].fill_(99)), "do not fit its tokens"),
    "bytes that are not there": (shard(lambda t: t["byte_ends"][-1].add_(1)), "do not fit its tokens"),
    "a token too high": (
        shard(lambda t: t["ids"][3, 1].fill_(320)),
        "'ids' has tokens that are none of the source's 320",
    ),
    "a token below 0": (
        shard(lambda t: t["token_ids"][3].fill_(-1)),
        "'token_ids' has tokens that are none of the source's",
    ),
    "no probability": (
        shard(lambda t: t["log_probabilities"][2, 0].fill_(0.5)),
        "'log_probabilities' is not the logarithm of a probability everywhere",
    ),
    "NaN": (shard(lambda t: t["rest"][2].fill_(math.nan)), "'rest' is not the logarithm of a probability everywhere"),
    "a special token that is none": (
        edit(lambda a: a["special"].update(x=320)),
        "a special token is none of the tokens",
    ),
}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    (folder / "data.txt").write_text(text(1, 20))
    return cache_logits(model, [folder / "data.txt"], folder / "out", k=3, sequences=1, length=8).path


def opened_whole(folder: Path) -> None:
    found = open_cache(folder)
    found.shard(0)
    found.vocabulary()


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_caches_are_refused(name: str, whole: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    copytree(whole, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(DataError) as caught:
        opened_whole(tmp_path / "out")
    assert message in str(caught.value)


def test_a_missing_cache(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        open_cache(tmp_path / "nowhere")


def test_the_command(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("fuse", "cache", str(model), "--data", "data.jsonl", "--top", "3", "--length", "24", "--out", "out")
    assert done.code == 0
    assert "top 3 of 320" in done.out
    assert " nats per token, " in done.out
    assert "wrote out (" in done.out
    again = run("fuse", "cache", str(model), "--data", "data.jsonl", "--out", "out")
    assert (again.code, again.err) == (2, "error: out: exists; choose another folder, or remove it\n")
    none = run("fuse", "cache", str(model), "--data", "data.jsonl")
    assert (none.code, none.err) == (2, "error: --out is missing: give the folder to write\n")
    nothing = run("fuse", "cache", str(model), "--out", "other")
    assert nothing.code == 2
    assert run("fuse", "cahce").code == 2
