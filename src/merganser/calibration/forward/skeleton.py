"""A model without weights, whose blocks are loaded from a checkpoint one at a time and emptied again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint import DTYPE_BY_NAME, Checkpoint
from ...errors import CheckpointError, UnsupportedError
from ...inference.libraries import quiet
from ...process import release_freed_memory
from . import internals

__all__ = ["Block", "Skeleton", "Weights"]

Weights = Mapping[tuple[nn.Module, str], nn.Parameter]
"""Parameters by the module that holds them and their name in it."""

# keys of the number of blocks in a stack; most families map theirs to the first key
_DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


@dataclass(frozen=True, eq=False)
class Block:
    """One transformer block.

    Args:
        name: The module's name in the model, such as `model.layers.3`.
        module: The module.
        stack: Index of its stack: 0, or 1 for the decoder of an encoder-decoder.
        sources: Names of the checkpoint's tensors that fill it.
    """

    name: str
    module: nn.Module
    stack: int
    sources: tuple[str, ...]


class Skeleton:
    """A model of transformers with its parameters on the meta device. Use it as a context manager.

    Args:
        checkpoint: The checkpoint with its weights.
        dtype: Dtype of the parameters; None for that of the checkpoint.

    Attributes:
        model: The model.
        blocks: Its blocks, in the order of the model: an encoder's before its decoder's.
        targets: For every tensor of the checkpoint that the model uses, the parameter that it fills.
        dtype: Dtype of most parameters.

    Raises:
        CheckpointError: config.json is missing or transformers cannot read it.
        UnsupportedError: transformers does not know the model, or it has no stack of blocks.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
        self.checkpoint = checkpoint
        config = _config(checkpoint)
        self.dtype = dtype or _dtype(checkpoint, config)
        self.model = internals.build_skeleton(config, self.dtype)
        self.targets = internals.parameters_of(self.model, checkpoint.tensors)
        self.blocks = _blocks(checkpoint, self.model, self.targets)
        self._reader = checkpoint.reader()

    def __enter__(self) -> Skeleton:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._reader.close()

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return bool(self.model.config.is_encoder_decoder)

    def outside(self, *, head: bool = False) -> list[str]:
        """Return the names of the tensors outside the blocks: embeddings, norms.

        Args:
            head: Whether to include the output matrix, too, if it is not the embedding.
        """
        inside = {source for block in self.blocks for source in block.sources}
        skipped = frozenset() if head else _own_head(self.model)
        return [name for name, target in self.targets.items() if name not in inside and target.parameter not in skipped]

    def fill_outside(self, *, head: bool = False, source: internals.TensorReader | None = None) -> None:
        """Load the weights outside the blocks: embeddings, norms.

        Args:
            head: Whether to load the output matrix, too, if it is not the embedding.
            source: Where the weights come from, if not from the checkpoint.

        Raises:
            CheckpointError: A tensor cannot be read, or has the wrong shape.
        """
        self._load(self.outside(head=head), source)
        internals.tie(self.model)

    def _load(self, names: Sequence[str], source: internals.TensorReader | None) -> None:
        own = source or self._reader
        tensors = {name: internals.LazyTensor(self.checkpoint.tensors[name], own) for name in names}
        internals.load_tensors(self.model, tensors, self.targets)

    def loaded(self) -> Weights:
        """Return all parameters that are loaded at the moment, so that `use` can put them back."""
        return {
            (owner, name): parameter
            for owner in self.model.modules()
            for name, parameter in owner._parameters.items()
            if parameter is not None and not parameter.is_meta
        }

    def use(self, weights: Weights) -> None:
        """Use these parameters in place of those that the model has."""
        for (owner, name), parameter in weights.items():
            owner._parameters[name] = parameter

    @contextmanager
    def filled(self, block: Block, source: internals.TensorReader | None = None) -> Iterator[None]:
        """Load a block's weights, and free them at the end of the context.

        Args:
            block: The block.
            source: Where the weights come from, if not from the checkpoint.

        Raises:
            CheckpointError: A tensor is missing, cannot be read, or has the wrong shape.
        """
        try:
            self._load(block.sources, source)
            for name, parameter in block.module.named_parameters():
                if parameter.is_meta:
                    raise CheckpointError(
                        f"{self.checkpoint.reference}: {block.name}.{name} is missing; "
                        f"{type(self.model).__name__} needs it; fetch the model again"
                    )
            yield
        finally:
            internals.empty_tensors(block.module)
            # otherwise the C library would keep freed pieces between used ones, more with every block
            release_freed_memory()

    def stored(self, name: str) -> Tensor:
        """Return a tensor as the checkpoint stores it.

        Raises:
            CheckpointError: It cannot be read.
        """
        return self._reader.tensor(self.checkpoint.tensors[name])

    @contextmanager
    def zeroed(self) -> Iterator[None]:
        """Let all weights be zero within the context, in the memory of the largest; it must not be filled."""
        try:
            internals.zero_tensors(self.model)
            yield
        finally:
            internals.empty_tensors(self.model)

    def will_need(self, block: Block) -> None:
        """Advise the system that a block's tensors will be read soon."""
        for name in block.sources:
            tensor = self.checkpoint.tensors[name]
            self._reader.will_need(tensor, 0, tensor.nbytes)


