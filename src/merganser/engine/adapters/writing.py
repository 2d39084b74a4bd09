"""Write an adapter: its tensors one after another, then the folder that peft loads, which appears when it is complete."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ...adapters.adapter import FILES, PREFIX
from ...adapters.config import CONFIG_NAME
from ...checkpoint import DTYPE_BY_NAME, Checkpoint, DType, TensorInfo, plan_shards
from ...errors import OutputError
from ...files import sha256_of_file
from ...record.format import RECORD_FORMAT, RECORD_NAME, record_text
from ...version import __version__
from ..output.staging import Staging, check_target, resolve_target

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "TRANSPOSED",
    "Spool",
    "config_on",
    "low_rank_names",
    "norm_of",
    "peft_config",
    "target_modules",
    "write_adapter",
]

# Classes whose linear layers (Conv1D) store weights as [in, out].
TRANSPOSED = ("gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer")

_PIECE = 1 << 22
_STEM = FILES[0].removesuffix(".safetensors")


def low_rank_names(module: str, *, embedding: bool = False) -> tuple[str, str]:
    """Return the names under which peft stores A and B of a module."""
    kind = "lora_embedding_{}" if embedding else "lora_{}.weight"
    return f"{PREFIX}{module}.{kind.format('A')}", f"{PREFIX}{module}.{kind.format('B')}"


def norm_of(tensor: Tensor) -> float:
    """Return the Frobenius norm of a tensor, summed in float64."""
    import torch

    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


class Spool:
    """Tensors on disk in a file without a name, until all shapes are known; a killed run leaves nothing of it.

    Args:
        out: The target folder; the file is on the same disk.
        overwrite: Whether the target may exist.

    Raises:
        OutputError: The target exists, or its parent cannot be written.
    """

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        check_target(out, overwrite=overwrite)
        self.out = out
        self.tensors: list[tuple[str, DType, tuple[int, ...]]] = []
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        try:
            parent = resolve_target(out).parent
            parent.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=parent)  # noqa: SIM115  # closed by close
        except OSError as error:
            raise OutputError(f"{out}: cannot be written: {error.strerror}") from None

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor.

        Raises:
            OutputError: The disk is full or failed.
        """
        import torch

        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        try:
            self._file.write(data)
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be written: {error.strerror}") from None
        dtype = DTYPE_BY_NAME[str(tensor.dtype).removeprefix("torch.")]
        self.tensors.append((name, dtype, tuple(tensor.shape)))
        self._places[name] = (self._end, data.nbytes)
        self._end += data.nbytes

    def add_biases(self, biases: Mapping[str, Tensor], factored: Collection[str]) -> None:
        """Add biases of linear layers, by module, under the names that they have while factors are beside them.

        Args:
            biases: The biases.
            factored: Modules with factors.

        Raises:
            OutputError: The disk is full or failed.
        """
        for module, value in biases.items():
            self.add(f"{PREFIX}{module}{'.base_layer' if module in factored else ''}.bias", value)

    def counts(self) -> dict[str, Any]:
        """Return what a run record says of the tensors: parameters, tensors, dtypes."""
        return {
            "parameters": sum(math.prod(shape) for _, _, shape in self.tensors),
            "tensors": len(self.tensors),
            "dtypes": sorted({dtype.name for _, dtype, _ in self.tensors}),
        }

    def copy(self, name: str, write: Callable[[int, memoryview], None]) -> None:
        """Pass on a tensor's bytes in pieces, each with its position in the tensor."""
        start, nbytes = self._places[name]
        self._file.seek(start)
        done = 0
        while done < nbytes:
            piece = self._file.read(min(_PIECE, nbytes - done))
            write(done, memoryview(piece))
            done += len(piece)


