"""RegMean in float64 throughout, forward too: `python -m benchmarks.calibrate.reference JOB.json`.

Every Gram matrix is that of a matrix's own inputs, with its off-diagonal entries times alpha; the merged matrix solves the normal
equations of the paper (equation 2), without a ridge.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def main(file: str) -> None:
    """Merge the models of a job, one after the other in memory, and write the result."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    job = json.loads(Path(file).read_text(encoding="utf-8"))
    left: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    for reference, tokens in zip(job["models"], job["tokens"], strict=True):
        model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float64)
        for name, (gram, weight) in inputs_of(model, torch.load(tokens)).items():
            shrunk = job["alpha"] * gram + (1 - job["alpha"]) * torch.diag(gram.diagonal())
            left[name] = left.get(name, 0) + shrunk
            right[name] = right.get(name, 0) + weight @ shrunk
        del model
    save_file({name: torch.linalg.solve(left[name], right[name], left=False) for name in left}, job["out"])


@torch.no_grad()
def inputs_of(model: Any, batches: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for every matrix of the blocks the mean of x x^T over its inputs, and its weight, float64."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(name: str, given: Tensor) -> None:
        x = given.reshape(-1, given.shape[-1])
        sums[name] = sums.get(name, 0) + x.T @ x
        rows[name] = rows.get(name, 0) + len(x)

    linear = {name: own for name, own in model.model.layers.named_modules() if isinstance(own, nn.Linear)}
    handles = [
        own.register_forward_hook(lambda _, given, __, name=name: add(name, given[0])) for name, own in linear.items()
    ]
    for ids in batches:
        model.model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return {
        f"model.layers.{name}.weight": (sums[name] / rows[name], own.weight.double()) for name, own in linear.items()
    }


if __name__ == "__main__":
    main(sys.argv[1])
