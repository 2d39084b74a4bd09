"""The format of a folder of correlations between units of two models on the same tokens, and how to read it.

        correlations.json                             both models, data and settings
    correlations-00001-of-00032.safetensors ...   the correlations, one file per block

Every file holds, under the name of a group of units (`Units.name`, "model.layers.3 mlp"), the Pearson correlation of each
unit of the reference (rows) with each unit of the other model (columns), float32, shape [size, size]. Where a unit has
several features, such as the channels of a head, their correlations are summed. What several files hold of one group is
to be summed, too: channels of the residual stream are compared in every block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ..checkpoint import TensorInfo
from ..checkpoint.formats.safetensors import read_header
from ..errors import DataError, MergeError
from ..jsonfile import Entry, open_regular, read_object

__all__ = ["CORRELATIONS_FORMAT", "CORRELATIONS_KIND", "CORRELATIONS_NAME", "Correlations", "open_correlations"]

CORRELATIONS_NAME = "correlations.json"
CORRELATIONS_KIND = "correlations"
CORRELATIONS_FORMAT = 1
"""Increased when an older reader would misunderstand the files."""


@dataclass(frozen=True)
class Correlations:
    """A folder of correlations.

    Args:
        path: The folder.
        about: Contents of correlations.json.
        units: By the name of a group of units, the tensors whose sum is its correlations.
        hash: Hash of correlations.json, which names both models, the data and all settings with their hashes.
    """

    path: Path
    about: Mapping[str, Any]
    units: Mapping[str, Sequence[TensorInfo]]
    hash: str


def open_correlations(folder: str | Path) -> Correlations:
    """Open a folder of correlations by reading its headers.

    Raises:
        DataError: The folder is missing, damaged, or has another version.
    """
    path = Path(folder).expanduser()
    file = path / CORRELATIONS_NAME
    if not file.is_file():
        raise DataError(f"{folder}: holds no correlations (no {CORRELATIONS_NAME}); a merge that aligns makes them")
    try:
        about = read_object(file)
        entry = Entry(about, str(file))
        if entry["kind"].text() != CORRELATIONS_KIND or entry["format"].whole() != CORRELATIONS_FORMAT:
            raise DataError(f"{file}: is of another kind or version; this one reads {CORRELATIONS_FORMAT}; merge again")
        units: dict[str, list[TensorInfo]] = {}
        for name in entry["files"].each(Entry.text):
            if Path(name).name != name:
                raise DataError(f"{file}: files: {name!r} leaves the folder")
            for info in read_header(path / name)[0]:
                units.setdefault(info.name, []).append(info)
        with open_regular(file) as content:
            found = xxhash.xxh3_128_hexdigest(content.read())
    except DataError:
        raise
    except MergeError as error:
        raise DataError(str(error)) from None
    return Correlations(path, about, units, found)
