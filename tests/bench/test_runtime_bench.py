"""The benchmark of caches: what a cache is given is what it would see in the model, budgets take equal bytes, tasks fit."""

import json
import math

import pytest
import torch

from benchmarks.runtime import __main__ as command
from benchmarks.runtime import checks, contenders
from benchmarks.runtime.checks import WrongResultError, check
from benchmarks.runtime.contenders import METHODS, Field, budget, caches, rival
from benchmarks.runtime.intervals import mean, paired
from benchmarks.runtime.prompts import Prompt, answer, bits
from benchmarks.runtime.scales import likelihoods, needle_grid, ruler, scored, speed
from benchmarks.runtime.tasks import NOUNS, TASKS, Item, Maker, beginning
from merganser.runtime import MergedCache
from tests.runtime.making import model, text


class Characters:
    """A tokenizer with a token per character, below 128, which may put token 1 before a text."""

    bos_token_id = 1

    def __init__(self, begins=False):
        self.input_ids = [1, 97] if begins else [97]

    def __call__(self, text, **options):
        return self

    @staticmethod
    def encode(text):
        return [ord(each) for each in text]

    @staticmethod
    def decode(tokens):
        return "".join(chr(each) for each in tokens)


def maker(length=900, seed=0):
    return Maker(Characters.encode, [ord("x")] * 2000, length, seed)


def field(made, entries=60, methods=("knorm",)):
    return Field(made, entries, methods, {"minicache": lambda: MergedCache("minicache", made)})


def test_a_prompt_that_ran_once():
    made, tokens = model(), text(90)
    prompt = Prompt(made, tokens[:, :80], 60)
    for method in METHODS:
        options = {"budget": 50, "history": 60} if method in ("d2o", "ems") else {"budget": 50}
        cache = MergedCache(method, made, **options)
        with torch.no_grad():
            first = made(tokens[:, :80], past_key_values=cache).logits[:, -1:]
            logits = torch.cat((first, made(tokens[:, 80:-1], past_key_values=cache).logits), dim=1).log_softmax(-1)
        expected = float(-logits.gather(-1, tokens[:, 80:, None]).mean() / torch.tensor(2.0).log())
        found = bits(made, prompt, MergedCache(method, made, **options), tokens[:, 80:])
        assert abs(found - expected) < 1e-4
    plain = made.generate(tokens[:, :80], max_new_tokens=5, do_sample=False)[0, 80:].tolist()
    assert answer(made, prompt, caches(made, 50, [])["whole"](), 5) == plain


def test_bits_of_a_model_in_half_precision():
    made, tokens = model().bfloat16(), text(70)
    with torch.no_grad():
        logits = made(tokens).logits[:, 59:-1].float().log_softmax(-1)
    expected = float(-logits.gather(-1, tokens[:, 60:, None]).mean() / torch.tensor(2.0).log())
    found = bits(made, Prompt(made, tokens[:, :60], 40), MergedCache("snapkv", made, budget=99), tokens[:, 60:])
    # the mean of numbers that were rounded to bfloat16 is 6.763
    assert found == pytest.approx(expected, abs=3e-3)


def test_a_model_with_sliding_windows():
    """What layers with a window hold is in no budget, and is what they would hold in the model."""
    made, tokens = model("gemma3"), text(90)
    prompt = Prompt(made, tokens, 90)
    found = field(made, 60, METHODS)
    found.free = {"task_kv": lambda: MergedCache("task_kv", made, middle=9)}
    check(made, tokens, found, METHODS, 60, 90)
    beside, entry = 9 * 2 * 2 * 8 * 4, 2 * 2 * 8 * 4
    taken = {name: prompt.into(make()).stored_bytes() - beside for name, make in found.at(prompt).items()}
    assert taken["snapkv"] == 60 * entry
    assert taken["task_kv"] - entry < taken[rival("task_kv")] <= taken["task_kv"]
    plain = made.generate(tokens, max_new_tokens=5, do_sample=False)[0, 90:].tolist()
    assert answer(made, prompt, found.at(prompt)["whole"](), 5) == plain
    assert command.mixed(made)
    assert not command.mixed(model())


