"""Merge adapters into one adapter, a module at a time."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...adapters import LowRank
from ...adapters.adapter import FILES
from ...adapters.config import CONFIG_NAME
from ...checkpoint import Reader
from ...errors import MergeError, NonFiniteError, OutputError
from ...files import sha256_of_file
from ...method.factors import Factors
from ...ops.random import Random, keys
from ...process import one_thread
from ...version import __version__
from ..kernels.merge_tensor import merge_tensor
from ..kernels.values import Values
from ..output.staging import lies_in, resolve_target
from .plan import AdapterPlan, PlannedModule
from .space import Truncated, open_space
from .writing import Spool, low_rank_names, peft_config, write_adapter

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["lay_out", "output_rank", "run_adapters"]

Progress = Callable[[int, int], None]


def run_adapters(
    plan: AdapterPlan, out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Mapping[str, Any]:
    """Merge adapters; the folder appears when it is complete.

    Args:
        plan: From `plan_adapters`.
        out: Target folder.
        overwrite: Replace a target that merganser wrote before.
        progress: Called with the modules merged so far, and their number.

    Returns:
        The run record.

    Raises:
        OutputError: The target cannot be written.
        NonFiniteError: A factor or a result is not finite.
        MergeError: The method does not take these factors.
    """
    for adapter, name in zip(plan.adapters, plan.names, strict=True):
        if lies_in(adapter.path, resolve_target(out)):
            raise OutputError(f"{out}: {name}, an input of this merge, is in this folder; choose another target")
    started = time.monotonic()
    with Spool(out, overwrite=overwrite) as spool, Reader() as reader, one_thread():
        rank = output_rank(plan)
        entries = []
        for module, found in _in_order(plan, rank, reader):
            entries.append(_store(module, found, spool))
            if progress:
                progress(len(entries), len(plan.modules))
        for name, tensor in plan.copied.items():
            spool.add(name, reader.tensor(tensor))
        return _write(plan, spool, rank, entries, started, overwrite)


def lay_out(plan: AdapterPlan, folder: Path) -> None:
    """Write the output of a plan without values, for planning later stages: config, header, a sparse file."""
    from ...checkpoint import DTYPE_BY_NAME, plan_shards

    rank, dtype = output_rank(plan), DTYPE_BY_NAME[plan.dtype]
    tensors: list[tuple[str, Any, tuple[int, ...]]] = []
    for module in plan.modules:
        out, into = module.shape
        a, b = low_rank_names(module.name, embedding=module.embedding)
        tensors += [(a, dtype, (rank, into)), (b, dtype, (out, rank))]
    tensors += [(name, tensor.dtype, tensor.shape) for name, tensor in plan.copied.items()]
    (shard,) = plan_shards(tensors, 1 << 62, {}, stem=FILES[0].removesuffix(".safetensors"))
    folder.mkdir()
    with (folder / shard.name).open("wb") as file:
        file.write(shard.header)
        file.truncate(shard.size)
    (folder / CONFIG_NAME).write_text(json.dumps(_config(plan, rank)))


def output_rank(plan: AdapterPlan) -> int:
    """Return the rank of the output: the recipe's; else as much as loses nothing, or what the method gives."""
    if plan.recipe.rank is not None:
        return plan.recipe.rank
    largest = max(max(module.ranks) for module in plan.modules)
    together = max(min(sum(module.ranks), *module.shape) for module in plan.modules)
    if not plan.of_factors:
        return together
    concatenates = any(module.parameters.get("combination_type") == "cat" for module in plan.modules)
    return max(sum(module.ranks) for module in plan.modules) if concatenates else largest


