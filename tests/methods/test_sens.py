"""Sens-Merging against its reference, and what follows from its definition."""

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.method import Location
from merganser.methods.sens import sens
from merganser.methods.task_arithmetic import task_arithmetic
from tests.methods.spectra import make_matrices
from tests.reference.sens import sens as reference

LAYERS = [None, 0, 0, 1, 2, None]
PLACES = [Location("before"), *(Location("layer", layer, 3) for layer in (0, 0, 1, 2)), Location("after")]
# sensitivity of three models in each of six tensors
MEASURED = [[0.5, 2.0, 1.0, 0.1, 0.2, 0.3], [0.1, 0.1, 0.1, 5.0, 0.1, 0.1], [7.0, 1.0, 2.0, 3.0, 4.0, 5.0]]


def tables():
    found = []
    for measured in MEASURED:
        table = {}
        for layer, value in zip(LAYERS, measured, strict=True):
            table[layer] = table.get(layer, 0.0) + value
        found.append(table)
    return found


def case():
    made = [make_matrices((5, 7), 3, "random", seed=seed) for seed in range(len(LAYERS))]
    return [base for base, _ in made], [[models[k] for _, models in made] for k in range(3)]


def merged(base, models, **parameters):
    return [
        merge_tensor(
            sens, base[i], [own[i] for own in models], parameters, location=place, data={"sensitivity": tables()}
        )
        for i, place in enumerate(PLACES)
    ]


@pytest.mark.parametrize(
    "parameters",
    [{}, {"temperature": 0.05}, {"temperature": 0.1, "transfer": [1.0, 0.0, 4.0], "lambda": 0.4}],
    ids=str,
)
def test_agrees_with_the_reference(parameters):
    base, models = case()
    expected = reference(base, models, LAYERS, MEASURED, **parameters)
    for found, own in zip(merged(base, models, **parameters), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-12, atol=1e-15)


def test_a_high_temperature_gives_the_sum():
    base, models = case()
    for i, found in enumerate(merged(base, models, temperature=1e12)):
        total = merge_tensor(task_arithmetic, base[i], [own[i] for own in models], {"weight": 1.0, "normalize": False})
        torch.testing.assert_close(found, total, rtol=1e-9, atol=1e-12)


def test_a_low_temperature_gives_every_layer_to_one_model():
    base, models = case()
    found = merged(base, models, temperature=1e-4)
    # of the second model all sensitivity is in layer 1
    torch.testing.assert_close(found[3], base[3] + 3 * (models[1][3] - base[3]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1], base[1] + 3 * (models[0][1] - base[1]), rtol=1e-9, atol=1e-12)


def test_a_model_without_gradients_is_borne():
    base, models = case()
    none = [dict.fromkeys(LAYERS, 0.0), *tables()[1:]]
    found = merge_tensor(sens, base[0], [own[0] for own in models], data={"sensitivity": none})
    assert torch.isfinite(found).all()
