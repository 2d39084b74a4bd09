"""Shares of numbers, and the highest of scores: the same on any machine."""

from fractions import Fraction

import pytest
import torch

from merganser.runtime import LAYERS, aim, holitom
from merganser.runtime.merging import highest
from merganser.runtime.options import part
from merganser.runtime.tokens.plan import Plan


@pytest.mark.parametrize(
    ("count", "share", "down", "up"),
    [(100, 0.07, 7, 7), (100, 0.29, 29, 29), (50, 0.14, 7, 7), (7, 0.5, 3, 4), (9, 1, 9, 9), (10**6, 1e-05, 10, 10)],
)
def test_a_share_is_what_it_reads_as(count, share, down, up):
    assert (part(count, share), part(count, share, up=True)) == (down, up)
    assert part(count, Fraction(share)) in (down, down - 1)


def test_shares_of_tokens_and_frames():
    # in floating point 100 * 0.07 is above 7, and 100 - 100 * 0.55 below 45
    features = torch.randn(1, 100, 4, generator=torch.Generator().manual_seed(0))
    assert aim(features, 0.07).features.shape == (1, 7, 4)
    assert len(holitom(features, 0.07).features) == 7
    assert Plan(None, 0.55, 1).number(0, 100) == 45


def test_of_equal_scores_the_first_is_taken():
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]])
    assert highest(scores, 4).tolist() == [[1, 3, 2, 4]]
    assert highest(scores, 0).shape == (1, 0)


@pytest.mark.parametrize("method", ["snapkv", "kvmerger"])
def test_a_pooled_maximum_has_equal_scores(method):
    """The row of a batch keeps what it keeps alone, however many entries share the score at the edge of the budget."""
    draw = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(40, 2, 90, 8, generator=draw), 2 * torch.randn(40, 4, 4, 8, generator=draw)
    options = {"budget": 30, "sinks": 2, "window": 4, "pool": 9}
    every = LAYERS[method](**options)
    every.observe(queries, 0.35)
    every.update(keys, keys)
    for row in (0, 17, 39):
        alone = LAYERS[method](**options)
        alone.observe(queries[row : row + 1], 0.35)
        alone.update(keys[row : row + 1], keys[row : row + 1])
        torch.testing.assert_close(every.keys[row : row + 1], alone.keys)
