import pytest
import torch

from merganser.ops.linalg.spectral import (
    has_more_below,
    joined,
    left_basis,
    nuclear_norm,
    orthogonalised,
    polar,
    rank_tolerance,
    self_product,
    svd,
)

RANK = 2.0**-22


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_values(m, n, values, seed=0):
    """Make a float32 matrix whose singular values are these, to rounding."""
    k = len(values)
    left = torch.linalg.qr(random(m, k, seed=seed).double()).Q
    right = torch.linalg.qr(random(n, k, seed=seed + 1).double()).Q
    return (left * torch.as_tensor(values, dtype=torch.float64) @ right.T).float()


def condition(power, n=300):
    return with_values(n + 60, n, torch.logspace(0, -power, n, dtype=torch.float64))


def decompose(matrix, tolerance=RANK):
    """Decompose in float64, for comparison."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = values > tolerance * values[:1]
    return left[:, kept], values[kept], right[kept].T


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


ORDINARY = {
    "square": lambda: random(300, 300),
    "tall": lambda: random(400, 150),
    "wide": lambda: random(150, 400),
    "tiny": lambda: random(5, 7),
    "row": lambda: random(1, 200),
    "column": lambda: random(200, 1),
    "heavy tails": lambda: random(300, 250) ** 3,
    "rank 1": lambda: random(300, 1) @ random(1, 200, seed=1),
    "rank 8": lambda: random(300, 8) @ random(8, 200, seed=1),
    "rank 150 of 200": lambda: random(300, 150) @ random(150, 200, seed=1),
    "orthonormal": lambda: with_values(300, 200, [1.0] * 200),
    "one large": lambda: with_values(300, 200, [1.0] + [1e-4] * 199),
    "half tiny": lambda: with_values(300, 200, [1.0] * 100 + [1e-6] * 100),
    "graded": lambda: random(300, 250) * torch.logspace(0, -2, 250),
    "equal columns": lambda: random(300, 1).expand(300, 40).contiguous(),
    "1e3": lambda: condition(3),
    "1e4": lambda: condition(4),
    "1e6": lambda: condition(6),
    "1e8": lambda: condition(8),
}


@pytest.fixture(params=ORDINARY)
def matrix(request):
    return ORDINARY[request.param]()


def test_polar_factor_is_that_of_a_float64_decomposition(matrix):
    left, values, right = decompose(matrix)
    found = polar(matrix)
    assert found.factor.shape == matrix.shape
    assert found.factor.dtype == torch.float32
    assert found.rank == len(values)
    assert error(found.factor, left @ right.T) < 1e-4
    torch.testing.assert_close(nuclear_norm(found.factor, matrix), values.sum(), rtol=2e-6, atol=0)


def test_triplets_are_those_of_a_float64_decomposition(matrix):
    left, values, right = decompose(matrix)
    found = svd(matrix)
    assert found.left.dtype == found.right.dtype == torch.float32
    assert found.values.dtype == torch.float64
    # near the border between the passes neighbours may be mixed
    torch.testing.assert_close(found.values, values, rtol=1e-2, atol=1e-6 * float(values[0]))
    assert error(found.left.double() * found.values @ found.right.T.double(), matrix.double()) < 1e-4
    assert error(found.left @ found.right.T, left @ right.T) < 1e-4
    unit = torch.eye(len(values))
    for vectors in (found.left, found.right):
        assert (vectors.T @ vectors - unit).norm() < 2e-4 * len(values) ** 0.5


@pytest.mark.parametrize("k", [0, 1, 20, 150, 1000])
@pytest.mark.parametrize("kind", ["square", "wide", "graded", "rank 8", "1e6", "tiny"])
def test_leading_triplets_are_the_truncation(kind, k):
    matrix = ORDINARY[kind]()
    left, values, right = (part[..., :k] for part in decompose(matrix))
    found = svd(matrix, k)
    assert [part.shape for part in found] == [left.shape, values.shape, right.shape]
    truncated = left * values @ right.T
    if k:
        assert error(found.left.double() * found.values @ found.right.T.double(), truncated) < 2e-4


def test_the_second_pass_is_taken_where_it_is_needed():
    # one direction of 1000 that is lost, or of arbitrary length, is an error of 3e-2
    for values in ([1.0] * 999 + [1e-5], [1.0] + [1e-3] * 998 + [1e-6]):
        matrix = with_values(1000, 1000, values)
        left, _, right = decompose(matrix)
        assert error(polar(matrix).factor, left @ right.T) < 1e-3


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_any_scale_is_as_good(scale):
    matrix = random(40, 30)
    scaled = matrix * scale
    # the numbers themselves are coarse among the denormal ones
    bound = 1e-2 if scale < 1e-38 else 1e-5
    torch.testing.assert_close(polar(scaled).factor, polar(matrix).factor, rtol=0, atol=bound)
    torch.testing.assert_close(svd(scaled).values / scale, svd(matrix).values, rtol=bound, atol=bound)


def test_scaling_by_a_power_of_two_changes_no_bit():
    matrix = random(300, 200)
    assert torch.equal(polar(matrix * 2.0**-40).factor, polar(matrix).factor)
    assert torch.equal(svd(matrix * 2.0**-40).left, svd(matrix).left)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (3, 40), (40, 3), (40, 40)])
def test_nothing_comes_of_nothing(shape):
    matrix = torch.zeros(shape)
    assert torch.equal(polar(matrix).factor, matrix)
    assert polar(matrix).rank == 0
    left, values, right = svd(matrix)
    assert (left.shape, values.shape, right.shape) == ((shape[0], 0), (0,), (shape[1], 0))


def test_a_number_has_its_sign():
    assert polar(torch.tensor([[-3.0]])).factor.tolist() == [[-1]]
    assert svd(torch.tensor([[-3.0]])).values.tolist() == [3]


def test_the_rank_follows_the_tolerance():
    matrix = with_values(100, 80, [1.0, 0.5, 1e-2, 1e-4, 1e-6, 1e-8])
    ranks = {tolerance: polar(matrix, tolerance=tolerance).rank for tolerance in (0.0, 1e-5, 1e-3, 0.2, 0.7)}
    assert ranks == {0.0: 5, 1e-5: 4, 1e-3: 3, 0.2: 2, 0.7: 1}
    assert {tolerance: len(svd(matrix, tolerance=tolerance).values) for tolerance in ranks} == ranks
    assert polar(matrix.double(), tolerance=0.2).rank == 2
    assert rank_tolerance(matrix) == RANK


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_what_counts_as_zero_does_not_tilt_the_rest(noise):
    matrix = with_values(300, 200, [1.0] * 5 + [0.006] * 5) + noise * random(300, 200)
    left, _, right = decompose(matrix, 1e-3)
    assert error(polar(matrix, tolerance=1e-3).factor, left @ right.T) < 1e-5


def test_float64_is_kept():
    matrix = with_values(100, 80, torch.logspace(0, -6, 80)).double()
    left, values, right = decompose(matrix)
    assert error(polar(matrix).factor, left @ right.T) < 1e-9
    found = svd(matrix, 10)
    torch.testing.assert_close(found.values, values[:10], rtol=1e-12, atol=0)
    assert found.left.dtype == torch.float64


def test_inputs_are_left_alone():
    for shape in ((30, 20), (20, 30)):
        matrix = random(*shape)
        before = matrix.clone()
        polar(matrix)
        svd(matrix)
        assert torch.equal(matrix, before)


def test_views_are_as_good_as_copies():
    wide = random(300, 400)
    view = wide[:, ::2]
    assert error(polar(view).factor, polar(view.contiguous()).factor.double()) < 1e-5


@pytest.mark.parametrize("shape", [(7, 5), (300, 512), (10, 513), (20, 1300), (4, 0)])
def test_a_self_product_is_symmetric_to_the_bit(shape):
    matrix = random(*shape)
    found = self_product(matrix)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.double(), matrix.double().T @ matrix.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["random", "rank 3", "graded", "1 row"])
def test_a_left_basis_is_that_of_all_side_by_side(kind):
    parts = [random(60, 30, seed=1), random(60, 50, seed=2)]
    if kind == "rank 3":
        parts = [random(60, 3) @ random(3, 30, seed=i) for i in (1, 2)]
    elif kind == "graded":
        parts = [torch.logspace(0, -5, 60)[:, None] * part for part in parts]
    elif kind == "1 row":
        parts = [part[:1] for part in parts]
    left, values, _ = decompose(torch.cat(parts, dim=1))
    found = left_basis(parts, 0.0)
    # but for their signs
    assert (found.double().T @ left).diagonal().abs().min() > 1 - 1e-6
    assert found.shape == left.shape
    middle = 1.001 * float(values[len(values) // 2])
    assert left_basis(parts, middle).shape[1] == (values > middle).sum()


def test_a_left_basis_of_nothing_is_empty():
    assert left_basis([torch.zeros(4, 5)], 0.0).shape == (4, 0)
    assert left_basis([torch.zeros(0, 5)], 0.0).shape == (0, 0)
    assert left_basis([torch.zeros(4, 0)], 0.0).shape == (4, 0)


def test_frames_are_made_orthogonal_and_what_they_share_is_left_out():
    one, two = (torch.linalg.qr(random(50, 10, seed=seed)).Q for seed in (1, 2))
    found = orthogonalised([one, two])
    left, _, right = decompose(torch.cat([one, two], dim=1))
    assert error(found, left @ right.T) < 1e-5
    twice = orthogonalised([one, one])
    torch.testing.assert_close(twice, torch.cat([one, one], dim=1) / 2**0.5)
    nearly = torch.linalg.qr(one + 2e-6 * two).Q
    nearly = nearly * (nearly * one).sum(0).sign()
    torch.testing.assert_close(orthogonalised([one, nearly]), twice, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-20])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (20, 30)])
@pytest.mark.parametrize("power", [1, 1.5])
@pytest.mark.parametrize("bound", [0.15, 0.6])
def test_what_is_below_a_bound_is_compared_without_vectors(bound, power, shape, scale):
    values = torch.logspace(0, -power, min(shape), dtype=torch.float64)
    matrix = with_values(*shape, values) * scale
    below = float(values[values < bound].square().sum()) * scale**2
    assert has_more_below(matrix, bound * scale, 0.95 * below)
    assert not has_more_below(matrix, bound * scale, 1.01 * below)


def test_what_float32_does_not_resolve_is_not_compared():
    values = torch.full((200,), 1e-3, dtype=torch.float64)
    values[0] = 1
    matrix = with_values(300, 200, values)
    assert not has_more_below(matrix, 2e-3, 1e-5)
    assert not has_more_below(matrix, 2e-9, 0.0)
    values[0] = 0.05
    assert has_more_below(with_values(300, 200, values), 2e-3, 1e-5)
    assert not has_more_below(torch.zeros(30, 20), 1.0, 0.0)


def test_joined_parts_keep_their_values():
    parts = [svd(random(50, 40, seed=seed), 5) for seed in (1, 2)]
    values = torch.linalg.svdvals(joined([parts[0], parts[1]._replace(values=-parts[1].values)]).double())
    expected = torch.cat([part.values for part in parts]).sort(descending=True).values
    torch.testing.assert_close(values[:10], expected, rtol=1e-5, atol=0)
    assert values[10] < 1e-5


@pytest.mark.parametrize("failures", [1, 2])
def test_what_does_not_converge_is_tried_turned_and_upside_down(failures, monkeypatch):
    # as LAPACK does of some projections; which ones depends on the library
    whole, tries = torch.linalg.svd, []

    def fails_first(matrix, **given):
        tries.append(matrix.shape)
        if len(tries) <= failures:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return whole(matrix, **given)

    monkeypatch.setattr(torch.linalg, "svd", fails_first)
    matrix = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = svd(matrix)
    assert tries == [(7, 5), (5, 7), (7, 5)][: failures + 1]
    torch.testing.assert_close(found.left * found.values @ found.right.T, matrix)
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(5, dtype=torch.float64))


def test_what_is_not_finite_is_still_refused():
    with pytest.raises(torch.linalg.LinAlgError):
        svd(torch.full((3, 3), float("nan"), dtype=torch.float64))
