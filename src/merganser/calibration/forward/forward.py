"""Run a model's forward one block at a time: the model's own code runs, with only one block's weights in memory.

To compute block i, the model is called as usual, but every block before it returns its stored output (from the spool),
and the call ends when block i returns. So every block receives exactly the arguments that the model computes for it:
masks, rotary tables, position biases, the results of an encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import MergeError, NonFiniteError, UnsupportedError
from ..data.batches import Batch, Padded
from .experts import router_modules
from .internals import TensorReader, linear_classes
from .skeleton import Block, Skeleton

__all__ = [
    "Output",
    "call_block",
    "call_head",
    "check_streamable",
    "logits",
    "run_alone",
    "run_block",
    "run_on_text",
]


@dataclass(frozen=True)
class Output:
    """The output of a block.

    Args:
        hidden: The hidden states, shape [sequences, longest, width].
        rest: Further values of the returned tuple, such as position biases that later blocks share; None if the block
            returned the hidden states alone, not a tuple.
    """

    hidden: Tensor
    rest: tuple[Any, ...] | None

    def returned(self) -> Any:
        """Return the output in the form in which the block returned it."""
        return self.hidden if self.rest is None else (self.hidden, *self.rest)


class _Finished(BaseException):
    """Ends a model's forward; not an Exception, so that no `except Exception` of the model catches it."""

    def __init__(self, output: Any) -> None:
        self.output = output


@torch.no_grad()
def run_block(skeleton: Skeleton, index: int, batch: Batch, before: Mapping[int, Output]) -> Output:
    """Run one block without autograd; arguments and errors are those of `call_block`."""
    return call_block(skeleton, index, batch, before)


def call_block(skeleton: Skeleton, index: int, batch: Batch, before: Mapping[int, Output]) -> Output:
    """Run one block.

    Args:
        skeleton: The model; the weights of the block are loaded.
        index: Index of the block.
        batch: The input of the model.
        before: By stack, the output of its last finished block: of all stacks before the block's own, and of its own
            stack unless the block is the first one.

    Raises:
        UnsupportedError: The block was not called, or returned something other than hidden states.
    """
    block = skeleton.blocks[index]

    def run(*args: Any, **kwargs: Any) -> Any:
        raise _Finished(type(block.module).forward(block.module, *args, **kwargs))

    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for earlier in skeleton.blocks[:index]:
        forwards[earlier.module] = _returning(before[earlier.stack])
    forwards[block.module] = run
    try:
        with replaced(forwards):
            skeleton.model(**batch.inputs())
    except _Finished as finished:
        return _output(skeleton, block, batch.stacks[block.stack], finished.output)
    raise UnsupportedError(f"{skeleton.checkpoint.reference}: {_name(skeleton)} does not run {block.name}")


@torch.no_grad()
def logits(skeleton: Skeleton, batch: Batch, last: Mapping[int, Output]) -> Tensor:
    """Return the logits of a batch without autograd; arguments are those of `call_head`."""
    return call_head(skeleton, batch, last)


def call_head(skeleton: Skeleton, batch: Batch, last: Mapping[int, Output]) -> Tensor:
    """Return the logits of a batch, computed from the last block's output of every stack.

    The weights outside the blocks must be loaded, including the head.

    Returns:
        Shape [sequences, longest, vocabulary].
    """
    with replaced({block.module: _returning(last[block.stack]) for block in skeleton.blocks}):
        found: Tensor = skeleton.model(**batch.inputs()).logits
    return found


