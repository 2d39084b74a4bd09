"""Whether a merge is right: hashes, names and shapes, and sampled numbers against float64 arithmetic."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoints import DELTA_STD, Models, from_bfloat16
from .recipes import METHODS, inputs

Array = np.ndarray

_ROWS = 8
# a tensor over which everything is computed, where a method measures whole tensors
_WHOLE = 1 << 21
# votes of weighted float32 numbers that are this near to a tie, relative to what was voted, may go either way
_TIE = 1e-5
_MOST_UNSURE = 0.05


class WrongResult(AssertionError):
    """A merge is not what it must be; its time means nothing."""


class Weights:
    """Tensors of a folder of safetensors files, read one by one."""

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, tuple[Path, int, tuple[int, ...], str]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as data:
                (length,) = struct.unpack("<Q", data.read(8))
                entries: dict[str, Any] = json.loads(data.read(length))
            entries.pop("__metadata__", None)
            for name, entry in entries.items():
                start = 8 + length + entry["data_offsets"][0]
                self._places[name] = (file, start, tuple(entry["shape"]), entry["dtype"])

    @property
    def layout(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every tensor."""
        return {name: (shape, dtype) for name, (_, _, shape, dtype) in self._places.items()}

    def read(self, name: str, n_elements: int) -> Array:
        """Return the first elements of a bfloat16 or float32 tensor, float64."""
        file, start, _, dtype = self._places[name]
        with file.open("rb") as data:
            data.seek(start)
            if dtype == "F32":
                return np.frombuffer(data.read(4 * n_elements), np.float32).astype(np.float64)
            return from_bfloat16(np.frombuffer(data.read(2 * n_elements), np.uint16)).astype(np.float64)


def check_hashes(out: Path) -> str:
    """Compare the files of an output with its run record; return one hash of all weights.

    Raises:
        WrongResult: A file differs.
    """
    record = json.loads((out / "merge.json").read_text(encoding="utf-8"))
    weights = hashlib.sha256()
    for entry in record["outputs"]:
        with (out / entry["file"]).open("rb") as file:
            found = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
        if found.hexdigest() != entry["sha256"]:
            raise WrongResult(f"{out / entry['file']}: is not what merge.json says was written")
        if entry["file"].endswith(".safetensors"):
            weights.update(entry["sha256"].encode())
    return weights.hexdigest()


def check_merge(name: str, models: Models, out: Path, *, strict: bool = True) -> dict[str, Any]:
    """Compare an output with what it must be.

    Args:
        name: Merge method.
        models: The inputs.
        out: The output.
        strict: Demand bfloat16, from float32 arithmetic with one rounding; otherwise say how far off the numbers are.

    Returns:
        `dtype`; `tensors`, compared with float64 or only looked at; `mean_error_ulp`, the mean distance from the float64
        result in units of the last place of bfloat16 (0.25 is perfect); `wrong_share`, the share of elements further
        off than rounding explains. The last two only for methods that are computed here.

    Raises:
        WrongResult: It is wrong.
    """
    weights = Weights(out)
    layout = weights.layout
    # mergekit writes float32 for some methods, whatever the recipe says
    dtype = "F32" if not strict and all(found == "F32" for _, found in layout.values()) else "BF16"
    wanted = {tensor: (tuple(shape), dtype) for tensor, shape in models.tensors}
    if layout != wanted:
        odd = sorted({*layout.items()} ^ {*wanted.items()})[:4]
        raise WrongResult(f"{out}: {name} wrote other tensors than it must: {odd}")
    sources = [Weights(folder) for folder in inputs(name, models)]
    formula = FORMULAS.get(name)
    errors: list[Array] = []
    wrong = unsure = 0
    samples = _samples(models, whole=name in _NEED_WHOLE)
    for tensor, size in samples:
        merged = weights.read(tensor, size)
        given = [source.read(tensor, size) for source in sources]
        _check_plausible(name, tensor, merged, given)
        if formula is not None:
            expected = formula(given)
            sure = ~np.isnan(expected)
            distance = np.abs(merged - expected)[sure]
            ulp = _ulp(expected[sure])
            # one rounding to bfloat16, behind float32 sums of terms of this size
            slack = 2.0**-22 * np.sum(np.abs(given), axis=0)[sure]
            wrong += int((distance > 0.5 * ulp + slack).sum())
            unsure += int((~sure).sum())
            errors.append(distance / np.maximum(ulp, slack))
    found: dict[str, Any] = {"dtype": dtype, "tensors": len(samples), "computed": formula is not None}
    if formula is not None:
        every = np.concatenate(errors)
        found |= {"mean_error_ulp": round(float(every.mean()), 4), "wrong_share": wrong / len(every)}
        if strict and wrong:
            raise WrongResult(f"{out}: {name}: {wrong} of {len(every)} sampled elements are further off than rounding")
        if unsure > _MOST_UNSURE * len(every):
            raise WrongResult(f"{name}: {unsure} of {len(every)} sampled elements cannot be told in float32")
    return found


