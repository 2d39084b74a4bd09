"""The tensors of a quantised checkpoint while formats take those that they understand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....errors import CheckpointError
from ....wording import brief
from ...derived.derived import Rows, derive
from ...dtypes import DType
from ...tensor import Noise, TensorInfo

__all__ = ["Pool", "flaw"]


def flaw(tensor: TensorInfo, what: str) -> CheckpointError:
    """Return the error for a tensor that is not what its format asks for."""
    return CheckpointError(f"{tensor.file}: tensor {tensor.name!r}: {what}")


class Pool:
    """Tensors by name; formats take stored ones and make logical ones.

    Args:
        where: The checkpoint, for messages.
        settings: `quantization_config` of config.json, or an empty mapping.
        tensors: All tensors of the files.
        natural: The dtype in which an output stores dequantised weights by default.
        metadata: The `__metadata__` of the files' headers.
    """

    def __init__(
        self,
        where: str,
        settings: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        natural: DType,
        metadata: Mapping[str, str],
    ) -> None:
        self.where = where
        self.settings = settings
        self.stored = tensors
        self.natural = natural
        self.metadata = metadata
        self.schemes: set[str] = set()
        self._made: dict[str, TensorInfo] = {}
        self._taken: dict[str, str] = {}
        self.dropped: dict[str, str] = {}

    def ending(self, *suffixes: str) -> list[str]:
        """Return the names with one of these endings that no format has taken."""
        return [name for name in self.stored if name.endswith(suffixes) and self.free(name)]

    def free(self, name: str) -> bool:
        """Return whether there is such a tensor, and no format has taken it."""
        return name in self.stored and name not in self._taken and name not in self.dropped

    def find(self, *names: str) -> TensorInfo | None:
        """Return the first of these tensors that is there; None if there is none."""
        return next((self.stored[name] for name in names if name in self.stored), None)

    def need(self, tensor: TensorInfo, what: str, *names: str) -> TensorInfo:
        """Return the first of these tensors that is there.

        Raises:
            CheckpointError: There is none.
        """
        found = self.find(*names)
        if found is None:
            raise flaw(tensor, f"{what} ({names[0]}) is missing; the values mean nothing without it")
        return found

    def make(
        self,
        name: str,
        shape: tuple[int, ...],
        stored: Sequence[TensorInfo | None],
        rows: Rows,
        *,
        scheme: str,
        noise: Noise | None = None,
    ) -> None:
        """Add a logical tensor, computed from stored ones; the first of them gives its place among the others.

        Raises:
            CheckpointError: A stored tensor is used twice, or there is another tensor of this name.
        """
        parts = [part for part in stored if part is not None]
        for part in parts:
            if part.name in self._taken:
                raise flaw(part, f"belongs to two weights, {self._taken[part.name]} and {name}")
            self._taken[part.name] = name
        clash = name in self._made or (name in self.stored and name not in {part.name for part in parts})
        if clash:
            raise flaw(parts[0], f"stores {name}, and there is another tensor of this name")
        self._made[name] = derive(name, shape, parts, rows, natural=self.natural, noise=noise)
        self.schemes.add(scheme)

    def drop(self, name: str, reason: str) -> None:
        """Leave out a tensor that is of no use to unquantised weights."""
        if self.free(name):
            self.dropped[name] = reason

    def result(self) -> dict[str, TensorInfo]:
        """Return the logical tensors in the order of the stored ones, and those that no format took as they are."""
        found: dict[str, TensorInfo] = {}
        for name, tensor in self.stored.items():
            made = self._taken.get(name)
            if made is not None:
                # the first of the stored ones gives the place
                if self._made[made].stored[0] is tensor:
                    found[made] = self._made[made]
            elif name not in self.dropped:
                found[name] = tensor
        return found

    def number(self, *keys: str, allowed: Sequence[int], default: int | None = None) -> int:
        """Return a whole number of the settings.

        Raises:
            CheckpointError: It is missing without a default, or not one of `allowed`.
        """
        value = next((self.settings[key] for key in keys if self.settings.get(key) is not None), default)
        if type(value) is not int or value not in allowed:
            listed = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 8 else ", ".join(map(str, allowed))
            raise CheckpointError(
                f"{self.where}: config.json: {keys[0]} of the quantisation must be one of {listed}, found {brief(value)}"
            )
        return value
