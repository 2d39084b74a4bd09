"""Dynamic tokens of a batch against a literal transcription, and what a model reads."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from merganser.errors import ParameterError
from merganser.runtime import embed_groups, merge_words
from tests.reference import dynamic_bpe


@pytest.mark.parametrize("merges", [0, 1, 7, 40, 1000])
def test_groups(merges: int) -> None:
    draw = random.Random(merges)
    # few letters, so that pairs overlap themselves and each other
    words = [tuple(draw.choices([3, 4, 5], k=draw.randint(1, 7))) for _ in range(60)]
    sequences = [words[:20], words[20:45], words[45:]]
    ids = [[number for word in own for number in word] for own in sequences]
    numbers = [[place for place, word in enumerate(own) for _ in word] for own in sequences]
    expected = dynamic_bpe.merged(dict(Counter(words)), merges, 6)
    found = merge_words(ids, numbers, merges)
    assert found == [[group for word in own for group in expected[word]] for own in sequences]
    if merges == 1000:
        assert found == sequences


def test_tokens_without_a_word_stay_alone() -> None:
    assert merge_words([[1, 7, 8, 7, 8, 2]], [[None, 0, 0, 1, 1, None]], 5) == [[(1,), (7, 8), (7, 8), (2,)]]
    assert merge_words([[7, 8, 7, 8]], [[None, None, 0, 0]], 5) == [[(7,), (8,), (7, 8)]]
    assert merge_words([[7, 8, 7, 8]], [[0, 0, 1, 1]], 5, least=3) == [[(7,), (8,), (7,), (8,)]]
    assert merge_words([], [], 3) == []


def test_inputs_of_a_model() -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config).eval()
    embedding = model.get_input_embeddings()
    groups = [[(1,), (5, 6, 6), (7,)], [(8, 9)]]
    right = embed_groups(groups, embedding)
    rows = embedding.weight
    torch.testing.assert_close(right["inputs_embeds"][0, 1], (rows[5] + 2 * rows[6]) / 3)
    torch.testing.assert_close(right["inputs_embeds"][1, 0], (rows[8] + rows[9]) / 2)
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert not right["inputs_embeds"][1, 1:].any()
    left = embed_groups(groups, embedding, side="left")
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    torch.testing.assert_close(left["inputs_embeds"][1, 2], right["inputs_embeds"][1, 0])
    single = embed_groups([[(token,) for token in (1, 5, 6)]], embedding)
    with torch.no_grad():
        assert torch.equal(model(**single).logits, model(torch.tensor([[1, 5, 6]])).logits)
        assert model(**right).logits.shape == (2, 3, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merge_words([[1]], [[0]], -1), "merges -1"),
        (lambda: merge_words([[1]], [[0]], 1, least=0), "least 0"),
        (lambda: merge_words([[1, 2]], [[0]], 1), "ids and words must have equal lengths"),
        (lambda: merge_words([[1, 2]], [], 1), "ids and words must have equal lengths"),
        (lambda: embed_groups([[()]], torch.nn.Embedding(4, 2)), "a group has no tokens"),
        (lambda: embed_groups([[(1,)]], torch.nn.Embedding(4, 2), side="up"), "side 'up' is not known"),
    ],
)
def test_refused(call, message) -> None:
    with pytest.raises(ParameterError, match=message):
        call()
