"""Tensors on disk: what a checkpoint holds and where, how to read it, and the layout of one to be written.

checkpoint = open_checkpoint("path/to/model")
tensor = checkpoint.tensors["model.norm.weight"]
with checkpoint.reader() as reader:
    reader.read_into(tensor, 0, memoryview(bytearray(tensor.nbytes)))
"""

from .derived.derived import Rows, derive
from .dtypes import DTYPE_BY_NAME, DTYPES, DType
from .folder import Checkpoint, open_checkpoint
from .layout import INDEX_NAME, Shard, index_json, plan_shards
from .reader import MappedFiles, Reader
from .tensor import TensorInfo, matched, renamed

__all__ = [
    "DTYPES",
    "DTYPE_BY_NAME",
    "INDEX_NAME",
    "Checkpoint",
    "DType",
    "MappedFiles",
    "Reader",
    "Rows",
    "Shard",
    "TensorInfo",
    "derive",
    "index_json",
    "matched",
    "open_checkpoint",
    "plan_shards",
    "renamed",
]
