"""ZipIt: the groups of units, and one tensor, given the groups. How they are measured is tested in tests/calibration."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from merganser.calibration.within.zipping import zip_units
from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.zipit import zipit
from tests.reference.zipit import zip_matrix, zipped


def similarity(count, n, seed, shared=1.0):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(200, n, generator=generator, dtype=torch.float64)
    rows = [shared * common + torch.randn(200, n, generator=generator, dtype=torch.float64) for _ in range(count)]
    return torch.from_numpy(np.corrcoef(torch.cat(rows, 1).T.numpy()))


def as_matrix(groups, n):
    return torch.nn.functional.one_hot(torch.as_tensor(np.asarray(groups)).reshape(-1).long(), n).double()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.125), (1.0, 1.0), (0.01, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_the_groups_are_those_of_the_reference(count, alpha, beta, shared):
    scores = similarity(count, 17, count, shared)
    expected = zip_matrix(scores, count, alpha, beta)
    found = as_matrix(zip_units(scores.numpy(), count, alpha, beta), 17)
    assert torch.equal(found, expected)


def test_units_that_match_one_to_one_are_paired_in_the_order_of_the_first_model():
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(300, 9))
    order = draw.permutation(9)
    scores = np.corrcoef(np.concatenate([rows, rows[:, order] + 0.1 * draw.normal(size=(300, 9))], 1).T)
    groups = zip_units(scores, 2, 0.3, 0.125)
    assert groups[0].tolist() == list(range(9))
    assert groups[1].tolist() == order.tolist()


@pytest.mark.parametrize("count", [2, 3])
def test_matrices_agree_with_the_reference(count):
    generator = torch.Generator().manual_seed(0)
    n, width = 11, 6
    groups = zip_units(similarity(count, n, 4).numpy(), count, 0.4, 0.5)
    hidden, channels = as_matrix(groups, n), as_matrix(np.tile(np.arange(width), count), width)
    up = [torch.randn(n, width, generator=generator, dtype=torch.float64) for _ in range(count)]
    down = [torch.randn(width, n, generator=generator, dtype=torch.float64) for _ in range(count)]
    bias = [torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(count)]
    own = [torch.from_numpy(each).double() for each in groups]
    same = torch.arange(width, dtype=torch.float64)

    def merged(models, data):
        return merge_tensor(zipit, None, models, data={"groups": data})

    rows = merged(up, [torch.cat([each, -1 - same]) for each in own])
    torch.testing.assert_close(rows, zipped(up, hidden, channels))
    columns = merged(down, [torch.cat([same, -1 - each]) for each in own])
    torch.testing.assert_close(columns, zipped(down, channels, hidden))
    # stored [inputs, outputs]
    turned = merged([each.T.contiguous() for each in down], [torch.cat([-1 - each, same]) for each in own])
    torch.testing.assert_close(turned, columns.T)
    expected = zipped([each[:, None] for each in bias], hidden, torch.ones(count, 1, dtype=torch.float64))
    torch.testing.assert_close(merged(bias, own), expected[:, 0])


def test_what_has_no_groups_is_averaged():
    models = [torch.randn(3, 4), torch.randn(3, 4)]
    for shaped in (models, [each[0] for each in models], [each[0, 0] for each in models]):
        torch.testing.assert_close(merge_tensor(zipit, None, shaped), (shaped[0] + shaped[1]) / 2)
