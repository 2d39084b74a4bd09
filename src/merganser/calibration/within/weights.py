"""The weights of a merge and of its models, under the names of the merged model's tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ...checkpoint import Reader, TensorInfo
from ...engine.alignment.alignment import Member
from ...engine.in_memory.run import merge_to_state_dict
from ...engine.plan.from_data import DataOfModels, with_data
from ...engine.plan.part import part_of
from ...engine.plan.plan import Plan

__all__ = ["MergedTensors", "ModelTensors"]


class ModelTensors:
    """The tensors of one of the models; of a tied one, the embedding stands for the head that the merged model has.

    Args:
        model: The model, with the names of the merged model.
        reader: Reads them.
    """

    def __init__(self, model: Member, reader: Reader) -> None:
        self._model = model
        self._reader = reader

    def tensor(self, info: TensorInfo, /) -> Tensor:
        """Return the model's tensor of this name."""
        found = self._model.tensor(info.name)
        assert found is not None, info.name
        return self._reader.tensor(found)


class MergedTensors:
    """The tensors of the merged model, a few at a time: bit for bit those that the whole merge writes.

    Args:
        plan: The merge, planned without its statistics from data.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._planned = {tensor.name: tensor for tensor in plan.tensors}
        self._made: dict[str, Tensor] = {}

    def make(self, names: Iterable[str], data: DataOfModels | None = None) -> None:
        """Merge some tensors, and forget those before.

        Args:
            names: Their names.
            data: Their statistics; None to merge without.

        Raises:
            CheckpointError: An input is damaged or not finite.
        """
        self._made = {}
        chosen = [with_data(self._planned[name], data) for name in names]
        self._made = merge_to_state_dict(part_of(self._plan, chosen))

    @property
    def made(self) -> Mapping[str, Tensor]:
        """The tensors that were made last."""
        return self._made

    def tensor(self, info: TensorInfo, /) -> Tensor:
        """Return one of the tensors that were made last."""
        return self._made[info.name]
