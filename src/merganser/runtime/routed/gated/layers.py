"""Gates in a model of transformers: every linear layer with parts adds them to its output, weighted by what its gate says."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ....errors import UnsupportedError
from .parts import Part
from .routing import Routing
from .settings import GateSettings

__all__ = ["GatedLayers"]


class GatedLayers(Routing):
    """The linear layers of a model that have parts, and their gates.

    Args:
        model: A causal language model of transformers; hooks are put into it, and its weights stay as they are.
        parts: Parts by the name of their linear layer, in the model's dtype.
        settings: What gates read, and how scores become weights.
        tasks: Number of tasks.

    Raises:
        UnsupportedError: One gate is to be shared by sites that read different numbers of features.
    """

    def __init__(self, model: Any, parts: Mapping[str, Part], settings: GateSettings, tasks: int) -> None:
        super().__init__(model, settings, tasks)
        self._parts, self.count = parts, len(parts)
        self._sites: dict[str, str] = {}
        self._readers: dict[str, str] = {}
        for name, module in model.named_modules():
            if name not in parts:
                continue
            site = name if settings.site == "linear" else name.rpartition(".")[0]
            self._sites[name] = site
            if site not in self._readers:
                self._readers[site] = name
                self.widths[site] = tasks * module.out_features if settings.reads == "outputs" else module.in_features
            module.register_forward_hook(partial(self._add, name))
        self._check_widths()

    def _add(self, name: str, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add the weighted parts to the output of a linear layer."""
        x = args[0]
        if self._readers[self._sites[name]] == name:
            self._show(self._sites[name], x)
        return output + self._parts[name].mixed(x, self._weights(name, x)).to(output.dtype)

    def _weights(self, name: str, x: Tensor) -> Tensor:
        """Return the weights of the tasks for each token, shape [..., tasks]."""
        if self.told is not None:
            return self.told.to(x.device, x.dtype).expand(*x.shape[:-1], -1)
        text, site = self._running(), self._sites[name]
        found = text.gates.get(site)
        if found is None:
            if self._readers[site] != name:
                raise UnsupportedError(
                    f"{name} runs before {self._readers[site]}, which the gate reads; use site 'linear'"
                )
            scores = self._scores(site, self._parts[name], x)
            found = self._decide(site, scores.view(*text.mask.shape, self.tasks))
        return found.reshape(*x.shape[:-1], self.tasks).to(x.dtype)

    def _scores(self, site: str, part: Part, x: Tensor) -> Tensor:
        """Return the scores of the tasks for each token, float32, shape [..., tasks]."""
        if self.settings.reads == "projection":
            # SMILE: how much of the input lies in the space that each part reads
            lengths: Tensor = torch.linalg.vector_norm(part.codes(x).float(), dim=-1)
            return lengths
        read = x
        if self.settings.reads == "outputs":
            # MoLE: each adapter's output at length 1, one behind the other
            read = normalize(part.outputs(x).float(), dim=-1).flatten(-2)
        return self._scores_of(site, read)
