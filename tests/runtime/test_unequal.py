"""Experts of unequal sizes mixed: the formula, laws, batches, caches, making and measuring them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from merganser.errors import (
    NonFiniteError,
    NotFoundError,
    ParameterError,
)
from merganser.evaluation import evaluate
from merganser.runtime.routed.gated.fitting import Training
from merganser.runtime.routed.gated.stored import GATES_FILE
from merganser.runtime.routed.unequal import MixtureSettings, UnequalModel
from merganser.runtime.routed.unequal.tables import least_squares, mean_table
from merganser.runtime.routed.unequal.weighing import inverse_perplexities, top_softmax
from tests.evaluation.tiny import make_model
from tests.reference import mergeme
from tests.runtime.unequal import GREEDY, IDS, LISTS, TEXTS, loaded, made, make_experts, opened


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experts, and a text for each."""
    return make_experts(tmp_path_factory.mktemp("unequal"))


def each(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test for all ways of mixing."""
    for name, values in (("by", ["router", "perplexity"]), ("embeddings", ["own", "shared"])):
        test = pytest.mark.parametrize(name, values)(test)
    return test


@each
def test_the_formula(root: Path, by: str, embeddings: str) -> None:
    """At every token, the logits are those of the paper's formula with the text up to it as the prompt."""
    model = opened(root / "experts", by, embeddings, top=2)
    experts = [copy.deepcopy(loaded(root / "experts" / name)) for name in "abc"]
    wanted = mergeme.Mixture(experts, embeddings == "shared", 2, model.model.router if by == "router" else None)
    logits = model.logits(IDS)
    for row in range(2):
        for length in range(1, 7):
            ids = IDS[row, :length].tolist()
            expected = wanted.next(ids, length)
            torch.testing.assert_close(logits[row, length - 1].double(), expected, rtol=1e-3, atol=1e-4)
        weights = torch.tensor(wanted.weights(IDS[row].tolist()))
        torch.testing.assert_close(model.weights(IDS)[row], weights, rtol=1e-4, atol=1e-5)


@each
def test_generation_keeps_the_weights_of_the_prompt(root: Path, by: str, embeddings: str) -> None:
    """With a cache, without one, and token by token by the formula."""
    model = opened(root / "experts", by, embeddings, top=2)
    found = model.generate(IDS, **GREEDY)
    assert found.equal(model.generate(IDS, use_cache=False, **GREEDY))
    experts = [copy.deepcopy(loaded(root / "experts" / name)) for name in "abc"]
    wanted = mergeme.Mixture(experts, embeddings == "shared", 2, model.model.router if by == "router" else None)
    for row in range(2):
        ids = IDS[row].tolist()
        for _ in range(4):
            ids.append(int(wanted.next(ids, 6).argmax()))
        assert found[row].tolist() == ids


@each
def test_rows_of_a_batch_are_those_alone(root: Path, by: str, embeddings: str) -> None:
    """Padding on either side changes nothing; rows that need other experts run with those."""
    top = 1 if by == "router" else 2
    model = opened(root / "experts", by, embeddings, top=top)
    texts = [[5, 9, 30], [7, 100, 3, 60, 12], [200, 201, 202, 203], [44] * 5]
    alone = [model.logits(torch.tensor([text]))[0] for text in texts]
    answers = [model.generate(torch.tensor([text]), **GREEDY)[0, len(text) :] for text in texts]
    weights = torch.cat([model.weights(torch.tensor([text])) for text in texts])
    if top == 1:
        assert len(set(weights.argmax(1).tolist())) > 1
    for left in (True, False):
        pads = [5 - len(text) for text in texts]
        rows = [[0] * pad + text if left else text + [0] * pad for pad, text in zip(pads, texts, strict=True)]
        masks = [[0] * pad + [1] * (5 - pad) if left else [1] * (5 - pad) + [0] * pad for pad in pads]
        ids, mask = torch.tensor(rows), torch.tensor(masks)
        logits = model.logits(ids, mask)
        torch.testing.assert_close(model.weights(ids, mask), weights, rtol=1e-4, atol=1e-5)
        for row, pad in enumerate(pads):
            kept = logits[row, pad:] if left else logits[row, : 5 - pad]
            torch.testing.assert_close(kept, alone[row], rtol=1e-3, atol=1e-4)
        together = model.generate(ids, mask, **GREEDY)
        for row, pad in enumerate(pads):
            assert together[row, pad:5].tolist() == texts[row]
            assert together[row, 5:].equal(answers[row])


@pytest.mark.parametrize("by", ["router", "perplexity"])
def test_one_expert_alone_is_that_expert(root: Path, tmp_path: Path, by: str) -> None:
    shutil.copytree(root / "experts" / "a", tmp_path / "a")
    expert = loaded(tmp_path / "a")
    with torch.no_grad():
        wanted = expert(IDS).logits
    model = opened(tmp_path, by)
    assert torch.equal(model.logits(IDS), wanted)
    assert torch.equal(model.generate(IDS, **GREEDY), expert.generate(IDS, **GREEDY))
    assert torch.equal(model.weights(IDS), torch.ones(2, 1))
    with pytest.raises(
        ParameterError, match="own embeddings, with weights by perplexity or a single expert, have nothing"
    ):
        model.fit({"a": LISTS["a"]}, length=8, training=Training(1))
    shared = opened(tmp_path, by, "shared")
    assert shared.model.tables is not None
    for matrix in (*shared.model.tables.into, *shared.model.tables.out):
        torch.testing.assert_close(matrix, torch.eye(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(shared.logits(IDS), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("embeddings", ["own", "shared"])
@pytest.mark.parametrize("by", ["router", "perplexity"])
def test_copies_of_one_expert_are_that_expert(root: Path, tmp_path: Path, by: str, embeddings: str) -> None:
    for name in ("one", "two"):
        shutil.copytree(root / "experts" / "b", tmp_path / name)
    model = opened(tmp_path, by, embeddings, top=2)
    with torch.no_grad():
        wanted = loaded(tmp_path / "one")(IDS).logits
    torch.testing.assert_close(model.logits(IDS), wanted, rtol=1e-3, atol=1e-4)
    if by == "perplexity":
        assert torch.equal(model.weights(IDS), torch.full((2, 2), 0.5))
        first = UnequalModel(tmp_path, MixtureSettings("perplexity", embeddings, 1))
        assert torch.equal(first.weights(IDS), torch.tensor([[1.0, 0.0]] * 2))


@pytest.mark.parametrize("embeddings", ["own", "shared"])
def test_the_task_can_be_told(root: Path, embeddings: str) -> None:
    model = UnequalModel(root / "experts", MixtureSettings("router", embeddings))
    with pytest.raises(NotFoundError, match="has no router; make one from text"):
        model.logits(IDS)
    model.task = "b"
    assert model.task == "b"
    assert model.weights(IDS).tolist() == [[0.0, 1.0, 0.0]] * 2
    expert = loaded(root / "experts" / "b")
    if embeddings == "own":
        with torch.no_grad():
            assert torch.equal(model.logits(IDS), expert(IDS).logits[..., :300])
    with pytest.raises(ParameterError, match=r"no expert 'd'.*Experts: a, b, c"):
        model.task = "d"
    model.task = None
    assert model.task is None


@each
def test_nothing_depends_on_later_tokens(root: Path, by: str, embeddings: str) -> None:
    model = opened(root / "experts", by, embeddings, top=2)
    other = IDS.clone()
    other[:, 4:] = torch.tensor([[250, 251], [1, 2]])
    torch.testing.assert_close(model.logits(IDS)[:, :4], model.logits(other)[:, :4])
    every = model.model.weights_so_far(IDS, None)
    torch.testing.assert_close(every.sum(-1), torch.ones(2, 6))
    assert ((every > 0).sum(-1) == 2).all()
    assert not torch.allclose(every[:, 0], every[:, 5], atol=1e-3)


def test_only_experts_with_a_weight_run(root: Path) -> None:
    calls: list[str] = []

    def counted(model: UnequalModel) -> UnequalModel:
        for name, expert in zip(model.tasks, model.model.experts, strict=True):
            expert.register_forward_hook(lambda *_, name=name: calls.append(name))
        return model

    model = counted(made(root / "experts", "router"))
    [chosen] = ["abc"[int(number)] for number in model.weights(IDS[:1]).argmax(1)]
    assert calls == []
    model.generate(IDS[:1], **GREEDY)
    assert calls == [chosen] * 4
    calls.clear()
    model = counted(made(root / "experts", "perplexity"))
    model.generate(IDS[:1], **GREEDY)
    assert calls[:3] == ["a", "b", "c"]
    assert len(calls) == 6
    assert len(set(calls[3:])) == 1


@pytest.mark.parametrize("embeddings", ["own", "shared"])
def test_beams_and_samples(root: Path, embeddings: str) -> None:
    """Beams carry the caches of their experts along: the same as reading all tokens again."""
    model = opened(root / "experts", "router", embeddings, top=2)
    ids, mask = torch.tensor([[0, 0, 5, 9, 30], [7, 100, 3, 60, 12]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    options = GREEDY | {"num_beams": 3, "max_new_tokens": 8, "num_return_sequences": 2}
    cached, again = (model.generate(ids, mask, use_cache=cache, **options) for cache in (True, False))
    assert cached.shape == (4, 13)
    assert torch.equal(cached, again)
    drawn = []
    for cache in (True, False):
        torch.manual_seed(0)
        drawn.append(
            model.generate(ids, mask, use_cache=cache, **GREEDY | {"do_sample": True, "num_return_sequences": 3})
        )
    assert torch.equal(*drawn)
    assert len({tuple(row) for row in drawn[0].tolist()}) > 2


def test_a_text_ends_where_one_expert_would_end_it(root: Path, tmp_path: Path) -> None:
    for name, end in (("a", 1), ("b", 7)):
        make_model(tmp_path / name, 1, eos_token_id=end)
    model = opened(tmp_path)
    assert model.model.generation_config.eos_token_id == [1, 7]
    one = opened(root / "experts")
    assert one.model.generation_config.eos_token_id == [1]


def test_top_softmax() -> None:
    scores = torch.tensor([1.0, 3.0, 3.0, 2.0])
    assert top_softmax(scores, 1).tolist() == [0, 1, 0, 0]
    torch.testing.assert_close(top_softmax(scores, 2), torch.tensor([0.0, 0.5, 0.5, 0.0]))
    torch.testing.assert_close(top_softmax(scores, None), scores.softmax(0))
    assert torch.equal(top_softmax(scores, 9), scores.softmax(0))


def test_perplexity_of_padding_counts_for_nothing() -> None:
    logits = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    ids, mask = torch.tensor([[0, 0, 3, 5]]), torch.tensor([[0, 0, 1, 1]])
    found = inverse_perplexities(torch.cat([logits[:, :2] * float("nan"), logits[:, 2:]], 1), ids, mask)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, 1.0, float(logits[0, 2].softmax(-1)[5])]]))


def test_least_squares_and_averages() -> None:
    draw = torch.Generator().manual_seed(0)
    shared, own = torch.randn(50, 6, generator=draw), torch.randn(50, 4, generator=draw)
    torch.testing.assert_close(least_squares(shared, own), torch.linalg.lstsq(shared, own).solution)
    average = mean_table([shared, own])
    torch.testing.assert_close(average[:, :4], (shared[:, :4] + own) / 2)
    torch.testing.assert_close(average[:, 4:], shared[:, 4:] / 2)
    # columns that repeat others leave a choice, and no error
    twice = torch.cat([shared, shared], 1)
    torch.testing.assert_close(
        twice @ least_squares(twice, own), shared @ least_squares(shared, own), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(NonFiniteError, match="least squares between the embeddings or heads"):
        least_squares(shared * float("nan"), own)


@pytest.mark.parametrize("embeddings", ["own", "shared"])
def test_a_router_from_text_is_kept(root: Path, embeddings: str) -> None:
    out = root / "experts"
    model = UnequalModel(out, MixtureSettings("router", embeddings, 2))
    model.fit(LISTS, length=16)
    found = [model.weights(torch.tensor([model.tokenizer(text)["input_ids"][:8]])) for text in TEXTS.values()]
    assert torch.cat(found).argmax(1).tolist() == [0, 1, 2]
    assert torch.cat(found).max(1).values.min() > 0.6
    file = model.save()
    assert file == out / GATES_FILE
    again = UnequalModel(out)
    assert again.settings == model.settings
    assert torch.equal(again.logits(IDS), model.logits(IDS))
    file.unlink()


@pytest.mark.parametrize(("by", "embeddings"), [("router", "own"), ("router", "shared"), ("perplexity", "shared")])
def test_training_changes_router_and_projections_alone_and_helps(root: Path, by: str, embeddings: str) -> None:
    def fitted(training: Training | None) -> tuple[UnequalModel, list[float]]:
        model = UnequalModel(root / "experts", MixtureSettings(by, embeddings))
        return model, model.fit(LISTS, length=16, training=training)

    before, _ = fitted(None)
    training = Training(2, rate=0.05, batch=3)
    after, losses = fitted(training)
    assert len(losses) == 2
    assert losses[-1] < losses[0]
    assert losses == fitted(training)[1]
    for name, tensor in after.model.state_dict().items():
        assert torch.equal(tensor, before.model.state_dict()[name])
    if by == "router":
        assert before.model.router is not None
        assert after.model.router is not None
        assert not torch.equal(after.model.router[0], before.model.router[0])
    if embeddings == "shared":
        assert before.model.tables is not None
        assert after.model.tables is not None
        for name in ("into", "out"):
            for ours, theirs in zip(getattr(after.model.tables, name), getattr(before.model.tables, name), strict=True):
                assert not torch.equal(ours, theirs)
        assert torch.equal(after.model.tables.embedding, before.model.tables.embedding)


def test_an_evaluation_weights_each_token_by_those_before_it(root: Path, tmp_path: Path) -> None:
    out = root / "experts"
    model = UnequalModel(out, MixtureSettings("perplexity", "own", 2))
    file = model.save()
    question = {"context": "the cat sat", "choices": [" on a mat", " größere"], "gold": 0}
    (tmp_path / "q.jsonl").write_text(json.dumps(question), encoding="utf-8")
    found = evaluate([f"m={out}#gates"], [root / "a.txt", tmp_path / "q.jsonl"], dtype="float32", context=16, limit=1)
    outcome = found.outcomes["m"]["a"]
    ids = model.tokenizer((root / "a.txt").read_text())["input_ids"][:17]
    logits = model.logits(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    bits = -sum(float(logits[t, ids[t + 1]]) for t in range(16)) / torch.tensor(2.0).log().item()
    nbytes = len(model.tokenizer.decode(ids[1:]).encode())
    assert outcome.metrics["bits_per_byte"].value == pytest.approx(bits / nbytes, rel=1e-5)
    assert sum(outcome.chosen.values()) == 1
    assert found.right("m", "a") in (0.0, 1.0)
    # of a question, the weights are those of its context
    context = model.tokenizer(question["context"])["input_ids"]
    weights = model.weights(torch.tensor([context]))
    scores = []
    for choice in question["choices"]:
        ids = model.tokenizer(question["context"] + choice)["input_ids"]
        logits = model.model(torch.tensor([ids]), weights=weights).logits[0].log_softmax(-1)
        scores.append(sum(float(logits[t, ids[t + 1]]) for t in range(len(context) - 1, len(ids) - 1)))
    assert found.outcomes["m"]["q"].columns["loglikelihood"][0] == pytest.approx(scores, rel=1e-4)
    file.unlink()


def test_an_expert_that_gives_nan_is_named(root: Path) -> None:
    model = made(root / "experts", "perplexity")
    with torch.no_grad():
        model.model.experts[1].model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="b: gives NaN for this text, so it has no perplexity"):
        model.logits(IDS)


@torch.no_grad()
def test_bfloat16(root: Path) -> None:
    """A single expert has its own logits, bit for bit, in any dtype; experts are mixed in float32."""
    model = UnequalModel(root / "experts", MixtureSettings("perplexity", "own", 2), dtype=torch.bfloat16)
    outputs = [expert(IDS).logits[..., :300] for expert in model.model.experts]
    model.task = "a"
    assert torch.equal(model.logits(IDS), outputs[0])
    model.task = None
    every = model.model.weights_so_far(IDS, None)
    wanted = sum(every[..., k, None] * output.float() for k, output in enumerate(outputs))
    assert torch.equal(model.logits(IDS), wanted.bfloat16())
    shared = UnequalModel(root / "experts", MixtureSettings("perplexity", "shared", 2), dtype=torch.bfloat16)
    assert shared.logits(IDS).dtype == torch.bfloat16
