"""The steps of each cache against literal transcriptions in float64."""

import pytest
import torch

from merganser.runtime import LAYERS, MergedCache
from merganser.runtime.attention import queries_of, weights
from merganser.runtime.merging import fold, nearest, shares
from tests.reference.d2o import d2o
from tests.reference.ems import ems
from tests.reference.kv_scores import scores
from tests.reference.kvmerger import kvmerger
from tests.reference.snapkv import snapkv
from tests.runtime.making import KINDS, model, text

SIZES = {"budget": 12, "sinks": 2, "window": 4}
SCALING = 0.3


def filled(method, length=30, seed=0, **options):
    """A layer that has got keys, values and queries and has not compressed them: one row, two heads, two queries each."""
    layer = LAYERS[method](**SIZES, **options)
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, 2, length, 8, generator=generator)
    # neighbours that are alike, as real keys are
    keys = (keys + 2 * keys.cumsum(-2) / 3).contiguous()
    queries = torch.randn(1, 4, length, 8, generator=generator)
    layer.compress, compress = (lambda: None), layer.compress
    layer.observe(queries[:, :, -max(layer.queries_wanted(), 1) :], SCALING)
    layer.update(keys, values)
    layer.compress = compress
    return layer


def heads(layer):
    """Keys, values and queries of each key head, float64."""
    for head in range(2):
        queries = None if layer.queries is None else layer.queries[0, 2 * head : 2 * head + 2].double()
        yield head, layer.keys[0, head].double(), layer.values[0, head].double(), queries


