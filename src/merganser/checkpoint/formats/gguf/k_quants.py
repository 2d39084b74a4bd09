"""Rounding to GGUF's K types: the bytes that llama.cpp writes without an importance matrix.

A block has 256 values in groups of 16 or 32. A group has a scale (and in Q2_K, Q4_K, Q5_K a minimum), which is itself rounded
to 4, 6 or 8 bits, times a float16 of the block. Scales and minima are searched for: some twenty grids around that which
spans the group are tried, each with the scale and minimum that fit best, and the one with the smallest weighted error stays.

The bytes equal those of `ggml_quantize_chunk` of llama.cpp, as its builds for x86-64 compute them. For that, every sum is taken
in the order of the values and every operation rounds to float32, as in its C code (`quantize_row_q4_K_ref` and similar functions
in ggml-quants.c, MIT). Here a group is a column of an array, so that one operation works on many groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .header import TYPE_BY_NAME

__all__ = ["K_TYPES", "quantise_k"]

Array = NDArray[Any]

_BLOCK = 256
_AT_ONCE = 128
"""Blocks per call: the arrays of that many stay in the processor's cache."""

_ZERO = np.float32(1e-15)
"""Groups whose largest magnitude is below are zeros."""

_ROUNDS = 5
"""How often the codes of a group of Q3_K are improved, one after the other."""


def quantise_k(values: Array, kind: str) -> Array:
    """Return the bytes of consecutive values, flat.

    Args:
        values: float32, a multiple of 256, all finite.
        kind: One of `K_TYPES`.
    """
    encode = _ENCODERS[kind]
    blocks = values.reshape(-1, _BLOCK)
    found = np.empty((len(blocks), TYPE_BY_NAME[kind].nbytes), np.uint8)
    # groups without a range divide by zero; what comes of it is left out
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        for start in range(0, len(blocks), _AT_ONCE):
            piece = blocks[start : start + _AT_ONCE]
            parts = encode(piece)
            found[start : start + len(piece)] = np.concatenate([part.view(np.uint8) for part in parts], axis=1)
    return found.reshape(-1)


def _q2(blocks: Array) -> list[Array]:
    groups = _columns(blocks, 16)
    fit = _Range(groups, np.abs(groups), most=3, first=-0.5, steps=15, squared=False)
    scale, scales = _in_steps(fit.scale.reshape(-1, 16), 15)
    least, minima = _in_steps(fit.depth.reshape(-1, 16), 15)
    codes = fit.codes(_times(scale, scales), _times(least, minima))
    return [scales | minima << 4, _two_bits(codes), scale, least]


def _q3(blocks: Array) -> list[Array]:
    groups = _columns(blocks, 16)
    found, codes = _improved(groups)
    scale, scales = _signed_steps(found.reshape(-1, 16), 32)
    _recode(codes, groups, _times(scale, scales), 4)
    # a code of 3 bits is stored as its high bit, and the others
    high = _rows(codes, 32) >> 2
    low = scales + 32 & 15
    packed = np.concatenate([low[:, :8] | low[:, 8:] << 4, _pairs_of_bits(scales + 32 >> 4)], axis=1)
    return [_bits(high), _two_bits(codes & 3), packed.astype(np.uint8), scale]


def _q4(blocks: Array) -> list[Array]:
    scales, codes = _in_groups_of_32(blocks, most=15, first=-1.0, steps=20)
    return [*scales, _nibbles(_rows(codes, 32))]


def _q5(blocks: Array) -> list[Array]:
    scales, codes = _in_groups_of_32(blocks, most=31, first=-0.5, steps=15)
    rows = _rows(codes, 32)
    return [*scales, _bits(rows >> 4), _nibbles(rows & 15)]


