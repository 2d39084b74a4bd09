"""Task vectors of the kinds that methods for matrices must bear, and the bar they are held to."""

import torch

from merganser.engine.kernels.merge_tensor import merge_tensor

KINDS = ["random", "low rank", "conditioned", "shared"]
SHAPES = [(40, 64), (64, 40), (48, 48), (16, 96)]
BARS = {"random": 1e-3, "low rank": 1e-3, "conditioned": 1e-2, "shared": 1e-3}


def make_matrices(shape, n, kind, *, seed=0, size=1e-3):
    """Make a base and fine-tunes of one matrix.

    Args:
        shape: Rows and columns.
        n: Number of models.
        kind: "random"; "low rank" (rank 3 each); "conditioned" (singular values from 1 to 1e-6); "shared" (the same
            right singular vectors, from 1 to 1e-3).
        seed: Of the draws.
        size: Root mean square of the task vectors, where weights have 0.03.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def orthonormal(rows, columns):
        return torch.linalg.qr(draw(rows, columns))[0]

    r = min(shape)
    common = orthonormal(shape[1], r)
    base = draw(*shape) * 0.03
    models = []
    for _ in range(n):
        if kind == "random":
            delta = draw(*shape)
        elif kind == "low rank":
            delta = draw(shape[0], 3) @ draw(3, shape[1])
        elif kind == "conditioned":
            values = torch.logspace(0, -6, r, dtype=torch.float64)
            delta = orthonormal(shape[0], r) * values @ orthonormal(shape[1], r).T
        else:
            values = torch.logspace(0, -3, r, dtype=torch.float64)
            delta = orthonormal(shape[0], r) * values @ common.T
        models.append(base + delta * size / delta.square().mean().sqrt())
    return base, models


def step_error(method, reference, base, models, parameters=None, dtype=torch.float32):
    """Merge numbers of a dtype, and compare how the base moved with float64: norm of the error over norm of the step."""
    parameters = parameters or {}
    base, models = base.to(dtype), [model.to(dtype) for model in models]
    wide = [tensor.double() for tensor in models]
    merged = merge_tensor(method, base, models, parameters, dtype=torch.float64, compute=dtype)
    expected = reference(base.double(), wide, **parameters)
    return float((merged - expected).norm() / (expected - base.double()).norm().clamp(min=1e-300))


def steps(method, base, models, parameters=None):
    """Return how a merge moves the base, float64."""
    return merge_tensor(method, base, models, parameters or {}, dtype=torch.float64) - base
