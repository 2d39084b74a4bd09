"""Task vectors beside a base of zeros, so that what is merged is exact, and the error of what comes of them."""

import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from tests.methods.spectra import KINDS, make_matrices

__all__ = ["KINDS", "make_vectors", "merged_vector", "rotated", "vector_error"]


def make_vectors(shape, n, kind, *, seed=0):
    """Make task vectors, float32; low ranks and condition numbers are exact, but for the rounding of the entries."""
    base, models = make_matrices(shape, n, kind, seed=seed, size=1.0)
    return [(model - base).float() for model in models]


def merged_vector(method, vectors, parameters=None):
    """Merge task vectors beside a base of zeros, in float32."""
    return merge_tensor(method, torch.zeros_like(vectors[0]), vectors, parameters or {})


def vector_error(method, reference, vectors, parameters, *, base=None):
    """Return the norm of the error of the merged task vector over the norm of the reference's."""
    base = torch.zeros_like(vectors[0]) if base is None else base
    models = [base + vector for vector in vectors]
    merged = merge_tensor(method, base, models, parameters).double()
    expected = reference(base, models, **parameters)
    return float((merged - expected).norm() / (expected - base.double()).norm().clamp(min=1e-300))


def rotated(n, seed=5):
    """Return an orthogonal matrix, float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q.float()
