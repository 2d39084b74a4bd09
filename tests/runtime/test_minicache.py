"""MiniCache: layers in pairs."""

import pytest
import torch
from transformers import DynamicCache

from merganser.runtime import LAYERS, MergedCache
from merganser.runtime.caches.minicache import between
from tests.reference.minicache import minicache
from tests.runtime.making import model, text


def filled(parts, t=0.6, retained=0.1, rows=1):
    """Two layers that got keys and values in several calls, and what they got."""
    layers = LAYERS["minicache"].build(2, {"t": t, "retained": retained, "start": 0})
    states = torch.randn(2, 2, rows, 2, sum(parts), 8, generator=torch.Generator().manual_seed(0))
    for part in states.split(parts, dim=-2):
        for layer, (keys, values) in zip(layers, part, strict=True):
            layer.update(keys, values)
    return layers, states


@pytest.mark.parametrize(("t", "retained"), [(0.6, 0.1), (0.0, 0.0), (1.0, 0.5)])
def test_restored(t, retained):
    layers, states = filled([20, 1, 10], t, retained)
    assert [layer.kept() for layer in layers] == [31, 31]
    for stream in range(2):
        found = [layers[0].pair[stream].restored(i) for i in range(2)]
        for head in range(2):
            at = 0
            for part in (20, 1, 10):
                both = states[:, stream, 0, head, at : at + part].double()
                expected = minicache(both[0], both[1], t=t, apart=int(retained * part))
                for layer in range(2):
                    mine = torch.stack([each[layer] for each in expected]).float()
                    torch.testing.assert_close(found[layer][0, head, at : at + part], mine, rtol=1e-4, atol=1e-5)
                at += part


def test_lengths_are_kept_and_directions_have_length_one():
    layers, states = filled([30], retained=0.0)
    for layer in range(2):
        found = layers[layer].pair[0].restored(layer).norm(dim=-1)
        torch.testing.assert_close(found, states[layer, 0].norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_equal_and_opposite_directions():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[2.0, 0.0], [-3.0, 0.0], [0.0, 0.0], [1.0, 1e-6]])
    direction, cosine = between(a, b, 0.6)
    torch.testing.assert_close(direction, a, rtol=0, atol=1e-6)
    assert cosine.tolist() == [1.0, -1.0, 0.0, 1.0]


def test_everything_kept_apart_is_the_whole_cache():
    made, tokens = model(num_hidden_layers=5), text(30, rows=2)
    cache = MergedCache("minicache", made, retained=1.0)
    plain = DynamicCache(config=made.config)
    for part in tokens.split([20, 1, 9], dim=1):
        assert torch.equal(made(part, past_key_values=cache).logits, made(part, past_key_values=plain).logits)
    assert [layer.pair is None for layer in cache.layers] == [True, True, False, False, True]
    none = MergedCache("minicache", made, start=5)
    for part in tokens.split([20, 1, 9], dim=1):
        found = made(part, past_key_values=none).logits
    plain.crop(-9)
    assert torch.equal(found, made(tokens[:, 21:], past_key_values=plain).logits)


def test_within_a_model():
    made, tokens = model(num_hidden_layers=4), text(40, rows=2)
    cache = MergedCache("minicache", made)
    mask = torch.ones_like(tokens)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    first = made.generate(tokens, past_key_values=cache, **options)
    assert cache.kept() == [45] * 4
    assert cache.get_seq_length() == 45
    whole = 4 * 2 * 2 * 2 * 45 * 8 * 4
    # two layers whole; two with one direction, two lengths, and two tokens of the prompt apart with their places
    assert cache.stored_bytes() == whole // 2 + whole // 4 + 2 * 2 * 2 * (2 * 45 * 4 + 2 * (2 * 8 * 4 + 8))
    cache.reset()
    assert torch.equal(made.generate(tokens, past_key_values=cache, **options), first)


def test_rows_are_reordered():
    made, tokens = model(num_hidden_layers=4), text(30, rows=2)
    cache, other = MergedCache("minicache", made), MergedCache("minicache", made)
    made(tokens, past_key_values=cache)
    made(tokens.flip(0), past_key_values=other)
    cache.reorder_cache(torch.tensor([1, 0]))
    step = text(1, rows=2, seed=3)
    for _ in range(2):
        one, two = (made(step, past_key_values=each).logits for each in (cache, other))
        torch.testing.assert_close(one, two)
