"""What gates are, as data: what they weight, what they read, and how scores become weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ....errors import ParameterError, did_you_mean

__all__ = ["KINDS", "GateSettings", "settings_of"]

_CHOICES = {
    "where": ("all", "mlp", "attention"),
    "site": ("block", "linear"),
    "reads": ("input", "outputs", "projection"),
    "pool": ("token", "prefix", "text"),
    "weights": ("softmax", "top_softmax", "scores"),
    "mix": ("parts", "outputs"),
    "keys": ("own", "shared"),
    "top_where": ("all", "mlp", "attention"),
}


@dataclass(frozen=True, slots=True)
class GateSettings:
    """How tasks are weighted.

    A linear layer computes `W x + sum_k g_k part_k x`, and gates give the `g_k`; or an attention or MLP computes
    `sum_k g_k module_k(x)`.

    Args:
        where: Which of the model's layers have parts or experts: "mlp", "attention", or "all".
        site: What has gates of its own: every "block" (attention or MLP), or every "linear" layer.
        reads: What scores are computed from: the "input" of the site's first linear layer; the "outputs" of all parts, each at
            length 1 and one behind the other; or the "projection" of the input on the leading right singular vectors of each
            part, whose length is the score, so that nothing is fitted. The latter two need a gate per linear layer.
        shared: Whether all sites have the same gate.
        pool: Which tokens count for the scores of a token: the "token" itself, the mean over it and those before it
            ("prefix"), or the mean over all tokens of the text ("text"; while generating, those of the prompt).
        weights: The scores themselves ("scores"), their "softmax" over all tasks, or over those that `top` leaves
            ("top_softmax").
        top: Only so many of the weights, the largest, stay; None for all.
        rank: Parts are cut to this rank by a singular value decomposition; None leaves them as they are.
        density: Of each part, only this share of its elements is kept, the largest; None for all.
        mix: What is summed: "parts" of linear layers, or "outputs" of whole modules, the attention and the MLP of each layer
            with all their tensors, of which every task has its own ("experts").
        keys: With "outputs", whether every expert of an attention has its "own" keys and values, or all have "shared" ones,
            the mean over the tasks.
        top_where: With "outputs", where `top` counts: "all", or only in each "mlp" or "attention".

    Raises:
        ParameterError: A setting is not valid, or does not go with another one.
    """

    where: str = "all"
    site: str = "block"
    reads: str = "input"
    shared: bool = False
    pool: str = "token"
    weights: str = "softmax"
    top: int | None = None
    rank: int | None = None
    density: float | None = None
    mix: str = "parts"
    keys: str = "own"
    top_where: str = "all"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ParameterError(f"{name}: must be {', '.join(map(repr, allowed))}, found {value!r}")
        for name in ("top", "rank"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise ParameterError(f"{name}: must be a whole number of at least 1, found {number!r}")
        if not isinstance(self.shared, bool):
            raise ParameterError(f"shared: must be true or false, found {self.shared!r}")
        if self.density is not None and not (isinstance(self.density, int | float) and 0 < self.density <= 1):
            raise ParameterError(f"density: must be above 0 and at most 1, found {self.density!r}")
        if self.rank is not None and self.density is not None:
            raise ParameterError("rank and density are two ways to make parts smaller; give one of them")
        if self.reads != "input" and (self.site != "linear" or self.shared):
            raise ParameterError(
                f"gates that read {self.reads} belong to one linear layer: site must be 'linear', shared false"
            )
        if self.reads == "projection" and self.rank is None:
            raise ParameterError("gates that read a projection need the singular vectors of parts: give their rank")
        self._check_mix()

    def _check_mix(self) -> None:
        if self.mix == "parts":
            for name, plain in (("keys", "own"), ("top_where", "all")):
                if getattr(self, name) != plain:
                    raise ParameterError(f"{name}: {getattr(self, name)!r} goes with mix 'outputs'")
            return
        if self.reduced:
            name = "rank" if self.rank is not None else "density"
            raise ParameterError(f"{name}: makes parts smaller, but experts (mix 'outputs') are whole")
        if self.site != "block" or self.reads != "input":
            raise ParameterError("experts (mix 'outputs') have a gate per block that reads its input")
        if self.weights == "scores":
            raise ParameterError("weights of experts (mix 'outputs') must add up to 1: 'softmax' or 'top_softmax'")
        if self.weights == "softmax" and self.top is not None:
            raise ParameterError("weights of experts (mix 'outputs') must add up to 1: with top, give 'top_softmax'")
        if self.where == "mlp" and self.keys != "own":
            raise ParameterError("keys: belong to attention, which is not among the experts (where 'mlp')")

    @property
    def reduced(self) -> bool:
        """Whether parts are smaller than what the tasks have."""
        return self.rank is not None or self.density is not None

    @property
    def causal(self) -> bool:
        """Whether a token's weights depend on no later token."""
        return self.pool != "text"

    def to_json(self) -> str:
        """Return the settings as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> GateSettings:
        """Read what `to_json` wrote.

        Raises:
            ParameterError: It does not describe such settings.
        """
        try:
            found = json.loads(text)
            return cls(**found)
        except (ValueError, TypeError) as error:
            raise ParameterError(f"does not describe gate settings: {error}") from None


KINDS = {
    "wemoe": GateSettings(where="mlp", pool="prefix", weights="scores"),
    "e-wemoe": GateSettings(where="mlp", shared=True, pool="prefix", weights="scores", density=0.1),
    "mole": GateSettings(site="linear", reads="outputs", pool="prefix"),
    "self-moe": GateSettings(shared=True, top=1),
    "smile": GateSettings(site="linear", reads="projection", weights="top_softmax", top=1, rank=32),
    "bam": GateSettings(mix="outputs", weights="top_softmax", top=1, top_where="mlp"),
    "bam-kv": GateSettings(mix="outputs", keys="shared", weights="top_softmax", top=1, top_where="mlp"),
}
"""Settings by the name of the published system that they are nearest to."""


def settings_of(kind: str, **changes: Any) -> GateSettings:
    """Return the settings of a kind, with some of them changed; None changes nothing.

    Raises:
        ParameterError: The kind or a setting is not valid.
    """
    if kind not in KINDS:
        raise ParameterError(f"gates: no kind {kind!r}.{did_you_mean(kind, KINDS)} Kinds: {', '.join(KINDS)}")
    given = {name: value for name, value in changes.items() if value is not None}
    found = asdict(KINDS[kind]) | given
    if given.get("rank") is not None and "density" not in given:
        found["density"] = None
    return GateSettings(**found)
