"""Answers of several models, ranked and fused: what is written, what is kept, and what is refused."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merganser.distillation import blend_answers
from merganser.distillation.blending.fuser import fuser_text
from merganser.distillation.blending.generation import Sampling, Speaker, grouped
from merganser.distillation.blending.prompts import Prompt, Task, read_prompts, tokens_of
from merganser.distillation.blending.ranking import CommandRanker, RewardModel
from merganser.errors import CheckpointError, DataError, MergeError, OutputError, TaskError
from merganser.inference.language_model import open_model
from merganser.inference.stored import open_stored
from tests.cli.tiny import run
from tests.evaluation.tiny import add_tokenizer, load, make_model

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
LENGTHS = """\
import json, sys
for line in sys.stdin:
    print(json.dumps([float(len(own)) for own in json.loads(line)["answers"]]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that answer, the second one in a chat template, a reward model, and prompts."""
    found = tmp_path_factory.mktemp("blending")
    for name, seed in (("plain", 1), ("chat", 2)):
        make_model(found / name, seed, max_position_embeddings=512)
    (found / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    make_reward_model(found / "reward")
    (found / "score.py").write_text(LENGTHS)
    lines = [{"prompt": "the cat", "id": 7}, {"prompt": "größere Häuser"}, {"prompt": "x = 1"}]
    (found / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return found


def make_reward_model(folder: Path, **config: Any) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    settings = {"num_labels": 1, "pad_token_id": 1, "max_position_embeddings": 512} | config
    torch.manual_seed(5)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=320,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.4,
            **settings,
        )
    )
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def blend(folder: Path, out: Path, **changes: Any) -> tuple[Any, list[dict[str, Any]]]:
    own: dict[str, Any] = {"each": 2, "max_tokens": 4, "temperature": 1.0, "device": "cpu", **changes}
    models = own.pop("models", [str(folder / "plain"), str(folder / "chat")])
    found = blend_answers(models, own.pop("prompts", folder / "prompts.jsonl"), out, **own)
    return found, [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_answers_are_ranked_and_fused(folder: Path, tmp_path: Path) -> None:
    fuser, reward = str(folder / "chat"), str(folder / "reward")
    found, lines = blend(folder, tmp_path / "out.jsonl", ranker=reward, fuser=fuser, top=2)
    assert [line["prompt"] for line in lines] == ["the cat", "größere Häuser", "x = 1"]
    assert lines[0]["id"] == 7
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    judge = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward)

    def score(prompt: str, answer: str) -> float:
        with torch.no_grad():
            return float(judge(tokenizer(prompt, answer, return_tensors="pt")["input_ids"]).logits[0, 0])

    for line in lines:
        assert [own["model"] for own in line["answers"]] == ["plain", "plain", "chat", "chat"]
        scores = [own["score"] for own in line["answers"]]
        assert scores == pytest.approx([score(line["prompt"], own["text"]) for own in line["answers"]], abs=1e-5)
        assert line["chosen"] == scores.index(max(scores))
        best = sorted(range(4), key=lambda i: -scores[i])[:2]
        assert line["fused"]["answers"] == best
        assert line["fused"]["score"] == pytest.approx(score(line["prompt"], line["fused"]["text"]), abs=1e-5)
    means = {
        name: [own["score"] for line in lines for own in line["answers"] if own["model"] == name] for name in found.one
    }
    for name, own in means.items():
        assert found.one[name] == pytest.approx(sum(own) / 6)
        assert found.best[name] == pytest.approx(sum(max(own[i : i + 2]) for i in (0, 2, 4)) / 3)
    times = Counter(line["answers"][line["chosen"]]["model"] for line in lines)
    assert found.times == {name: times[name] for name in means}
    assert found.chosen == pytest.approx(sum(line["answers"][line["chosen"]]["score"] for line in lines) / 3)
    assert found.fused == pytest.approx(sum(line["fused"]["score"] for line in lines) / 3)
    assert found.cut == sum(not own["ended"] for line in lines for own in line["answers"])
    assert (found.prompts, found.unwritten) == (3, 0)


def test_the_likeliest_tokens_are_those_of_plain_steps(folder: Path, tmp_path: Path) -> None:
    """Each model in its own words: the chat model in its template, the other one goes on with the text."""
    _, lines = blend(folder, tmp_path / "out.jsonl", each=1, temperature=0.0)
    for name, number in (("plain", 0), ("chat", 1)):
        model, tokenizer = load(folder / name)
        text = "the cat" if name == "plain" else "[user] the cat</s>[assistant] "
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        start, ended = len(ids), False
        while len(ids) < start + 4 and not ended:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            ended = ids[-1] == 1
        said = tokenizer.decode(ids[start:], skip_special_tokens=True)
        own = lines[0]["answers"][number]
        assert own == {
            "model": name,
            "text": said.rstrip() if name == "plain" else said.strip(),
            "ended": ended,
            "score": None,
        }
    assert lines[0]["chosen"] is None
    assert lines[0]["fused"] is None


def test_draws_depend_on_the_seed_and_the_prompt_alone(folder: Path, tmp_path: Path) -> None:
    _, lines = blend(folder, tmp_path / "a.jsonl", models=[str(folder / "plain")])
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "x = 1"}) + "\n")
    _, (alone,) = blend(
        folder, tmp_path / "b.jsonl", models={"p": str(folder / "plain")}, prompts=tmp_path / "one.jsonl"
    )
    texts = [[own["text"] for own in line["answers"]] for line in (lines[2], alone)]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]
    _, (other,) = blend(
        folder, tmp_path / "c.jsonl", models=[str(folder / "plain")], prompts=tmp_path / "one.jsonl", seed=1
    )
    assert [own["text"] for own in other["answers"]] != texts[0]


def _random_model(kind: str, **settings: Any) -> Any:
    """A causal language model of transformers of that kind, with the vocabulary of the tests."""
    import transformers

    torch.manual_seed(3)
    shape = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**shape, initializer_range=0.4, **settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


# whether a prompt may be padded on the left: of absolute, rotary and other positions, windows, and a state in place of attention
PADDED: dict[str, tuple[dict[str, Any], bool]] = {
    "Llama": ({"intermediate_size": 48, "num_key_value_heads": 2}, True),
    "GPT2": ({"n_positions": 64}, True),
    "Bloom": ({}, True),
    "Mistral": ({"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 4}, True),
    "OPT": ({"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "init_std": 0.4}, True),
    "Rwkv": ({"context_length": 64, "attention_hidden_size": 32, "intermediate_size": 48}, False),
}


@pytest.mark.parametrize("kind", PADDED)
def test_batches_say_what_each_prompt_says_alone(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, padded = PADDED[kind]
    opened = open_model(open_stored(folder / "plain"))
    model = _random_model(kind, **settings)
    monkeypatch.setattr(type(opened), "load", lambda *_: model)
    speaker = Speaker(opened, torch.device("cpu"))
    assert speaker.pads is padded
    tasks = [Task(n, opened.tokenizer.ids(text)) for n, text in enumerate(("x", "größere Häuser", "the cat sat on a"))]
    for sampling in (
        Sampling(max_tokens=5, temperature=0.0),
        Sampling(each=2, max_tokens=5, temperature=1.0, top_p=0.9),
    ):
        together = speaker.answers(tasks, sampling)
        assert together == [own for task in tasks for own in speaker.answers([task], sampling)]
        assert len({own.text for each in together for own in each}) > 1


def test_a_model_for_which_padding_is_text_answers_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model(open_stored(folder / "plain"))
    speaker = Speaker(opened, torch.device("cpu"))
    original, seen = speaker._model.generate, []

    def deaf(input_ids: Any, attention_mask: Any, **more: Any) -> Any:
        seen.append(len(input_ids))
        return original(input_ids=input_ids, attention_mask=torch.ones_like(attention_mask), **more)

    monkeypatch.setattr(speaker._model, "generate", deaf)
    tasks = [Task(0, [5]), Task(1, [5, 6, 7])]
    speaker.answers(tasks, Sampling(max_tokens=2, temperature=0.0))
    assert not speaker.pads
    # the two of the trial, then each prompt by itself
    assert seen == [1, 2, 1, 1]


def test_batches(folder: Path, tmp_path: Path) -> None:
    def tasks(*lengths: int) -> list[Task]:
        return [Task(n, [0] * length) for n, length in enumerate(lengths)]

    few = Sampling(max_tokens=10, temperature=0)
    assert grouped(tasks(3, 9, 8, 1), few, None, 40) == [[1, 2], [0, 3]]
    assert grouped(tasks(3, 9, 8, 1), few, None, 1) == [[1], [2], [0], [3]]
    assert grouped(tasks(3, 9, 8, 1), few, None, 1000) == [[1, 2, 0, 3]]
    # two answers each are two rows
    assert grouped(tasks(3, 9, 8, 1), Sampling(each=2, max_tokens=10), None, 80) == [[1, 2], [0, 3]]
    # an answer that the context cuts short is no reason to cut others
    assert grouped(tasks(3, 9, 8, 1), few, 18, 1000) == [[2, 0, 3], [1]]
    batched = blend(folder, tmp_path / "a.jsonl", temperature=0.0, each=1)[1]
    assert blend(folder, tmp_path / "b.jsonl", temperature=0.0, each=1, batch_tokens=1)[1] == batched


def test_draws_have_the_probabilities_of_the_model(folder: Path) -> None:
    opened = open_model(open_stored(folder / "plain"))
    speaker = Speaker(opened, torch.device("cpu"))
    sampling = Sampling(each=4000, max_tokens=1, temperature=0.7, top_p=0.8)
    answers = speaker.answers([Task(3, [5, 6, 7])], sampling)[0]
    with torch.no_grad():
        logits = load(folder / "plain")[0](torch.tensor([[5, 6, 7]])).logits[0, -1].double() / 0.7
    probabilities, order = logits.softmax(0).sort(descending=True)
    # the likeliest tokens that reach 0.8 together
    kept = probabilities[: int((probabilities.cumsum(0) < 0.8).sum()) + 1]
    found = Counter(own.text for own in answers)
    assert sum(found.values()) == 4000
    expected: Counter[str] = Counter()
    for token, share in zip(order.tolist(), (kept / kept.sum()).tolist(), strict=False):
        expected[speaker._answer([token]).text] += share
    assert found.keys() <= expected.keys()
    for word, share in expected.items():
        assert abs(found[word] / 4000 - share) < 0.05


def test_a_model_without_numbers_is_refused(folder: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "nan", 1, max_position_embeddings=512)
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, model / "model.safetensors")
    for temperature in (0.0, 1.0):
        with pytest.raises(CheckpointError, match="nan: cannot answer: ValueError: its logits are NaN"):
            blend(folder, tmp_path / "out.jsonl", models=[str(model)], each=1, temperature=temperature)


def test_a_model_stops_where_its_files_say(folder: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", 1, max_position_embeddings=512)
    network, tokenizer = load(model)
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) < start + 4:
        with torch.no_grad():
            ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
    said = ids[start:]
    last = max(place for place, own in enumerate(said) if own not in said[:place])
    generation = json.loads((model / "generation_config.json").read_text())
    # besides the token that ends its answers, the file has what would change them
    own = {"eos_token_id": [1, said[last]], "repetition_penalty": 9.0}
    (model / "generation_config.json").write_text(json.dumps({**generation, **own}))
    (tmp_path / "p.jsonl").write_text('{"prompt": "the cat"}\n')
    more = {"models": [str(model)], "prompts": tmp_path / "p.jsonl", "each": 1, "temperature": 0}
    _, (line,) = blend(folder, tmp_path / "out.jsonl", **more)
    assert last > 0
    assert (line["answers"][0]["text"], line["answers"][0]["ended"]) == (tokenizer.decode(said[:last]).rstrip(), True)


class _Stop(BaseException):
    """As a kill: no code of ours runs after it but `finally`."""


def test_a_killed_run_continues_and_another_ranker_asks_nobody(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a batch for each prompt
    more: dict[str, Any] = {"ranker": str(folder / "reward"), "fuser": str(folder / "plain"), "batch_tokens": 1}
    whole = blend(folder, tmp_path / "whole.jsonl", **more)[1]
    original, seen = Speaker.answers, []

    def counting(self: Any, *args: Any) -> Any:
        seen.append(args[0][0].number)
        if len(seen) == 5:
            raise _Stop
        return original(self, *args)

    monkeypatch.setattr(Speaker, "answers", counting)
    with pytest.raises(_Stop):
        blend(folder, tmp_path / "cut.jsonl", **more)
    assert not (tmp_path / "cut.jsonl").exists()
    assert blend(folder, tmp_path / "cut.jsonl", **more)[1] == whole
    # two models and the fuser, each on three prompts, and the one that was cut short
    assert len(seen) == 10
    (tmp_path / "cut.jsonl").unlink()
    command = f"{sys.executable} {folder / 'score.py'}"
    _, lines = blend(folder, tmp_path / "cut.jsonl", rank_command=command)
    assert len(seen) == 10
    for line, before in zip(lines, whole, strict=True):
        assert [own["text"] for own in line["answers"]] == [own["text"] for own in before["answers"]]
        assert [own["score"] for own in line["answers"]] == [len(own["text"]) for own in line["answers"]]


def test_merges_answer(folder: Path, tmp_path: Path) -> None:
    models = [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in ("plain", "chat")]
    recipe = {"merge_method": "linear", "models": models}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    _, lines = blend(folder, tmp_path / "out.jsonl", models=[f"both={tmp_path / 'merge.yaml'}"], each=1)
    assert [own["model"] for own in lines[0]["answers"]] == ["both"]


def test_a_fuser_sees_as_many_answers_as_fit(folder: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "short", 3, max_position_embeddings=200)
    _, lines = blend(folder, tmp_path / "a.jsonl", fuser=str(tmp_path / "short"), top=4)
    shown = {len(line["fused"]["answers"]) for line in lines}
    assert shown <= {1, 2, 3}
    make_model(tmp_path / "tiny", 3, max_position_embeddings=64)
    found, lines = blend(folder, tmp_path / "b.jsonl", fuser=str(tmp_path / "tiny"))
    assert [line["fused"] for line in lines] == [None] * 3
    assert found.unwritten == 3


def test_the_text_for_a_fuser() -> None:
    assert fuser_text("2 + 2?", ["4", "five"]).endswith("\n\nRequest:\n2 + 2?\n\nAnswer 1:\n4\n\nAnswer 2:\nfive")


def test_conversations(folder: Path, tmp_path: Path) -> None:
    said = [("system", "be brief"), ("user", "the cat?"), ("assistant", "sat"), ("user", "where?")]
    messages = [{"role": role, "content": content} for role, content in said]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (prompt,) = read_prompts(tmp_path / "p.jsonl")
    chat = open_model(open_stored(folder / "chat"))
    expected = "[system] be brief</s>[user] the cat?</s>[assistant] sat</s>[user] where?</s>[assistant] "
    assert (
        tokens_of(chat.tokenizer, prompt, "chat")
        == load(folder / "chat")[1](expected, add_special_tokens=False)["input_ids"]
    )
    assert prompt.text == "system: be brief\n\nuser: the cat?\n\nassistant: sat\n\nuser: where?"
    _, (line,) = blend(folder, tmp_path / "out.jsonl", models=[str(folder / "chat")], prompts=tmp_path / "p.jsonl")
    assert line["messages"] == messages
    with pytest.raises(DataError, match=r"p.jsonl:1: plain has no chat template, which messages need"):
        blend(folder, tmp_path / "o.jsonl", prompts=tmp_path / "p.jsonl")


def test_a_reward_model_with_a_template_reads_the_conversation(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path / "reward")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    from merganser.distillation.blending.ranking import open_reward_model

    ranker = open_reward_model(folder, torch.device("cpu"))
    assert isinstance(ranker, RewardModel)
    prompt = Prompt(({"role": "user", "content": "the cat"},), "the cat", "p:1", {})
    ((found,),) = ranker.scores([prompt], [["sat on a mat"]], lambda done: None)
    from transformers import AutoModelForSequenceClassification

    ids = load_tokenizer(folder)(
        "[user] the cat</s>[assistant] sat on a mat</s>", add_special_tokens=False, return_tensors="pt"
    )
    with torch.no_grad():
        expected = AutoModelForSequenceClassification.from_pretrained(folder).eval()(ids["input_ids"]).logits[0, 0]
    assert found == pytest.approx(float(expected), abs=1e-5)
    long = "0123456789" * 60
    with pytest.raises(
        DataError, match=r"p:1: with an answer it has [\d,]+ tokens for .*reward, which can see 512 at once"
    ):
        ranker.scores([prompt], [[long]], lambda done: None)


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


PROMPTS: dict[str, tuple[str, str]] = {
    "no prompts": ("\n \n", "p.jsonl: has no prompts; each line must hold one object"),
    "no JSON": ("{\n", "p.jsonl:1: is not valid JSON"),
    "a list": ("[]\n", "p.jsonl:1: must be a JSON object, found a list"),
    "no UTF-8": ("\udcff\n", "p.jsonl:1: is not UTF-8 text"),
    "neither": ('{"promt": "x"}\n', "has neither prompt nor messages. Is 'promt' meant to be 'prompt'?"),
    "both": ('{"prompt": "x", "messages": []}\n', "has both prompt and messages"),
    "an empty prompt": ('{"prompt": " "}\n', "prompt must be a text that is not empty, found ' '"),
    "a number": ('{"prompt": 3}\n', "prompt must be a text that is not empty, found '3'"),
    "a surrogate": ('{"prompt": "\\ud800"}\n', "holds half of a surrogate pair"),
    "no messages": ('{"messages": []}\n', "p.jsonl:1: messages must be a list of objects with role and content"),
    "a message without content": ('{"messages": [{"role": "user"}]}\n', "message 1: 'content' is missing"),
    "an answer": (
        '{"messages": [{"role": "assistant", "content": "x"}]}\n',
        "the last message is the assistant's, so there is nothing to answer",
    ),
    "a key of ours": ('{"prompt": "x", "chosen": 1}\n', "has 'chosen', which is written here"),
    "a key twice": ('{"prompt": "x", "prompt": "y"}\n', "key 'prompt' appears twice"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_malformed_prompts(name: str, tmp_path: Path) -> None:
    text, message = PROMPTS[name]
    (tmp_path / "p.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError) as caught:
        read_prompts(tmp_path / "p.jsonl")
    assert message in str(caught.value)


PRINTED: dict[str, tuple[str, str]] = {
    "nothing": ("", "printed 0 lines for 1 prompts; it must print one list of numbers"),
    "too much": ("print([1, 2]); print([1, 2])", "printed 2 lines for 1 prompts"),
    "no list": ("print(3)", "line 1: expected a list of 2 finite numbers, got '3'"),
    "too few": ("print([3])", "line 1: expected a list of 2 finite numbers, got '[3]'"),
    "no number": ("print('[1, null]')", "expected a list of 2 finite numbers, got '[1, null]'"),
    "infinity": ("print('[1, Infinity]')", "expected a list of 2 finite numbers, got '[1, Infinity]'"),
    "failure": ("raise SystemExit(3)", "ended with exit code 3"),
}


@pytest.mark.parametrize("name", PRINTED)
def test_what_a_command_must_print(name: str) -> None:
    code, message = PRINTED[name]
    ranker = CommandRanker(f'{sys.executable} -S -c "{code}"')
    prompt = Prompt(({"role": "user", "content": "x"},), "x", "p:1", {})
    with pytest.raises(DataError) as caught:
        ranker.scores([prompt], [["a", "b"]], lambda done: None)
    assert message in str(caught.value)


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(kind: type[MergeError], match: str, **changes: Any) -> None:
        with pytest.raises(kind, match=match):
            blend(folder, tmp_path / "out.jsonl", **changes)
        assert not (tmp_path / "out.jsonl").exists()

    refused(TaskError, "models: none given", models=[])
    refused(MergeError, "nowhere", models=["nowhere/x"])
    refused(DataError, r"none.jsonl: there is no such file", prompts=tmp_path / "none.jsonl")
    refused(DataError, "ranker: a model and a command are given", ranker="r", rank_command="c")
    refused(DataError, "rank command: is empty", rank_command=" ")
    refused(DataError, "rank command: 'a \"': no closing quotation", rank_command='a "')
    refused(DataError, "rank command: nowhere-xyz: cannot be run: no such file", rank_command="nowhere-xyz")
    refused(
        CheckpointError,
        r"plain: is not a reward model: config.json says LlamaForCausalLM",
        ranker=str(folder / "plain"),
    )
    make_reward_model(tmp_path / "three", num_labels=3)
    refused(
        CheckpointError, "three: has 3 labels, so it is not known which one is the reward", ranker=tmp_path / "three"
    )
    for change, message in (
        ({"each": 0}, "each: must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature: must be from 0 to 100, got -1"),
        ({"temperature": float("nan")}, "temperature: must be from 0 to 100, got nan"),
        ({"top_p": 0.0}, "top_p: must be above 0, and at most 1, got 0"),
        ({"temperature": 0.0}, "with 0 all 2 answers of a model are the same"),
        ({"top": 0}, "top: must be at least 1, got 0"),
        ({"batch_tokens": 0}, "batch_tokens: must be at least 1, got 0"),
    ):
        refused(DataError, message, **change)
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "0123456789" * 60}) + "\n")
    refused(DataError, r"long.jsonl:1: has [\d,]+ tokens for plain, which can see 512", prompts=tmp_path / "long.jsonl")
    (tmp_path / "mine").write_text("x")
    with pytest.raises(OutputError, match="mine: exists; choose another name"):
        blend(folder, tmp_path / "mine")
    with pytest.raises(OutputError, match="there is no folder"):
        blend(folder, tmp_path / "no" / "out.jsonl")
    assert Sampling(each=1, temperature=0.0).to_json()["temperature"] == 0.0


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        *("fuse", "answer", folder / "plain", f"b={folder / 'chat'}", "--prompts", folder / "prompts.jsonl"),
        *("--out", "out.jsonl", "--each", 2, "--max-tokens", 4, "--fuser", folder / "plain"),
        *("--rank-command", f"{sys.executable} {folder / 'score.py'}"),
    ]
    done = run(*arguments)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("2 models · 3 prompts · 2 answers each · ")
    assert lines[1] == "mean score"
    assert lines[2].split() == ["an", "answer", "best", "of", "2", "chosen"]
    assert [line.split()[0] for line in lines[3:7]] == ["plain", "b", "best", "fused"]
    assert lines[-1] == "wrote out.jsonl; the answers are kept in out.jsonl.items.jsonl"
    again = run(*arguments)
    assert (again.code, again.err) == (2, "error: out.jsonl: exists; choose another name, or remove it\n")
    Path("out.jsonl").unlink()
    told = run(*arguments, "--json")
    assert told.json["times"].keys() == {"plain", "b"}
    assert told.json["kept"] == "out.jsonl.items.jsonl"
