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
from ...inference.language_model import positions_of
from ...inference.libraries import quiet
from ...jsonfile import read_object
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
        per_token: For the weight of every matrix that ran when the model was checked, and each time it ran, whether its
            input had a row per token; empty before the check. False for other inputs, such as tables of relative positions,
            even if such a table happens to have as many rows as a batch has tokens.

    Raises:
        CheckpointError: config.json is missing or transformers cannot read it.
        UnsupportedError: transformers does not know the model, it has no stack of blocks, or blocks share weights.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
        self.checkpoint = checkpoint
        config = _config(checkpoint)
        self.dtype = dtype or _dtype(checkpoint, config)
        self.model = internals.build_skeleton(config, self.dtype)
        self.targets = internals.parameters_of(self.model, checkpoint.tensors)
        self.blocks = _blocks(checkpoint, self.model, self.targets)
        self.per_token: dict[str, tuple[bool, ...]] = {}
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

    @property
    def ignores_padding(self) -> bool:
        """Whether tokens are known not to depend on padding behind them.

        Decoders read from left to right, and encoder-decoders mask the padding. Some encoders mix it into the tokens before
        it: they have no mask (FNet), or convolutions beside it (ConvBERT, MobileBERT).
        """
        return self.is_encoder_decoder or internals.is_causal(self.model)

    @property
    def positions(self) -> int | None:
        """Largest number of tokens that the model can read at once; None without such a limit."""
        found = positions_of(self.model.config)
        tables = [table for name, table in self.model.named_modules() if name.endswith("position_embeddings")]
        for table in tables:
            # RoBERTa and its kin begin to count behind the padding token's place
            if isinstance(table, nn.Embedding) and table.padding_idx is not None:
                rows = table.num_embeddings - table.padding_idx - 1
                found = rows if found is None else min(found, rows)
        return found

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
    for part in internals.configs_of(config):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    if getattr(config, "is_encoder_decoder", False):
        config.decoder_start_token_id = _decoder_start(checkpoint, config)
    return config


def _decoder_start(checkpoint: Checkpoint, config: Any) -> int:
    """Return the token with which the decoder of an encoder-decoder begins."""
    said = [getattr(config, "decoder_start_token_id", None)]
    generation = checkpoint.path / "generation_config.json"
    if generation.is_file():
        said.append(read_object(generation).get("decoder_start_token_id"))
    # what T5Gemma takes
    said.append(getattr(getattr(config, "decoder", None), "bos_token_id", None))
    found = next((token for token in said if type(token) is int and token >= 0), None)
    if found is None:
        raise CheckpointError(
            f"{checkpoint.reference}: neither config.json nor generation_config.json has a decoder_start_token_id, so it is "
            "not known with which token its decoder begins; add it to config.json"
        )
    return found


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
    blocks = [Block(name, model.get_submodule(name), stack, tuple(sources.get(name, ()))) for stack, name in names]
    _check_own_weights(checkpoint, model, blocks, targets)
    return blocks


def _check_own_weights(
    checkpoint: Checkpoint, model: nn.Module, blocks: Sequence[Block], targets: Mapping[str, internals.Target]
) -> None:
    filled = {target.parameter for target in targets.values()}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for block in blocks:
        for name, _ in block.module.named_parameters():
            own = f"{block.name}.{name}"
            other = tied.get(own)
            if own not in filled and other is not None and not other.startswith(f"{block.name}."):
                raise UnsupportedError(
                    f"{checkpoint.reference}: {type(model).__name__}: {own} is the same as {other} of another block; "
                    "statistics from data are computed one block at a time, each with weights of its own"
                )


def _stacks(model: Any) -> list[tuple[str, int]]:
    """Return name and length of the outermost module lists that are as long as the config says; an image tower has none."""
    config: Any = model.config
    text = config.get_text_config()
    depths = {depth for each in (config, text) for name in _DEPTHS if (depth := getattr(each, name, None))}
    found: list[tuple[str, int]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) not in depths:
            continue
        if not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, len(module)))
    if len(found) > 1 and text is not config and not config.is_encoder_decoder:
        decoder = _decoder_of(model)
        found = [(name, depth) for name, depth in found if decoder is None or name.startswith(f"{decoder}.")] or found
    return found


def _decoder_of(model: Any) -> str | None:
    """Return the name of the part of a model that reads text, such as `model.language_model`; None if it is not known."""
    find = getattr(model, "get_decoder", None)
    decoder = None if find is None else find()
    return next((name for name, module in model.named_modules() if name and module is decoder), None)


def _own_head(model: Any) -> frozenset[str]:
    """Return the parameters of the output module, without those that another module has, too, such as an embedding."""
    head = model.get_output_embeddings()
    if head is None:
        return frozenset()
    inside = {id(module) for module in head.modules()}
    elsewhere = {id(p) for module in model.modules() if id(module) not in inside for p in module._parameters.values()}
    own = {id(parameter) for parameter in head.parameters()} - elsewhere
    return frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own)
