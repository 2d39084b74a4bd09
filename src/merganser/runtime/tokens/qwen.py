"""Vision encoders of Qwen-VL, whose blocks merge cells of 2 x 2 patches within a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...errors import UnsupportedError
from ..attention import rotated
from ..merging import absorb, added
from .encoder import QWEN, check, replaced_forwards
from .plan import Choose, Plan

__all__ = ["CellMerging", "fits", "installed", "windows"]


def fits(model: Any) -> bool:
    """Return whether a model is a vision encoder of Qwen2-VL or Qwen2.5-VL."""
    return type(model).__name__ in QWEN


def windows(grid: Tensor, cell: int, side: int | None) -> Tensor:
    """Return the window of every cell of all images, in the order of frames, rows and columns: shape [cells], int64.

    Args:
        grid: Frames, rows and columns of patches of each image or video, shape [images, 3].
        cell: Patches along the side of a cell.
        side: Cells along the side of a window; None if a whole frame is one.
    """
    found, start = [], 0
    for frames, rows, columns in grid.tolist():
        rows, columns = rows // cell, columns // cell
        high, wide = (rows, columns) if side is None else (side, side)
        down, across = -(-rows // high), -(-columns // wide)
        frame, row, column = (torch.arange(n, device=grid.device) for n in (frames, rows, columns))
        window = (frame[:, None, None] * down + row[:, None] // high) * across + column // wide
        found.append(start + window.flatten())
        start += frames * down * across
    return torch.cat(found)


class CellMerging:
    """What the merging of the latest images did.

    Attributes:
        sizes: Number of cells that each cell behind the last block stands for, shape [cells], float32; they add up to those
            of the images. None before the first call.
        places: Which cells those are, counted through all images, frames, rows and columns, ascending: shape [cells],
            int64. A merged cell has the place of the one that others went into.
        counts: Number of cells behind each block, of all images together.
    """

    def __init__(self, choose: Choose, plan: Plan, model: Any):
        self.sizes: Tensor | None = None
        self.places: Tensor | None = None
        self.counts: list[int] = []
        self._choose, self._plan, self._blocks = choose, plan, len(model.blocks)
        self._cell = model.spatial_merge_size
        patch = model.config.patch_size
        patch = patch if isinstance(patch, int) else patch[0]
        window = getattr(model, "window_size", None)
        self._side = None if window is None else window // self._cell // patch

    # cells are in the order of the encoder, window by window, until `end`

    def begin(self, grid: Tensor) -> None:
        """Start with all cells, each of size 1; grid: frames, rows and columns of each image, shape [images, 3]."""
        window = windows(grid, self._cell, self._side)
        self._order = window.argsort(stable=True)
        self._window = window[self._order]
        self._left = torch.arange(len(window), device=grid.device)
        self.sizes = torch.ones(len(window), device=grid.device)
        self.counts, self.places = [], None

    def patches(self, every: Tensor) -> Tensor:
        """Return the rows of patches that are left, of all patches in the order of the encoder: shape [patches, d]."""
        return every.reshape(-1, self._cell**2, every.shape[-1])[self._left].flatten(0, 1)

    def bounds(self, bounds: Tensor) -> Tensor:
        """Return where segments of patches begin and end among those that are left: int32, as the encoder gives them."""
        ends = torch.bucketize(bounds, self._left * self._cell**2)
        found: Tensor = torch.unique_consecutive(ends * self._cell**2)
        return found.to(torch.int32)

    def bias(self) -> Tensor | None:
        """Return the logarithms of sizes, a number for each patch, shape [patches]; None if all are 0."""
        assert self.sizes is not None
        return self.sizes.log().repeat_interleave(self._cell**2) if (self.sizes > 1).any() else None

    def merge(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """Merge cells within each window.

        Args:
            hidden: Patches behind a block's attention, shape [patches, hidden size].
            keys: Their keys, averaged over heads, shape [patches, head_dim].
        """
        assert self.sizes is not None
        layer, unit, width = len(self.counts), self._cell**2, hidden.shape[1]
        lengths = torch.unique_consecutive(self._window[self._left], return_counts=True)[1].tolist()
        every = hidden.reshape(-1, unit * width), keys.reshape(len(self._left), -1), self.sizes, self._left
        found = []
        for cells, metric, sizes, left in zip(*(torch.split(each, lengths) for each in every), strict=True):
            r = min(self._plan.number(layer, len(cells)), len(cells) // 2)
            if r:
                gone, into = self._choose(metric[None], r, 0, layer / self._blocks)
                merged, kept, target = absorb(cells[None], sizes[None], gone, into)
                cells, sizes, left = merged[0], added(sizes[None], gone, kept, target)[0], left[kept[0]]
            found.append((cells, sizes, left))
        hidden, self.sizes, self._left = (torch.cat(each) for each in zip(*found, strict=True))
        self.counts.append(len(self._left))
        return hidden.reshape(-1, width)

    def spread(self, features: Tensor) -> Tensor:
        """Return rows for all cells in the order of the encoder, 0 where a cell is gone, which it puts into that of places."""
        every = features.new_zeros(len(self._order), features.shape[-1])
        return every.index_copy(0, self._left, features)

    def end(self, features: Tensor) -> Tensor:
        """Return the rows of cells that are left, in the order of places, of the rows of all cells in that order."""
        assert self.sizes is not None
        places = self._order[self._left]
        order = places.argsort()
        self.places, self.sizes = places[order], self.sizes[order]
        return features[self.places]


@contextmanager
def installed(model: Any, merging: CellMerging) -> Iterator[None]:
    """Let the blocks of a vision encoder of Qwen-VL ask `merging`."""
    check(model.config, model.blocks, "merge_tokens")

    def on_model(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        merging.begin(kwargs["grid_thw"] if "grid_thw" in kwargs else args[1])

    handles = [
        model.register_forward_pre_hook(on_model, with_kwargs=True),
        model.merger.register_forward_hook(lambda module, args, output: merging.spread(output)),
        model.register_forward_hook(lambda module, args, output: _ended(merging, output)),
    ]
    with replaced_forwards(model.blocks, lambda block: _forward(block, merging), handles):
        yield


def _ended(merging: CellMerging, output: Any) -> Any:
    # transformers 4 returns the features alone
    if isinstance(output, Tensor):
        return merging.end(output)
    if isinstance(output, tuple):
        raise UnsupportedError("merge_tokens: a tuple of outputs is not supported; leave return_dict=False out")
    output.pooler_output = merging.end(output.pooler_output)
    return output


def _forward(block: Any, merging: CellMerging) -> Any:
    """Return a block's forward with merging between its attention and its MLP."""

    def forward(
        hidden_states: Tensor, cu_seqlens: Tensor, *args: Any, position_embeddings: Any = None, **kwargs: Any
    ) -> Tensor:
        if position_embeddings is None:
            raise UnsupportedError("merge_tokens: blocks of Qwen-VL without position_embeddings are not supported")
        normed, bias = block.norm1(hidden_states), merging.bias()
        positions = tuple(merging.patches(each) for each in position_embeddings)
        bounds = merging.bounds(cu_seqlens)
        if bias is None:
            attended = block.attn(normed, cu_seqlens=bounds, position_embeddings=positions, **kwargs)
        else:
            attended = attention(block.attn, normed, bounds, positions, bias)
        hidden = merging.merge(hidden_states + attended, _heads(block.attn, normed)[1].mean(1))
        merged: Tensor = hidden + block.mlp(block.norm2(hidden))
        return merged

    return forward


