"""Choose the weight files of a folder from file names alone.

Only names are used, because the same choice is made for a repository on the Hub before anything is fetched.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...errors import CheckpointError, NotFoundError, UnsupportedError

__all__ = [
    "GGUF_SUFFIX",
    "PICKLED_SUFFIXES",
    "TRAINER_SUFFIX",
    "Weights",
    "choose_weights",
    "is_weight_file",
    "may_be_weights",
    "refuse_name",
]

PICKLED_SUFFIXES = (".bin", ".pt", ".pth")
"""Endings of the names of pickled checkpoints."""

TRAINER_SUFFIX = ".ckpt"
"""Ending of the names of pickled files that hold the state of a training, too, as those of PyTorch Lightning."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.safetensors|\.bin|\.gguf)")
GGUF_SUFFIX = ".gguf"
"""Ending of the names of GGUF files."""

_OTHER_WEIGHTS = (GGUF_SUFFIX, ".onnx", ".h5", ".msgpack", ".tflite", ".ot", ".npz", ".mlmodel", ".pdparams")
# Optimizer and training states, and adapters: these files hold tensors, but not the model's weights.
_NOT_WEIGHTS = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|trainer_state|adapter_|pytorch_lora|"
    r"tokenizer|global_step|mmproj|.*optim_states|.*_rank_\d)"
)


@dataclass(frozen=True, slots=True)
class Weights:
    """The chosen weights: either an index, which names the shards, or the files themselves.

    Args:
        index: Name of the index.
        files: Names of the files, if no index is chosen.
        cut: Whether every file holds a piece of every matrix, as those of Llama for several GPUs.
        rival: Name of an index in the same folder as the chosen file. The index may name only that file; if it names
            others, it is not clear which files are the model's.
    """

    index: str | None
    files: tuple[str, ...]
    rival: str | None = None
    cut: bool = False


def is_weight_file(name: str) -> bool:
    """Return whether a file holds tensors in any format, be it model weights or training state."""
    return name.endswith((".safetensors", *PICKLED_SUFFIXES, TRAINER_SUFFIX, *_OTHER_WEIGHTS))


def may_be_weights(name: str) -> bool:
    """Return whether a file has a weight format and its name is not that of training state or an adapter."""
    return not _NOT_WEIGHTS.match(name)


def refuse_name(where: str, name: str) -> None:
    """Raise the error for a single file that was given as a checkpoint but cannot be one.

    Raises:
        UnsupportedError: The file is an adapter.
        CheckpointError: The file has any other name.
    """
    if name.startswith("adapter_"):
        raise UnsupportedError(f"{where}: {_lora('the file is a LoRA adapter')}")
    if foreign := _foreign([name]):
        raise CheckpointError(f"{where}: {foreign}")
    if not name.endswith((".safetensors", GGUF_SUFFIX, *PICKLED_SUFFIXES, TRAINER_SUFFIX)):
        raise CheckpointError(
            f"{where}: not a checkpoint: give a folder, or a file that ends in .safetensors, .gguf, "
            f"{', '.join(PICKLED_SUFFIXES)} or {TRAINER_SUFFIX}"
        )


def choose_weights(where: str, names: Iterable[str]) -> Weights:
    """Choose the weights among the files of a folder.

    The order of preference: what transformers itself loads (`model.safetensors`, its index), any other index, any other
    set of shards, any other single file, a `consolidated` copy of the weights; pickled files come last, in the same
    order, then those of trainers, and GGUF last of all.

    Args:
        where: name of the folder in messages.
        names: the names of its files.

    Raises:
        NotFoundError: a shard of a set without index is missing.
        CheckpointError: there are no weights, or several equally preferred candidates.
        UnsupportedError: the folder holds an adapter.
    """
    present = sorted(set(names))
    if "adapter_config.json" in present:
        raise UnsupportedError(f"{where}: {_lora('the folder holds a LoRA adapter (adapter_config.json)')}")
    usable = [name for name in present if "/" not in name and may_be_weights(name)]
    for suffixes, default in (
        ((".safetensors",), "model.safetensors"),
        (PICKLED_SUFFIXES, "pytorch_model.bin"),
        ((TRAINER_SUFFIX,), "model.ckpt"),
        ((GGUF_SUFFIX,), "model.gguf"),
    ):
        mine = [name for name in usable if name.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes))]
        mine += [name for name in usable if name.endswith(tuple(suffixes))]
        first = [name for name in mine if not name.startswith("consolidated")]
        chosen = _choose(where, first, default) or _choose(where, mine, default)
        if chosen is not None:
            return chosen
    raise _nothing(where, present)