def _config(checkpoint: Checkpoint) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError:
        raise UnsupportedError(
            "calibrating needs transformers, which is not installed: pip install 'merganser[transformers]'"
        ) from None
    if not checkpoint.config:
        raise CheckpointError(f"{checkpoint.reference}: has no config.json, so it is not known what model this is")
    found = checkpoint.quantisation
    if found is not None and found.unreadable is not None:
        raise CheckpointError(
            f"{checkpoint.reference}: its weights are quantised ({found.evidence}); {found.unreadable}; give the "
            "unquantised model"
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.reference}: transformers cannot read config.json: {_first_line(error)}"
        ) from None
    # weights are dequantised while they are read, so that the model is an ordinary one
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _dtype(checkpoint: Checkpoint, config: Any) -> torch.dtype:
    """Return the dtype in config.json, else the dtype of most of the weights."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if tensor.dtype.kind == "float":
            sizes[tensor.dtype.name] += tensor.numel
    name = sizes.most_common(1)[0][0] if sizes else DTYPE_BY_NAME["float32"].name
    found: torch.dtype = getattr(torch, name)
    return found


def _blocks(checkpoint: Checkpoint, model: nn.Module, targets: dict[str, internals.Target]) -> list[Block]:
    sources: dict[str, list[str]] = {}
    names = [(stack, f"{name}.{i}") for stack, (name, depth) in enumerate(_stacks(model)) for i in range(depth)]
    prefixes = {f"{name}.": name for _, name in names}
    longest = max((prefix.count(".") for prefix in prefixes), default=0)
    for source, target in targets.items():
        parts = target.parameter.split(".")
        for length in range(1, longest + 1):
            own = prefixes.get(".".join(parts[:length]) + ".")
            if own is not None:
                sources.setdefault(own, []).append(source)
    if not names:
        raise UnsupportedError(
            f"{checkpoint.reference}: {type(model).__name__} has no stack of blocks as long as config.json says; "
            "statistics from data need one"
        )
    return [Block(name, model.get_submodule(name), stack, tuple(sources.get(name, ()))) for stack, name in names]


def _stacks(model: nn.Module) -> list[tuple[str, int]]:
    """Return name and length of the outermost module lists that are as long as the config says."""
    config: Any = model.config
    text = config.get_text_config()
    depths = {depth for each in (config, text) for name in _DEPTHS if (depth := getattr(each, name, None))}
    found: list[tuple[str, int]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) not in depths:
            continue
        if not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, len(module)))
    return found


def _own_head(model: Any) -> frozenset[str]:
    """Return the parameters of the output module, without those that it shares with the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return frozenset()
    shared = set() if embedding is None else {id(parameter) for parameter in embedding.parameters()}
    own = {id(parameter) for parameter in head.parameters()} - shared
    return frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own)
