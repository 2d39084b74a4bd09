"""`.bin`, `.pt`, `.pth` and `.ckpt` files, read without executing code from them.

Only torch's restricted unpickler (`weights_only=True`) is used; a file that needs more is refused. Files in the zip
format (torch 1.6 and later) are memory-mapped, so opening one reads no weights; files in the older format are loaded
whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError, NotFoundError
from ...jsonfile import LFS_MAGIC, LFS_POINTER, open_regular, os_reason
from ..dtypes import DTYPE_BY_NAME
from ..files.weights import TRAINER_SUFFIX
from ..tensor import ByteReader, TensorInfo
from .pickle_cost import why_costly

if TYPE_CHECKING:
    import torch

__all__ = ["PickledFile", "read_pickled"]

_ZIP_MAGIC = b"PK\x03\x04"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_REMEDY = "convert it to safetensors with the program that wrote it"
# the objects that a trainer keeps beside the weights, such as its settings, are only made by running code
_TAKE_OUT = (
    "it is a checkpoint of a trainer, such as PyTorch Lightning, with other objects beside the weights; if you trust who wrote it, "
    'take the weights out, which runs code from it, and put config.json in their folder: python -c "import torch; '
    "torch.save(torch.load('{name}', map_location='cpu', weights_only=False)['state_dict'], 'pytorch_model.bin')\""
)


class PickledFile:
    """The tensors of one pickled file, memory-mapped or in memory. Thread-safe, since it only reads.

    Args:
        file: The file.
        tensors: Its tensors.
        wrapped: Whether they are under a key of the file, beside the state of a training.
    """

    def __init__(self, file: Path, tensors: dict[str, torch.Tensor], *, wrapped: bool = False) -> None:
        self.file = file
        self.tensors = tensors
        self.wrapped = wrapped

    def __reduce__(self) -> tuple[Callable[[Path], PickledFile], tuple[Path]]:
        """Pickle as a path: another process opens the file itself."""
        return _reopen, (self.file,)

    def read_into(self, reader: ByteReader, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer`, which must not be empty, with bytes of the row-major tensor `name`, from byte `start` on."""
        import torch

        tensor, end = self.tensors[name], start + len(buffer)
        if tensor.is_contiguous() and not tensor.is_neg():
            found = tensor.reshape(-1).view(torch.uint8)[start:end]
        else:
            # Copy only the rows that contain the range. Squeeze first, since a leading dimension of length 1 would make
            # the whole tensor a single row.
            tensor = tensor.squeeze()
            tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
            row = tensor[0].numel() * tensor.element_size()
            first = start // row
            rows = tensor[first : -(-end // row)].clone(memory_format=torch.contiguous_format)
            found = rows.reshape(-1).view(torch.uint8)[start - first * row : end - first * row]
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(found)


def _reopen(file: Path) -> PickledFile:
    state, wrapped = _state_dict(file, _load(file))
    return PickledFile(file, {name: _plain(file, name, value) for name, value in state.items()}, wrapped=wrapped)


def read_pickled(file: Path) -> list[TensorInfo]:
    """Read the names, types and shapes of the tensors in a pickled checkpoint.

    The file must hold a mapping from names to tensors. A mapping that holds no tensor itself, but exactly one such
    mapping under `state_dict`, `model_state_dict`, `model` or `module`, is unwrapped; its other entries (an epoch, the
    state of an optimizer) are ignored.

    Returns:
        The tensors in the file's order. Each has the offset -1 and the file's `PickledFile` as source.

    Raises:
        NotFoundError: there is no such file.
        CheckpointError: the file needs more than the restricted unpickler allows, or holds something else.
    """
    source = _reopen(file)
    found = []
    for name, tensor in source.tensors.items():
        dtype = DTYPE_BY_NAME.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None or dtype.bits < 8:
            raise CheckpointError(f"{file}: tensor {name!r}: dtype {tensor.dtype} cannot be read")
        shape = tuple(tensor.shape)
        found.append(
            TensorInfo(
                name=name,
                dtype=dtype,
                shape=shape,
                file=file,
                offset=-1,
                nbytes=dtype.nbytes(tensor.numel()),
                source=source,
            )
        )
    return found


def _load(file: Path) -> Any:
    import torch

    try:
        with open_regular(file) as handle:
            magic = handle.read(len(_ZIP_MAGIC))
    except FileNotFoundError:
        raise NotFoundError(f"{file}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {os_reason(error)}") from None
    if not magic:
        raise CheckpointError(f"{file}: the file is empty; fetch it again")
    if magic == LFS_MAGIC[: len(magic)]:
        raise CheckpointError(f"{file}: {LFS_POINTER}")
    if why := why_costly(file, zipped=magic == _ZIP_MAGIC):
        raise CheckpointError(f"{file}: cannot be read: {why}; {_REMEDY}")
    try:
        with warnings.catch_warnings():
            # torch warns of its own deprecated storage classes when it reads old files.
            warnings.simplefilter("ignore")
            return torch.load(str(file), map_location="cpu", weights_only=True, mmap=magic == _ZIP_MAGIC)
    # torch may raise any exception type for a damaged or hostile pickle.
    except Exception as error:
        if file.suffix == TRAINER_SUFFIX and _holds_more(error):
            remedy = _TAKE_OUT.format(name=file.name)
            raise CheckpointError(f"{file}: cannot be read without running code from it: {remedy}") from None
        raise CheckpointError(
            f"{file}: cannot be read without running code from it, or is damaged ({_first_line(error)}); {_REMEDY}"
        ) from None


def _holds_more(error: Exception) -> bool:
    return "weights_only" in str(error) or "Unsupported global" in str(error)


def _first_line(error: Exception) -> str:
    if _holds_more(error):
        return "it holds more than tensors"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _state_dict(file: Path, loaded: Any) -> tuple[dict[str, torch.Tensor], bool]:
    """Return the tensors of what was loaded, and whether they were under a key."""
    import torch

    def has_tensors(value: object) -> bool:
        return isinstance(value, Mapping) and any(isinstance(item, torch.Tensor) for item in value.values())

    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{file}: must hold a mapping from names to tensors, found {type(loaded).__name__}")
    around = bool(loaded) and not has_tensors(loaded)
    if around:
        wrapped = [key for key in _WRAPPERS if has_tensors(loaded.get(key))]
        if len(wrapped) != 1:
            found = ", ".join(wrapped) if wrapped else "none"
            raise CheckpointError(
                f"{file}: must hold a mapping from names to tensors, alone or under one of the keys "
                f"{', '.join(_WRAPPERS)}; such keys found: {found}"
            )
        loaded = loaded[wrapped[0]]
    tensors: dict[str, torch.Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{file}: the name of a tensor must be a string, found {name!r}")
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{file}: entry {name!r} is not a tensor, found {type(value).__name__}; {_REMEDY}")
        tensors[name] = value
    return tensors, around


def _plain(file: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    import torch

    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        kind = f"{tensor.layout} on {tensor.device}"
        kind = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else kind
        raise CheckpointError(f"{file}: tensor {name!r}: only dense tensors can be read, found {kind}; {_REMEDY}")
    return tensor.detach()
