"""Statistics: numbers that are measured from the inputs before the merge and passed to the method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from torch import Tensor

from .learning import Learning

When = str | Callable[..., bool] | None


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over the inputs: a measurement per block, summed over the blocks, and a result computed from the sum.

    Args:
        measure: Gets a block of the inputs (and any other arguments that it names), returns a float64 or int64 tensor
            of fixed shape. The results of all blocks are added, in the order of the blocks.
        solve: Gets the sum (or maximum) as its first argument and any others that it names, on the CPU in float64.
        largest: Take the elementwise maximum over the blocks instead of the sum.
        early: Gets what `solve` returned; returns the statistic if the later rounds would find just that, which are then left
            out, or else None.
    """

    measure: Callable[..., Tensor]
    solve: Callable[..., Tensor]
    largest: bool = False
    early: Callable[[Tensor], Tensor | None] | None = None


@dataclass(frozen=True, slots=True)
class AtOnce:
    """A faster way to compute a statistic for k small tensors of one size together, without rounds.

    Args:
        measure: Gets a mapping with the inputs of one tensor and all other arguments of a measure; returns a tensor.
        solve: Gets the k results of `measure`, stacked to a leading dimension of k; a mapping with the arguments of a
            solve, except earlier statistics; and a mapping with these, with the leading dimension k as well. Returns
            the statistic of each tensor, shape [k, ...].
    """

    measure: Callable[[Mapping[str, Any]], Tensor]
    solve: Callable[[Tensor, Mapping[str, Any], Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class Statistic:
    """A small tensor of numbers about every row, a whole tensor or the whole model, that the method needs.

    Args:
        rounds: Passes over the inputs; the argument `previous` is the solved result of the round before.
        over: "tensor", "model", or the name of the parameter that decides between them; or "row": there is one round,
            the measured and the solved tensor have the shape [rows, ...], and a function that takes the statistic gets
            the entries of the rows of its block.
        when: Whether a tensor needs the statistic: a function of parameters that it names (per-model ones are tuples),
            or the name of a flag; None means always. If it is not needed, its passes are skipped and it is None.
        at_once: If given, computes the same for tensors of one block each, without rounds. It always runs eagerly, and
            must agree with the rounds to the last bit.
    """

    rounds: tuple[Round, ...]
    over: str = "tensor"
    when: When = None
    at_once: AtOnce | None = None

    def wanted(self, parameters: Mapping[str, Any]) -> bool:
        """Return whether a tensor needs the statistic.

        Args:
            parameters: All parameters of the tensor, by their names in recipes.
        """
        return applies(self.when, parameters)

    def where(self, parameters: Mapping[str, Any]) -> str:
        """Return what the statistic is measured over with these parameters: "row", "tensor" or "model".

        Args:
            parameters: All parameters of the tensor, by their names in recipes.
        """
        return str(parameters.get(self.over, self.over))


_OF_INPUTS = ("gram", "cross_gram", "second_moment", "magnitude", "coefficients", "groups")
_NO_SUMS = {"coefficients": ("fitted", "end_to_end"), "groups": ("zipped",)}
_ALONE = tuple(inputs for needed in _NO_SUMS.values() for inputs in needed)
_ELEMENTWISE = ("fisher", "gradient", "absolute_gradient")


DataInputs = Literal["own", "prefix", "merged", "fitted", "mean", "zipped", "end_to_end"]
"""What computes the inputs that statistics are of: see `FromData`."""


@dataclass(frozen=True, slots=True)
class FromData:
    """A statistic of what each model computes on text, which `merganser calibrate` measured before the merge.

    A method takes it under the name by which it is declared: a sequence with one tensor per model (or with one tensor alone,
    see `of`), which are read when they are asked for, so that a loop holds one at a time; or None where a tensor has no such
    statistic. Measures of other statistics may take it, too.

    With x the tokens that a matrix [rows, columns] receives, and g the gradients of its outputs, a method of scope "matrix"
    gets, in the compute dtype, and zero where no token came (an expert that was never chosen),

        gram             mean of x x^T, shape [columns, columns]
        cross_gram       mean of x y^T, with y what the same matrix of the model itself receives for the same token, and x
                         what it receives in the merged model, or the mean of what it receives in all models
        second_moment    mean of x^2, shape [columns]
        magnitude        mean of |x|, shape [columns]
        gradient_gram    mean of g g^T, shape [rows, rows]

    With g the gradient of the loss of a sequence with respect to a tensor, a method of any scope gets, in the shape of its
    block,

        fisher               sum of g^2, over the number of tokens in the loss
        gradient             sum of g, over the number of tokens in the loss
        absolute_gradient    sum of |g|, over the number of tokens in the loss

    A method of scope "tensor" may get

        coefficients         of the task vector, one for each chunk of consecutive elements, shape [chunks]

    which are fitted block by block within the merge, before the method runs. For these it declares the parameters `weight`
    (per model), `start`, `chunks`, `steps`, `rate` and `regulariser` of the fit, as `expert_merging` explains them. With
    `learning` they are instead learnt by gradients of the whole merged model, and of the shape [1]; or [chunks], where every
    chunk has its own; or where every column has, of a shape that is multiplied with the tensor entry by entry. The method
    then declares `weight` (per model), `steps`, `rate` and `batch`, as `adamerging` explains them, and `chunks` where these
    have coefficients. Or

        groups               the group of every output and every input of a tensor that holds hidden units, for each axis in
                             turn, shape [rows + columns]; inputs are numbered from -1 downwards

    for which it declares `alpha` and `beta`, as `zipit` explains them.

    Args:
        statistic: Which of them.
        inputs: What computes x on the model's data: "own", the model itself; "prefix", the model's block behind the
            merged blocks before it; "merged", the block as the method merges it without statistics, behind the merged
            blocks before it; "fitted", the block while coefficients are fitted, behind the merged blocks before it;
            "mean", all models themselves on the same data, of which the mean is taken; "zipped", the same, of which units are
            joined; "end_to_end", the whole merged model while coefficients are learnt. All statistics of a method have the
            same; but for "own", all models are calibrated together, within the merge. `cross_gram` needs "merged" or
            "mean", "merged" needs it, "mean" has nothing else, `coefficients` need "fitted" or "end_to_end", and `groups` "zipped".
        of: Whose statistics they are: a tensor for each of the "models"; one, for the "base" or the "first" model; or a
            tensor for each model, of the base on the data of that model: "base_on_models". All statistics of a method
            have the same, but that "models" goes with "base_on_models"; those of one are of its own inputs.
        learning: How coefficients are learnt, for "end_to_end".
    """

    statistic: Literal[
        "gram",
        "cross_gram",
        "second_moment",
        "magnitude",
        "gradient_gram",
        "fisher",
        "gradient",
        "absolute_gradient",
        "coefficients",
        "groups",
    ]
    inputs: DataInputs = "own"
    of: Literal["models", "base", "first", "base_on_models"] = "models"
    learning: Learning | None = None

    @property
    def of_inputs(self) -> bool:
        """Whether it is a sum over the tokens that a matrix receives, and not over predicted tokens."""
        return self.statistic in _OF_INPUTS

    @property
    def elementwise(self) -> bool:
        """Whether it has an entry for every entry of the tensor."""
        return self.statistic in _ELEMENTWISE

    @property
    def summed(self) -> bool:
        """Whether it is a sum, whose mean the method gets; otherwise it gets the numbers themselves."""
        return self.statistic not in _NO_SUMS

    def shape(self, block: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of one model's tensor, given that of the block that a method gets; of coefficients, of one chunk."""
        if self.elementwise:
            return tuple(block)
        if not self.summed:
            if self.statistic == "groups":
                return (sum(block),)
            of_columns = self.learning is not None and self.learning.over == "column" and len(block) > 1
            return (*[1] * (len(block) - 1), block[-1]) if of_columns else (1,)
        rows, columns = block[-2:]
        square = {"gram": columns, "cross_gram": columns, "gradient_gram": rows}.get(self.statistic)
        return (columns,) if square is None else (square, square)


@dataclass(frozen=True, slots=True)
class NumbersFromData:
    """Numbers of what each model computes on text, which `merganser calibrate` measured before the merge.

    They are known when the merge is planned. Functions in `located` take them under the name by which they are declared, a
    sequence with one entry per model:

        loss           mean loss, nats per token
        losses         loss of every sequence, the sum over its tokens, nats: a sequence, in the order of the draw, which is
                       the same for models of one tokenizer and the same data
        sensitivity    mean over tokens of the sum of |w g| over the entries w of a layer, g being their gradients: a mapping
                       by the number of the layer, with None for all that is in no layer

    Args:
        statistic: Which of them.
        optional: Whether the method works without them; it then gets None.
    """

    statistic: Literal["loss", "losses", "sensitivity"]
    optional: bool = False

    @property
    def measured(self) -> str:
        """The statistic that `merganser calibrate` measures for it."""
        return "loss" if self.statistic == "losses" else self.statistic


def from_data_complaint(wanted: Mapping[str, FromData]) -> str | None:
    """Return what is wrong with the statistics from data that a method declares together, or None."""
    if len({(own.inputs, "models" if own.of == "base_on_models" else own.of) for own in wanted.values()}) > 1:
        return "its statistics from data are of different inputs or models, and must be of the same"
    if any(own.of != "models" and own.inputs != "own" for own in wanted.values()):
        return "statistics of the base or of the first model alone are of its own inputs"
    compared = ("merged", "mean")
    odd = next(
        (name for name, own in wanted.items() if own.statistic == "cross_gram" and own.inputs not in compared), None
    )
    if odd is not None:
        return f"{odd} compares inputs of the merged model with others, which needs inputs='merged' or 'mean'"
    if any(own.inputs == "merged" for own in wanted.values()) and all(
        own.statistic != "cross_gram" for own in wanted.values()
    ):
        return "inputs='merged' are compared with those of the models, so one of the statistics must be cross_gram"
    odd = next((name for name, own in wanted.items() if own.statistic != "cross_gram" and own.inputs == "mean"), None)
    if odd is not None:
        return f"{odd}: inputs='mean' are compared with those of the models, as cross_gram, and nothing else"
    for name, own in wanted.items():
        needed = _NO_SUMS.get(own.statistic, ())
        if not own.summed and own.inputs not in needed:
            return f"{name}: {own.statistic} need inputs={' or '.join(map(repr, needed))}"
        if own.summed and own.inputs in _ALONE:
            return f"{name}: with inputs={own.inputs!r} there are no sums, and {own.statistic} is one"
    odd = next((name for name, own in wanted.items() if (own.inputs == "end_to_end") == (own.learning is None)), None)
    return None if odd is None else f"{odd}: inputs='end_to_end' and learning belong together"


def statistic(
    measure: Callable[..., Tensor],
    solve: Callable[..., Tensor],
    *,
    over: str = "tensor",
    when: When = None,
    largest: bool = False,
) -> Statistic:
    """Declare a statistic with one round."""
    return Statistic((Round(measure, solve, largest=largest),), over=over, when=when)


def applies(when: When, parameters: Mapping[str, Any]) -> bool:
    """Return whether a condition holds for these parameters, given by their names in recipes; None always holds."""
    if when is None or isinstance(when, str):
        return when is None or bool(parameters[when])
    return when(**{name: parameters[name.rstrip("_")] for name in takes(when)})


@lru_cache(maxsize=1024)
def takes(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments that a measure, solve or combine function takes."""
    return tuple(inspect.signature(function).parameters)
