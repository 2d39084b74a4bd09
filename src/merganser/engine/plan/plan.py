"""What a merge will do: everything that will be read, held and written, known from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...checkpoint import Checkpoint, Shard
from ...method import MergeMethod
from ...recipe import ModelReference, Recipe
from .memory import estimate_memory
from .sidecars import SidecarPlan
from .tensor import PlannedTensor, each_once


@dataclass(frozen=True, eq=False)
class Plan:
    """A merge, decided down to the byte. Nothing was written, and no weights were read.

    Args:
        recipe: The recipe.
        method: Its merge method.
        checkpoints: The opened inputs, by reference, the donor first.
        donor: Gives config, names, and files that are not weights.
        tensors: The output, in the order of its shards.
        shards: Files of the output, with their headers.
        config: config.json of the output; empty where the donor has none.
        side_files: Files to copy: path below the output, and source.
        chat_template: Jinja text to write; None where the donor's files hold it, or none does.
        generation_config: generation_config.json of the output; None where the donor's is copied, or none is.
        compiled: Whether kernels will be fused.
        seed: Seed of random draws.
        workers: Threads that merge.
        kept: What each of them may keep of inputs that are looked at several times, bytes.
        max_memory: Largest resident memory allowed, bytes.
        device: "cpu" or "cuda[:i]".
        warnings: What the user should know before running.
        differences: Where mergekit would compute other numbers for this recipe.
        sidecars: What is stored for each model beside the merged one; None where the method stores nothing.
        stages: Plans of the recipe's other documents, in the order of work; their results do not exist yet.
        made: Path in this plan of each input that an earlier stage makes, and that stage's name.
    """

    recipe: Recipe
    method: MergeMethod
    checkpoints: Mapping[ModelReference, Checkpoint]
    donor: ModelReference
    tensors: Sequence[PlannedTensor]
    shards: Sequence[Shard]
    config: Mapping[str, Any]
    side_files: Mapping[str, Path]
    chat_template: str | None
    generation_config: Mapping[str, Any] | None
    compiled: bool
    seed: int
    workers: int
    kept: int
    max_memory: int
    device: str
    warnings: Sequence[str] = field(default_factory=list)
    differences: Sequence[str] = field(default_factory=list)
    sidecars: SidecarPlan | None = None
    stages: Sequence[Plan] = ()
    made: Mapping[str, str] = field(default_factory=dict)

    def shown(self, text: object) -> str:
        """Return a text with the names of stages in the place of their paths."""
        found = str(text)
        for path in sorted(self.made, key=len, reverse=True):
            found = found.replace(path, self.made[path])
        return found

    @property
    def files(self) -> list[Shard]:
        """Every file of tensors that is written: the weights, and those of the sidecars."""
        return [*self.shards, *(self.sidecars.shards if self.sidecars else ())]

    @cached_property
    def distinct(self) -> list[PlannedTensor]:
        """One tensor for every distinct set of parameters."""
        return each_once(t for t in self.tensors if not t.copy)

    @cached_property
    def methods(self) -> dict[MergeMethod, int]:
        """Number of tensors that each method merges: the recipe's method first, then those for tensors it leaves out."""
        counts = Counter(t.method for t in self.tensors if not t.copy)
        return {self.method: counts.pop(self.method, 0), **counts}

    @cached_property
    def passes(self) -> int:
        """How often inputs are read, at most: once per measuring round, once to combine."""
        return max((t.passes for t in self.distinct), default=1)

    @cached_property
    def whole_model(self) -> bool:
        """Whether a statistic is measured over the whole model before the first tensor is merged."""
        return any(t.over_model for t in self.distinct)

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of the inputs that all passes read together; tensors of one block are read once.

        Some of them are kept in memory between passes, and not read again.
        """
        passes = {id(t.parameters): t.passes for t in self.distinct}
        total = 0
        for t in self.tensors:
            once = t.copy or not (self.whole_model or t.size > t.block)
            total += t.nbytes_read * (1 if once else passes[id(t.parameters)])
        return total

    @cached_property
    def bytes_written(self) -> int:
        """Bytes of the output's weights."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def n_parameters(self) -> int:
        """Number of weights of the output."""
        return sum(t.size for t in self.tensors if not t.copy)

    @cached_property
    def peak_memory(self) -> int:
        """Largest resident memory to expect, bytes: measured constants, and what the workers hold."""
        # memory that the workers freed stays with the process while the sidecars are made
        beside = self.sidecars.peak_memory if self.sidecars else 0
        return estimate_memory(self.tensors, self.workers, self.compiled) + self.workers * self.kept + beside

    @property
    def seconds(self) -> float:
        """Rough time to expect: passes at 4 GB/s from memory, the first read and the writing at 0.5 GB/s."""
        once = sum(t.nbytes_read for t in self.tensors)
        beside = self.sidecars.bytes_read / 2e9 + self.sidecars.bytes_written / 0.5e9 if self.sidecars else 0
        merge = 2 + once / 1e9 + self.bytes_read / 4e9 + self.bytes_written / 0.5e9 + (20 if self.compiled else 0)
        return merge + beside
