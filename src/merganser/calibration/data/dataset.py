"""Data to calibrate on from data sets that the library `datasets` opens: on the Hub, or local."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from ...errors import DataError, UnsupportedError
from ...statistics import Dataset
from ...statistics.choice import DEFAULT_SPLIT
from .data import KEYS, DataFile, make_record

__all__ = ["MOST_ROWS", "read_dataset"]

MOST_ROWS = 20_000
"""Rows of a data set that are read at most; of a larger one, so many are drawn. Calibration needs some hundred."""


def read_dataset(dataset: Dataset) -> DataFile:
    """Read the rows of a data set that have text, prompt and completion, or messages.

    Returns:
        The rows, as those of one file; the hash is that of their contents.

    Raises:
        DataError: The data set cannot be opened, or has no such columns or rows.
        UnsupportedError: `datasets` is not installed.
    """
    name = f"dataset {dataset}"
    rows = _open(dataset, name)
    columns = [column for column in rows.column_names if column in KEYS]
    if not columns:
        # refuses, and says which columns there are
        make_record(name, dict.fromkeys(rows.column_names))
    if not len(rows):
        raise DataError(f"{name}: has no rows; there is nothing to calibrate on")
    numbers: Any = range(len(rows))
    if len(rows) > MOST_ROWS:
        numbers = sorted(random.Random(0).sample(numbers, MOST_ROWS))
    found = rows.select_columns(columns).select(numbers).to_list()
    text = json.dumps(found, ensure_ascii=True, sort_keys=True, default=str).encode()
    records = []
    for number, row in zip(numbers, found, strict=True):
        # a null means that the row lacks this column
        own = {key: value for key, value in row.items() if value is not None}
        records.append(make_record(f"{name}: row {number + 1}", own or dict.fromkeys(rows.column_names)))
    return DataFile(str(dataset), xxhash.xxh3_128_hexdigest(text), len(text), tuple(records))


def _open(dataset: Dataset, name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UnsupportedError(
            f"{name}: needs the library datasets, which is not installed: pip install 'merganser[data]'; or give files"
        ) from None
    with _explained(dataset, name, datasets):
        if Path(dataset.name, "dataset_info.json").is_file() or Path(dataset.name, "dataset_dict.json").is_file():
            found = datasets.load_from_disk(dataset.name)
            if dataset.subset is not None:
                raise ValueError(
                    f"a folder that was saved has no subsets, and {dataset.subset!r} is asked for; leave it out"
                )
            single = isinstance(found, datasets.Dataset)
            if single and dataset.split not in (DEFAULT_SPLIT, str(found.split)):
                raise ValueError(f"holds one split alone, and {dataset.split!r} is asked for; leave it out")
            if isinstance(found, datasets.DatasetDict):
                if dataset.split not in found:
                    raise ValueError(f"has no split {dataset.split!r}; it has {', '.join(found)}")
                found = found[dataset.split]
        else:
            found = datasets.load_dataset(dataset.name, dataset.subset, split=dataset.split)
    return found


@contextmanager
def _explained(dataset: Dataset, name: str, datasets: Any) -> Iterator[None]:
    """Turn what the library raises into one message; its progress bars are off within the context."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    # readers of many formats raise exceptions of many kinds
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise DataError(f"{name}: cannot be opened: {reason}") from None
    finally:
        if shown:
            datasets.enable_progress_bars()