def _returning(output: Output) -> Callable[..., Any]:
    return lambda *args, **kwargs: output.returned()


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of modules within the context; such contexts may be nested."""
    previous = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in previous.items():
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


def _output(skeleton: Skeleton, block: Block, padded: Padded, found: Any) -> Output:
    hidden, rest = (found[0], tuple(found[1:])) if isinstance(found, tuple | list) and found else (found, None)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != padded.ids.shape:
        shape = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise UnsupportedError(
            f"{skeleton.checkpoint.reference}: {_name(skeleton)}: {block.name} returns {shape} and not one row of "
            f"hidden states per token, {[*padded.ids.shape, '...']}; statistics from data need that"
        )
    return Output(hidden, rest)


def check_streamable(skeleton: Skeleton, batch: Batch, source: TensorReader | None = None) -> None:
    """Check that blocks run one at a time return bit for bit the same as within the model's own forward.

    The model's own forward runs once, with each block loaded in turn; next to it, each block is run alone. The results
    differ for models that pass something between blocks other than their outputs, such as a cache that blocks share.

    Args:
        skeleton: The model, with the weights outside its blocks loaded; its `per_token` is set.
        batch: A few tokens, without padding.
        source: Where the weights of blocks come from, if not from the checkpoint.

    Raises:
        UnsupportedError: The results differ, or the blocks are not each called once and in order.
        NonFiniteError: The model produces NaN or infinity.
    """
    turns = iter(range(len(skeleton.blocks)))
    before: dict[int, Output] = {}

    def observed(index: int, block: Block) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if next(turns, None) != index:
                raise _refusal(skeleton, f"{block.name} does not run once and in its turn")
            with skeleton.filled(block, source):
                found = type(block.module).forward(block.module, *args, **kwargs)
                whole = _output(skeleton, block, batch.stacks[block.stack], found)
                with _noting_inputs(skeleton, block, batch):
                    alone = run_alone(skeleton, index, batch, before)
            if not bool(whole.hidden.isfinite().all()):
                raise NonFiniteError(
                    f"{skeleton.checkpoint.reference}: {block.name} gives NaN or infinity for the first tokens of the "
                    "data; the model is damaged, or its dtype too small for it"
                )
            if not torch.equal(whole.hidden, alone.hidden):
                raise _refusal(skeleton, f"{block.name} computes something else when it runs by itself")
            # a copy, since the next block may work in place
            before[block.stack] = Output(whole.hidden.clone(), whole.rest)
            if index + 1 == len(skeleton.blocks):
                raise _Finished(None)
            return found

        return forward

    forwards = {block.module: observed(index, block) for index, block in enumerate(skeleton.blocks)}

    def refusal(reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"{skeleton.checkpoint.reference}: {_name(skeleton)} cannot be run one block at a time: its forward fails "
            f"({reason})"
        )

    # the model may need more than tokens, or weights at a time when only one block has any
    with _refusing(refusal), suppress(_Finished), torch.no_grad(), replaced(forwards):
        skeleton.model(**batch.inputs())
        raise _refusal(skeleton, f"its forward does not run {skeleton.blocks[-1].name}")


@contextmanager
def _noting_inputs(skeleton: Skeleton, block: Block, batch: Batch) -> Iterator[None]:
    """Note within the context which inputs of a block's matrices have a row per token."""

    def note(parameter: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # inputs that are given by keyword are not seen
        has_rows = bool(inputs) and batch.stack_of(inputs[0].shape[:-1]) is not None
        skeleton.per_token[parameter] = (*skeleton.per_token[parameter], has_rows)

    kinds = tuple(linear_classes())
    routers = router_modules(block.module)
    with ExitStack() as stack:
        for name, module in block.module.named_modules():
            if isinstance(module, kinds) or name in routers:
                parameter = f"{block.name}.{name}.weight"
                skeleton.per_token[parameter] = ()
                stack.callback(module.register_forward_pre_hook(partial(note, parameter)).remove)
        yield


@contextmanager
def _refusing(refusal: Callable[[str], UnsupportedError]) -> Iterator[None]:
    """Replace exceptions of a model's code by a refusal, which is made of their description; a lack of memory stays as it is."""
    try:
        yield
    except MergeError:
        raise
    except Exception as error:
        # torch raises an exception of a general type if memory runs out
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        raise refusal(f"{type(error).__name__}: {reason}") from None


def run_alone(skeleton: Skeleton, index: int, batch: Batch, before: Mapping[int, Output]) -> Output:
    """Run one block as `run_block` does, for the first time; what it raises for lack of a value is a refusal.

    Raises:
        UnsupportedError: The block cannot run by itself.
    """
    name = skeleton.blocks[index].name
    # a block that misses a value which an earlier block would have left for it may raise any exception
    with _refusing(lambda reason: _refusal(skeleton, f"{name} fails when it runs by itself ({reason})")):
        return run_block(skeleton, index, batch, before)


def run_on_text(skeleton: Skeleton, index: int, batch: Batch, before: Mapping[int, Output]) -> Output:
    """Run one block as `run_block` does; what the model raises for this text alone is a message that names it.

    Raises:
        UnsupportedError: The model does not accept the text.
    """

    def refusal(reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"{batch.where[0]}: {_name(skeleton)} fails for this text, in {skeleton.blocks[index].name} "
            f"({reason}); leave it out, or choose another length"
        )

    with _refusing(refusal):
        return run_block(skeleton, index, batch, before)


def _refusal(skeleton: Skeleton, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{skeleton.checkpoint.reference}: {_name(skeleton)} does work between its blocks: {reason}; statistics from "
        "data are computed one block at a time and cannot be had for it"
    )


def _name(skeleton: Skeleton) -> str:
    return type(skeleton.model).__name__
