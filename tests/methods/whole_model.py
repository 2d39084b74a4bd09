"""Merge several tensors with statistics over all of them, in memory, as the engine does over files."""

import torch

from merganser.engine.kernels.blocks import BLOCK, TensorRun
from merganser.engine.kernels.kernels import Kernels
from merganser.engine.kernels.values import Values
from merganser.method.method import fill
from merganser.ops.random import keys


def merge_whole_model(method, tensors, parameters):
    """Merge tensors, each given as base and models, float32."""
    n = len(tensors[0][1])
    values = Values.of(method, fill(method, parameters, n))
    kernels = Kernels(method, values.static, torch.float32, torch.float32, torch.device("cpu"))
    assert {over for _, _, over in kernels.statistics} == {"model"}
    runs = [TensorRun(kernels, values, base.shape, keys(0, str(i), n), BLOCK) for i, (base, _) in enumerate(tensors)]
    flat = [(base.reshape(-1), [model.reshape(-1) for model in models]) for base, models in tensors]
    known = {}
    for name, statistic, _ in kernels.statistics:
        for index in range(len(statistic.rounds)):
            total = None
            for run, inputs in zip(runs, flat, strict=True):
                total, _ = run.measure(name, index, known, run.ranges[0], *inputs, total)
            runs[0].solve(name, index, total, known, sum(base.numel() for base, _ in tensors))
            if name in known:
                break
    merged = [run.combine(known, run.ranges[0], *f)[0] for run, f in zip(runs, flat, strict=True)]
    return [result.view(base.shape) for result, (base, _) in zip(merged, tensors, strict=True)]
