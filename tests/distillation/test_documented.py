"""Files and commands of docs/fusion-recipes.md run, on tiny models with few steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from merganser.record import verify
from tests.cli.tiny import run
from tests.distillation.test_fuse import conversation, other_tokenizer
from tests.evaluation.tiny import load, make_model, text

PAGE = Path(__file__).parents[2] / "docs" / "fusion-recipes.md"
SECTIONS = {
    part.partition("\n")[0]: part for part in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
}
FEWER = {
    r"sequences: \d+": "sequences: 3",
    r"length: \d+": "length: 40",
    r"steps: \d+": "steps: 1",
    r"--trials \d+": "--trials 2 --limit 8 --dtype float32",
    r"max_steps=\d+": "max_steps=2",
    r"MergeCallback\(\d+": "MergeCallback(1",
    r"max_completion_length=\d+": "max_completion_length=4",
}
RESULTS = {
    "FuseChat: pairwise fusion, then a merge": "fusechat",
    "Unconstrained Model Merging": "unconstrained",
    "A merge distilled from its experts": "distilled",
    "Train several, then merge": "residue",
}
QUICK = ["A merge distilled from its experts"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.usefixtures("little_to_collect"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data of the page: mixtral and solar have other tokens."""
    found = tmp_path_factory.mktemp("documented")
    base = make_model(found / "base", 1)
    for seed, name in enumerate(("pivot", "maths", "code"), 2):
        make_model(found / name, seed, like=base)
    for seed, name in enumerate(("mixtral", "solar"), 6):
        make_model(found / name, seed)
        (found / name / "tokenizer.json").write_text(other_tokenizer())
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<begin>", "eos_token": "<end>"}
        (found / name / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("pivot", "mixtral", "solar"):
        (found / name / "chat_template.jinja").write_text(TEMPLATE.replace("</s>", "" if name != "pivot" else "</s>"))
    return found


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models").symlink_to(models)
    for seed, name in enumerate(("maths", "code", "maths.train", "code.train", "texts")):
        (tmp_path / f"{name}.txt").write_text(text(seed, 300))
    chats = [
        conversation("x", "the cat sat on a mat while"),
        conversation("y", "def return x = 1"),
        conversation("z", "and then it was"),
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    (tmp_path / "instructions.jsonl").write_text("".join(json.dumps({"text": text(i, 9)}) + "\n" for i in range(8)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fewer(given: str) -> str:
    for pattern, value in FEWER.items():
        given = re.sub(pattern, value, given)
    return given


def blocks(section: str) -> list[str]:
    return [fewer(found) for found in re.findall(r"^```\w*\n(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL)]


def test_every_section_is_run() -> None:
    assert {*SECTIONS} - {*RESULTS} == {"# Published schemes of fusion", "On-policy distillation, by TRL"}


@pytest.mark.parametrize(
    "section", [own if own in QUICK else pytest.param(own, marks=pytest.mark.slow) for own in RESULTS]
)
def test_commands_of_the_page(section: str, folder: Path) -> None:
    for block in blocks(section):
        name = re.match(r"# (\S+\.yaml)\n", block)
        if name is not None:
            Path(name[1]).write_text(block)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "merganser"
            done = run(*arguments)
            assert done.code == 0, done.err
    assert verify(folder / RESULTS[section]).ok


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_on_policy_distillation(folder: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    (merge,) = (own for own in blocks("A merge distilled from its experts") if own.startswith("# merge.yaml"))
    Path("merge.yaml").write_text(merge)
    (script,) = blocks("On-policy distillation, by TRL")
    found: dict[str, object] = {}
    exec(compile(script, "distil.py", "exec"), found)
    assert found["trainer"].state.global_step == 2  # type: ignore[attr-defined]
    before, after = (load(folder / name)[0].state_dict() for name in ("merged", "on-policy"))
    assert any(not before[name].equal(after[name]) for name in before)
