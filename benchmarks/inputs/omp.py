"""Orthogonal matching pursuit, ours beside mergekit's, on the same matrices in float32."""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merganser.transplant.omp import matching_pursuit

from ..merge import peer

ROWS, WIDTH, K, ALL = 50_000, 896, 64, 50_000
"""Shared tokens, width, rows that are combined, and the tokens that a figure is scaled to."""
THREADS = 2
_CONDITION = 1e4
"""Rows whose chosen matrix has a smaller condition number are compared."""

# mergekit's file is loaded by itself: its package imports more than torch
_PEER = """
import importlib.util, json, os, resource, sys, time, types
import numpy as np, torch
place, folder, batch, k, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
package = types.ModuleType("tokensurgeon"); package.__path__ = [place]; sys.modules["tokensurgeon"] = package
spec = importlib.util.spec_from_file_location("tokensurgeon.omp", place + "/omp.py")
module = importlib.util.module_from_spec(spec); sys.modules[spec.name] = module; spec.loader.exec_module(module)
torch.set_num_threads(threads)
rows, targets = (torch.from_numpy(np.load(f"{folder}/{name}.npy")) for name in ("rows", "targets"))
module.batch_omp(targets[:8], rows[:256], 4)
start, cpu = time.perf_counter(), time.process_time()
found = [module.batch_omp(part, rows, k) for part in targets.split(batch)]
taken = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
np.save(f"{folder}/indices.npy", torch.cat([each[0] for each in found]).numpy())
np.save(f"{folder}/coefficients.npy", torch.cat([each[1] for each in found]).numpy())
taken["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(json.dumps(taken))
"""


def draw(count: int, donor: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and targets: of an embedding, or drawn with lengths and a few strong directions as embeddings have them."""
    if donor is not None:
        table = torch.from_numpy(np.load(donor)).float()
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
        rows = min(ROWS, len(table) - count)
        return table[order[:rows]].contiguous(), table[order[rows : rows + count]].contiguous()
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, WIDTH + 1).float() ** -0.4
    mix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q * spectrum[:, None]
    every = torch.randn(ROWS + count, WIDTH, generator=generator) @ mix
    every *= 0.5 + torch.rand(len(every), 1, generator=generator)
    return every[:ROWS].contiguous(), every[ROWS:].contiguous()


def measure(options: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Pursue some tokens with both, compare what they give, and scale the times."""
    place = peer.folder(cache, options.peer_folder)
    peer.check(place)
    rows, targets = draw(options.tokens, options.donor)
    folder = options.folder / "omp"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "rows.npy", rows.numpy())
    np.save(folder / "targets.npy", targets.numpy())
    ours = _ours(rows, targets)
    theirs = _theirs(place, folder)
    compared = _compare(rows, targets, ours.pop("indices"), ours.pop("coefficients"), folder)
    scale = ALL / len(targets)
    for found in (ours, theirs):
        found["hours_of_50k_on_two_cores"] = found["cpu_seconds"] * scale / THREADS / 3600
    return {
        "rows": list(rows.shape),
        "tokens": len(targets),
        "k": K,
        "threads": THREADS,
        "merganser": ours,
        "mergekit": theirs,
        "ratio_of_cpu_seconds": theirs["cpu_seconds"] / ours["cpu_seconds"],
        "ratio_of_seconds": theirs["seconds"] / ours["seconds"],
        **compared,
    }


def _ours(rows: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    matching_pursuit(targets[:8], rows[:4096], 4)
    start, cpu = time.perf_counter(), time.process_time()
    indices, coefficients = matching_pursuit(targets, rows, K, threads=THREADS)
    taken = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return {**taken, "indices": indices, "coefficients": coefficients}


def _theirs(place: Path, folder: Path) -> dict[str, Any]:
    [package] = (place / "lib").glob("python*/site-packages/mergekit/tokensurgeon")
    surroundings = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    # 512 tokens at a time, as in the example of its documentation; all at once is its default
    command = [str(place / "bin/python"), "-c", _PEER, str(package), str(folder), "512", str(K), str(THREADS)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=surroundings)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def _compare(
    rows: torch.Tensor, targets: torch.Tensor, indices: torch.Tensor, coefficients: torch.Tensor, folder: Path
) -> dict[str, Any]:
    """Compare choices, and coefficients where both chose the same rows and these are well conditioned."""
    chosen = torch.from_numpy(np.load(folder / "indices.npy"))
    solved = torch.from_numpy(np.load(folder / "coefficients.npy")).double()
    same, well, worst, better = 0, 0, 0.0, 0
    for i in range(len(targets)):
        mine, theirs = indices[i].sort(), chosen[i].sort()
        target = targets[i].double()
        left = [
            float((target - c @ rows[r].double()).norm())
            for r, c in ((indices[i], coefficients[i]), (chosen[i], solved[i]))
        ]
        better += left[0] <= left[1] * (1 + 1e-6)
        if not torch.equal(mine.values, theirs.values):
            continue
        same += 1
        if torch.linalg.cond(rows[indices[i]].double()) > _CONDITION:
            continue
        well += 1
        own, other = coefficients[i][mine.indices], solved[i][theirs.indices]
        worst = max(worst, float(((own - other).abs() / other.abs().max()).max()))
    return {
        "same_rows_chosen": same,
        "well_conditioned": well,
        "largest_difference": worst,
        "our_residual_is_no_larger": better,
    }