def _in_order(plan: AdapterPlan, rank: int, reader: Reader) -> Iterator[tuple[PlannedModule, Truncated]]:
    """Merge modules on several threads, a few ahead of the one that is yielded; each by one thread alone."""
    workers = min(os.cpu_count() or 1, 8)
    waiting: deque[tuple[PlannedModule, Future[Truncated]]] = deque()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for module in plan.modules:
                waiting.append((module, pool.submit(_merge, plan, module, rank, reader)))
                if len(waiting) > workers:
                    first, found = waiting.popleft()
                    yield first, found.result()
            for first, found in waiting:
                yield first, found.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _merge(plan: AdapterPlan, module: PlannedModule, rank: int, reader: Reader) -> Truncated:
    """Merge one module; return factors in the dtype and of the rank of the output."""
    pairs = [None if change is None else _read(change, reader) for change in module.changes]
    try:
        found = (_by_factors if plan.of_factors else _by_weights)(plan, module, pairs, rank)
    except MergeError as error:
        raise type(error)(f"{module.name}: {error}") from error
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise MergeError(f"{module.name}: merge method {plan.method.name}: {error}") from error
    dtype = getattr(torch, plan.dtype)
    left, right = _padded(found.left.to(dtype), found.right.to(dtype), rank)
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise NonFiniteError(f"{module.name}: the merged factors are not finite")
    return replace(found, left=left, right=right)


def _store(module: PlannedModule, found: Truncated, spool: Spool) -> dict[str, Any]:
    a, b = low_rank_names(module.name, embedding=module.embedding)
    spool.add(a, found.right)
    spool.add(b, found.left)
    return {"module": module.name, "norm": found.norm, "error": found.error}


def _read(change: LowRank, reader: Reader) -> Factors:
    a, b = (reader.tensor(part) for part in (change.a, change.b))
    for part, info in ((a, change.a), (b, change.b)):
        if not torch.isfinite(part).all():
            raise NonFiniteError(f"{info.file}: tensor {info.name!r} holds NaN or infinity")
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return Factors(a.to(wide), b.to(wide), change.scale)


def _by_factors(plan: AdapterPlan, module: PlannedModule, pairs: list[Factors | None], rank: int) -> Truncated:
    """Call a method that works on factors; adapters without this module have no part in it."""
    present = [i for i, pair in enumerate(pairs) if pair is not None]
    own = {
        name: tuple(value[i] for i in present) if isinstance(value, tuple) else value
        for name, value in module.parameters.items()
    }
    values = Values.of(plan.method, own, {})
    given = {
        "models": [pairs[i] for i in present],
        "rng": Random(keys(plan.seed, module.name, len(pairs))[present], torch.zeros((), dtype=torch.int64)),
        "rank": plan.recipe.rank,
        **values.numbers,
        **values.static,
    }
    wanted = plan.method.combine.__code__.co_varnames[: _arguments(plan.method.combine)]
    found: Any = plan.method.combine(**{name: given[name] for name in wanted})
    if found.rank > rank:
        raise MergeError(f"{plan.method.name} gives the rank {found.rank}, the recipe says {rank}")
    return Truncated(found.b, found.a, math.nan, math.nan)


def _arguments(function: Callable[..., Any]) -> int:
    return function.__code__.co_argcount + function.__code__.co_kwonlyargcount


def _by_weights(plan: AdapterPlan, module: PlannedModule, pairs: list[Factors | None], rank: int) -> Truncated:
    """Call a method for weights on small matrices that stand for the changes, or on the changes themselves."""
    kind = plan.kind
    assert kind is not None
    # a table of embeddings is stored with a row per token, which is an output unit of it
    turn = module.embedding
    given = [None if pair is None else _oriented(pair, turn) for pair in pairs]
    # both sides are reduced, unless the method gives the same result only if one side is whole
    left, right = (False, False) if plan.space == "full" else kind.space or (True, True)
    space = open_space(given, reduce_left=left, reduce_right=right)
    own = None if plan.method.base == "unused" else torch.zeros_like(space.matrices[0])
    merged = merge_tensor(
        plan.method,
        own,
        space.matrices,
        module.parameters,
        name=f"{module.name}.weight",
        role=module.location.role,
        location=module.location,
        seed=plan.seed,
        dtype=torch.float64,
    )
    found = space.expand(merged, rank)
    return replace(found, left=found.right.T, right=found.left.T) if turn else found


