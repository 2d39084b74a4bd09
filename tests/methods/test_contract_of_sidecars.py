"""The laws of sidecars fail methods that break them: one toy for each; and contradictions are refused at once."""

import pytest
import torch
from torch import Tensor

from merganser.method import Embeddings, Kept, Lossless, Part, Sidecar, merge_method, statistic
from merganser.ops import deltas, pack_flags, unpack_flags
from merganser.ops.bits import packed
from merganser.testing import contract
from merganser.testing import sidecars as laws

DOC = """Do something.

        merged = something

    Use when:
        Never.

    Differs from the paper:
        There is none.
    """


def toy(parts, encode, decode, **options):
    def average(base: Tensor, models: list[Tensor]) -> Tensor:
        return base + sum(deltas(base, models)) / len(models)

    average.__doc__ = DOC
    return merge_method(family="toys", cite="-", sidecar=Sidecar(parts, encode, decode, **options))(average)


def whole(shape: tuple[int, ...]) -> dict[str, Part]:
    return {"rest": Part(shape)}


def encode_rest(models: list[Tensor], merged: Tensor) -> dict[str, list[Tensor]]:
    return {"rest": [model - merged for model in models]}


def decode_rest(merged: Tensor, rest: Tensor) -> Tensor:
    return merged + rest


def fails(law, method, message):
    assert law in contract(method)
    with pytest.raises(AssertionError, match=message):
        law(method)


def test_a_sound_toy_passes():
    method = toy(whole, encode_rest, decode_rest, lossless=Lossless())
    for law in contract(method):
        law(method)
    assert not set(laws.SIDECAR_LAWS) & set(contract(merge_method(family="toys", cite="-")(method.combine)))


def test_other_sizes_than_declared():
    def parts(shape: tuple[int, ...]) -> dict[str, Part]:
        return {"rest": Part((shape[0] + 1,))}

    fails(
        laws.stores_what_it_declares, toy(parts, encode_rest, decode_rest), r"rest: \[\d+\] instead of the declared \["
    )

    def parts_of_blocks(shape: tuple[int, ...]) -> dict[str, Part]:
        return {"rest": Part(shape), "count": Part((1,), "float32")}

    def encode(models: list[Tensor], merged: Tensor) -> dict[str, list[Tensor]]:
        return {"rest": [model - merged for model in models], "count": [torch.ones(1) for _ in models]}

    # one number for each block, and nobody knows how many there are
    method = toy(parts_of_blocks, encode, decode_rest)
    laws.stores_what_it_declares(method)
    fails(laws.stores_the_same_again, method, "blocks change what is stored")


def test_results_that_change():
    def encode(models: list[Tensor], merged: Tensor) -> dict[str, list[Tensor]]:
        return {"rest": [model - merged + torch.rand(()) for model in models]}

    fails(laws.stores_the_same_again, toy(whole, encode, decode_rest), "two results of the same inputs")


def test_results_that_depend_on_blocks():
    def encode(models: list[Tensor], merged: Tensor) -> dict[str, list[Tensor]]:
        return {"rest": [(model - merged) / (model - merged).norm() for model in models]}

    fails(laws.stores_the_same_again, toy(whole, encode, decode_rest), "blocks change what is stored")

    def decode(merged: Tensor, rest: Tensor) -> Tensor:
        return merged + rest - rest.mean()

    fails(laws.stores_the_same_again, toy(whole, encode_rest, decode), "blocks change what is restored")


def test_writing_to_inputs():
    def encode(models: list[Tensor], merged: Tensor) -> dict[str, list[Tensor]]:
        return {"rest": [model.sub_(merged) for model in models]}

    fails(laws.stores_the_same_again, toy(whole, encode, decode_rest), "two results|writes to its inputs")


def test_division_by_zero():
    def encode(base: Tensor, models: list[Tensor], merged: Tensor) -> dict[str, list[Tensor]]:
        return {"rest": [(model - merged) / (model - base) for model in models]}

    def decode(base: Tensor, merged: Tensor, rest: Tensor) -> Tensor:
        return merged + rest

    fails(laws.restores_finite_numbers, toy(whole, encode, decode), "numbers that are not finite, on zeros")


def test_another_shape():
    def decode(merged: Tensor, rest: Tensor) -> Tensor:
        return (merged + rest)[:1].expand(merged.shape) * 1.5

    fails(laws.restores_the_base, toy(whole, encode_rest, decode), "models equal to the base do not come back")


def test_signs_of_no_change():
    def parts(shape: tuple[int, ...]) -> dict[str, Part]:
        return {"sign": packed(shape[0])}

    def encode(base: Tensor, models: list[Tensor]) -> dict[str, list[Tensor]]:
        return {"sign": [pack_flags(delta >= 0) for delta in deltas(base, models)]}

    def decode(base: Tensor, sign: Tensor) -> Tensor:
        return base + torch.where(unpack_flags(sign, base.numel()), 0.1, -0.1)

    method = toy(parts, encode, decode, lossless=Lossless())
    laws.stores_what_it_declares(method)
    fails(laws.restores_the_base, method, "models equal to the base do not come back")
    fails(laws.restores_without_loss, method, r"\{\} loses \d")


def test_what_is_lost_though_nothing_should_be():
    def encode(models: list[Tensor], merged: Tensor) -> dict[str, list[Tensor]]:
        return {"rest": [(model - merged) * 0.99999 for model in models]}

    fails(laws.restores_without_loss, toy(whole, encode, decode_rest, lossless=Lossless()), "loses")
    laws.restores_without_loss(toy(whole, encode, decode_rest, lossless=Lossless(tolerance=1e-4)))
    laws.restores_without_loss(toy(whole, encode, decode_rest))


def test_contradictions():
    def without_base(models: list[Tensor]) -> Tensor:
        """Do."""
        return models[0]

    given = {"family": "toys", "cite": "-"}
    with pytest.raises(TypeError, match="without_base: a method with a sidecar needs `base: Tensor`"):
        merge_method(**given, sidecar=Sidecar(whole, encode_rest, decode_rest))(without_base)
    with pytest.raises(TypeError, match="needs the parameters `others: Kept` and `embeddings: Embeddings`"):
        toy(whole, encode_rest, decode_rest, matrices=True)

    def encode(
        models: list[Tensor], merged: Tensor, *, others: Kept = "own", embeddings: Embeddings = "others"
    ) -> dict[str, list[Tensor]]:
        return encode_rest(models, merged)

    with pytest.raises(TypeError, match="a sidecar of scope 'matrix' treats matrices alone: matrices=True"):
        toy(whole, encode, decode_rest, scope="matrix")
    with pytest.raises(
        TypeError, match="statistics of a sidecar are sums over tensors or the model, neither over rows"
    ):
        toy(whole, encode_rest, decode_rest, statistics={"top": statistic(lambda: None, lambda: None, over="row")})
    with pytest.raises(TypeError, match="nor the largest"):
        toy(whole, encode_rest, decode_rest, statistics={"top": statistic(lambda: None, lambda: None, largest=True)})
    method = toy(whole, encode, decode_rest, scope="matrix", matrices=True)
    assert list(method.parameters) == ["others", "embeddings", "keep"]
    assert "the task's own" in method.parameters["others"].help
    for law in laws.SIDECAR_LAWS:
        law(method)
