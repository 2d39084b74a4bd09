"""The decorator that turns a function into a merge method."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import did_you_mean
from .docstring import Docstring, parse_docstring
from .factors import Factors
from .method import Ignored, Law, MergeMethod, Scope
from .parameter import Embeddings, Others, Parameter, read_parameter
from .sidecar import Sidecar, for_all_sidecars
from .statistic import FromData, NumbersFromData, Statistic, When, from_data_complaint, takes


def merge_method(
    *,
    family: str,
    cite: str,
    scope: Scope = "element",
    models: tuple[int, int | None] = (1, None),
    statistics: Mapping[str, Statistic | FromData | NumbersFromData] | None = None,
    located: Mapping[str, Callable[..., float | Sequence[float]]] | None = None,
    version: int = 1,
    breaks: Mapping[Law, str] | None = None,
    mergekit: Mapping[str, Any] | None = None,
    when: Mapping[str, When] | None = None,
    validate: Callable[[Mapping[str, Any]], str | None] | None = None,
    sidecar: Sidecar | None = None,
) -> Callable[[Callable[..., Tensor]], MergeMethod]:
    """Turn a function into a merge method.

    Args:
        family: Group in the index of methods.
        cite: Key in `references.bib`, or "-" if no publication exists.
        scope: What one call must see: single elements (flat blocks of any length), whole rows (blocks of shape
            [rows, columns], a row being all weights of one output unit), the whole tensor in its shape, one
            whole weight matrix, or the factors of one matrix of adapters (see below).
        models: Smallest and largest number of models, not counting the base (None: no limit).
        statistics: Statistics that are measured before the function runs, by the name of the argument that takes them.
            They are measured in this order, and each may use those before it. Those of kind `FromData` were measured on
            text before the merge; all others may use them. Those of kind `NumbersFromData` are for `located`.
        located: Numbers that follow from where in the model a tensor is, by the name of the argument that takes them.
            Each, or one for every model, is computed when the merge is planned, from `location: Location`, parameters
            (per-model ones are tuples) and numbers from data, which it names. It may raise ParameterError.
        version: Raise it when results change; it is written to every run record.
        breaks: Laws of the contract suite that do not hold, each with the reason.
        mergekit: How mergekit treats a parameter: the value that reproduces mergekit where it differs from the
            definition, or `Ignored` for a parameter that mergekit accepts but does not use.
        when: For a parameter, the condition on other parameters under which it can change the result, as in
            `Statistic`; a parameter without an entry always can.
        validate: Gets all parameters of a tensor, by their names in recipes (per-model ones as tuples); returns what
            is wrong with their combination, or None.
        sidecar: What is stored for each model in addition to the result; arguments of its `encode` are parameters, too.

    A method of scope "matrix" gets the matrices of the model one by one, shape [rows, columns]: 2-D weights that
    multiply activations, and the experts of a packed tensor [experts, rows, columns]. Its parameters `others: Others`
    and `embeddings: Embeddings` decide what happens to all other tensors; it must declare them, but does not read them.
    It takes a base, which may be optional. Its statistics must be over the model (it can compute those of one matrix itself), and count
    matrices only.

    A method of scope "factors" is declared with `factor_method` and lies in `factor_methods/`. It gets the adapters'
    `models: list[Factors]` of one matrix, may take `rng` and `rank: int | None` (the recipe's rank), and returns Factors.

    The operations of functions over elements and rows are fused, so these must not branch on tensor values; those over a
    whole tensor or matrix, or with statistics from data, are never fused.

    Raises:
        TypeError: The declaration contradicts itself, or the docstring does not describe a parameter.
    """

    def decorate(function: Callable[..., Tensor]) -> MergeMethod:
        given = dict(mergekit or {})
        doc = parse_docstring(function.__doc__ or "")
        hints = typing.get_type_hints(function, include_extras=True)
        signature = inspect.signature(function).parameters
        declaring: list[Callable[..., Any]] = [function]
        if sidecar is not None:
            declaring += [sidecar.encode, for_all_sidecars]
        base = "unused"
        if "base" in signature:
            base = "optional" if type(None) in typing.get_args(hints["base"]) else "required"
        declared = (statistics or {}).items()
        method = MergeMethod(
            name=function.__name__,
            combine=function,
            statistics={name: own for name, own in declared if isinstance(own, Statistic)},
            from_data={name: own for name, own in declared if isinstance(own, FromData)},
            numbers={name: own for name, own in declared if isinstance(own, NumbersFromData)},
            located=dict(located or {}),
            parameters=_parameters(declaring, doc),
            family=family,
            cite=cite,
            scope=scope,
            base=typing.cast(Any, base),
            min_models=models[0],
            max_models=models[1],
            version=version,
            breaks=dict(breaks or {}),
            mergekit={name: value for name, value in given.items() if not isinstance(value, Ignored)},
            ignored={name: value.reason for name, value in given.items() if isinstance(value, Ignored)},
            when=dict(when or {}),
            validate=validate,
            sidecar=sidecar,
            doc=doc,
        )
        complaint = _complaint(method, hints)
        if complaint:
            raise TypeError(f"{function.__name__}: {complaint}")
        return method

    return decorate


def _complaint(method: MergeMethod, hints: Mapping[str, Any]) -> str | None:
    """Return in what a declaration contradicts itself; None if it does not.

    Args:
        method: The method, as it is declared.
        hints: Types of the arguments of its function.
    """
    scope, base = method.scope, method.base
    complaint = _matrix_complaint(scope, hints, base, method.statistics) or _row_complaint(scope, method.statistics)
    complaint = complaint or from_data_complaint(method.from_data)
    complaint = complaint or _data_complaint(scope, method.from_data, method.parameters)
    if any(own.of == "base_on_models" for own in method.from_data.values()) and base != "required":
        complaint = complaint or "statistics of the base need `base: Tensor`"
    if scope != "matrix" and "rounding" in inspect.signature(method.combine).parameters:
        complaint = complaint or "rounding is known of whole matrices; this needs the scope 'matrix'"
    if method.sidecar is not None:
        complaint = complaint or method.sidecar.complaint(method.parameters, scope, base)
    return complaint or _names_complaint(method)


def factor_method(*, cite: str, version: int = 1) -> Callable[[Callable[..., Factors]], MergeMethod]:
    """Turn a function over the factors of adapters into a merge method, of family "adapters" and scope "factors".

    Args:
        cite: As for `merge_method`.
        version: As for `merge_method`.

    Raises:
        TypeError: As for `merge_method`.
    """

    def decorate(function: Callable[..., Factors]) -> MergeMethod:
        declare = merge_method(family="adapters", cite=cite, scope="factors", version=version)
        return declare(typing.cast("Callable[..., Tensor]", function))

    return decorate


def _parameters(functions: Sequence[Callable[..., Any]], doc: Docstring) -> dict[str, Parameter]:
    """Return the parameters that functions declare, by name; if two functions share a name, the first one counts."""
    found: dict[str, Parameter] = {}
    for function in functions:
        hints = typing.get_type_hints(function, include_extras=True)
        for declared in inspect.signature(function).parameters.values():
            if declared.kind is inspect.Parameter.KEYWORD_ONLY:
                parameter = read_parameter(declared, hints[declared.name], doc)
                found.setdefault(parameter.name, parameter)
    return found


def _matrix_complaint(
    scope: Scope, hints: Mapping[str, Any], base: str, statistics: Mapping[str, Statistic]
) -> str | None:
    """Return what scope "matrix" requires and this method lacks, or has without that scope; None if it is correct."""
    common = {"others": Others, "embeddings": Embeddings}
    declared = {name for name, hint in common.items() if hints.get(name) == hint}
    if scope != "matrix":
        odd = ", ".join(sorted(declared))
        return f"the parameters {odd} say something only where the scope is 'matrix'" if declared else None
    if declared != common.keys():
        return "scope 'matrix' needs the parameters `others: Others` and `embeddings: Embeddings`"
    if base == "unused":
        return (
            "scope 'matrix' needs `base: Tensor`, or `Tensor | None`: tensors that are not matrices may be the base's"
        )
    other = next((name for name, statistic in statistics.items() if statistic.over != "model"), None)
    return f"a method of scope 'matrix' gets whole matrices; let it compute {other} itself" if other else None


_GIVEN = ("base", "models", "rng", "rounding")


def _names_complaint(method: MergeMethod) -> str | None:
    """Return a message for an argument for which there will be no value; None if there is none."""
    given = ("models", "rng", "rank") if method.scope == "factors" else _GIVEN
    declared = (method.statistics, method.from_data, method.numbers, method.located)
    known = {
        *given,
        *(parameter.argument for parameter in method.parameters.values()),
        *(n for own in declared for n in own),
    }
    taken = [(method.name, name) for name in takes(method.combine)]
    for statistic, own in method.statistics.items():
        for one in own.rounds:
            solved = takes(one.solve)[1:]
            taken += [(f"the measuring of {statistic}", name) for name in takes(one.measure) if name != "previous"]
            taken += [(f"the solving of {statistic}", name) for name in solved if name not in ("previous", "size")]
    for where, name in taken:
        if name not in known:
            return (
                f"{where} takes {name!r}, which is no input, statistic or located number; parameters are keyword-only."
                f"{did_you_mean(name, known)}"
            )
    return None


_SETTINGS = {
    "coefficients": {"weight", "start", "chunks", "steps", "rate", "regulariser"},
    "groups": {"alpha", "beta"},
}
"""Parameters that statistics are made with within a merge."""


def _data_complaint(scope: Scope, from_data: Mapping[str, FromData], parameters: Mapping[str, Parameter]) -> str | None:
    """Return why a method cannot take one of its statistics from data; None if it can take all."""
    for name, own in from_data.items():
        if own.summed:
            if not own.elementwise and scope != "matrix":
                return f"{name} is of a whole matrix, which only methods of scope 'matrix' are handed"
            continue
        if scope != "tensor":
            return f"{name} are of a whole tensor, which only methods of scope 'tensor' are handed"
        needed = _SETTINGS[own.statistic] if own.learning is None else own.learning.needed
        lacking = sorted(needed - parameters.keys())
        if lacking:
            return f"{name} are made with the parameters {', '.join(lacking)}, which it does not declare"
    return None


def _row_complaint(scope: Scope, statistics: Mapping[str, Statistic]) -> str | None:
    """Return a message for the first statistic over rows that cannot be over rows; None if there is none."""
    for name, statistic in statistics.items():
        plain = not any(round_.largest for round_ in statistic.rounds)
        if statistic.over == "row" and (scope != "row" or len(statistic.rounds) != 1 or not plain):
            return f"{name} is over rows: this needs the scope 'row', and one round that adds its measurements"
    return None
