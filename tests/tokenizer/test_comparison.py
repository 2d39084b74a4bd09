"""Which rows of an embedding stand for the same token in two models."""

from __future__ import annotations

import pytest

from merganser.tokenizer.comparison import Comparison, compare_vocabularies, is_placeholder
from merganser.tokenizer.vocabulary import Vocabulary

WORDS = [f"w{i}" for i in range(300)]
SPECIAL = ["<s>", "</s>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]


def vocabulary(tokens: list[str | None], added: int = 0, numbered: bool = True) -> Vocabulary:
    """A vocabulary of tokens in the order of their ids, the last of which were added."""
    ids = {number: token for number, token in enumerate(tokens) if token is not None}
    return Vocabulary(ids, frozenset(range(len(tokens) - added, len(tokens))), "tokenizer.json", numbered=numbered)


def compare(first: list[str | None], second: list[str | None], rows: int = 1000, added: int = 4) -> Comparison:
    return compare_vocabularies(vocabulary(first, added), vocabulary(second, added), rows)


def test_the_same_tokens() -> None:
    found = compare([*WORDS, *SPECIAL], [*WORDS, *SPECIAL])
    assert found == Comparison(same=304)
    assert found.mergeable


def test_a_permuted_vocabulary() -> None:
    found = compare([*WORDS, *SPECIAL], [*WORDS[::-1], *SPECIAL])
    assert len(found.permuted) == 300
    assert not found.mergeable


def test_one_more_token_in_front_moves_all_behind_it() -> None:
    found = compare([*WORDS, *SPECIAL], ["new", *WORDS, *SPECIAL])
    assert len(found.permuted) == 301
    assert not found.mergeable


def test_two_special_tokens_changed_places() -> None:
    found = compare([*WORDS, *SPECIAL], [*WORDS, "</s>", "<s>", *SPECIAL[2:]])
    assert [row.id for row in found.permuted] == [300, 301]
    assert not found.mergeable


def test_reserved_tokens_that_got_a_name() -> None:
    found = compare([*WORDS, *SPECIAL], [*WORDS, *SPECIAL[:2], "<tool>", SPECIAL[3]])
    assert [(row.id, row.first, row.second) for row in found.renamed] == [(302, SPECIAL[2], "<tool>")]
    assert (found.permuted, found.replaced, found.same) == ([], [], 303)
    assert found.mergeable


def test_reserved_tokens_with_other_names() -> None:
    assert compare([*WORDS, *SPECIAL], [*WORDS, *SPECIAL[:2], "<unused0>", "[PAD]"]) == Comparison(same=302)


def test_a_special_token_with_another_name() -> None:
    found = compare([*WORDS, *SPECIAL], [*WORDS, "<|im_start|>", *SPECIAL[1:]])
    assert [row.id for row in found.renamed] == [300]
    assert found.mergeable


def test_a_token_that_both_have_at_places_the_other_keeps_free() -> None:
    # one renamed a reserved token, the other added a row
    found = compare([*WORDS, *SPECIAL[:2], "<think>", SPECIAL[3]], [*WORDS, *SPECIAL, "<think>"], added=5)
    assert ([row.id for row in found.renamed], found.only_second) == ([302], {304: "<think>"})
    assert found.mergeable


def test_tokens_that_only_one_has() -> None:
    found = compare([*WORDS, *SPECIAL], [*WORDS, *SPECIAL, "<tool>", "<|pad|>"])
    assert (found.only_first, found.only_second) == ({}, {304: "<tool>"})
    assert compare([*WORDS, *SPECIAL, "<tool>"], [*WORDS, *SPECIAL]).only_first == {304: "<tool>"}


def test_tokens_behind_the_rows_are_not_looked_at() -> None:
    assert compare([*WORDS, "a", "b"], [*WORDS, "b", "a"], rows=300) == Comparison(same=300)


@pytest.mark.parametrize(("count", "mergeable"), [(2, True), (40, False)])
def test_ordinary_tokens_that_are_others(count: int, mergeable: bool) -> None:
    found = compare([*WORDS, *SPECIAL], [*(f"x{i}" for i in range(count)), *WORDS[count:], *SPECIAL])
    assert len(found.replaced) == count
    assert found.mergeable is mergeable


def test_a_sentencepiece_file_whose_class_puts_tokens_in_front() -> None:
    pieces = vocabulary(["<unk>", "<s>", "</s>", *WORDS], numbered=False)
    assert compare_vocabularies(vocabulary(["<s>", "<pad>", "</s>", "<unk>", *WORDS]), pieces, 1000).comparable
    assert compare_vocabularies(vocabulary(["<unk>", "<s>", "</s>", *WORDS]), pieces, 1000).comparable
    assert not compare_vocabularies(vocabulary(["<unk>", "<s>", "</s>", *WORDS[::-1]]), pieces, 1000).comparable
    assert not compare_vocabularies(vocabulary([]), pieces, 1000).comparable
    assert not compare_vocabularies(vocabulary([*WORDS[:100], *map(str, range(900))]), pieces, 1000).comparable


@pytest.mark.parametrize(
    "token",
    [
        "[unused1]",
        "<|reserved_special_token_0|>",
        "<reserved_106>",
        "<unused12>",
        "[UNUSED_TOKEN_145]",
        ">>UNUSED_12<<",
        "<SPECIAL_12>",
        "[control_12]",
        "<|dummy_12|>",
        "<extra_id_0>",
        "<|placeholder1|>",
        "<|extra_0|>",
        "▁<extra_id_0>",
        "madeupword0001",
        "<pad>",
        "[PAD]",
        "<|finetune_right_pad_id|>",
        "<|PAD_TOKEN|>",
        "<|vision_pad|>",
        "<padding>",
    ],
)
def test_tokens_that_stand_for_nothing(token: str) -> None:
    assert is_placeholder(token)


@pytest.mark.parametrize(
    "token",
    [
        "reserved",
        "Ġunused",
        "pad",
        "▁padding",
        "▁reserved",
        "<think>",
        "<|im_end|>",
        "<unk>",
        "[INST]",
        "{pad",
        "<p>",
        "<|tool|>",
        "</s>",
    ],
)
def test_tokens_that_stand_for_something(token: str) -> None:
    assert not is_placeholder(token)
