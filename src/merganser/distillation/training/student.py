"""The model that is taught: opened, measured on held-out texts, and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.files.sidefiles import copy_file
from ...errors import CheckpointError, UnsupportedError
from ...evaluation.scoring.batches import Refused, batches
from ...evaluation.scoring.tasks import TextTask, load_tasks
from ...evaluation.scoring.text import score, windows
from ...files import sha256_of_file
from ...inference.language_model import LanguageModel, open_model
from ...inference.libraries import explained, quiet
from ...inference.sources import open_source
from ..token_bytes import TokenBytes

__all__ = ["HeldOut", "Student", "hashed", "load_held_out", "open_student", "rounded", "write_model"]

_CONTEXT, _BATCH_TOKENS = 512, 2048
_OWN = ("config.json", "README.md")


@dataclass(frozen=True)
class Student:
    """The model that is taught.

    Args:
        opened: Its config and tokenizer; weights are read when they are needed.
        token_bytes: Bytes of its tokens.
    """

    opened: LanguageModel
    token_bytes: TokenBytes

    @cached_property
    def size(self) -> int:
        """Number of its logits."""
        found: int = self.opened.config.get_text_config().vocab_size
        return found

    def load(self, device: torch.device) -> tuple[Any, dict[str, torch.dtype]]:
        """Return the model in float32, and the dtypes of its tensors as they are stored.

        Raises:
            CheckpointError: The weights do not fit the config.
        """
        tensors = self.opened.source.read()
        return self.opened.load(tensors, torch.float32, device), {name: own.dtype for name, own in tensors.items()}

    def without_weights(self) -> Any:
        """Return the model without weights."""
        import transformers

        library: Any = transformers
        with torch.device("meta"), quiet():
            return library.AutoModelForCausalLM.from_config(self.opened.config)


def open_student(reference: str, stack: ExitStack, *, cache_dir: Path | None = None) -> Student:
    """Open a checkpoint, or the recipe of a merge, which is merged when its weights are read.

    Raises:
        MergeError: It cannot be read, or is not a language model.
        UnsupportedError: Its tokens do not spell the text.
    """
    opened = open_model(open_source(reference, stack, cache_dir=cache_dir))
    if opened.config.is_encoder_decoder:
        raise UnsupportedError(f"{reference}: is an encoder-decoder; only models that continue a text can be taught")
    return Student(opened, TokenBytes(opened.tokenizer, reference))


def rounded(model: Any, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Round a model's weights once to the dtypes in which they are stored, and return them in these.

    The model itself gets the rounded values, so that what is measured is what is written. A weight that is another one, as a
    head that is tied to the embedding, is returned once, under the name that is stored.
    """
    kinds = [own for own in dtypes.values() if own.is_floating_point]
    usual = max(set(kinds), key=kinds.count)
    own = model.state_dict()
    stored = {tensor.data_ptr() for name, tensor in own.items() if name in dtypes}
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in own.items():
            if name not in dtypes and tensor.data_ptr() in stored:
                continue
            dtype = dtypes.get(name, usual)
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            tensor.copy_(state[name])
    return state


def write_model(
    student: Student, model: Any, state: Mapping[str, Tensor], folder: Path, claim: Callable[[Iterable[str]], None]
) -> list[str]:
    """Write the weights, and config, tokenizer and other files as the student has them; return their names.

    Args:
        student: The student.
        model: The trained model.
        state: Its weights, from `rounded`.
        folder: Folder that is being written.
        claim: Called with names of files before they are written.

    Raises:
        CheckpointError: transformers cannot write the model, or a file to copy cannot be read.
    """
    beside, source = folder / "model", student.opened.source
    claim(["model/"])
    beside.mkdir(exist_ok=True)
    with explained(CheckpointError, f"{source.reference}: transformers cannot write the model"), quiet():
        model.save_pretrained(beside, state_dict=dict(state), max_shard_size="5GB")
    # the Trainer changes the config that transformers writes beside the weights
    weights = sorted(path.name for path in beside.iterdir() if path.name.startswith("model"))
    copied = [name for name in source.files if name not in (*weights, *source.texts, *_OWN)]
    claim([*weights, *copied, *source.texts, "config.json"])
    for name in weights:
        (beside / name).replace(folder / name)
    shutil.rmtree(beside)
    for name in copied:
        copy_file(source.files[name], folder / name)
    for name, text in source.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(dict(source.config), indent=2) + "\n", encoding="utf-8")
    return [*weights, *copied, *source.texts, "config.json"]


def hashed(folder: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """Return names, sizes and hashes of files, as a run record has them."""
    return [{"file": n, "bytes": (folder / n).stat().st_size, "sha256": sha256_of_file(folder / n)} for n in names]


@dataclass(frozen=True)
class HeldOut:
    """Texts on which models are measured.

    Args:
        tasks: The texts.
        limit: Number of windows, or documents, of each.
    """

    tasks: Sequence[TextTask]
    limit: int

    def bits_per_byte(self, model: Any, opened: LanguageModel) -> dict[str, float]:
        """Return the bits per byte of each text, by name.

        Raises:
            CheckpointError: The logits are not finite.
        """
        context = min(_CONTEXT, opened.positions or _CONTEXT)
        found: dict[str, float] = {}
        for task in self.tasks:
            cut, _ = windows(task, opened.tokenizer, context=context, stride=context // 2, limit=self.limit)
            sizes = [len(own.fed) for own in cut], [len(own.targets) for own in cut]
            bits = nbytes = 0.0
            for batch in batches(*sizes, model.config.get_text_config().vocab_size, _BATCH_TOKENS):
                try:
                    columns = score(model, [cut[row] for row in batch])
                except Refused as error:
                    raise CheckpointError(f"held_out: {task.name}: {error}") from None
                bits, nbytes = bits + sum(columns["bits"]), nbytes + sum(columns["bytes"])
            found[task.name] = bits / nbytes if nbytes else float("nan")
        return found


def load_held_out(files: Mapping[str, str], limit: int) -> HeldOut:
    """Read held-out texts.

    Raises:
        TaskError: A file is missing, empty, or holds questions.
    """
    tasks = load_tasks(dict(files)) if files else []
    for task in tasks:
        if not isinstance(task, TextTask):
            raise UnsupportedError(f"{task.source}: held_out takes texts; merganser eval scores questions")
    return HeldOut([task for task in tasks if isinstance(task, TextTask)], limit)
