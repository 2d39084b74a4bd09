"""Learn the coefficients of a merge, and write them as statistics of its models."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ...checkpoint import Reader
from ...engine.plan.plan import Plan
from ...engine.record import fingerprint
from ...errors import RecipeError
from ...method import Learning
from ...statistics import COUNT, Statistics, open_statistics
from ..forward.forward import check_streamable
from ..output.target import Target
from ..reverse.run import check_predicts
from ..single.preparation import Prepared
from ..single.run import Progress
from ..sums.coefficients import COEFFICIENTS
from ..within.merged import merge_identity, merged_models, merged_skeleton, merged_sources
from ..within.weights import ModelTensors
from .coefficients import Coefficients, LearntTensors, chosen
from .columns import input_axes
from .learner import WORKING, Learner
from .sequences import usable

__all__ = ["check_learning", "learn_coefficients"]


def learn_coefficients(
    plan: Plan,
    models: Sequence[Prepared],
    out: str | Path,
    progress: Progress | None = None,
    *,
    names: Sequence[str] | None = None,
) -> list[Statistics]:
    """Learn the coefficients that a method takes, by gradients of the whole merged model.

    An interrupted run continues at its step when it is called again with the same arguments, to the last bit.

    Args:
        plan: The merge, planned without its statistics from data: `build_plan(recipe, measured=False)`.
        models: The models in the order of the recipe, each with its data, from `prepare`.
        out: The folder to write, with a folder of statistics for every model. It must not exist.
        progress: Called with the number of finished steps and of all steps.
        names: Names of the models' folders; None for `model-1`, `model-2`, and so on.

    Returns:
        The statistics of each model: the coefficients of its tensors. Their `about["learning"]` has the mean loss of the
        model's tokens in every step, and before and after all steps on the sequences of the first one.

    Raises:
        RecipeError: The method learns no coefficients, or its tensors have different parameters.
        CheckpointError: A model is damaged or not finite.
        DataError: No token of a model's data is predicted.
        UnsupportedError: transformers does not know the merged model, or it cannot be run one block at a time.
        NonFiniteError: The merged model, its loss or a gradient is NaN or infinite.
        OutputError: `out` exists or cannot be written.
    """
    learning = check_learning(plan)
    count = len(merged_sources(plan))
    if len(models) != count:
        raise RecipeError(f"{plan.recipe.place}: {count} models are merged, {len(models)} have data")
    folders = names or [f"model-{k + 1}" for k in range(len(models))]
    with tempfile.TemporaryDirectory(prefix="merganser-") as root, Reader() as reader:
        sources = [ModelTensors(model, reader) for model in merged_models(plan)]
        with merged_skeleton(plan, Path(root, "merged"), torch.float32) as skeleton:
            for model in models:
                check_predicts(skeleton, model.batches())
            coefficients = Coefficients(plan.method, learning, chosen(plan), input_axes(skeleton), reader)
            weights = LearntTensors(plan, coefficients)
            weights.prepare(skeleton.outside())
            skeleton.fill_outside(source=weights)
            check_streamable(skeleton, models[0].probe(), sources[0])
            found = {"statistics": [COUNT, COEFFICIENTS], "inputs": plan.method.data_inputs}
            about = [{**model.about(), **found, "merge": merge_identity(plan)} for model in models]
            with Target(Path(out), fingerprint(plan, {"models": about})) as target:
                if not target.finished:
                    data = [usable(own) for own in models]
                    learner = Learner(plan, skeleton, coefficients, learning, target, data, folders)
                    learner.open(sources)
                    learner.run(progress)
                    learner.write(about)
                target.publish(WORKING)
    return [open_statistics(Path(out, name)) for name in folders]


def check_learning(plan: Plan) -> Learning:
    """Return how the method of a plan learns.

    Args:
        plan: The merge, planned without its statistics from data.

    Raises:
        RecipeError: It does not, or its tensors have different parameters.
    """
    method, place = plan.method, plan.recipe.place
    learning = next((own.learning for own in method.from_data.values()), None)
    if learning is None:
        raise RecipeError(f"{place}: {method.name} learns no coefficients with the whole merged model")
    tensors = chosen(plan)
    if not tensors:
        raise RecipeError(f"{place}: {method.name} merges no tensor, so there are no coefficients to learn")
    for key, first in tensors[0].parameters.items():
        other = next((own for own in tensors if str(own.parameters[key]) != str(first)), None)
        if other is not None:
            raise RecipeError(
                f"{place}: {method.name} learns the model as a whole, and its tensors have different {key} "
                f"({tensors[0].name} and {other.name}); give all tensors the same"
            )
    if not any(tensors[0].parameters["weight"]):
        raise RecipeError(f"{place}: weight is 0 for every model, so there is no loss; one at least must be above 0")
    return learning
