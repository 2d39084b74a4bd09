"""Alignment of tokens, vocabularies and answers, against references that try everything."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merganser.distillation.alignment.answers import Reading, answer_groups, spoken_alone
from merganser.distillation.alignment.chunks import chunks
from merganser.distillation.alignment.edit_distance import Nearest, edit_distances
from merganser.distillation.alignment.groups import byte_groups
from merganser.distillation.alignment.pairing import PairCounts, lesson_by_pairs
from merganser.distillation.alignment.tables import byte_table, edit_table
from merganser.distillation.alignment.transfer import Predictions, lesson_by_bytes, lesson_by_warping
from merganser.distillation.alignment.warping import partners, warp
from merganser.distillation.vocabulary import Vocabulary
from tests.reference import fusion as reference


def divide(text: bytes, cuts: set[int]) -> list[bytes]:
    edges = [0, *sorted(cut for cut in cuts if 0 < cut < len(text)), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def ends_of(tokens: Sequence[bytes]) -> np.ndarray:
    return np.cumsum([len(token) for token in tokens], dtype=np.int64)


def reading(
    tokens: Sequence[bytes], counted: Sequence[bool] | None = None, ids: Sequence[int] | None = None
) -> Reading:
    n = len(tokens)
    return Reading(
        np.array(range(n) if ids is None else ids, np.int64),
        ends_of(tokens),
        np.array([True] * n if counted is None else counted, np.bool_),
        b"".join(tokens),
    )


# a machine that does much else is slow to make examples
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])

cuts = st.sets(st.integers(1, 30))
texts = st.binary(min_size=1, max_size=30)


@quick
@given(texts, cuts, cuts)
def test_groups_are_the_finest_and_cover_every_byte(text: bytes, one: set[int], other: set[int]) -> None:
    own, others = divide(text, one), divide(text, other)
    found = byte_groups(ends_of(own), ends_of(others))
    pieces = [
        (b"".join(own[a:b]), b"".join(others[c:d]))
        for a, b, c, d in zip(found.starts, found.stops, found.other_starts, found.other_stops, strict=True)
    ]
    assert pieces == reference.groups(own, others)
    assert b"".join(piece for piece, _ in pieces) == b"".join(piece for _, piece in pieces) == text


@quick
@given(texts, cuts)
def test_groups_of_one_division_are_its_tokens(text: bytes, cut: set[int]) -> None:
    ends = ends_of(divide(text, cut))
    found = byte_groups(ends, ends)
    assert found.ends.tolist() == ends.tolist()
    assert found.starts.tolist() == found.other_starts.tolist() == list(range(len(ends)))


def test_tokens_without_bytes_are_in_no_group() -> None:
    found = byte_groups([0, 3, 3, 5, 5], [2, 3, 5])
    assert found.starts.tolist() == [1, 3]
    assert found.stops.tolist() == [2, 4]
    assert found.other_starts.tolist() == [0, 2]
    assert len(byte_groups([], [1])) == 0
    # what one side has more is in no group
    assert byte_groups([2, 4], [2, 3, 7]).ends.tolist() == [2]
    with pytest.raises(ValueError, match="must not decrease"):
        byte_groups([2, 1], [2])


letters = st.binary(max_size=9).map(lambda own: bytes(byte % 3 + 97 for byte in own))


@quick
@given(letters, st.lists(letters, min_size=1, max_size=6))
def test_edit_distances(pattern: bytes, others: list[bytes]) -> None:
    for other in others:
        table = np.frombuffer(other, np.uint8).reshape(1, -1)
        assert edit_distances(pattern, table)[0] == reference.edit_distance(pattern, other)


@pytest.mark.parametrize("size", [63, 64, 65, 90])
def test_edit_distances_at_the_width_of_a_word(size: int) -> None:
    draw = random.Random(size)
    pattern = bytes(draw.choices(b"ab", k=size))
    others = [bytes(draw.choices(b"ab", k=70)) for _ in range(3)]
    found = edit_distances(pattern, np.frombuffer(b"".join(others), np.uint8).reshape(3, 70))
    assert found.tolist() == [reference.edit_distance(pattern, other) for other in others]


@quick
@given(letters.filter(len), st.lists(letters, min_size=1, max_size=8))
def test_nearest_is_the_first_minimum(token: bytes, tokens: list[bytes]) -> None:
    distances = [(reference.edit_distance(token, own), i) for i, own in enumerate(tokens) if own]
    assert Nearest(tokens).find(token) == (min(distances)[1] if distances else -1)


@quick
@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=5))
def test_warping_is_the_cheapest_path(costs: list[list[int]]) -> None:
    path = warp(np.array(costs, np.float64))
    assert path[0] == (0, 0)
    assert path[-1] == (len(costs) - 1, 2)
    for (a, b), (c, d) in pairwise(path):
        assert (c - a, d - b) in [(1, 1), (1, 0), (0, 1)]
    assert sum(costs[i][j] for i, j in path) == reference.cheapest_path([[*map(float, row)] for row in costs])


def test_partners() -> None:
    assert partners([b"a", b" cat"], [b"a", b"cat"]) == [(0,), (1,)]
    assert partners([b"utter", b" ly"], [b"utter", b"l", b"y"]) == [(0,), (1, 2)]
    assert partners([], [b"x"]) == []
    assert partners([b"x"], []) == [()]


SOURCE = Vocabulary((b"", b"a", b"ab", b"abc", b"zz", None, b"a", b""), {"<s>": 0, "</s>": 7}, {"bos": 0, "eos": 7})
TARGET = Vocabulary((b"a", b"ab", b"b", b"", b"", b"z", b"a"), {"<s>": 3, "<end>": 4}, {"eos": 4})


def test_tables() -> None:
    assert byte_table(SOURCE, TARGET).tolist() == [3, 0, 1, 1, 5, -1, 6, 4]
    # two edits lead from "zz" to "a" and to "ab", one to "z"; one from "abc" to "ab"
    told: list[tuple[int, int]] = []
    assert edit_table(SOURCE, TARGET, lambda *own: told.append(own)).tolist() == [3, 0, 1, 1, 5, -1, 6, 4]
    assert told == [(1, 2), (2, 2)]
    assert edit_table(Vocabulary((b"bz",)), TARGET).tolist() == [2]
    assert byte_table(Vocabulary((b"x",)), TARGET).tolist() == [-1]
    for table in (byte_table, edit_table):
        assert table(SOURCE, SOURCE).tolist() == list(range(8))


@quick
@given(st.lists(st.one_of(st.none(), st.binary(max_size=5)), max_size=9))
def test_a_stored_vocabulary_comes_back(tokens: list[bytes | None]) -> None:
    special = {f"<{i}>": i for i, token in enumerate(tokens) if token == b""}
    own = Vocabulary(tuple(tokens), special, {})
    arrays = own.to_arrays()
    assert Vocabulary.from_arrays(arrays, special, {}) == own
    with pytest.raises(ValueError, match="do not fit each other"):
        Vocabulary.from_arrays({**arrays, "ends": np.append(arrays["ends"], 99)}, special, {})


def predictions(n: int, k: int, vocabulary: int, seed: int = 0) -> Predictions:
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(n, vocabulary))
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logs, axis=1)[:, :k]
    top = np.take_along_axis(logs, ids, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = np.log(np.maximum(1 - np.exp(top).sum(1), 0)) if k < vocabulary else np.full(n, -np.inf)
    return Predictions(ids.astype(np.int32), top.astype(np.float32), rest.astype(np.float32))


def test_one_tokenizer_is_the_identity() -> None:
    own = reading([b"", b"ab", b"c", b"", b"d"])
    said = predictions(5, 3, 5)
    found = lesson_by_bytes(own, own, said, np.arange(5), same=True)
    assert found.positions.tolist() == [0, 1, 2, 3]
    for name in ("ids", "log_probabilities", "rest"):
        assert (getattr(found, name) == getattr(said, name)[:4]).all()


@quick
@given(texts, cuts, cuts, st.integers(0, 99))
def test_no_probability_is_lost(text: bytes, one: set[int], other: set[int], seed: int) -> None:
    student, source = reading([b"", *divide(text, one)]), reading([b"", *divide(text, other)])
    said = predictions(len(source.ids), 4, 8, seed)
    table = np.random.default_rng(seed).integers(-1, 3, size=8)
    found = lesson_by_bytes(student, source, said, table, same=False)
    sums = np.exp(found.log_probabilities.astype(np.float64)).sum(1) + np.exp(found.rest.astype(np.float64))
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    for row in found.ids.tolist():
        known = [own for own in row if own >= 0]
        assert known == sorted(set(known))
        assert row == known + [-1] * (4 - len(known))
    # what is taught at a position is what the source says at the same byte
    for number, position in enumerate(found.positions.tolist()):
        place = source.ends.tolist().index(student.ends[position])
        probabilities = np.exp(said.log_probabilities[place].astype(np.float64))
        for token, log_probability in zip(found.ids[number], found.log_probabilities[number], strict=True):
            if token >= 0:
                expected = probabilities[table[said.ids[place]] == token].sum()
                np.testing.assert_allclose(np.exp(log_probability), expected, rtol=1e-5)
    starts = {0, *ends_of(divide(text, one))[:-1].tolist()} & {0, *ends_of(divide(text, other))[:-1].tolist()}
    everything = (table[said.ids] >= 0).any(1)
    wanted = [b for b in sorted(starts) if everything[source.ends.tolist().index(b)]]
    assert student.ends[found.positions].tolist() == wanted


def test_answers_are_aligned_apart_from_templates() -> None:
    # <user> q \n <assistant> the answer <end> \n, and the same in another template, with a space before the answer
    student = reading(
        [b"", b"q", b"\n", b"", b"the", b" ans", b"wer", b"", b"\n"],
        [False] * 4 + [True] * 5,
        [0, 1, 2, 0, 3, 4, 5, 9, 2],
    )
    source = reading(
        [b"User: ", b"q", b" Bot:", b" the", b" answer", b""], [False] * 3 + [True] * 3, [0, 1, 2, 3, 4, 7]
    )
    assert student.answers() == source.answers() == (b"the answer",)
    table = np.full(8, 9)
    found = lesson_by_bytes(student, source, predictions(6, 2, 8), table, same=False)
    # behind "the", and at the end of the answer, where both end their turn; but not behind the marker of the turn, where the
    # source says what follows a space, and the student's text has none
    assert found.positions.tolist() == [4, 6]
    spaced = reading([b"", b" the", b" answer"], [False, True, True])
    assert lesson_by_bytes(spaced, source, predictions(6, 2, 8), table, same=False).positions.tolist() == [0, 1]
    # the answers differ after their first word
    other = reading([b"Bot:", b" the", b" ant"], [False, True, True])
    ((own, others, groups, alike),) = answer_groups(student, other)
    assert (own, others, groups.ends.tolist(), alike) == (4, 1, [3], False)
    assert not [*answer_groups(student, reading([b"x"], [False]))]


def test_what_one_template_writes_before_an_answer_is_not_part_of_it() -> None:
    """Templates of models that reason write an empty block of thoughts, others do not."""
    student = reading([b"Q", b"", b"it", b" sat", b"", b"\n"], [False, False, True, True, True, True])
    tokens = [b"[Q]", b"<think>", b"\n\n", b"</think>", b"\n\n", b"it", b" s", b"at", b""]
    source = reading(tokens, [False] + [True] * 8)
    found = spoken_alone(source, student)
    assert found.counted.tolist() == [False] * 5 + [True] * 4
    assert found.answers() == student.answers() == (b"it sat",)
    assert spoken_alone(student, source).counted.tolist() == student.counted.tolist()
    # what the source says behind the block is of the first token of the answer; and the same the other way round
    n = len(tokens)
    said = Predictions(np.arange(n)[:, None].astype(np.int32), np.zeros((n, 1), np.float32), np.zeros(n, np.float32))
    lesson = lesson_by_bytes(student, found, said, np.arange(n), same=False)
    assert (lesson.positions.tolist(), lesson.ids[:, 0].tolist()) == ([1, 2], [4, 5])
    n = len(student.ids)
    said = Predictions(np.arange(n)[:, None].astype(np.int32), np.zeros((n, 1), np.float32), np.zeros(n, np.float32))
    lesson = lesson_by_bytes(found, spoken_alone(student, source), said, np.arange(n), same=False)
    assert (lesson.positions.tolist(), lesson.ids[:, 0].tolist()) == ([4, 5], [1, 2])
    # a token that is of both stays, so that the answers differ, and so do other answers, and another number of them
    mixed = reading([b"[Q]", b"<think>", b"</think>it", b" sat"], [False, True, True, True])
    assert spoken_alone(mixed, student).answers() == (b"</think>it sat",)
    for other in (reading([b"it stood"]), reading([b"it", b"|", b"sat"], [True, False, True])):
        assert spoken_alone(source, other).counted.tolist() == source.counted.tolist()


def test_warping_teaches_behind_equal_tokens() -> None:
    # the source's 1, 2, 3 are the student's 4, 5, 6; its 0 and 4 are both the student's 8
    table = np.array([8, 4, 5, 6, 8])
    student = reading([b"a", b" cat", b"sat"], ids=[4, 5, 6])
    source = reading([b"a", b"cat", b"sat"], ids=[1, 2, 3])
    said = predictions(3, 3, 5, seed=3)
    found = lesson_by_warping(student, source, said, table, ([b"a", b" cat", b"sat"], [b"a", b"cat", b"sat"]))
    # nothing follows the last token
    assert found.positions.tolist() == [0, 1]
    np.testing.assert_allclose(np.exp(found.log_probabilities).sum(1), 1, rtol=1e-6)
    assert (found.rest == -np.inf).all()
    for row, place in zip(found.ids, (0, 1), strict=True):
        mapped = table[said.ids[place]].tolist()
        assert row.tolist() == [own if own not in mapped[:i] else -1 for i, own in enumerate(mapped)]
    unequal = reading([b"a", b"cat", b"sat"], ids=[1, 3, 3])
    again = lesson_by_warping(student, unequal, said, table, ([b"a", b" cat", b"sat"], [b"a", b"cat", b"sat"]))
    assert again.positions.tolist() == [0]


def counted(*pairs: tuple[list[int], list[int], list[bytes], list[bytes]]) -> PairCounts:
    found = PairCounts()
    for own, others, tokens, other_tokens in pairs:
        found.add(reading(tokens, ids=own), reading(other_tokens, ids=others), (tokens, other_tokens))
    return found


def test_tokens_are_paired_by_statistics() -> None:
    student = Vocabulary((b"go", b"ing", b"going", b"c", b"d", b"ne"))
    source = Vocabulary((b"go", b"goi", b"ng", b"c", b"xyz", b"gone"))
    counts = counted(
        # "going" is "goi" and "ng"; once "go" and "ing" are, so that "goi" is paired with "going" more often
        ([2], [1, 2], [b"going"], [b"goi", b"ng"]),
        ([2], [1, 2], [b"going"], [b"goi", b"ng"]),
        ([0, 1], [1, 2], [b"go", b"ing"], [b"goi", b"ng"]),
        ([0, 5], [5], [b"go", b"ne"], [b"gone"]),
    )
    assert [counts.of(2, 1), counts.of(2, 2), counts.of(0, 1), counts.of(1, 2), counts.of(3, 1)] == [2, 2, 1, 1, 0]
    # the same bytes first; "gone" is paired with "go" and "ne" once each, and "go" has the lower number; never: none
    assert counts.table(source, student).tolist() == [0, 2, 2, 3, -1, 0]


def test_statistics_teach_as_in_the_reference() -> None:
    vocabulary = (b"go", b"ing", b"going", b"c", b"d", b" ", b"")
    others = (b"go", b"goi", b"ng", b"c", b"d c", b" ", b"")
    for seed, (own, theirs) in enumerate(
        (
            ([2, 3, 4], [1, 2, 3, 4]),
            ([6, 0, 3, 4, 3], [6, 0, 3, 4]),
            ([0, 1, 3, 4, 3], [1, 2, 3, 4]),
            ([2, 5, 3, 4], [0, 5, 3, 4]),
        )
    ):
        tokens, other_tokens = [vocabulary[i] for i in own], [others[i] for i in theirs]
        student, source = reading(tokens, ids=own), reading(other_tokens, ids=theirs)
        said = predictions(len(theirs), 4, 7, seed)
        counts = counted((own, theirs, tokens, other_tokens), ([2], [1, 2], [b"going"], [b"goi", b"ng"]))
        table = np.array([0, 0, 2, 3, -1, 5, 6])
        found = lesson_by_pairs(student, source, said, table, (tokens, other_tokens), counts)
        pairs = partners(tokens, other_tokens, contained=0.1)
        probabilities = np.exp(said.log_probabilities.astype(np.float64)).tolist()
        expected = reference.taught_by_pairs(
            own, theirs, tokens, other_tokens, pairs, said.ids.tolist(), probabilities, table.tolist(), counts.of
        )
        assert found.positions.tolist() == [*expected]
        assert (found.rest == -np.inf).all()
        for ids, logs, wanted in zip(found.ids.tolist(), found.log_probabilities, expected.values(), strict=True):
            known = {i: p for i, p in zip(ids, np.exp(logs).tolist(), strict=True) if i >= 0}
            assert known == pytest.approx(wanted, rel=1e-5)


def test_the_cost_of_a_token_within_another() -> None:
    # one edit either way without the factor; with it "ab" goes to the token that holds it
    assert partners([b"ab", b"abcdef"], [b"xb", b"abcdef"]) == [(0,), (1,)]
    assert partners([b"ab", b"zz"], [b"abcd", b"zz"], contained=0.1) == [(0,), (1,)]


@quick
@given(texts, cuts, cuts, st.booleans())
def test_chunks_hold_the_likelihood_of_their_bytes(
    text: bytes, one: set[int], other: set[int], at_spaces: bool
) -> None:
    own, others = divide(text, one), divide(text, other)
    spoken = np.random.default_rng(len(text)).normal(size=len(others) + 1).astype(np.float32)
    found = chunks(reading([b"", *own]), reading([b"", *others]), spoken, at_spaces=at_spaces)
    pieces: dict[int, bytes] = {}
    for token, number in zip([b"", *own], found.numbers.tolist(), strict=True):
        if number >= 0:
            pieces[number] = pieces.get(number, b"") + token
    assert [*pieces] == list(range(len(found.log_probabilities)))
    ends = np.cumsum([len(piece) for piece in pieces.values()])
    assert b"".join(pieces.values()) == text
    edges, sides = [0, *ends.tolist()], ends_of(others).tolist()
    for number, (a, b) in enumerate(pairwise(edges)):
        inside = [spoken[i + 1] for i, end in enumerate(sides) if a < end <= b]
        np.testing.assert_allclose(found.log_probabilities[number], np.sum(inside, dtype=np.float64), rtol=1e-5)
    if at_spaces:
        assert all(text[end : end + 1] in (b" ", b"") for end in ends.tolist())
    else:
        assert [*pieces.values()] == [piece for piece, _ in reference.groups(own, others)]


def test_a_chunk_with_the_first_token_of_a_sequence_is_left_out() -> None:
    found = chunks(reading([b"ab", b"c", b"d"]), reading([b"a", b"b", b"cd"]), np.array([0.0, -1.0, -2.0], np.float32))
    assert found.numbers.tolist() == [-1, 0, 0]
    assert found.log_probabilities.tolist() == [-2.0]
    # no word begins with enough probability before the end, so that all else is one chunk
    words = np.log(np.array([0.01, 0.01, 0.01, 0.02], np.float32))
    spoken = np.array([0.0, -1.0, -2.0, -4.0], np.float32)
    found = chunks(reading([b"a", b"b", b"cd"]), reading([b"a", b"b", b"c", b"d"]), spoken, words=words)
    assert found.numbers.tolist() == [-1, 0, 0]
    assert found.ends is not None
    assert found.ends.tolist() == [2]
    np.testing.assert_allclose(found.log_probabilities, [-7.0 + np.log(0.02)], rtol=1e-6)


@quick
@given(texts, cuts, cuts, st.sampled_from([0.0, 0.3, 1.0]))
def test_debiased_chunks_are_those_of_the_authors(
    text: bytes, one: set[int], other: set[int], threshold: float
) -> None:
    own, others = divide(text, one), divide(text, other)
    draw = np.random.default_rng(len(text))
    spoken = draw.normal(-2, 0.5, len(others) + 1).astype(np.float32)
    words = np.log(draw.uniform(0.01, 0.99, len(others) + 1)).astype(np.float32)
    student, source = reading([b"", *own]), reading([b"", *others])
    found = chunks(student, source, spoken, words=words, threshold=threshold)
    assert found.ends is not None
    edges = np.cumsum([0, *(len(piece) for piece, _ in reference.groups(own, others))]).tolist()
    pieces = [
        tuple([i for i, end in enumerate(side.ends.tolist()) if i and a < end <= b] for side in (student, source))
        for a, b in pairwise(edges)
    ]
    mine = draw.normal(-2, 0.5, len(own) + 1).tolist()
    mine_words = draw.normal(-2, 0.5, len(own) + 1).tolist()
    expected = reference.debiased_chunks(pieces, mine, spoken.tolist(), mine_words, words.tolist(), threshold)
    np.testing.assert_allclose(found.log_probabilities, [heard for _, heard in expected], rtol=1e-5)
    sums = [sum(mine[i] for i in np.flatnonzero(found.numbers == chunk)) for chunk in range(len(expected))]
    both = [total + mine_words[end] for total, end in zip(sums, found.ends.tolist(), strict=True)]
    np.testing.assert_allclose(both, [said for said, _ in expected], rtol=1e-5)
    if threshold == 1.0 and text:
        assert len(expected) == 1


def test_which_tokens_begin_words() -> None:
    tokens = (b"", b" the", b"the", b"\n", b"\tx", None, b" ", b"")
    own = Vocabulary(tokens, {"<s>": 0}, {})
    assert own.begin_words(10).tolist() == [True, True, False, True, True, False, True, False, False, False]
    assert own.begin_words(2).tolist() == [True, True]
