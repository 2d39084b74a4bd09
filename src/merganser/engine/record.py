"""Write the run record (`merge.json`) and the model card: what was read, done and written."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..errors import NotFoundError
from ..files import sha256_of_file
from ..method import MergeMethod
from ..recipe import ModelReference
from ..record.format import RECORD_FORMAT, RECORD_NAME
from ..statistics import Statistics
from ..version import __version__
from .agreement.side_files import RECIPE
from .output.digests import Digests, digest
from .plan.plan import Plan
from .plan.sections.census import census_entry
from .plan.sections.vocabulary import REPORT_NAME

_TREATMENT = (
    "name",
    "dtype.name",
    "shape",
    "copy",
    "compute_dtype.name",
    "layer",
    "role",
    "shard",
    "offset",
    "method.name",
)
"""What the fingerprint holds of every tensor, besides its inputs and parameters."""


def fingerprint(plan: Plan, settings: Mapping[str, Any]) -> str:
    """Hash everything that determines a merge's result; a run continues only an output with the same fingerprint."""
    facts = {
        "versions": versions(plan),
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "methods": [_source(method) for method in plan.methods],
        "recipe": plan.recipe.text,
        "seed": plan.seed,
        "block": plan.block,
        "compiled": plan.fused,
        "device": plan.device.partition(":")[0],
        "settings": dict(settings),
        "headers": [hashlib.sha256(shard.header).hexdigest() for shard in plan.files],
        "inputs": [[file["path"], file["bytes"], file.get("mtime_ns", file.get("etag"))] for file in input_files(plan)],
        "adapters": [_state(file) for checkpoint in plan.checkpoints.values() for file in checkpoint.adapter],
        "statistics": [_state(file) for file in data_files(plan)],
        "tensors": _treatment(plan),
        "vocabulary": None if plan.vocabulary is None else plan.vocabulary.digest,
        "mixture": None if plan.mixture is None else plan.mixture.as_json(),
        "healing": None if plan.healing is None else plan.healing.as_json(),
        "permutation": None if plan.permutation is None else plan.permutation.digest,
        "config": plan.config,
        "generation_config": plan.generation_config,
        "chat_template": plan.chat_template,
        "side_files": {name: _state(file) for name, file in plan.side_files.items()},
        "tasks": [
            [
                task.name,
                plan.checkpoints[task.reference].config,
                *map(_state, plan.checkpoints[task.reference].side_files),
            ]
            for task in (plan.sidecars.tasks if plan.sidecars else ())
        ],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _treatment(plan: Plan) -> str:
    """Hash how every tensor is merged: its inputs, method, parameters and layer."""
    tensors = plan.tensors
    # what many tensors share is written out once: sets of parameters, and paths
    parameters = {id(t.parameters): t.parameters for t in tensors}
    files: dict[tuple[int, ...], list[list[str]]] = {}
    held: list[tuple[int, ...]] = []
    renamed: list[tuple[int, list[str]]] = []
    for i, tensor in enumerate(tensors):
        inputs = tensor.inputs
        # a tensor that is stored as it is has one file, and thousands share its path
        held.append(key := tuple([id(own) if own.stored else id(own.file) for own in inputs]))
        if key not in files:
            files[key] = [[*map(str, own.place[0])] for own in inputs]
        if any(own.name != tensor.name for own in inputs):
            renamed.append((i, [own.name for own in inputs]))
    sets, places = ({key: number for number, key in enumerate(each)} for each in (parameters, files))
    columns: list[Any] = [list(map(attrgetter(name), tensors)) for name in _TREATMENT]
    columns += [
        [sorted(each.items()) for each in parameters.values()],
        [sets[id(t.parameters)] for t in tensors],
        [(i, sorted(t.located.items())) for i, t in enumerate(tensors) if t.located],
        [*files.values()],
        [places[key] for key in held],
        renamed,
        [t.base is not None for t in tensors],
    ]
    return hashlib.sha256(repr(columns).encode()).hexdigest()


def _source(method: MergeMethod) -> str:
    """Hash the file that defines a method, as its author may change it without a new version."""
    try:
        return sha256_of_file(Path(inspect.getfile(method.combine)))
    except (OSError, TypeError):
        return ""


def _state(file: Path) -> tuple[str, int, int]:
    """Return a file's path, size and modification time.

    Raises:
        NotFoundError: The file no longer exists.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise NotFoundError(f"{file}: cannot be read any more: {error.strerror}") from None
    return str(file), status.st_size, status.st_mtime_ns


def versions(plan: Plan) -> dict[str, str]:
    """Return the versions of software that results depend on."""
    return {
        "merganser": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{f"method {method.name}": str(method.version) for method in plan.methods},
    }


def input_files(plan: Plan) -> list[dict[str, Any]]:
    """Return the weight files of the inputs, with size, and modification time or what the Hub calls the contents.

    Raises:
        NotFoundError: A file no longer exists.
    """
    found: dict[Path, dict[str, Any]] = {}
    for reference, checkpoint in plan.checkpoints.items():
        for file in checkpoint.weight_files:
            remote = checkpoint.remote.get(file)
            if remote is not None:
                entry = {"model": str(reference), "path": str(file), "bytes": remote.size}
                found.setdefault(file, entry | {"address": remote.address, "etag": remote.etag})
                continue
            path, size, time_of_change = _state(file)
            # models of one base with adapters share its files
            found.setdefault(file, {"model": str(reference), "path": path, "bytes": size, "mtime_ns": time_of_change})
    return list(found.values())


def data_files(plan: Plan) -> list[Path]:
    """Return the files of the statistics from data that the plan reads."""
    sums = (own.sum for tensor in plan.tensors for each in tensor.data.values() for own in each)
    return list(dict.fromkeys(info.file for info in sums))


def adapters(plan: Plan) -> list[dict[str, Any]]:
    """Return the adapters of the inputs, with the hashes of their files."""
    return [
        {
            "model": str(reference),
            "files": [{**_sized(file), "sha256": sha256_of_file(file)} for file in checkpoint.adapter],
        }
        for reference, checkpoint in plan.checkpoints.items()
        if checkpoint.adapter
    ]


def _sized(file: Path) -> dict[str, Any]:
    return dict(zip(("path", "bytes"), _state(file)[:2], strict=True))


def input_hashes(plan: Plan, digests: Digests) -> list[dict[str, Any]]:
    """Return the weight files of the inputs with a hash of the tensors that were read.

    The hash of a tensor is the xxh3-128 of the xxh3-128 digests of its blocks. A block is as many whole rows as fit
    into 524,288 elements, in multiples of 128 rows if the output has a scale per 128 x 128 (quantize: fp8_block), and of the rows of a
    head where GGUF has them in another order; a longer row is cut at multiples of that number, counted in elements of the
    tensor, and at its ends. A tensor of three dimensions may also be merged as a stack of matrices, so it is cut as well where blocks
    of these begin. A tensor that was permuted is hashed as it was merged. So is one with an adapter, in float32, and counts as one of the adapter's
    file. The hash of a file is the xxh3-128 of the digests of its tensors, in the order of their bytes. If
    not every tensor of a file was read, the entry says how many were.
    """
    # the digest of every tensor of a file; models of one base with adapters share tensors
    tensors: dict[Path, dict[Any, bytes | None]] = defaultdict(dict)
    for checkpoint in plan.checkpoints.values():
        file: Path | None = None
        for tensor in checkpoint.tensors.values():
            # thousands of tensors share a path, and hashing a path takes long
            if tensor.file is not file:
                file = tensor.file
                held, alone = tensors[file], digests.get((file,), {})
            if tensor.stored:
                place, name = tensor.place
                held[place, name] = digests.get(place, {}).get(name)
            else:
                held[tensor.name] = alone.get(tensor.name)
    files = input_files(plan)
    for entry in files:
        each = tensors[Path(entry["path"])].values()
        read = [found for found in each if found is not None]
        entry.pop("mtime_ns", None)
        # what was read by ranges is nowhere but on the Hub
        entry["path"] = entry.pop("address", entry["path"])
        entry["tensors"] = len(each)
        entry["tensors_read"] = len(read)
        entry["xxh3_128_of_tensors"] = digest(b"".join(read)).hex()
    return files


def make_record(
    plan: Plan,
    *,
    inputs: list[dict[str, Any]],
    outputs: Sequence[Mapping[str, Any]],
    statistics: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    movement: Mapping[str, Any],
    warnings: Sequence[str],
    timings: Mapping[str, float],
    continued: bool,
) -> dict[str, Any]:
    """Build the run record."""
    return {
        "format": RECORD_FORMAT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(plan),
        "recipe": plan.recipe.text,
        "method": plan.method.name,
        "methods": {method.name: count for method, count in plan.methods.items()},
        "seed": plan.seed,
        "compat": plan.recipe.compat,
        "donor": str(plan.donor),
        "models": [str(reference) for reference in plan.checkpoints],
        "parameters": plan.n_parameters,
        "tensors": len(plan.tensors),
        "dtypes": sorted({t.stored_as for t in plan.tensors}),
        "device": plan.device,
        "compiled": plan.fused,
        "workers": plan.workers,
        "continued": continued,
        "warnings": list(warnings),
        "differences_from_mergekit": list(plan.differences),
        "inputs": inputs,
        "adapters": adapters(plan),
        "vocabulary": None if plan.vocabulary is None else plan.vocabulary.as_json(),
        **({} if plan.mixture is None else {"mixture": plan.mixture.as_json()}),
        **({} if plan.healing is None else {"healed": plan.healing.as_json()}),
        **({} if plan.gguf is None else {"gguf": plan.gguf.as_json()}),
        "permutation": None if plan.permutation is None else plan.permutation.as_json(),
        "statistics_from_data": [_sized(file) for file in data_files(plan)],
        "calibrations": [_calibration(own) for own in plan.statistics],
        "census": [census_entry(str(reference), found) for reference, found in plan.census.items()],
        "outputs": list(outputs),
        "statistics": dict(statistics),
        "layers": list(layers),
        "movement": dict(movement),
        "timings": dict(timings),
    }


def _calibration(own: Statistics) -> dict[str, Any]:
    """Return what statistics from data were measured on: the model with its hash, and the data with theirs."""
    return {
        "folder": str(own.path),
        "model": own.about["model"],
        "tokenizer": own.about["tokenizer"],
        "statistics": list(own.statistics),
        "parts": own.about["parts"],
        **({"learning": own.about["learning"]} if "learning" in own.about else {}),
    }


def model_card(plan: Plan, title: str) -> str:
    """Return the text of the output's README.md."""
    models = list(plan.checkpoints)
    hub = [str(reference.path) for reference in models if _is_hub(reference, plan.checkpoints[reference])]
    front = ["---", "library_name: transformers", "tags:", "- merge", "- merganser"]
    if plan.gguf is not None:
        front[1] = "library_name: gguf"
    if hub:
        front += ["base_model:", *(f"- {name}" for name in hub)]
    fence = "```" if "```" not in plan.recipe.text else "~~~~~~"
    listed = "\n".join(f"- {_shown(reference, hub)}" for reference in models)
    return (
        "\n".join([*front, "---"])
        + f"""

# {title}

{_made(plan)}

## Models

{listed}

{_given(plan, hub)}

## Recipe

{fence}yaml
{plan.recipe.text.strip()}
{fence}
{_restoring(plan)}
`{RECORD_NAME}` says what was read and written, with hashes; `merganser verify .` checks them.
"""
    )


def _made(plan: Plan) -> str:
    """Return the card's sentence on how the model was made."""
    tool = f"Merganser {__version__}"
    if plan.healing is not None:
        return plan.healing.sentence(tool)
    mixed = plan.mixture
    if mixed is None:
        return f"Merged with {tool}, method `{plan.method.name}`\n({plan.method.doc.summary.rstrip('.')})."
    return mixed.sentence(tool, plan.method.name)


def _given(plan: Plan, hub: Sequence[str]) -> str:
    """Return the card's sentences on where the files besides the weights come from."""
    shown = {str(reference): _shown(reference, hub) for reference in plan.checkpoints}
    others = {model: names for model, names in plan.origins.items() if model != str(plan.donor)}
    found = plan.vocabulary
    if not others and found is None:
        return f"Config, tokenizer and other files are those of {_shown(plan.donor, hub)}."
    sentences = [f"Config and other files are those of {_shown(plan.donor, hub)}."]
    for model, names in others.items():
        listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        which = shown.get(model, model if model == RECIPE else f"`{Path(model).name}`")
        sentences.append(f"{listed} {'is that' if len(names) == 1 else 'are those'} of {which}.")
    if found is not None:
        more = f", with {found.added:,} more tokens" if found.added else ""
        sentences.append(
            f"The tokenizer is that of `{Path(found.owner).name}`{more}; rows of the embedding were matched by token, as "
            f"`{REPORT_NAME}` lists."
        )
    return "\n".join(sentences)


def _restoring(plan: Plan) -> str:
    """Return the card's section on how to restore the models."""
    if plan.sidecars is None:
        return ""
    base = ", together with the base" if plan.sidecars.needs_base else ""
    commands = "\n".join(f"merganser restore . --task {task.name}" for task in plan.sidecars.tasks)
    return f"""
## Tasks

`sidecars/` holds what restores each model{base}:

```
{commands}
```
"""


def _is_hub(reference: ModelReference, checkpoint: Checkpoint) -> bool:
    return not Path(reference.path).expanduser().exists() and checkpoint.path != Path(reference.path)


def _shown(reference: ModelReference, hub: Sequence[str]) -> str:
    """Return a model's name for the card: Hub ids unchanged, only the last part of a folder's path."""
    model = reference.path if reference.path in hub else f"`{Path(reference.path).name}`"
    if reference.revision:
        model += f" at {reference.revision}"
    return model if reference.lora is None else f"{model} with the adapter `{Path(reference.lora).name}`"
