import pytest
import torch

from merganser.engine import run
from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.engine.merge import merge
from merganser.methods.opcm import add_projected, divisor, opcm
from tests.making import make_recipe, read_model, write_llamas
from tests.methods.spectra import BARS, KINDS, SHAPES, make_matrices, steps
from tests.methods.whole_model import merge_whole_model
from tests.reference.opcm import opcm as reference


@pytest.mark.parametrize("alpha", [0.5, 0.0, 0.9, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 5])
def test_reaches_the_bar(alpha, kind, n):
    for shape in SHAPES:
        base, models = make_matrices(shape, n, kind)
        narrow = [tensor.float() for tensor in (base, *models)]
        merged = merge_tensor(opcm, narrow[0], narrow[1:], {"alpha": alpha}, dtype=torch.float64, compute=torch.float32)
        (expected,), _ = reference([(narrow[0], narrow[1:])], alpha=alpha)
        error = (merged - expected).norm() / (expected - base).norm()
        assert error <= BARS[kind], (shape, error)


def test_the_scale_is_that_of_the_whole_model():
    shapes = [(40, 64), (30, 30)]
    tensors = [make_matrices(shape, 4, "random", seed=i, size=10.0**-i) for i, shape in enumerate(shapes, 1)]
    # in the second, later models take back what the first one brought: its own norm would be another
    base, models = tensors[1]
    tensors[1] = (base, [models[0], *(base - (model - base) / 5 for model in models[:3])])
    tensors = [(base.float(), [model.float() for model in models]) for base, models in tensors]
    found = merge_whole_model(opcm, tensors, {"alpha": 0.4})
    expected, _ = reference(tensors, alpha=0.4)
    alone, _ = reference(tensors[1:], alpha=0.4)
    for merged, wanted, (base, _) in zip(found, expected, tensors, strict=True):
        assert (merged - wanted).norm() <= 1e-3 * (wanted - base).norm()
    assert (found[1] - alone[0]).norm() > 0.05 * (alone[0] - tensors[1][0]).norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_added_is_at_right_angles_to_what_is_there(shape):
    base, (first, second) = make_matrices(shape, 2, "random")
    there, delta = first - base, second - base
    for alpha in (0.0, 0.3, 1.0):
        added = add_projected(there, delta, torch.tensor(alpha)) - there
        assert abs(float((added * there).sum())) <= 1e-12 * float(there.norm() * delta.norm())
        u, s, vh = torch.linalg.svd(there, full_matrices=False)
        inner = u.T @ added @ vh.T
        block = int((s.cumsum(0) <= alpha * s.sum() * (1 + 1e-9)).sum())
        assert inner.diagonal().abs().max() <= 1e-12
        assert block == 0 or inner[:block, :block].abs().max() <= 1e-12
        if alpha == 0.3:
            assert block > 1
            # nothing else goes
            mask = torch.eye(len(s), dtype=torch.bool)
            mask[:block, :block] = True
            torch.testing.assert_close(inner[~mask], (u.T @ delta @ vh.T)[~mask])
        torch.testing.assert_close(added - u @ inner @ vh, delta - u @ (u.T @ delta @ vh.T) @ vh)


def test_the_norm_is_the_mean_of_all_norms():
    base, models = make_matrices((30, 50), 5, "random")
    models = [base + (i + 1) * (model - base) for i, model in enumerate(models)]
    mean = sum((model - base).norm() for model in models) / 5
    torch.testing.assert_close(steps(opcm, base, models).norm(), mean)


