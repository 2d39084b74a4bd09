"""Multiple choice: every log-likelihood against a literal calculation, and with the context kept or not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merganser.errors import TaskError
from merganser.evaluation import evaluate
from merganser.evaluation.scoring import choices
from merganser.evaluation.scoring.choices import encode, keeps_keys, right, score
from merganser.evaluation.scoring.tasks import ChoiceTask, Question
from merganser.inference.language_model import Tokenizer, open_model
from merganser.inference.sources import open_source
from tests.evaluation.tiny import VOCABULARY, add_tokenizer, literal_choice, text

CHOICES = [" cat", " on a mat", " größere Häuser and then it was", "; café", " x = 1"]


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    made = []
    for i in range(count):
        picked = draw.sample(CHOICES, draw.randint(2, 4))
        context = text(seed * 1000 + i, draw.randint(1, 9)).strip()
        made.append({"context": context, "choices": picked, "gold": draw.randrange(len(picked))})
    return made


def write(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in made), encoding="utf-8")
    return path


@pytest.mark.parametrize("model", ["base", "bos"])
def test_item_by_item(zoo: Path, tmp_path: Path, model: str) -> None:
    made = questions(12)
    found = evaluate([zoo / model], [write(tmp_path / "quiz.jsonl", made)], dtype="float32", batch_tokens=200)
    items = found.items(model, "quiz")
    right_plain, right_normal = [], []
    for question, nats in zip(made, items["loglikelihood"], strict=True):
        expected = [literal_choice(zoo / model, question["context"], choice) for choice in question["choices"]]
        assert nats == pytest.approx(expected, abs=2e-4)
        lengths = [len(choice.strip().encode()) for choice in question["choices"]]
        right_plain.append(np.argmax(expected) == question["gold"])
        right_normal.append(np.argmax(np.array(expected) / lengths) == question["gold"])
    assert items["correct"].tolist() == right_plain
    assert items["correct_norm"].tolist() == right_normal
    assert right_plain != right_normal
    assert found.metric(model, "quiz").value == pytest.approx(np.mean(right_plain))
    assert found.metric(model, "quiz", "accuracy_norm").value == pytest.approx(np.mean(right_normal))


def tokenizer_of(folder: Path) -> Tokenizer:
    return open_model(open_source(folder, None)).tokenizer  # type: ignore[arg-type]


def task(*made: Question) -> ChoiceTask:
    return ChoiceTask("quiz", "quiz.jsonl", "", made)


def question(context: str, *texts: str) -> Question:
    return Question(context, texts, 0, "quiz.jsonl:7")


ARCHITECTURES = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "sliding": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 8}),
    "absolute": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "alibi": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "mixed": ("Gemma2Config", {"num_key_value_heads": 2, "sliding_window": 8, "head_dim": 8}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")
def test_keeping_the_context_changes_nothing(zoo: Path, name: str) -> None:
    import transformers

    kind, more = ARCHITECTURES[name]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, kind)(vocab_size=VOCABULARY, initializer_range=0.4, **sizes | more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert keeps_keys(model)
    made = [Question(q["context"], tuple(q["choices"]), q["gold"], "") for q in questions(9, seed=4)]
    encoded = encode(task(*made), tokenizer_of(zoo / "base"), 64)
    assert len({len(each.context) for each in encoded}) > 3
    kept = choices._with_cache(model, encoded)
    whole = choices._without_cache(model, encoded)
    assert len({value for values in whole for value in values}) > 20
    for one, other in zip(kept, whole, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_models_with_a_state_get_each_choice_with_its_context(zoo: Path, tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2))
    model.save_pretrained(tmp_path / "mamba")
    add_tokenizer(tmp_path / "mamba")
    assert not keeps_keys(model)
    made = questions(2)
    found = evaluate([tmp_path / "mamba"], [write(tmp_path / "quiz.jsonl", made)], dtype="float32")
    nats = found.items("mamba", "quiz")["loglikelihood"]
    for each, values in zip(made, nats, strict=True):
        expected = [literal_choice(tmp_path / "mamba", each["context"], choice) for choice in each["choices"]]
        assert values == pytest.approx(expected, abs=2e-4)


def test_long_contexts_lose_their_begin(zoo: Path) -> None:
    tokenizer = tokenizer_of(zoo / "bos")
    long = question(text(3, 100).strip(), " cat", " on a mat")
    [encoded] = encode(task(long), tokenizer, 20)
    whole = tokenizer.ids(long.context)
    assert len(encoded.context) + encoded.longest - 1 == 20
    # the token that begins every text stays
    assert encoded.context == (0, *whole[len(whole) - len(encoded.context) + 1 :])


def test_long_choices_are_refused(zoo: Path, tmp_path: Path) -> None:
    made = [*questions(2), {"context": "the", "choices": [" cat", " " + text(3, 100)], "gold": 0}]
    path = write(tmp_path / "quiz.jsonl", made)
    with pytest.raises(TaskError, match=r"quiz\.jsonl:3: the longest choice has \d+ tokens, more than .*\(64 with"):
        evaluate([zoo / "base"], [path])


def test_white_space_belongs_to_the_choice(zoo: Path) -> None:
    tokenizer = tokenizer_of(zoo / "base")
    inside, outside = encode(task(question("the cat ", "sat", "on"), question("the cat", " sat", " on")), tokenizer, 64)
    assert inside.context == outside.context
    assert inside.choices == outside.choices
    assert inside.nbytes == outside.nbytes == (3, 2)


def test_letters_that_the_tokenizer_joins(zoo: Path) -> None:
    tokenizer = tokenizer_of(zoo / "base")
    # " cat" is one token, so the context does not begin like the whole
    [joined] = encode(task(question("the c", "at", "x")), tokenizer, 64)
    assert joined.context == tuple(tokenizer.ids("the c"))
    assert joined.choices[0] == tuple(tokenizer.ids("at"))
    [longer] = encode(task(question("the c", "at sat on a mat", "x")), tokenizer, 64)
    assert longer.choices[0] == tuple(tokenizer.ids("at sat on a mat"))


def test_empty_context(zoo: Path) -> None:
    for name in ("base", "bos"):
        [encoded] = encode(task(question("", "cat", "mat")), tokenizer_of(zoo / name), 64)
        assert encoded.context == (0,)
    bare = Tokenizer(tokenizer_of(zoo / "base").encoder, (), None, "")
    with pytest.raises(TaskError, match=r"quiz\.jsonl:7: the context is empty"):
        encode(task(question("", "cat", "mat")), bare, 64)


def test_of_equally_likely_choices_the_first_counts() -> None:
    rows = {"gold": [0, 1], "loglikelihood": [[-1.0, -1.0], [-1.0, -1.0]], "bytes": [[2, 4], [2, 4]]}
    found = right(rows)
    assert found["correct"].tolist() == [1, 0]
    assert found["correct_norm"].tolist() == [0, 1]


def test_score_is_plain_data(zoo: Path) -> None:
    model = open_model(open_source(zoo / "base", None))  # type: ignore[arg-type]
    loaded = model.load(model.source.read(), torch.float32, torch.device("cpu"))
    found = score(loaded, encode(task(question("the cat", " sat", " on a mat")), model.tokenizer, 64))
    assert json.loads(json.dumps(found)) == found