def _q6(blocks: Array) -> list[Array]:
    groups = _columns(blocks, 16)
    found, codes = _symmetric(groups, 32)
    scale, scales = _signed_steps(found.reshape(-1, 16), 128)
    _recode(codes, groups, _times(scale, scales), 32)
    empty = np.abs(found.reshape(-1, 16)).max(axis=1) < _ZERO
    rows = codes.T.reshape(-1, 2, 4, 32)
    rows[empty], scales[empty], scale[empty] = 0, 0, 0
    low = (rows & 15)[:, :, :2] | (rows & 15)[:, :, 2:] << 4
    return [low.reshape(-1, 128), _two_bits_of(rows >> 4), scales.astype(np.int8), scale]


_ENCODERS: dict[str, Callable[[Array], list[Array]]] = {"Q2_K": _q2, "Q3_K": _q3, "Q4_K": _q4, "Q5_K": _q5, "Q6_K": _q6}

K_TYPES = tuple(_ENCODERS)
"""Types that can be written."""


def _in_groups_of_32(blocks: Array, most: int, first: float, steps: int) -> tuple[list[Array], Array]:
    """Return the scales of Q4_K and Q5_K as they are stored, and the codes [32, groups]."""
    groups = _columns(blocks, 32)
    spread = np.sqrt(_sum(groups * groups) / np.float32(32))
    fit = _Range(groups, spread + np.abs(groups), most=most, first=first, steps=steps, squared=True)
    scale, scales = _in_steps(fit.scale.reshape(-1, 8), 63)
    least, minima = _in_steps(fit.depth.reshape(-1, 8), 63)
    codes = fit.codes(_times(scale, scales), _times(least, minima))
    own = (scales[:, :4], minima[:, :4], scales[:, 4:], minima[:, 4:])
    packed = [own[0] | own[2] >> 4 << 6, own[1] | own[3] >> 4 << 6, own[2] & 15 | (own[3] & 15) << 4]
    return [scale, least, np.concatenate(packed, axis=1)], codes


class _Range:
    """The scale and the minimum of each group: `value = scale * code - depth`.

    Args:
        values: [values per group, groups].
        weights: How much the error of each value counts, of the same shape.
        most: The largest code.
        first: By how much the number of steps of the first grid differs from `most`; later ones have 0.1 more each.
        steps: Grids that are tried after the first.
        squared: Whether errors are squared, or their magnitudes count.
    """

    def __init__(self, values: Array, weights: Array, *, most: int, first: float, steps: int, squared: bool) -> None:
        self._values, self._most = values, np.float32(most)
        high = values.max(axis=0)
        low = np.minimum(values.min(axis=0), np.float32(0))
        self._flat = high == low
        self._inverse, self._origin = self._most / (high - low), low
        self.scale = np.float32(1) / self._inverse
        codes, work = np.empty_like(values), np.empty_like(values)

        def code(inverse: Array, origin: Array) -> None:
            np.subtract(values, origin, out=codes)
            _rounded(codes, inverse, 0, self._most)

        def error(scale: Array, minimum: Array) -> Array:
            np.multiply(codes, scale, out=work)
            np.add(work, minimum, out=work)
            np.subtract(work, values, out=work)
            if squared:
                np.multiply(work, work, out=work)
            else:
                np.abs(work, out=work)
            return _sum(np.multiply(work, weights, out=work))

        code(self._inverse, low)
        best = error(self.scale, low)
        weight, weighted = _sum(weights), _sum(weights * values)
        products = np.empty_like(values)
        for step in range(steps + 1):
            inverse = (np.float32(first) + np.float32(0.1) * np.float32(step) + self._most) / (high - low)
            code(inverse, low)
            np.multiply(weights, codes, out=products)
            of_codes = _sum(products)
            of_squares = _sum(np.multiply(products, codes, out=work))
            of_both = _sum(np.multiply(products, values, out=work))
            determinant = weight * of_squares - of_codes * of_codes
            scale = (weight * of_both - weighted * of_codes) / determinant
            minimum = (of_squares * weighted - of_codes * of_both) / determinant
            above = minimum > 0
            scale = np.where(above, of_both / of_squares, scale)
            minimum = np.where(above, np.float32(0), minimum)
            found = error(scale, minimum)
            better = (determinant > 0) & (found < best)
            best = np.where(better, found, best)
            self.scale = np.where(better, scale, self.scale)
            self._inverse = np.where(better, inverse, self._inverse)
            self._origin = np.where(better, low, self._origin)
            # the next grid begins where the best one does
            low = np.where(better, minimum, low)
        self.scale[self._flat] = 0
        self.depth = -low

    def codes(self, scale: Array, depth: Array) -> Array:
        """Return the codes on the grid with rounded scales: [values per group, groups], uint8."""
        scale, depth = scale.reshape(-1), depth.reshape(-1)
        found = self._values + depth
        found /= scale
        np.clip(np.rint(found, out=found), 0, self._most, out=found)
        # with a scale of zero the codes mean nothing; llama.cpp leaves those of the search
        left = np.flatnonzero(scale == 0)
        if len(left):
            own = self._values[:, left] - self._origin[left]
            _rounded(own, self._inverse[left], 0, self._most)
            own[:, self._flat[left]] = 0
            found[:, left] = own
        return found.astype(np.uint8)


