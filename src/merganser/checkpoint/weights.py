"""Which files of a folder are its weights, decided from their names alone.

Names alone, because the same decision is made for a repository on the Hub before anything is fetched.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import CheckpointError, NotFoundError, UnsupportedError

__all__ = ["PICKLED_SUFFIXES", "Weights", "choose_weights", "is_weight_file", "refuse_name"]

PICKLED_SUFFIXES = (".bin", ".pt", ".pth")
"""What the names of pickled checkpoints end in."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.safetensors|\.bin)")
_OTHER_WEIGHTS = (".gguf", ".onnx", ".h5", ".msgpack", ".ckpt", ".tflite", ".ot", ".npz", ".mlmodel", ".pdparams")
# The state of a training run and adapters: tensors, and not the model's.
_NOT_WEIGHTS = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|trainer_state|adapter_|pytorch_lora|"
    r"tokenizer|global_step|.*optim_states|.*_rank_\d)"
)
_GGUF = "GGUF inputs come with a later version; give the safetensors checkpoint it was made from"


@dataclass(frozen=True, slots=True)
class Weights:
    """The choice: either an index, which names the shards, or the files themselves."""

    index: str | None
    files: tuple[str, ...]


def is_weight_file(name: str) -> bool:
    """Say whether a file holds tensors of any format, of the model or of its training."""
    return name.endswith((".safetensors", *PICKLED_SUFFIXES, *_OTHER_WEIGHTS))


def refuse_name(where: str, name: str) -> None:
    """Refuse a single file that is given as a checkpoint and cannot be one.

    Raises:
        UnsupportedError: GGUF, or an adapter.
        CheckpointError: any other name.
    """
    if name.endswith(".gguf"):
        raise UnsupportedError(f"{where}: {_GGUF}")
    if name.startswith("adapter_"):
        raise UnsupportedError(f"{where}: {_lora('the file is a LoRA adapter')}")
    if not name.endswith((".safetensors", *PICKLED_SUFFIXES)):
        raise CheckpointError(
            f"{where}: not a checkpoint: give a folder, or a file that ends in .safetensors, "
            f"{' or '.join(PICKLED_SUFFIXES)}"
        )


def choose_weights(where: str, names: Iterable[str]) -> Weights:
    """Choose the weights among the files of a folder.

    The order: what transformers itself loads (`model.safetensors`, its index), any other index, any other set of
    shards, any other single file; a `consolidated` copy of the weights comes after all of these; pickled files come
    last, in the same order.

    Args:
        where: what the folder is called in messages.
        names: the names of its files.

    Raises:
        NotFoundError: a shard of a set without index is missing.
        CheckpointError: there are no weights, or several that are equally good.
        UnsupportedError: the folder holds an adapter, or GGUF files only.
    """
    present = sorted(set(names))
    if "adapter_config.json" in present:
        raise UnsupportedError(f"{where}: {_lora('the folder holds a LoRA adapter (adapter_config.json)')}")
    usable = [name for name in present if "/" not in name and not _NOT_WEIGHTS.match(name)]
    for suffixes, default in ((".safetensors",), "model.safetensors"), (PICKLED_SUFFIXES, "pytorch_model.bin"):
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
    if default in files:
        return Weights(None, (default,))
    if f"{default}.index.json" in indexes:
        return Weights(f"{default}.index.json", ())
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
        return Weights(None, tuple(files))
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
    # No set of all numbers is made: the count is whatever a name says.
    missing = next(number for number in range(1, len(shards) + 2) if number not in shards)
    width = len(str(count)) if count > 99_999 else 5
    if missing <= count:
        raise NotFoundError(
            f"{where}: shard {missing} of {count} is missing ({stem}-{missing:0{width}d}-of-{count:0{width}d}{suffix}); "
            f"{len(shards)} are there; fetch the checkpoint again"
        )
    if len(shards) > count:
        raise CheckpointError(f"{where}: shard {max(shards)} of {count} is one too many ({shards[max(shards)]})")
    return tuple(shards[number] for number in range(1, count + 1))


def _nothing(where: str, names: Sequence[str]) -> Exception:
    if any(name.endswith(".gguf") for name in names):
        return UnsupportedError(f"{where}: {_GGUF}")
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
    return f"{found}; LoRA references come with a later version: merge the adapter into its base model first"
