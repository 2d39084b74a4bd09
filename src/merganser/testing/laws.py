"""The contract of merge methods: laws that every method must satisfy, whether ours or third-party.

A package that registers methods runs it in its own tests:

    import pytest
    from merganser.testing import contract
    from my_package import my_method

    @pytest.mark.parametrize("law", contract(my_method), ids=lambda law: law.__name__)
    def test_contract(law):
        law(my_method)

Each law is a plain function that raises AssertionError with the expectation that failed. Two more checks are not part of
`contract`, because they need more: `check_reproducible` (new processes) and `check_citation` (a bibliography).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..engine.kernels.peak_memory import peak_per_element
from ..errors import CheckpointError, ParameterError
from ..method import MergeMethod
from ..method.method import fill
from .borders import reads_its_statistics, stays_finite_at_borders
from .breakable import BREAKABLE, Law, applies, holds, require
from .cases import (
    EMPTY,
    LOCATIONS,
    SHAPE,
    SHAPES,
    Case,
    bad_values,
    cases,
    cast,
    count_models,
    defaults,
    each,
    make_data,
    make_inputs,
    merge,
    others,
    suggest,
    weak_inputs,
)
from .matrices import leaves_the_rest, merges_each_expert
from .processes import check_reproducible
from .sidecars import SIDECAR_LAWS

__all__ = ["Law", "check_citation", "check_reproducible", "contract", "peak_memory", "probe"]

# parameters of methods for matrices that matter to other tensors alone
_BESIDE_MATRICES = {"others", "embeddings"}
_FEW_STEPS = 20
# two whole blocks and a shorter one, rows and blocks not divisible by the length of vectors
_SHAPE_OF_BLOCKS, _BLOCK = (17, 37), 7 * 37


def contract(method: MergeMethod) -> list[Law]:
    """Return the laws that a method must satisfy."""
    applicable: list[Law] = [
        describes_itself,
        names_bad_parameters,
        suggests_values,
        ignores_what_does_not_matter,
        keeps_shape,
        takes_empty_tensors,
        gives_declared_dtype,
        stays_finite,
        stays_finite_at_borders,
        leaves_inputs_alone,
        rounds_once,
        keeps_precision,
        ignores_blocks,
        follows_seed if method.random else ignores_seed,
    ]
    kept = [law for name, law in BREAKABLE.items() if name not in method.breaks and applies(name, method)]
    if method.fuse:
        applicable.append(fuses_to_the_same_bits)
    if method.statistics:
        applicable.append(reads_its_statistics)
    if method.from_data:
        applicable.append(goes_by_data)
    if method.goes_by_location:
        applicable.append(goes_by_location)
    matrices: list[Law] = [leaves_the_rest, merges_each_expert] if method.scope == "matrix" else []
    sidecars: list[Law] = [] if method.sidecar is None else SIDECAR_LAWS
    return [*applicable, *matrices, *sidecars, *kept, *([breaks_what_it_says] if method.breaks else [])]


def probe(method: MergeMethod) -> dict[str, Any]:
    """Return the properties of a method, from its declaration where that is binding and by running it otherwise.

    Returns:
        Declared: `base` ("required", "optional", "unused"), `models` (in words), `scope` ("element", "row", "tensor",
        "matrix"), `passes` (largest number of passes over the inputs before the result) and `random`. Found by running
        the laws: `order_matters`, `identical_models_return_the_model` (for a method of one model: if it equals the
        base), `zero_task_vectors_return_the_base` (None without a base) and `result_differs_from_inputs`. Measured on
        a 64 x 64 tensor at the defaults: `peak_memory` (peak bytes, including inputs and result, over the bytes of the
        inputs, in float32).
    """
    kept = {name: holds(law, method) for name, law in BREAKABLE.items() if applies(name, method)}
    return {
        "base": method.base,
        "models": method.models_text(),
        "scope": method.scope,
        "passes": sum(len(statistic.rounds) for statistic in method.statistics.values()),
        "random": method.random,
        "order_matters": "order" in method.breaks or method.random or not kept.get("order", True),
        "identical_models_return_the_model": kept.get("identical", kept.get("zero_delta")),
        "zero_task_vectors_return_the_base": kept.get("zero_delta"),
        "result_differs_from_inputs": kept["differs"],
        "peak_memory": peak_memory(method),
    }


def peak_memory(method: MergeMethod) -> float:
    """Return the peak memory of a method on one block of float32, in multiples of the size of its inputs."""
    with_base, parameters = next(defaults(method))
    n = count_models(method)
    dtypes = [torch.float32] * (n + with_base)
    held = peak_per_element(
        method, fill(method, parameters, n), (64, 64), dtypes, torch.float32, torch.float32, with_base=with_base
    )
    return round(1 + held / (4 * len(dtypes)), 1)


# Declarations


def describes_itself(method: MergeMethod) -> None:
    """The docstring has a summary, a formula and all sections; `breaks`, `mergekit` and `when` are consistent."""
    doc = method.doc
    require(doc.summary.endswith("."), f"{method.name}: the docstring must begin with a sentence")
    require(bool(re.search(r"^ {4}\S", doc.body, re.M)), f"{method.name}: an indented formula is missing")
    for heading in ("Use when", "Differs from the paper"):
        require(bool(doc.sections.get(heading)), f"{method.name}: the section {heading!r} is missing")
    odd = doc.args.keys() - {p.argument for p in method.parameters.values()}
    require(not odd, f"{method.name}: Args describes {sorted(odd)}, which are not parameters")
    for reason in (*method.breaks.values(), *method.ignored.values()):
        require(bool(reason.strip()), f"{method.name}: a reason in breaks or of an ignored parameter is empty")
    overlap = method.ignored.keys() & method.parameters.keys()
    require(not overlap, f"{method.name}: {sorted(overlap)} cannot be parameters and have no effect")
    for name, value in method.mergekit.items():
        method.parameter(name, method.name).check(value, f"{method.name}: mergekit")
    for name in method.when:
        method.parameter(name, method.name)


def suggests_values(method: MergeMethod) -> None:
    """Every parameter has a value to try inside its range; the defaults are allowed, too."""
    n = count_models(method)
    for parameter in method.parameters.values():
        for value in [suggest(parameter, share) for share in (0.35, 0.5, 0.65)]:
            parameter.check(value, f"{method.name}: value to try")
        if not parameter.required:
            parameter.check(parameter.default, f"{method.name}: default")
    fill(method, {name: each(p, n) for name, p in method.parameters.items() if p.required}, n)


def names_bad_parameters(method: MergeMethod) -> None:
    """An error about a parameter that is unknown, missing, of the wrong type or count, or out of range, names it."""
    n = count_models(method)
    good = {name: each(p, n) for name, p in method.parameters.items() if p.required}
    _refuses(method, {**good, "no_such_parameter": 1}, "no_such_parameter")
    for name, parameter in method.parameters.items():
        # a typing error: the last letter twice
        _refuses(method, {**good, name + name[-1]: 1}, name + name[-1], f"Did you mean '{name}'?")
        if parameter.required:
            _refuses(method, {key: value for key, value in good.items() if key != name}, f"{name} is required")
        for value in bad_values(parameter):
            given = [*each(parameter, n)[:-1], value] if parameter.per_model else value
            _refuses(method, {**good, name: given}, name, parameter.allowed)
        if parameter.per_model:
            _refuses(method, {**good, name: [*each(parameter, n), suggest(parameter)]}, name, str(n), str(n + 1))


def ignores_what_does_not_matter(method: MergeMethod) -> None:
    """A parameter that does not matter in a case, as `when` declares, does not change the result in that case."""
    n = count_models(method)
    for with_base, parameters in cases(method):
        filled = fill(method, parameters, n)
        idle = [name for name in method.when if not method.matters(name, filled)]
        inputs = make_inputs(method, with_base)
        for other in ({**parameters, name: value} for name in idle for value in others(method.parameters[name], n)):
            same = torch.equal(merge(method, inputs, other), merge(method, inputs, parameters))
            require(same, f"{method.name}: {other} is said to make no difference to {parameters}, and does")


# Shapes, types and numbers


def keeps_shape(method: MergeMethod) -> None:
    """The result has the shape of the inputs, also for 0-d tensors and dimensions of size 1."""
    for with_base, parameters in cases(method):
        for shape in SHAPES:
            result = merge(method, make_inputs(method, with_base, shape), parameters)
            require(result.shape == shape, f"{method.name}: shape {list(shape)} became {list(result.shape)}")


def takes_empty_tensors(method: MergeMethod) -> None:
    """Tensors without elements give a result of their shape."""
    for with_base, parameters in cases(method):
        for shape in EMPTY:
            result = merge(method, make_inputs(method, with_base, shape), parameters)
            require(result.shape == shape, f"{method.name}: shape {list(shape)} became {list(result.shape)}")


def gives_declared_dtype(method: MergeMethod) -> None:
    """The result has the dtype of the inputs, or the requested dtype."""
    for with_base, parameters in defaults(method):
        inputs = make_inputs(method, with_base)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            result = merge(method, cast(inputs, dtype), parameters)
            require(result.dtype == dtype, f"{method.name}: {dtype} became {result.dtype}")
            result = merge(method, inputs, parameters, dtype=dtype)
            require(result.dtype == dtype, f"{method.name}: {result.dtype} instead of the declared {dtype}")


def stays_finite(method: MergeMethod) -> None:
    """Degenerate inputs (zeros, equal tensors, tiny numbers, one entry, opposite models) give no NaN or infinity."""
    for (with_base, parameters), shape in _cases_of_weak_inputs(method):
        for kind, inputs in weak_inputs(method, with_base, shape):
            try:
                result = merge(method, inputs, parameters, allow_nonfinite=True)
            except CheckpointError:
                # inputs for which the method is undefined may be refused
                continue
            complaint = f"{method.name}: not finite on {kind}, shape {list(shape)}, {parameters}"
            require(bool(torch.isfinite(result).all()), complaint)


def _cases_of_weak_inputs(method: MergeMethod) -> list[tuple[Case, tuple[int, ...]]]:
    """Return the cases and shapes for degenerate inputs, of which there are many; none computes the same as another one."""
    # elements do not know their shape, and what is not a matrix is merged by another method, whatever the parameters
    shapes: dict[str, list[tuple[int, ...]]] = {"element": [(), SHAPE], "matrix": [SHAPE]}
    usual = list(defaults(method))
    tried: list[tuple[Case, tuple[int, ...]]] = [(case, shape) for case in usual for shape in SHAPES]
    for with_base, parameters in cases(method):
        if method.scope == "matrix" and parameters.keys() - usual[0][1].keys() <= _BESIDE_MATRICES:
            continue
        # the defaults take all steps, so that what grows from step to step is noticed
        few = {**parameters, "steps": _FEW_STEPS} if "steps" in method.parameters else parameters
        tried += [((with_base, few), shape) for shape in shapes.get(method.scope, [(), (37,), SHAPE])]
    return tried


def leaves_inputs_alone(method: MergeMethod) -> None:
    """Base and models are not modified."""
    for with_base, parameters in cases(method):
        base, models = make_inputs(method, with_base)
        inputs = [*models] if base is None else [base, *models]
        before = [(tensor.clone(), tensor._version) for tensor in inputs]
        merge(method, (base, models), parameters)
        for tensor, (copy, version) in zip(inputs, before, strict=True):
            require(tensor._version == version and torch.equal(tensor, copy), f"{method.name}: writes to its inputs")


def rounds_once(method: MergeMethod) -> None:
    """16-bit inputs give the result of the same values in float32, rounded once."""
    for with_base, parameters in cases(method):
        for dtype in (torch.bfloat16, torch.float16):
            inputs = cast(make_inputs(method, with_base), dtype)
            wide = merge(method, cast(inputs, torch.float32), parameters)
            same = torch.equal(merge(method, inputs, parameters), wide.to(dtype))
            require(same, f"{method.name}: {dtype} is not the float32 result rounded once, {parameters}")


def keeps_precision(method: MergeMethod) -> None:
    """The result in float32 is within 2e-6 of that in float64 (norm of the difference over norm of the result).

    For methods on matrices, within 1e-4: the closer two singular values are, the more rounding changes their vectors.
    """
    allowed = 1e-4 if method.scope == "matrix" else 2e-6
    for with_base, parameters in cases(method):
        inputs = make_inputs(method, with_base)
        wide = merge(method, inputs, parameters, compute=torch.float64, dtype=torch.float64)
        error = float((merge(method, inputs, parameters) - wide).norm() / wide.norm().clamp(min=1e-30))
        require(error <= allowed, f"{method.name}: float32 is off by {error:.1e} of the result, {parameters}")


def ignores_blocks(method: MergeMethod) -> None:
    """Many small blocks give the bytes of one block; with statistics only up to the rounding of reordered sums."""
    # a block of a method for whole tensors or matrices is one of these, whatever the parameters
    every = defaults(method) if method.scope in ("tensor", "matrix") else cases(method)
    tried: list[tuple[Case, tuple[int, ...]]] = [(case, SHAPE) for case in every]
    tried += [(case, shape) for case in defaults(method) for shape in ((3, 10, 5), (500,))]
    for number, ((with_base, parameters), shape) in enumerate(tried):
        inputs = make_inputs(method, with_base, shape)
        whole = merge(method, inputs, parameters)
        # which of both sizes matters no more for other parameters
        for block in (64, 50) if number == 0 else (50,):
            cut = merge(method, inputs, parameters, block=block)
            if method.statistics:
                torch.testing.assert_close(cut, whole, rtol=2**-21, atol=2**-23)
            else:
                require(torch.equal(cut, whole), f"{method.name}: blocks of {block} change the result, {parameters}")


# Seeds


def ignores_seed(method: MergeMethod) -> None:
    """A method without random draws gives the same bytes for any seed and any tensor name."""
    for with_base, parameters in cases(method):
        inputs = make_inputs(method, with_base)
        first, other = (merge(method, inputs, parameters, seed=seed, name=f"tensor {seed}") for seed in (1, 2))
        require(torch.equal(first, other), f"{method.name}: depends on the seed without taking rng")


def follows_seed(method: MergeMethod) -> None:
    """The same seed gives the same bytes; another seed or tensor name gives others."""
    changed = False
    for with_base, parameters in cases(method):
        inputs = make_inputs(method, with_base)
        first = merge(method, inputs, parameters, seed=1)
        require(torch.equal(first, merge(method, inputs, parameters, seed=1)), f"{method.name}: one seed, two results")
        others = [merge(method, inputs, parameters, seed=2), merge(method, inputs, parameters, seed=1, name="other")]
        changed |= not any(torch.equal(first, other) for other in others)
    require(changed, f"{method.name}: takes rng, and neither seed nor tensor name changes the result")


# Data


def goes_by_data(method: MergeMethod) -> None:
    """Statistics from data change the result; without any, and where all are zero, it is finite."""
    for with_base, parameters in defaults(method):
        inputs = make_inputs(method, with_base)
        data = make_data(method, SHAPE, count_models(method))
        zero = {name: [torch.zeros_like(tensor) for tensor in own] for name, own in data.items()}
        results = [merge(method, inputs, parameters, data=own, allow_nonfinite=True) for own in (data, zero, None)]
        finite = all(bool(torch.isfinite(result).all()) for result in results)
        require(finite, f"{method.name}: not finite without statistics from data, or with zeros")
        changed = not any(torch.equal(result, results[0]) for result in results[1:])
        require(changed, f"{method.name}: takes statistics from data, and they change nothing")


# Layers


def goes_by_location(method: MergeMethod) -> None:
    """A method with `located` numbers gives different results at different locations, and finite ones at all."""
    for with_base, parameters in defaults(method):
        inputs = make_inputs(method, with_base)
        results = [merge(method, inputs, parameters, location=where, allow_nonfinite=True) for where in LOCATIONS]
        finite = all(bool(torch.isfinite(result).all()) for result in results)
        require(finite, f"{method.name}: not finite at some location")
        changed = any(not torch.equal(result, results[0]) for result in results)
        require(changed, f"{method.name}: takes numbers from where a tensor is, and they change nothing")


def fuses_to_the_same_bits(method: MergeMethod) -> None:
    """Operations that are fused into loops give the bits that they give one by one, at the defaults and other numbers."""
    for with_base, parameters in islice(cases(method), 2):
        inputs = cast(make_inputs(method, with_base, _SHAPE_OF_BLOCKS), torch.bfloat16)
        one_by_one, fused = (merge(method, inputs, parameters, block=_BLOCK, fused=fused) for fused in (False, True))
        same = torch.equal(one_by_one.view(torch.int16), fused.view(torch.int16))
        require(same, f"{method.name}: fused operations give other bits than single ones with {parameters}")


def breaks_what_it_says(method: MergeMethod) -> None:
    """A law that the method declares broken does not hold, since an unneeded entry in `breaks` misleads."""
    for name in method.breaks:
        if applies(name, method):
            said = f"{method.name}: breaks[{name!r}] is declared, but {BREAKABLE[name].__name__} holds"
            require(not holds(BREAKABLE[name], method), said)


# Laws that need more than the method


def check_citation(method: MergeMethod, bibliography: Path) -> None:
    """The method cites an entry of a BibTeX file, or declares "-" because there is no publication."""
    if method.cite == "-":
        return
    keys = re.findall(r"^@\w+\{([^,\s]+),", bibliography.read_text(encoding="utf-8"), re.M)
    require(method.cite in keys, f"{method.name}: {method.cite!r} is not in {bibliography.name}")


def _refuses(method: MergeMethod, parameters: Mapping[str, Any], *words: str) -> None:
    try:
        fill(method, parameters, count_models(method))
    except ParameterError as error:
        missing = [word for word in (method.name, *words) if word not in str(error)]
        require(not missing, f"{method.name}: the error {str(error)!r} does not mention {missing}")
    else:
        raise AssertionError(f"{method.name}: accepts {dict(parameters)}")