def _oriented(pair: Factors, turn: bool) -> tuple[Tensor, Tensor]:
    left, right = pair.b * pair.scale, pair.a
    return (right.T, left.T) if turn else (left, right)


def _padded(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Fill factors up with zeros: programs that serve adapters expect one rank of all modules."""
    more = rank - left.shape[1]
    return torch.nn.functional.pad(left, (0, more)), torch.nn.functional.pad(right, (0, 0, 0, more))


def _write(
    plan: AdapterPlan, spool: Spool, rank: int, entries: list[dict[str, Any]], started: float, overwrite: bool
) -> dict[str, Any]:
    norm = math.sqrt(sum(entry["norm"] ** 2 for entry in entries))
    error = math.sqrt(sum(entry["error"] ** 2 for entry in entries))
    merged = {
        "space": plan.space,
        "rank": rank,
        "modules": len(entries),
        "copied": len(plan.copied),
        "error": None if plan.of_factors else (error / norm if norm else 0.0),
        "base": plan.base,
    }
    record = {
        "versions": {"torch": torch.__version__, f"method {plan.method.name}": str(plan.method.version)},
        "recipe": plan.recipe.text,
        "method": plan.method.name,
        "seed": plan.seed,
        "merged_adapters": merged,
        "models": list(plan.names),
        "adapters": [
            _described(adapter.config.file, adapter.file, name)
            for adapter, name in zip(plan.adapters, plan.names, strict=True)
        ],
        **spool.counts(),
        "warnings": list(plan.warnings),
        "timings": {"seconds": round(time.monotonic() - started, 3)},
        "changes": [] if plan.of_factors else entries,
    }
    return write_adapter(
        spool, _config(plan, rank), card=_card(plan, spool.out.name, rank), record=record, overwrite=overwrite
    )


def _config(plan: AdapterPlan, rank: int) -> dict[str, Any]:
    saved = [name for adapter in plan.adapters for name in adapter.replaced]
    return peft_config(
        base=plan.base,
        rank=rank,
        ranks={},
        modules=_targets(plan),
        saved=sorted({name.rpartition(".")[0] for name in saved if not name.endswith("bias")}),
        biases=any(name.endswith("bias") for name in saved),
        transposed=plan.transposed,
    )


def _targets(plan: AdapterPlan) -> list[str]:
    """Return names of the modules for peft: ends of names where, it seems, every layer has such a module."""
    held: dict[str, list[str]] = {}
    for module in plan.modules:
        held.setdefault(module.name.rpartition(".")[2], []).append(module.name)
    most = max(len(names) for names in held.values())
    return sorted(name for end, names in held.items() for name in ([end] if len(names) == most > 1 else names))


def _described(config: Path, weights: Path, name: str) -> dict[str, Any]:
    files = [
        {"path": str(file), "bytes": file.stat().st_size, "sha256": sha256_of_file(file)} for file in (config, weights)
    ]
    return {"model": name, "files": files}


def _card(plan: AdapterPlan, title: str, rank: int) -> str:
    front = ["---", "library_name: peft", "tags:", "- lora", "- merge", "- merganser"]
    front += [f"base_model: {json.dumps(plan.base)}"] if plan.base and not Path(plan.base).exists() else []
    listed = "\n".join(f"- `{Path(name).name}`" for name in plan.names)
    fence = "```" if "```" not in plan.recipe.text else "~~~~~~"
    return (
        "\n".join([*front, "---"])
        + f"""

# {title}

A LoRA adapter of rank {rank}, merged with Merganser {__version__}, method
`{plan.method.name}`, from

{listed}

{fence}yaml
{plan.recipe.text.strip()}
{fence}
"""
    )