def _symmetric(values: Array, half: int) -> tuple[Array, Array]:
    """Return the scale of each group, and its codes from 0 to 2 * half - 1: `value = scale * (code - half)`."""
    largest = np.take_along_axis(values, np.abs(values).argmax(axis=0)[None], axis=0)[0]
    weights = values * values
    codes, work = np.empty_like(values), np.empty_like(values)

    def fitted(inverse: Array) -> tuple[Array, Array]:
        codes[:] = values
        _rounded(codes, inverse, -half, half - 1)
        np.multiply(weights, values, out=work)
        both = _sum(np.multiply(work, codes, out=work))
        np.multiply(weights, codes, out=work)
        return both, _sum(np.multiply(work, codes, out=work))

    inverse = np.float32(-half) / largest
    both, squares = fitted(inverse)
    scale = np.where(squares != 0, both / squares, np.float32(0))
    best = scale * both
    for step in (*range(-9, 0), *range(1, 10)):
        other = -(np.float32(half) + np.float32(0.1) * np.float32(step)) / largest
        both, squares = fitted(other)
        better = (squares > 0) & (both * both > best * squares)
        scale = np.where(better, both / squares, scale)
        best = np.where(better, scale * both, best)
        inverse = np.where(better, other, inverse)
    codes[:] = values
    _rounded(codes, inverse, -half, half - 1)
    codes += half
    empty = np.abs(largest) < _ZERO
    scale[empty] = 0
    codes[:, empty] = 0
    return scale, codes.astype(np.uint8)


def _improved(values: Array) -> tuple[Array, Array]:
    """Return the scale of each group of Q3_K and its codes, of which each is changed where that lowers the error."""
    half = 4
    largest = np.take_along_axis(values, np.abs(values).argmax(axis=0)[None], axis=0)[0]
    codes = values.copy()
    _rounded(codes, np.float32(-half) / largest, -half, half - 1)
    weights = values * values
    products = weights * values
    both = _sum(products * codes)
    squares = _sum(weights * codes * codes)
    for place in [*range(len(values))] * _ROUNDS:
        value, weight, product, code = values[place], weights[place], products[place], codes[place]
        without = both - product * code
        left = squares - weight * code * code
        other = np.clip(np.rint(value * left / without), -half, half - 1)
        with_it = without + product * other
        own = left + weight * other * other
        better = (without > 0) & (other != code) & (own > 0)
        better &= with_it * with_it * squares > both * both * own
        codes[place] = np.where(better, other, code)
        both = np.where(better, with_it, both)
        squares = np.where(better, own, squares)
    scale = np.where(squares > 0, both / squares, np.float32(0))
    codes += half
    empty = np.abs(largest) < _ZERO
    scale[empty] = 0
    codes[:, empty] = 0
    return scale, codes.astype(np.uint8)