def target_modules(tensors: Mapping[str, TensorInfo], changed: Collection[str]) -> list[str]:
    """Return names of the changed modules for peft: ends of names where all modules of that end are changed.

    Args:
        tensors: Tensors of the base, by name.
        changed: Full names of the modules with factors.
    """
    held: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight") and len(tensor.shape) >= 2:
            module = name.removesuffix(".weight")
            held.setdefault(module.rpartition(".")[2], set()).add(module)
    ends = {module.rpartition(".")[2] for module in changed}
    whole = {end for end in ends if held.get(end, {""}) <= set(changed)}
    return sorted(whole | {module for module in changed if module.rpartition(".")[2] not in whole})


def peft_config(
    *,
    base: str | None,
    rank: int,
    ranks: Mapping[str, int],
    modules: Sequence[str],
    saved: Sequence[str] = (),
    biases: bool = False,
    transposed: bool = False,
    task: str | None = "CAUSAL_LM",
) -> dict[str, Any]:
    """Return the contents of `adapter_config.json` of a LoRA adapter of scale 1.

    Args:
        base: Name of the base model.
        rank: Rank of most modules.
        ranks: Ranks that differ, by the full name of the module.
        modules: Changed modules: names, or ends of names.
        saved: Modules that are stored whole.
        biases: Whether biases of the base are stored.
        transposed: Whether weights are stored as [in, out].
        task: Kind of model.
    """
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "all" if biases else "none",
        "target_modules": list(modules),
        "modules_to_save": list(saved) or None,
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(ranks),
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def config_on(
    start: Checkpoint, named: str, ranks: Mapping[str, int], *, saved: Sequence[str], biases: bool, transposed: bool
) -> dict[str, Any]:
    """Return the contents of `adapter_config.json` of a LoRA adapter of a model whose files are known.

    Args:
        start: The model that the adapter is loaded on.
        named: Its name in the config.
        ranks: Rank of each module with factors, by its full name.
        saved: As for `peft_config`, like the two that follow.
        biases: As there.
        transposed: As there.
    """
    most = max(ranks.values())
    return peft_config(
        base=named,
        rank=most,
        ranks={module: rank for module, rank in ranks.items() if rank != most},
        modules=target_modules(start.tensors, ranks),
        saved=saved,
        biases=biases,
        transposed=transposed,
        task="CAUSAL_LM" if "CausalLM" in str(start.config.get("architectures", "CausalLM")) else None,
    )


def write_adapter(
    spool: Spool,
    config: Mapping[str, Any],
    *,
    card: str,
    record: Mapping[str, Any],
    overwrite: bool,
) -> dict[str, Any]:
    """Write the folder of an adapter: weights, config, model card and run record.

    Args:
        spool: The tensors.
        config: Contents of `adapter_config.json`.
        card: Text of `README.md`.
        record: What the run record says besides the files.
        overwrite: Replace a target that merganser wrote before.

    Returns:
        The run record.

    Raises:
        OutputError: The target cannot be written.
    """
    out = spool.out
    (shard,) = plan_shards(spool.tensors, 1 << 62, {}, stem=_STEM)
    staging = Staging(out, [shard], "adapter", overwrite=overwrite, fresh=True)
    try:
        for name, (offset, _) in shard.entries.items():
            spool.copy(name, lambda at, data, offset=offset: staging.write(0, offset + at, data))  # type: ignore[misc]
        texts = {CONFIG_NAME: json.dumps(config, indent=2) + "\n", "README.md": card}
        staging.claim([*texts, RECORD_NAME])
        for name, text in texts.items():
            (staging.folder / name).write_bytes(text.encode(errors="backslashreplace"))
        files = [shard.name, *texts]
        sizes = [(staging.folder / name).stat().st_size for name in files]
        written = {
            "format": RECORD_FORMAT,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": {"merganser": __version__, **record.get("versions", {})},
            **{key: value for key, value in record.items() if key != "versions"},
            "outputs": [
                {"file": name, "bytes": size, "sha256": sha256_of_file(staging.folder / name)}
                for name, size in zip(files, sizes, strict=True)
            ],
        }
        (staging.folder / RECORD_NAME).write_text(record_text(written), encoding="utf-8")
        staging.publish()
    except OSError as error:
        staging.remove()
        raise staging.write_error(error) from None
    except BaseException:
        staging.remove()
        raise
    return written