def same(layer, head, expected):
    keys, values = (torch.stack([each[i] for each in expected]).float() for i in range(2))
    torch.testing.assert_close(layer.keys[0, head], keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.values[0, head], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_queries_give_the_weights_of_eager_attention(kind):
    made, tokens = model(kind, "eager"), text(24, rows=2)
    cache = MergedCache("snapkv", made, budget=64, sinks=2, window=6)
    found = made(tokens, past_key_values=cache, output_attentions=True)
    for layer, expected in zip(cache.layers, found.attentions, strict=True):
        if layer.is_sliding:
            continue
        expected = expected[:, :, -6:].unflatten(1, (2, 2)).mean(2).sum(2)
        torch.testing.assert_close(layer.window_scores(), expected, rtol=1e-4, atol=1e-5)


def test_scores():
    layer = filled("snapkv", length=150)
    queries = torch.randn(1, 4, 100, 8, generator=torch.Generator().manual_seed(5))
    found = weights(queries, layer.keys, SCALING, torch.full((1, 2, 150), 2.0).log())
    for head, keys, _, _ in heads(layer):
        expected = scores(queries[0, 2 * head : 2 * head + 2].double(), keys, SCALING)
        torch.testing.assert_close(found[0, head], torch.tensor(expected).float(), rtol=1e-4, atol=1e-5)


def test_snapkv():
    layer = filled("snapkv", pool=3)
    expected = [
        (keys[index], values[index])
        for head, keys, values, queries in heads(layer)
        for index in [snapkv(keys, queries, SCALING, **SIZES, pool=3)]
    ]
    layer.compress()
    for head in range(2):
        same(layer, head, list(zip(*expected[head], strict=True)))


@pytest.mark.parametrize("method", ["d2o", "ems", "kvmerger"])
def test_neighbours_of_what_is_attended_stay(method, monkeypatch):
    """Entries are chosen by the highest score around them; the window's scores do not count for those before it."""
    layer, seen = filled(method, pool=5), []
    scores, pooled = torch.rand(1, 2, 30, generator=torch.Generator().manual_seed(4)), layer.pooled
    found = pooled(scores)
    for t in range(26):
        expected = scores[..., max(t - 2, 0) : min(t + 3, 26)].amax(-1)
        assert torch.equal(found[..., t], expected)
    monkeypatch.setattr(layer, "pooled", lambda given: seen.append(given) or pooled(given))
    layer.compress()
    assert len(seen) == 1
    plain = filled(method)
    plain.compress()
    assert not torch.equal(layer.values, plain.values)


def test_streaming_llm():
    layer = filled("streaming_llm")
    keys = layer.keys
    layer.compress()
    assert torch.equal(layer.keys, torch.cat((keys[:, :, :2], keys[:, :, -10:]), dim=2))


def test_knorm():
    layer = filled("knorm")
    keys = layer.keys[0]
    layer.compress()
    for head in range(2):
        shortest = sorted(range(2, 26), key=lambda t: float(keys[head, t].norm()))[:6]
        assert torch.equal(layer.keys[0, head], keys[head, [0, 1, *sorted(shortest), *range(26, 30)]])


@pytest.mark.parametrize("heavy", [0.0, 0.25, 0.5])
def test_kvmerger(heavy):
    layer = filled("kvmerger", heavy=heavy)
    counts = torch.randint(1, 4, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    layer.per_entry["counts"] = torch.tensor(counts, dtype=torch.float32).expand(1, 2, -1).clone()
    layer.seen = sum(counts)
    number = {0.0: 0, 0.25: 1, 0.5: 2}[heavy]
    expected = [
        kvmerger(keys, values, queries, SCALING, **SIZES, heavy=number, counts=counts)
        for _, keys, values, queries in heads(layer)
    ]
    layer.compress()
    for head in range(2):
        same(layer, head, expected[head])
        assert layer.per_entry["counts"][0, head].tolist() == [each[2] for each in expected[head]]


def test_kvmerger_values_stand_for_their_tokens():
    layer = filled("kvmerger", mass="values")
    layer.compress()
    assert layer.bias() is None
    counts = layer.per_entry["counts"]
    assert counts.max() > 1
    assert torch.equal(layer.seen_values(), layer.values * counts[..., None])


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_d2o(threshold):
    layer = filled("d2o", history=20)
    layer.threshold = None if threshold is None else torch.full((1, 2, 1), threshold)
    attention = layer.per_entry["attention"][0].double().tolist()
    expected = [
        d2o(keys, values, attention[head], **SIZES, beta=0.7, threshold=threshold)
        for head, keys, values, _ in heads(layer)
    ]
    layer.compress()
    for head in range(2):
        same(layer, head, expected[head][0])
        assert float(layer.threshold[0, head, 0]) == pytest.approx(expected[head][1], rel=1e-5)


@pytest.mark.parametrize("similarity", [-1.0, 0.6, 1.0])
def test_ems(similarity):
    layer = filled("ems", history=20, similarity=similarity)
    attention = layer.per_entry["attention"][0].double().tolist()
    chances = [min(30 - t, 20) for t in range(30)]
    assert layer.per_entry["chances"][0, 0].tolist() == chances
    expected = [
        ems(keys, values, queries, SCALING, attention[head], chances, **SIZES, similarity=similarity)
        for head, keys, values, queries in heads(layer)
    ]
    layer.compress()
    for head in range(2):
        same(layer, head, expected[head])


def test_ems_can_leave_keys_alone():
    layer, other = filled("ems", similarity=-1.0), filled("ems", similarity=-1.0, merge_keys=False)
    before = other.keys
    layer.compress()
    other.compress()
    assert torch.equal(layer.values, other.values)
    assert bool((other.keys[:, :, :, None] == before[:, :, None]).all(-1).any(-1).all())
    assert not torch.equal(layer.keys, other.keys)


def test_attention_is_summed_over_calls():
    made, tokens = model(attention="eager"), text(20)
    cache = MergedCache("d2o", made, budget=64)
    total = torch.zeros(1, 2, 20)
    for part, end in zip(tokens.split([12, 1, 7], dim=1), [12, 13, 20], strict=True):
        found = made(part, past_key_values=cache, output_attentions=True).attentions[1]
        total[..., :end] += found.unflatten(1, (2, 2)).mean(2).sum(2)
    torch.testing.assert_close(cache.layers[1].per_entry["attention"], total, rtol=1e-4, atol=1e-5)
    assert cache.layers[1].per_entry["chances"][0, 0].tolist() == list(range(20, 0, -1))


def test_shares_add_up_to_one():
    generator = torch.Generator().manual_seed(0)
    own, other = torch.rand(2, 3, 5, generator=generator), torch.rand(2, 3, 40, generator=generator)
    own[0, 0, :2] = 0
    target = torch.randint(1, 5, (2, 3, 40), generator=generator)
    mine, theirs = shares(own, other, target)
    torch.testing.assert_close(mine.scatter_add(-1, target, theirs), torch.ones(2, 3, 5))
    assert mine[0, 0, 0] == 1
    one = torch.ones(2, 3, 1, 8)
    folded = fold(one.expand(-1, -1, 5, -1), one.expand(-1, -1, 40, -1), mine, theirs, target)
    torch.testing.assert_close(folded, torch.ones(2, 3, 5, 8))


def test_nearest_is_a_cosine():
    keys = torch.tensor([[[[3.0, 0.0], [0.0, 2.0]]]])
    found, index = nearest(keys, torch.tensor([[[[0.0, 5.0], [1.0, 1.0]]]]))
    torch.testing.assert_close(found, torch.tensor([[[0.5**0.5, 1.0]]]))
    assert index.tolist() == [[[1, 0]]]


def test_queries_are_rotated_by_their_own_positions():
    made = model()
    attention, hidden = (
        made.model.layers[0].self_attn,
        torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0)),
    )
    embeddings = made.model.rotary_emb(hidden, torch.arange(9)[None])
    whole = queries_of(attention, hidden, embeddings, 9)
    torch.testing.assert_close(queries_of(attention, hidden, embeddings, 3), whole[:, :, -3:])