def test_equal_bytes():
    made, tokens = model(), text(100)
    prompt = Prompt(made, tokens, 60)
    found = {name: prompt.into(make()).stored_bytes() for name, make in field(made, 60, METHODS).at(prompt).items()}
    assert found["snapkv"] == 60 * 2 * 2 * 2 * 8 * 4
    one = found["snapkv"] // 60
    assert all(found["snapkv"] - 2 * one < found[name] <= found["snapkv"] for name in METHODS)
    assert found["minicache"] - one < found[rival("minicache")] <= found["minicache"]
    assert budget("ems", 60, 64) == 60 * 64 // 72


@pytest.mark.parametrize("task", TASKS)
def test_tasks(task):
    item, other = TASKS[task](maker()), TASKS[task](maker())
    assert item == other
    assert item.tokens != TASKS[task](maker(seed=1)).tokens
    assert len(item.tokens) == 900
    said = Characters.decode(item.tokens)
    assert all(each in said for each in item.wanted)
    assert item.count >= len(", ".join(item.wanted))
    assert item.score("it is " + " and ".join(item.wanted)) == 1
    assert item.score(item.wanted[0]) == pytest.approx(1 / len(item.wanted))


def test_answers_are_right():
    """Each task is solved by reading its prompt."""
    said = {name: Characters.decode(TASKS[name](maker()).tokens) for name in TASKS}
    wanted = {name: TASKS[name](maker()).wanted for name in TASKS}
    for name in ("multikey", "multivalue", "multiquery"):
        question = said[name].rsplit(" The ", 1)[1]
        asked = [noun for noun in NOUNS if f"the {noun} " in question]
        found = set()
        for part in said[name].split(" The secret number of the ")[1:]:
            key, _, number, *_ = [*part.replace(".", " ").split(), "", ""]
            if key in asked and number.isdigit():
                found.add(number)
        assert found == set(wanted[name])
    # assignments are in order, and each names the one before
    number = said["tracking"].rsplit("number ", 1)[1].split()[0]
    held = {number}
    for line in said["tracking"].split("\n"):
        if line.startswith("VAR ") and line.removeprefix("VAR ").split(" = ")[1].removeprefix("VAR ") in held:
            held.add(line.split()[1])
    assert held == {number, *wanted["tracking"]}
    for name in ("common", "frequent"):
        words = said[name].split("\n")[1].split(":")[1].split()
        counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
        assert {word for _, word in counts[:3]} == set(wanted[name])
        assert counts[2][0] > counts[3][0]


def test_depths():
    for depth in (0, 0.5, 1):
        said = Characters.decode(maker().needle(depth).tokens)
        before = said.index(" The secret")
        after = said.rindex(" The secret") - said.index("Remember it.") - len("Remember it.")
        assert before == round(depth * (before + after))


def test_prompts_begin_as_the_model_is_used_to():
    assert beginning(Characters()) == []
    assert beginning(Characters(begins=True)) == [1]
    item, other = Maker(Characters.encode, [ord("x")] * 2000, 900, 0, [1]).needle(0), maker().needle(0)
    assert item.tokens[:12] == [1, *map(ord, " The secret")]
    assert len(item.tokens) == len(other.tokens) == 900
    options = command.parsed(["model", "text", "--prompt", "30", "--following", "10", "--texts", "2"])
    parts = command.texts(list(range(100)), [1], options)
    assert [part[0, :3].tolist() for part in parts] == [[1, 0, 1], [1, 39, 40]]
    assert [part.shape for part in parts] == [(1, 40), (1, 40)]


def test_a_text_that_is_too_short():
    with pytest.raises(ValueError, match="the text has 2000 tokens, and prompts need 3000"):
        maker(3000)
    with pytest.raises(ValueError, match="frequent: 200 tokens have no room for the task; it takes"):
        maker(200).frequent()


def test_intervals():
    own, other = [1.0, 3.0, 2.0, 5.0], [1.0, 1.0, 1.0, 1.0]
    found = paired(own, other)
    assert found["more"] == 1.75
    assert found["low"] < 1.75 < found["high"]
    assert found["low"] >= 0
    assert paired(own, own) == {"more": 0, "low": 0, "high": 0}
    assert mean(own) == 2.75
    assert math.isnan(mean([]))