def _choose(where: str, names: Sequence[str], default: str) -> Weights | None:
    indexes = [name for name in names if name.endswith(".index.json")]
    files = [name for name in names if name not in indexes]
    own_index = f"{default}.index.json"
    if default in files:
        return Weights(None, (default,), own_index if own_index in indexes else None)
    if own_index in indexes:
        return Weights(own_index, ())
    if indexes:
        return Weights(_only(where, "indexes", indexes), ())
    sets: dict[tuple[str, int, str], dict[int, str]] = defaultdict(dict)
    for name in files:
        if match := _SHARD.fullmatch(name):
            sets[match["stem"], int(match["count"]), match["suffix"]][int(match["number"])] = name
    if sets:
        stem, suffix = default.split(".")
        usual = [key for key in sets if key[0] == stem and key[2] == f".{suffix}"]
        key = usual[0] if len(usual) == 1 else None
        if key is None:
            described = {f"{key[0]}-*-of-{key[1]}{key[2]}": key for key in sets}
            key = described[_only(where, "sets of shards", list(described))]
        return Weights(None, _complete(where, key, sets[key]))
    if files and files[0].startswith("consolidated"):
        return Weights(None, tuple(files), cut=len(files) > 1 and not files[0].endswith(".safetensors"))
    return Weights(None, (_only(where, "weight files and no index", files),)) if files else None


def _only(where: str, what: str, names: list[str]) -> str:
    if len(names) > 1:
        raise CheckpointError(
            f"{where}: {len(names)} {what}, it is not clear which are the model's: {_listing(names)}; "
            "remove the others, or give the path of the file itself"
        )
    return names[0]


def _complete(where: str, key: tuple[str, int, str], shards: dict[int, str]) -> tuple[str, ...]:
    stem, count, suffix = key
    # Do not build the set of all numbers: the count comes from a file's name and may be huge.
    missing = next(number for number in range(1, len(shards) + 2) if number not in shards)
    width = len(str(count)) if count > 99_999 else 5
    if missing <= count:
        raise NotFoundError(
            f"{where}: shard {missing} of {count} is missing ({stem}-{missing:0{width}d}-of-{count:0{width}d}{suffix}); "
            f"{len(shards)} are there; fetch the checkpoint again"
        )
    if len(shards) > count:
        raise CheckpointError(
            f"{where}: shard {max(shards)} of {count} is one too many ({shards[max(shards)]}); remove it if it belongs to another model"
        )
    return tuple(shards[number] for number in range(1, count + 1))


# Files of training programs: a pattern for the name, what the file is, and the command that makes a checkpoint of it.
_FOREIGN = (
    (
        r".*\.distcp",
        "a distributed checkpoint of PyTorch",
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin",
    ),
    (
        r"global_step\d+|zero_to_fp32\.py|.*zero_pp_rank_.*\.pt",
        "a checkpoint of DeepSpeed ZeRO, whose weights are cut up",
        "python zero_to_fp32.py FOLDER OUT",
    ),
    (
        r"model_world_size_\d+_rank_\d+\.pt",
        "a checkpoint of verl, whose weights are cut up",
        "python -m verl.model_merger merge --backend fsdp --local_dir FOLDER --target_dir OUT",
    ),
    (
        r"pytorch_model_fsdp_\d+",
        "a checkpoint of FSDP, whose weights are cut up",
        "accelerate merge-weights FOLDER OUT",
    ),
    (r".*\.nemo", "an archive of NeMo", "the export of NeMo to Hugging Face"),
)


def _foreign(names: Sequence[str]) -> str | None:
    """Return what a training program's file is and how to make a checkpoint of it; None if there is no such file."""
    for pattern, what, command in _FOREIGN:
        name = next((name for name in names if re.fullmatch(pattern, name)), None)
        if name is not None:
            return f"{name} is {what}; convert it to a checkpoint and put config.json in its folder: {command.format(name=name)}"
    return None


def _nothing(where: str, names: Sequence[str]) -> Exception:
    if foreign := _foreign(names):
        return CheckpointError(f"{where}: {foreign}")
    if other := [name for name in names if name.endswith(_OTHER_WEIGHTS)]:
        return CheckpointError(
            f"{where}: no weights in a format that can be read, found {_listing(other)}; convert them to safetensors"
        )
    found = f"found {_listing(names)}" if names else "the folder is empty"
    return CheckpointError(
        f"{where}: no weights: no *.safetensors and no {', '.join(f'*{s}' for s in PICKLED_SUFFIXES)} file, {found}"
    )


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _lora(found: str) -> str:
    return f"{found}, which is not a model by itself; write MODEL+ADAPTER for its base model with it"