def _check_plausible(name: str, tensor: str, merged: Array, given: Sequence[Array]) -> None:
    """Refuse what is not finite, and what is not near the inputs and yet different from them all."""
    if not np.isfinite(merged).all():
        raise WrongResult(f"{name}: {tensor}: is not finite")
    for position, array in enumerate(given):
        distance = float(np.sqrt(np.mean((merged - array) ** 2)))
        if len(merged) > 100 and not 0 < distance < 5 * DELTA_STD:
            raise WrongResult(f"{name}: {tensor}: is {distance:.2g} away from input {position}, which cannot be")


def _samples(models: Models, *, whole: bool) -> list[tuple[str, int]]:
    """Choose tensors, and how many elements of each: the first rows, or all where a method measures whole tensors."""
    shapes = dict(models.tensors)
    names = list(shapes)
    chosen = [names[round(i * (len(names) - 1) / 11)] for i in range(12)]
    found = {}
    for name in chosen:
        size = math.prod(shapes[name])
        if whole and size <= _WHOLE:
            found[name] = size
        elif not whole:
            found[name] = min(size, _ROWS * shapes[name][-1])
    if whole and not any(len(shapes[name]) > 1 for name in found):
        matrices = [name for name in names if len(shapes[name]) > 1]
        smallest = min(matrices, key=lambda name: math.prod(shapes[name]), default=names[0])
        found[smallest] = math.prod(shapes[smallest])
    return list(found.items())


def _linear(models: Sequence[Array]) -> Array:
    return np.mean(models, axis=0)


def _task_arithmetic(arrays: Sequence[Array]) -> Array:
    base, *models = arrays
    return base + np.mean([model - base for model in models], axis=0)


def _nearswap(arrays: Sequence[Array]) -> Array:
    base, model = arrays
    t = METHODS["nearswap"].shared["t"]
    return base + np.clip(model - base, -t, t)


def _slerp(arrays: Sequence[Array]) -> Array:
    base, model = arrays
    t = METHODS["slerp"].shared["t"]
    angle = math.acos(float(base @ model) / float(np.linalg.norm(base) * np.linalg.norm(model)))
    if math.cos(angle) > 0.9995:
        return (1 - t) * base + t * model
    return (math.sin((1 - t) * angle) * base + math.sin(t * angle) * model) / math.sin(angle)


def _ties(arrays: Sequence[Array]) -> Array:
    base, *models = arrays
    trimmed = []
    for model in models:
        # task vectors are float32 in the formula's own definition of a magnitude
        delta = (model.astype(np.float32) - base.astype(np.float32)).astype(np.float64)
        size = max(math.floor(METHODS["ties"].each["density"] * delta.size), 1)
        cut = np.partition(np.abs(delta), delta.size - size)[delta.size - size]
        trimmed.append(np.where(np.abs(delta) >= cut, delta, 0.0))
    total = np.sum(trimmed, axis=0)
    sign = np.where(total >= 0, 1.0, -1.0)
    unsure = np.abs(total) <= _TIE * np.sum(np.abs(trimmed), axis=0)
    unsure &= np.sum(np.sign(trimmed) != 0, axis=0) > 0
    agree = [np.sign(delta) == sign for delta in trimmed]
    kept = np.sum([delta * mask for delta, mask in zip(trimmed, agree, strict=True)], axis=0)
    return np.where(unsure, np.nan, base + kept / np.maximum(np.sum(agree, axis=0), 1))


# float64 results from the inputs, the base first; NaN where float32 cannot tell
FORMULAS: dict[str, Callable[[Sequence[Array]], Array]] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "nearswap": _nearswap,
    "slerp": _slerp,
    "ties": _ties,
}
_NEED_WHOLE = {"slerp", "ties"}


def _ulp(values: Array) -> Array:
    """Return the distance between neighbours in bfloat16 at these values."""
    exponent = np.frexp(values)[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, -126) - 7)


def _digest(file: Any) -> Any:
    found = hashlib.sha256()
    while piece := file.read(1 << 22):
        found.update(piece)
    return found


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights in a folder."""
    return sorted(folder.glob("*.safetensors"))


def size_of(files: Sequence[Path]) -> int:
    """Return the bytes of some files."""
    return sum(os.stat(file).st_size for file in files)  # noqa: PTH116