def _heads(module: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values without positions, each of the shape [patches, heads, head_dim]."""
    queries, keys, values = module.qkv(normed).reshape(len(normed), 3, module.num_heads, -1).unbind(1)
    return queries, keys, values


def attention(module: Any, normed: Tensor, bounds: Tensor, positions: Any, bias: Tensor) -> Tensor:
    """Return what a block's attention says, with a number added to the logits of each patch.

    Args:
        module: The attention of the block.
        normed: Its input, shape [patches, hidden size].
        bounds: Where segments that attend to themselves begin and end, shape [segments + 1].
        positions: Cosines and sines, each of the shape [patches, head_dim].
        bias: Shape [patches].
    """
    queries, keys, values = _heads(module, normed)
    cos, sin = (each[:, None].float() for each in positions)
    queries, keys = (rotated(each.float(), cos, sin).to(values.dtype) for each in (queries, keys))
    lengths = bounds.diff().tolist()
    every = queries, keys, values, bias.to(values.dtype)
    found = []
    for q, k, v, b in zip(*(torch.split(each, lengths) for each in every), strict=True):
        # [1, heads, patches, head_dim]
        q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
        found.append(scaled_dot_product_attention(q, k, v, attn_mask=b.expand(1, 1, len(b), -1)))
    projected: Tensor = module.proj(torch.cat(found, dim=2)[0].transpose(0, 1).flatten(1))
    return projected