def _in_steps(numbers: Array, most: int) -> tuple[Array, Array]:
    """Return numbers that are not negative, [blocks, groups], as a float16 of each block times whole numbers up to `most`."""
    largest = np.maximum(numbers.max(axis=1, keepdims=True), np.float32(0))
    inverse = np.where(largest > 0, np.float32(most) / largest, np.float32(0))
    found = np.rint(inverse * numbers).astype(np.int32).astype(np.uint8)
    return (largest / np.float32(most)).astype(np.float16), np.minimum(found, most)


def _signed_steps(numbers: Array, half: int) -> tuple[Array, Array]:
    """Return numbers [blocks, groups] as a float16 of each block times whole numbers from -half to half - 1, int32."""
    largest = np.take_along_axis(numbers, np.abs(numbers).argmax(axis=1)[:, None], axis=1)
    inverse = np.float32(-half) / largest
    found = np.clip(np.rint(inverse * numbers), -half, half - 1)
    empty = largest[:, 0] == 0
    scale = (np.float32(1) / inverse).astype(np.float16)
    # llama.cpp leaves the bits of such scales at zero, which stand for -half
    found[empty], scale[empty] = -half, 0
    return scale, found.astype(np.int32)


def _recode(codes: Array, values: Array, scale: Array, half: int) -> None:
    """Round to the grid with rounded scales, in place; where a scale is zero, codes stay, as in llama.cpp."""
    scale = scale.reshape(-1)
    found = np.clip(np.rint(values / scale), -half, half - 1) + half
    np.copyto(codes, found, where=scale != 0, casting="unsafe")


def _times(scale: Array, steps: Array) -> Array:
    return scale.astype(np.float32) * steps.astype(np.float32)


def _rounded(values: Array, inverse: Array, least: Any, most: Any) -> None:
    """Divide by a step and round to whole numbers within bounds, in place."""
    np.multiply(values, inverse, out=values)
    np.rint(values, out=values)
    np.clip(values, least, most, out=values)


def _sum(values: Array) -> Array:
    """Return the sum of each column, added from the first row to the last."""
    found: Array = np.add.reduce(values, axis=0)
    return found


def _columns(blocks: Array, size: int) -> Array:
    return np.ascontiguousarray(blocks.reshape(-1, size).T)


def _rows(codes: Array, size: int) -> Array:
    """Return codes [values per group, groups] as [blocks, 256 / size, size]."""
    return codes.T.reshape(-1, _BLOCK // size, size)


def _bits(rows: Array) -> Array:
    """Pack bits [blocks, 8, 32]: bit i of byte j is that of value j of group i."""
    found: Array = np.packbits(rows, axis=1, bitorder="little")[:, 0]
    return found


def _nibbles(rows: Array) -> Array:
    found: Array = rows[:, ::2] | rows[:, 1::2] << 4
    return found.reshape(-1, 128)


def _two_bits(codes: Array) -> Array:
    return _two_bits_of(codes.T.reshape(-1, 2, 4, 32))


def _two_bits_of(rows: Array) -> Array:
    """Pack codes of two bits [blocks, 2, 4, 32]: byte j of a half has value j of four groups."""
    found: Array = rows[:, :, 0] | rows[:, :, 1] << 2 | rows[:, :, 2] << 4 | rows[:, :, 3] << 6
    return found.reshape(-1, 64)


def _pairs_of_bits(scales: Array) -> Array:
    """Pack the high bits of the 16 scales of Q3_K: byte i has those of scales i, i + 4, i + 8 and i + 12."""
    own = scales.reshape(-1, 4, 4)
    found: Array = own[:, 0] | own[:, 1] << 2 | own[:, 2] << 4 | own[:, 3] << 6
    return found
