"""The plan of a merge: everything that will be read, held in memory and written, from file headers alone."""

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
from ...statistics import CalibrationPlan, Statistics
from ...wording import html_table, plural, size_text
from .gguf import GgufSummary
from .memory import estimate_memory
from .sections.census import InputCensus
from .sections.healing import HealingSummary
from .sections.mixture import MixtureSummary, ShrinkingSummary
from .sections.permutation import Permutation
from .sections.sidecars import SidecarPlan
from .sections.vocabulary import VocabularyChange
from .tensor import PlannedTensor, each_once
from .work import arithmetic_seconds


@dataclass(frozen=True, eq=False)
class Plan:
    """A merge planned down to the byte, before any weights are read or written.

    Args:
        recipe: The recipe.
        method: Its merge method.
        checkpoints: The opened inputs, by reference; the donor first.
        donor: Model from which config, tensor names and files other than weights are taken.
        tensors: The output's tensors, in the order of their bytes in the shards.
        shards: Weight files of the output, with their headers.
        config: config.json of the output; empty if the donor has none.
        side_files: Files to copy: source by path relative to the output.
        origins: Names of the output's files besides weights, by the model that gives them, or "the recipe".
        chat_template: Jinja text to write; None if it is copied with the donor's files, or there is none.
        generation_config: generation_config.json to write; None if the donor's is copied, or there is none.
        fused: Whether operations are fused, for methods where that helps.
        seed: Seed of random draws.
        block: Most elements per block, the unit of arithmetic; sums, and so the result, depend on it.
        workers: Threads that merge.
        kept: Bytes of inputs that each worker may cache between passes.
        max_memory: Largest resident memory allowed, bytes.
        device: "cpu" or "cuda[:i]".
        warnings: Messages for the user before the run.
        differences: Messages about where mergekit would compute other values for this recipe.
        sidecars: What is stored to restore each model from the merged one; None if the method has no sidecar.
        vocabulary: What changes where rows are matched by token; None if no model changes.
        stages: Plans of the recipe's other documents, in the order in which they run; their outputs do not exist yet.
        calibrations: What must be measured on data before the merge; those that need nothing are included.
        statistics: The statistics from data that the merge takes, each folder once.
        census: What becomes of the tensors of each input.
        mixture: The mixture of experts that the output is; None for other models.
        healing: How the seams of a stacked model were healed; None for other outputs.
        permutation: How models are permuted to a reference before they are merged; None if they are merged as they are.
        gguf: How the output is written as GGUF; None if it is not.
        made: Names of the earlier stages whose outputs are inputs here, by their path in this plan.
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
    fused: bool
    seed: int
    block: int
    workers: int
    kept: int
    max_memory: int
    device: str
    warnings: Sequence[str] = field(default_factory=list)
    differences: Sequence[str] = field(default_factory=list)
    sidecars: SidecarPlan | None = None
    vocabulary: VocabularyChange | None = None
    stages: Sequence[Plan] = ()
    calibrations: Sequence[CalibrationPlan] = ()
    statistics: Sequence[Statistics] = ()
    made: Mapping[str, str] = field(default_factory=dict)
    permutation: Permutation | None = None
    census: Mapping[ModelReference, InputCensus] = field(default_factory=dict)
    mixture: MixtureSummary | ShrinkingSummary | None = None
    healing: HealingSummary | None = None
    gguf: GgufSummary | None = None
    origins: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Plan: {self._facts()}>"

    def _repr_html_(self) -> str:
        rows = [["reads", size_text(self.bytes_read)], ["writes", size_text(self.bytes_written)]]
        rows += [["warning", self.shown(warning)] for warning in self.warnings]
        return html_table(f"Plan: {self._facts()}", rows)

    def _facts(self) -> str:
        inputs, tensors = plural(len(self.checkpoints), "checkpoint"), plural(len(self.tensors), "tensor")
        return f"{self.method.name}, {inputs}, {tensors}, writes {size_text(self.bytes_written)}"

    def shown(self, text: object) -> str:
        """Return a text with the paths of stages replaced by their names."""
        found = str(text)
        for path in sorted(self.made, key=len, reverse=True):
            found = found.replace(path, self.made[path])
        return found

    @property
    def files(self) -> list[Shard]:
        """Every safetensors file that is written: weights and sidecars."""
        return [*self.shards, *(self.sidecars.shards if self.sidecars else ())]

    @cached_property
    def distinct(self) -> list[PlannedTensor]:
        """One tensor for every distinct set of parameters."""
        return each_once(t for t in self.tensors if not t.copy)

    @cached_property
    def methods(self) -> dict[MergeMethod, int]:
        """Number of tensors per method: the recipe's method first, then those that merge what it leaves out."""
        counts = Counter(t.method for t in self.tensors if not t.copy)
        return {self.method: counts.pop(self.method, 0), **counts}

    @cached_property
    def passes(self) -> int:
        """Most passes over the inputs of any tensor: one per measuring round, and one to combine."""
        return max((t.passes for t in self.distinct), default=1)

    @cached_property
    def whole_model(self) -> bool:
        """Whether a statistic is measured over the whole model before the first tensor is merged."""
        return any(t.over_model for t in self.distinct)

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of inputs read in all passes together; tensors of one block are read once.

        An upper bound: inputs cached in memory are not read again.
        """
        passes = {id(t.parameters): t.passes for t in self.distinct}
        total = self._bytes_once
        for t in self.tensors:
            if not t.copy and (self.whole_model or not t.in_one_block):
                total += t.nbytes_read * (passes[id(t.parameters)] - 1)
        return total

    @cached_property
    def _bytes_once(self) -> int:
        """Bytes of inputs read in one pass."""
        return sum(t.nbytes_read for t in self.tensors)

    @cached_property
    def bytes_written(self) -> int:
        """Bytes of the output's weights."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def n_parameters(self) -> int:
        """Number of elements of the output, without copied integers."""
        return sum(t.size for t in self.tensors if not t.copy)

    @cached_property
    def peak_memory(self) -> int:
        """Largest resident memory to expect, bytes: measured constants, and the memory of the workers."""
        # add, not max: memory that workers freed stays with the process while the sidecars are made
        beside = self.sidecars.peak_memory if self.sidecars else 0
        return estimate_memory(self.tensors, self.workers, self.fused) + self.workers * self.kept + beside

    @property
    def moving_seconds(self) -> float:
        """Rough time of starting, reading and writing, seconds.

        Fitted to processor times of merges of files in the page cache; a disk below about 2 GB/s takes longer.
        """
        beside = self.sidecars.bytes_read / 2e9 + self.sidecars.bytes_written / 0.9e9 if self.sidecars else 0
        return 2 + self._bytes_once / 2e9 + self.bytes_read / 8e9 + self.bytes_written / 0.9e9 + beside

    @property
    def seconds(self) -> float:
        """Rough time to expect, seconds: reading, arithmetic (see `work`), writing."""
        return self.moving_seconds + arithmetic_seconds(self.tensors, self.workers, fused=self.fused)
