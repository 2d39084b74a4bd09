"""Restore tensors in memory, compare with float64 references, and try inputs on which a factor is 0."""

import torch

from merganser.engine.sidecars.tensor import make_sidecar, restore_tensor
from tests.methods.bars import BFLOAT16, FLOAT32, error


def restored(method, base, models, parameters=None):
    """Return the shared tensor, and what is restored of each model."""
    made = make_sidecar(method, base, models, parameters)
    return made.merged, [restore_tensor(method, made, i, base, parameters) for i in range(len(models))]


def stored_bytes(method, base, models, parameters=None):
    """Return what is stored for one task, and for all of them, in bytes."""
    made = make_sidecar(method, base, models, parameters)

    def total(parts):
        return sum(part.numel() * part.element_size() for part in parts.values())

    return total(made.tasks[0]), total(made.shared)


def assert_restores(method, reference, base, models, parameters=None):
    """Assert the bars of elementwise methods for what is restored; the reference starts from the tensor as written."""
    parameters = parameters or {}
    for dtype in (torch.float32, torch.bfloat16):
        start, own = base.to(dtype), [model.to(dtype) for model in models]
        merged, found = restored(method, start, own, parameters)
        wide = [tensor.double() for tensor in own]
        expected = reference(start.double(), wide, merged.double(), **parameters)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == dtype
            once = error(other.bfloat16(), other)
            bar = FLOAT32 if dtype == torch.float32 else BFLOAT16 * once
            assert error(one, other) <= bar, f"{method.name} in {dtype}, {parameters}"


def assert_bears_degenerate_inputs(method, parameters=None):
    """Models that are equal, zero, of rank 1, many, or one come back finite, and equal ones alike."""
    generator = torch.Generator().manual_seed(0)
    for shape in [(24, 16), (16, 24), (7,), (2, 9, 5)]:
        base = torch.randn(shape, generator=generator)
        delta = torch.randn(shape, generator=generator) * 0.1
        lonely = torch.zeros(shape)
        lonely.view(-1)[3] = 1.0
        outer = delta if len(shape) != 2 else torch.outer(delta[:, 0], delta[0])
        tried = {
            "one model": [delta],
            "equal models": [delta, delta, delta],
            "no change": [torch.zeros(shape)] * 3,
            "one without change": [delta, torch.zeros(shape), -delta],
            "rank 1": [outer, 2 * outer, outer.flip(0)],
            "one entry": [lonely, lonely, delta],
            "opposite": [delta, -delta],
            "sixteen": [torch.randn(shape, generator=generator) * 0.1 for _ in range(16)],
        }
        for what, deltas in tried.items():
            models = [base + each for each in deltas]
            _, found = restored(method, base, models, parameters)
            assert all(torch.isfinite(each).all() for each in found), f"{method.name}: {what}, {shape}"
            for i, one in enumerate(models):
                for k, other in enumerate(models):
                    if torch.equal(one, other):
                        torch.testing.assert_close(found[i], found[k], rtol=0, atol=1e-6)
                if torch.equal(one, base) and what == "no change":
                    assert torch.equal(found[i], base), f"{method.name}: {what}, {shape}"
