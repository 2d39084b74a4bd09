"""Task-KV: heads that keep everything, chosen for each text, and heads that keep little."""

import pytest
import torch

from merganser.errors import ParameterError, UnsupportedError
from merganser.runtime import MergedCache
from merganser.runtime.caches.task_kv import TaskKV
from tests.reference.task_kv import other_head, separator
from tests.runtime.making import model

SMALL = {"sinks": 2, "middle": 5, "window": 6}


def test_the_separator_and_what_stays():
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 3, 30, 8, generator=generator)
    queries = torch.randn(2, 6, 30, 8, generator=generator)
    attention = torch.nn.Module()
    attention.o_proj = torch.nn.Linear(48, 20)
    layer = TaskKV(share=0.34, **SMALL)
    layer.meet(attention)
    layer.observe(queries, 0.4)
    layer.update(keys, values)
    assert layer.held["whole keys"].shape[1] == 1
    projection = attention.o_proj.weight.detach().double()
    chosen = set()
    for row in range(2):
        last = queries[row, :, -6:].double()
        distance = separator(last, keys[row].double(), values[row].double(), 0.4, projection)
        far = [max(distance[2 * head : 2 * head + 2]) for head in range(3)]
        order = sorted(range(3), key=lambda head: -far[head])
        assert layer.order[row].tolist() == order
        chosen.add(order[0])
        assert torch.equal(layer.held["whole keys"][row, 0], keys[row, order[0]])
        for place, head in enumerate(order[1:]):
            stays = other_head(last[2 * head : 2 * head + 2], keys[row, head].double(), 0.4, **SMALL)
            assert torch.equal(layer.held["near keys"][row, place], keys[row, head, stays])
            assert torch.equal(layer.held["near values"][row, place], values[row, head, stays])
    # the rows of this batch differ in it, so that a choice for the whole batch would be seen
    assert len(chosen) == 2


def test_attention_sees_what_stays():
    """A query's output from what `update` and `bias` return is that over the entries that each head holds."""
    generator = torch.Generator().manual_seed(3)
    layer = TaskKV(share=0.34, **SMALL)
    attention = torch.nn.Module()
    attention.o_proj = torch.nn.Linear(48, 20)
    layer.meet(attention)
    layer.observe(torch.randn(2, 6, 30, 8, generator=generator), 0.4)
    layer.update(*torch.randn(2, 2, 3, 30, 8, generator=generator))
    bias, order, held = layer.bias(), layer.order, dict(layer.held)
    new = torch.randn(2, 2, 3, 1, 8, generator=generator)
    layer.observe(torch.randn(2, 6, 1, 8, generator=generator), 0.4)
    keys, values = layer.update(*new)
    query = torch.randn(8, generator=generator)
    logits = keys @ query
    logits[..., :-1] += bias
    found = (logits.softmax(-1)[..., None] * values).sum(-2)
    for row in range(2):
        for place, head in enumerate(order[row].tolist()):
            part, at = ("whole", 0) if place == 0 else ("near", place - 1)
            own_keys = torch.cat((held[f"{part} keys"][row, at], new[0][row, head]))
            own_values = torch.cat((held[f"{part} values"][row, at], new[1][row, head]))
            torch.testing.assert_close(found[row, head], (own_keys @ query).softmax(-1) @ own_values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, "share: must be a share from 0 to 1, not 1.5"),
        ({"share": True}, "share: must be a share from 0 to 1, not True"),
        ({"middle": -1}, "middle: must be a whole number of at least 0, not -1"),
        ({"window": 0}, "window: must be a whole number of at least 1, not 0"),
        ({"budget": 99}, "task_kv: 'budget' is not an option"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ParameterError) as error:
        MergedCache("task_kv", model(), **options)
    assert message in str(error.value)


def test_layers_need_a_model():
    with pytest.raises(UnsupportedError, match="heads are told apart by the queries of a model"):
        TaskKV(**SMALL).update(*torch.zeros(2, 1, 3, 20, 8))