def test_one_model_is_that_model_and_so_are_equal_ones():
    base, (model, other) = make_matrices((30, 50), 2, "random")
    for models in ([model], [model] * 4):
        torch.testing.assert_close(merge_tensor(opcm, base, models), model, rtol=1e-9, atol=1e-12)
    assert torch.equal(merge_tensor(opcm, base, [base, base]), base)
    # the norm of the mean: half
    torch.testing.assert_close(steps(opcm, base, [base, other]), (other - base) / 2, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(steps(opcm, base, [model, base]), (model - base) / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("split", [1, 2, 3])
def test_a_later_merge_goes_on_from_an_earlier_one(split):
    base, models = make_matrices((30, 50), 4, "random")
    models = [base + (i + 1) * (model - base) for i, model in enumerate(models)]
    whole = merge_tensor(opcm, base, models, {"alpha": 0.4})
    early = merge_tensor(opcm, base, models[:split], {"alpha": 0.4})
    _, scale = reference([(base, models[:split])], alpha=0.4)
    state = {"merged": split, "scale": scale}
    later = merge_tensor(opcm, base, [early, *models[split:]], {"alpha": 0.4, **state})
    torch.testing.assert_close(later, whole, rtol=1e-9, atol=1e-12)
    if split > 1:
        forgotten = merge_tensor(opcm, base, [early, *models[split:]], {"alpha": 0.4})
        assert (forgotten - whole).norm() > 0.05 * (whole - base).norm()


def test_order_matters():
    base, models = make_matrices((30, 50), 3, "random")
    there, back = (steps(opcm, base, order) for order in (models, models[::-1]))
    assert (there - back).norm() > 0.05 * there.norm()


def test_divisor_by_hand():
    # norms 3 and 1 of task vectors, 4 of their sum: mean 2
    assert divisor(torch.tensor([9.0, 1.0, 16.0], dtype=torch.float64), 1).item() == 2
    # the first stands for three models: mean (3 * 3 + 1) / 4
    assert divisor(torch.tensor([9.0, 1.0, 16.0], dtype=torch.float64), 3).item() == 1.6
    assert divisor(torch.zeros(3, dtype=torch.float64), 1).item() == 1


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_turning_rows_or_columns_turns_the_merge(shape):
    base, models = make_matrices(shape, 3, "random")
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0] for k in shape)
    turned = steps(opcm, left @ base @ right, [left @ model @ right for model in models])
    torch.testing.assert_close(turned, left @ steps(opcm, base, models) @ right, rtol=1e-7, atol=1e-11)


def test_many_models_and_scales():
    base, models = make_matrices((9, 7), 16, "random")
    found = steps(opcm, base, models)
    assert torch.isfinite(found).all()
    zero, deltas = torch.zeros(9, 7), [(model - base).float() for model in models]
    once = merge_tensor(opcm, zero, deltas)
    torch.testing.assert_close(merge_tensor(opcm, zero, [delta * 2.0**-60 for delta in deltas]) * 2.0**60, once)


def test_a_merge_on_disk_goes_on_from_what_its_record_says(tmp_path):
    base, *paths = write_llamas(tmp_path, 5)
    whole = merge(make_recipe("opcm", paths, base), tmp_path / "whole")
    early = merge(make_recipe("opcm", paths[:2], base), tmp_path / "early")
    scale = early.record["statistics"]["scale_after"]
    assert 1 < scale < 2
    state = {"merged": 2, "scale": scale}
    later = merge(make_recipe("opcm", [early.out, *paths[2:]], base, state), tmp_path / "later")
    assert later.record["statistics"]["scale_after"] == pytest.approx(
        whole.record["statistics"]["scale_after"], rel=1e-6
    )
    expected, found, start = (read_model(path) for path in (whole.out, later.out, base))
    for name in expected:
        if "proj" in name:
            step = (expected[name] - start[name]).norm()
            assert (found[name] - expected[name]).norm() <= 1e-5 * step
    # the norm over all matrices is the mean of those of the models
    matrices = [name for name in start if "proj" in name]
    norms = [
        sum(float((read_model(path)[name] - start[name]).square().sum()) for name in matrices) ** 0.5
        for path in (*paths, whole.out)
    ]
    assert norms[-1] == pytest.approx(sum(norms[:-1]) / 4, rel=1e-5)


def test_the_record_of_a_continued_run_tells_the_scale(tmp_path, monkeypatch):
    def stopped(*arguments, **keys):
        raise KeyboardInterrupt

    base, *paths = write_llamas(tmp_path, 3)
    recipe = make_recipe("opcm", paths, base)
    whole = merge(recipe, tmp_path / "whole")
    # when every tensor is written
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_rest", stopped)
        with pytest.raises(run.Interrupted):
            merge(recipe, tmp_path / "out")
    again = merge(recipe, tmp_path / "out")
    assert again.record["statistics"] == whole.record["statistics"]
    assert again.record["continued"]
