"""Fuse by training: run the sources, train the student on their predictions, train a control, and write the student."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...calibration.output.target import Target, check_absent
from ...calibration.single.preparation import fingerprint
from ...engine.kernels.devices import resolve_devices
from ...engine.output.failure import failures_of
from ...errors import UnsupportedError
from ...jsonfile import read_object
from ...record.format import RECORD_FORMAT, RECORD_NAME, record_text
from ...version import __version__
from . import libraries
from .fit import fit, steps_of
from .preparation import Preparation, Progress, prepare_fusion
from .recipe import FusionRecipe, load_fusion
from .sequences import Example
from .student import hashed, rounded, write_model

__all__ = ["Fused", "fuse"]

FUSED, CONTROL = "fused", "control"


@dataclass(frozen=True)
class Fused:
    """A fusion that is done.

    Args:
        out: The folder.
        record: The run record, as in merge.json.
    """

    out: Path
    record: Mapping[str, Any]


def fuse(
    recipe: str | Path | Mapping[str, Any] | FusionRecipe,
    out: str | Path,
    *,
    control: bool = True,
    device: str = "auto",
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Fused:
    """Train a student on the predictions of sources, and write it as a checkpoint.

    An interrupted run continues when it is called again with the same arguments.

    Args:
        recipe: The recipe, as for `load_fusion`.
        out: The folder to write; it must not exist.
        control: Whether the student is also trained without the sources (lambda = 1), on the same batches, to compare with.
        device: Where to train: auto, cpu or cuda.
        cache_dir: Folder for models from the Hub.
        progress: Called with what is done, the number of finished steps, and of all steps.

    Raises:
        RecipeError: The recipe is not valid.
        MergeError: A model or data are missing or not valid.
        UnsupportedError: A library is not installed.
        OutputError: `out` exists or cannot be written.
    """
    started = time.monotonic()
    out = Path(out)
    check_absent(out)
    loaded = recipe if isinstance(recipe, FusionRecipe) else load_fusion(recipe)
    libraries.transformers()
    if loaded.lora is not None:
        libraries.peft()
    where = resolve_devices(device)[0]
    if where.index:
        raise UnsupportedError(
            f"device {device}: the Trainer takes the first one it sees; choose with CUDA_VISIBLE_DEVICES={where.index}"
        )
    with ExitStack() as stack:
        prepared = prepare_fusion(loaded, stack, cache_dir=cache_dir)
        about = _about(prepared, control=control)
        target = stack.enter_context(Target(out, fingerprint(about, 0), RECORD_NAME))
        run = _Run(prepared, target, where, progress or (lambda what, done, count: None))
        record = run.write(about, control=control, started=started)
    return Fused(out, record)


def _about(prepared: Preparation, *, control: bool) -> dict[str, Any]:
    """Return everything that the result depends on."""
    return {
        "kind": "fusion",
        "versions": {
            "merganser": __version__,
            "torch": torch.__version__,
            "transformers": libraries.transformers().__version__,
            "python": platform.python_version(),
        },
        "recipe": prepared.recipe.text,
        "student": prepared.student.opened.source.hash,
        "sources": prepared.hashes(),
        "texts": [list(own) for own in prepared.texts],
        "held_out": [task.hash for task in prepared.held_out.tasks],
        "control": control,
    }


class _Run:
    """A fusion that is being made.

    Args:
        prepared: The opened recipe.
        target: The output.
        device: Where to train.
        progress: Called with what is done.
    """

    def __init__(self, prepared: Preparation, target: Target, device: torch.device, progress: Progress) -> None:
        self._prepared, self._recipe, self._student = prepared, prepared.recipe, prepared.student
        self._target, self._device, self._progress = target, device, progress
        self._state: dict[str, Any] = dict(target.state)

    def write(self, about: Mapping[str, Any], *, control: bool, started: float) -> dict[str, Any]:
        """Make what is missing, and publish the folder."""
        names = [f"texts-{number}.jsonl" for number in range(len(self._prepared.texts))]
        if self._target.finished:
            record = read_object(self._target.folder / RECORD_NAME)
        else:
            record = self._make(about, names, control=control, started=started)
        self._target.publish(["caches", FUSED, CONTROL, *names])
        return record

    def _make(self, about: Mapping[str, Any], names: list[str], *, control: bool, started: float) -> dict[str, Any]:
        """Write what is missing, and return the record."""
        folder, continued = self._target.folder, bool(self._state)
        self._target.claim(["caches/", *names, *(f".{name}.new" for name in names), f"{FUSED}/", f"{CONTROL}/"])
        self._note()
        if "student" not in self._state:
            bits: dict[str, float] = {}
            if self._prepared.held_out.tasks:
                bits = self._bits(self._student.load(self._device)[0])
            self._note(student=bits)
        with failures_of(self._target.out):
            (folder / "caches").mkdir(exist_ok=True)
            files = self._prepared.write_texts(folder)
        examples = self._prepared.examples_of(files)
        caches = self._prepared.caches or self._prepared.make_caches(folder / "caches", files, self._progress)
        taught = self._prepared.teach(examples, caches, self._progress)
        examples = [own for own in examples if own.lessons]
        for name in (FUSED, CONTROL) if control else (FUSED,):
            if name not in self._state:
                self._note(**{name: self._train(name, examples)})
                # not before: a run that is killed in between goes on from a state
                shutil.rmtree(folder / name, ignore_errors=True)
        seconds = time.monotonic() - started
        record = self._record(about, taught, len(examples), continued=continued, seconds=seconds)
        with failures_of(self._target.out):
            (folder / RECORD_NAME).write_text(record_text(record), encoding="utf-8")
        return record

    def _note(self, **more: Any) -> None:
        self._state |= more
        self._target.note(self._state)

    def _bits(self, model: Any) -> dict[str, float]:
        return self._prepared.held_out.bits_per_byte(model, self._student.opened)

    def _train(self, name: str, examples: list[Example]) -> dict[str, Any]:
        """Train the student, write it unless it is the control, and return what the record says of it."""
        folder = self._target.folder / name
        key = f"{name}_state"
        resume = folder / self._state[key] if key in self._state else None
        model, dtypes = self._student.load(self._device)
        with failures_of(self._target.out):
            fitted = fit(
                model,
                examples,
                self._recipe,
                folder,
                control=name == CONTROL,
                device=self._device,
                resume=resume,
                words=self._prepared.words,
                step=self._step(name),
                saved=lambda path: self._note(**{key: path.name}),
            )
            state = rounded(fitted.model, dtypes)
            found: dict[str, Any] = {"bits_per_byte": self._bits(fitted.model), "history": fitted.history}
            if name == FUSED:
                names = write_model(self._student, fitted.model, state, self._target.folder, self._target.claim)
                self._target.claim(["README.md"])
                (self._target.folder / "README.md").write_text(self._card(), encoding="utf-8")
                found["outputs"] = hashed(self._target.folder, [*names, "README.md"])
                found["parameters"] = fitted.model.num_parameters()
        return found

    def _step(self, name: str) -> Callable[[int, int], None]:
        what = "training" if name == FUSED else "training the control"
        return lambda done, count: self._progress(what, done, count)

    def _record(
        self, about: Mapping[str, Any], taught: Mapping[str, Any], sequences: int, *, continued: bool, seconds: float
    ) -> dict[str, Any]:
        fused = dict(self._state[FUSED])
        outputs, parameters = fused.pop("outputs"), fused.pop("parameters")
        control = self._state.get(CONTROL)
        sources = [
            {"source": own.name, "hash": digest, "tokens_taught": tokens, "nats_per_token": nats}
            for own, digest, tokens, nats in zip(
                self._recipe.sources, about["sources"], taught["taught"], taught["nats_per_token"], strict=True
            )
        ]
        scores = {"student": self._state["student"], FUSED: fused["bits_per_byte"]}
        if control is not None:
            scores[CONTROL] = control["bits_per_byte"]
        return {
            "format": RECORD_FORMAT,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": about["versions"],
            "recipe": self._recipe.text,
            "fused": {
                "student": self._recipe.student,
                "student_hash": about["student"],
                "sources": sources,
                "sequences": sequences,
                "sequences_without_a_source": taught["sequences"] - sequences,
                "tokens": taught["tokens"],
                "steps": steps_of(self._recipe, sequences),
                "device": str(self._device),
                "bits_per_byte": scores,
                "history": {FUSED: fused["history"], **({} if control is None else {CONTROL: control["history"]})},
            },
            "parameters": parameters,
            "continued": continued,
            "outputs": outputs,
            "timings": {"seconds": seconds},
        }

    def _card(self) -> str:
        """Return the text of README.md."""
        fence = "```" if "```" not in self._recipe.text else "~~~~~~"
        listed = "\n".join(f"- `{Path(source.name).name}`" for source in self._recipe.sources)
        return f"""---
library_name: transformers
tags:
- merganser
---

# {self._target.out.name}

`{Path(self._recipe.student).name}`, taught what these models say by Merganser {__version__}:

{listed}

## Recipe

{fence}yaml
{self._recipe.text.strip()}
{fence}

`{RECORD_NAME}` says what was read, trained and measured, with hashes; `merganser verify .` checks them.
"""