def test_scales():
    made = model(vocab_size=128, max_position_embeddings=1024)
    compared = field(made, 45)
    names = {"whole", "snapkv", "knorm", "minicache", rival("minicache")}
    found = likelihoods(made, compared, [text(70), text(70, seed=1)], 60, 40)
    assert found.keys() == names
    assert found["snapkv"]["more"] == 0
    assert found["knorm"]["more"] == pytest.approx(found["knorm"]["bits"] - found["snapkv"]["bits"])
    assert found["minicache"]["more"] == pytest.approx(found["minicache"]["bits"] - found[rival("minicache")]["bits"])
    grid = needle_grid(made, Characters(), compared, [maker(150), maker(200)], 2, 40)
    assert grid["depths"] == [0.25, 0.75]
    assert {length: len(own) for length, own in grid["cells"]["knorm"].items()} == {"150": 2, "200": 2}
    tasks = ruler(made, Characters(), compared, maker(400), ["multikey"], 1, 40)
    assert tasks["scores"]["multikey"].keys() == names
    timed = speed(made, compared, text(60), 2, 1, 40)
    assert timed["snapkv"]["bytes"] == 45 * 2 * 2 * 2 * 8 * 4
    assert all(row["tokens_per_second"] > 0 for row in timed.values())


def test_other_pools_stand_beside_the_default():
    made = model(vocab_size=128, max_position_embeddings=1024)
    compared = Field(made, 45, ["ems", "knorm"], {}, [9])
    found = likelihoods(made, compared, [text(70)], 60, 40)
    assert found.keys() == {"whole", "ems", "knorm", "snapkv", "ems, pool 9", "snapkv, pool 9"}
    for method in ("ems", "snapkv"):
        own, wide = found[method], found[f"{method}, pool 9"]
        assert wide["bytes"] == own["bytes"]
        assert wide["bits"] != own["bits"]
        assert wide["more"] == pytest.approx(wide["bits"] - own["bits"])


def test_an_answer_counts_by_what_it_says():
    made = model(vocab_size=128)
    item = Item("x", text(50)[0].tolist(), ("",), 3)
    assert scored(made, Characters(), field(made, 45), [item], 40)["snapkv"] == [1.0]


def test_checks_find_what_is_wrong(monkeypatch):
    made, tokens = model(), text(60)
    check(made, tokens, field(made, 45, METHODS), METHODS, 45, 60)

    def broken(found):
        def wrong(*arguments):
            return found

        return wrong

    monkeypatch.setattr(checks, "answer", broken([1, 2, 3, 4]))
    with pytest.raises(WrongResultError, match="knorm: with a budget above the length the next tokens are"):
        check(made, tokens, field(made, 45), ["knorm"], 45, 60)
    monkeypatch.undo()
    monkeypatch.setattr(contenders, "budget", lambda method, entries, width: entries + (method == "knorm"))
    with pytest.raises(WrongResultError, match=r"knorm: takes \d+ bytes, and snapkv \d+"):
        check(made, tokens, field(made, 45), ["knorm"], 45, 60)
    monkeypatch.undo()
    monkeypatch.setattr(Prompt, "into", lambda self, cache: cache)
    with pytest.raises(WrongResultError, match="knorm: "):
        check(made, tokens, field(made, 45), ["knorm"], 45, 60)


def test_the_command(monkeypatch, tmp_path, capsys):
    made = model(vocab_size=128, max_position_embeddings=1024)
    (tmp_path / "text").write_text("a text " * 200)
    monkeypatch.setattr(command.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: made)
    monkeypatch.setattr(command.AutoTokenizer, "from_pretrained", lambda *_: Characters())
    monkeypatch.setattr(command, "encoder", lambda tokenizer: tokenizer.encode)
    arguments = [str(tmp_path), str(tmp_path / "text"), "--methods", "knorm", "--budget", "45", "--prompt", "150"]
    few = [
        "--scales",
        "likelihood",
        "needles",
        "--texts",
        "2",
        "--lengths",
        "150",
        "--depths",
        "1",
        "--following",
        "20",
    ]
    assert command.main([*arguments, *few]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"threads", "likelihood", "needles"}
    assert command.main([*arguments, "--scales", "ruler", "--tasks", "frequent"]) == 1
    assert "frequent: 150 tokens have no room" in capsys.readouterr().err
