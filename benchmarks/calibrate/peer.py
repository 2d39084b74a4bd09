"""FusionBench's own RegMean: `python -m benchmarks.calibrate.peer JOB.json`.

Its classes for recipes take CLIP and GPT-2 alone; their arithmetic, and the hooks that measure, are in its function
`regmean_merging`, which takes any model, and data from a trainer. That function is called as it is, with the models in
float32: `torch.inverse` knows no bfloat16. What it gets of a trainer are batches of tokens.
"""

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..spectral.peer import stand_ins

_FOLDER = Path("fusion_bench") / "method" / "regmean"

Merge = Callable[..., dict[str, Tensor]]


class Batches:
    """What FusionBench needs of a trainer.

    Args:
        tokens: The batches, shape [sequences, length] each.
    """

    def __init__(self, tokens: Sequence[Tensor]) -> None:
        self._tokens = tokens
        self._train_batch_size = len(tokens[0])

    @property
    def examples(self) -> int:
        """The number of sequences."""
        return sum(len(ids) for ids in self._tokens)

    def get_train_dataloader(self) -> list[dict[str, Tensor]]:
        """Return the batches as arguments of a model."""
        return [{"input_ids": ids} for ids in self._tokens]

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs


def load(place: Path) -> Merge:
    """Return FusionBench's `regmean_merging`, without the rest of FusionBench.

    Args:
        place: From `benchmarks.spectral.peer.folder`.
    """

    class First:
        pass

    class Second:
        pass

    given: dict[str, dict[str, Any]] = {
        "fusion_bench": {},
        "fusion_bench.method": {"BaseAlgorithm": First},
        "fusion_bench.mixins": {"SimpleProfilerMixin": Second, "auto_register_config": lambda found: found},
        "fusion_bench.modelpool": {"BaseModelPool": object},
        "fusion_bench.method.regmean": {"__path__": [str(place / _FOLDER)]},
    }
    with stand_ins(given):
        found: Merge = importlib.import_module("fusion_bench.method.regmean.regmean").regmean_merging
    return found


def main(file: str) -> None:
    """Merge the models of a job, and write the result."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    job = json.loads(Path(file).read_text(encoding="utf-8"))
    merge = load(Path(job["place"]))
    models = [AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for model in job["models"]]
    data = [Batches(torch.load(tokens)) for tokens in job["tokens"]]
    merged = merge(models, data, [], [own.examples for own in data], job["alpha"])
    save_file({name: value.detach().contiguous() for name, value in merged.items()}, job["out"])


if __name__ == "__main__":
    main(sys.argv[1])
