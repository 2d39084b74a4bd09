"""Help, version and wrong usage."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from merganser import __version__
from merganser.cli._mergekit import COMMANDS, OPTIONS, OPTIONS_OF, answer
from tests.cli.tiny import run, write

VERBS = [
    "merge",
    "plan",
    "methods",
    "schema",
    "inspect",
    "diff",
    "calibrate",
    "verify",
    "restore",
    "route",
    "transplant",
    "mix",
    "shrink",
    "heal",
    "extract",
    "export",
    "eval",
    "report",
    "push",
]


def test_help_lists_every_verb_in_the_order_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = run("--help")
    assert found.code == 0
    assert found.out == (
        "Usage: merganser [OPTIONS] COMMAND [ARGS]...\n"
        "\n"
        "  Merge large language models on the machine you have.\n"
        "\n"
        "Options:\n"
        "  --version             Print the version and exit.\n"
        "  --install-completion  Install completion for the current shell.\n"
        "  --show-completion     Show completion for the current shell, to copy it or\n"
        "                        customize the installation.\n"
        "  -h, --help            Show this message and exit.\n"
        "\n"
        "Commands:\n"
        "  merge       Merge models by a recipe into a new checkpoint.\n"
        "  plan        Show what a merge will read, do and write; nothing is written.\n"
        "  methods     List the merge methods, or explain one.\n"
        "  schema      Print the path of the JSON schema of recipes, for editors.\n"
        "  inspect     Describe a checkpoint, or how models of one base are related.\n"
        "  diff        Compare two checkpoints, tensor by tensor, by layer and role.\n"
        "  calibrate   Write statistics of a model on text, for merges that use data.\n"
        "  verify      Check an output against the hashes in its merge.json.\n"
        "  restore     Rebuild a task's own checkpoint from a merge with sidecars.\n"
        "  route       Fit a router that chooses a task per text, or gates of tasks.\n"
        "  transplant  Give a model the tokenizer of another one.\n"
        "  mix         Build a mixture of experts from dense models; join mixtures.\n"
        "  shrink      Reduce the number of experts of a mixture of experts.\n"
        "  heal        Fit layers of a stacked model to the models they came from.\n"
        "  extract     Write what a fine-tune changed as an adapter.\n"
        "  export      Write the sidecars of a merge as LoRA adapters.\n"
        "  eval        Measure models on tasks, and what merges kept of experts.\n"
        "  search      Find open values of a recipe by trials.\n"
        "  auto        Find and test the best merge of some models for some tasks.\n"
        "  report      Draw a page about a merge or a search.\n"
        "  push        Upload an output to the Hub, or show what would be uploaded.\n"
        "  fuse        Train a model on others' predictions, or blend their answers.\n"
    )


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_of_a_verb(verb: str, option: str) -> None:
    found = run(verb, option)
    assert found.code == 0
    assert found.out.startswith(f"Usage: merganser {verb} ")
    assert "--json" in found.out


def test_options_of_merge() -> None:
    text = run("merge", "--help").out
    options = ["threads", "device", "out-shard-size", "seed", "overwrite", "fresh", "allow-nonfinite", "max-memory"]
    for name in [*options, "cache-dir", "keep-stages", "quiet", "json"]:
        assert f"--{name}" in text
    assert "[default: 5GB]" in text


def test_version() -> None:
    assert run("--version").out == f"merganser {__version__}\n"


def test_without_a_verb_help_is_shown() -> None:
    found = run()
    assert found.code == 2
    assert (found.out + found.err).rstrip() == run("--help").out.rstrip()


WRONG = [
    (["mrege"], "No such command 'mrege'. Did you mean 'merge'?"),
    (["merge", "r.yaml", "out", "--trheads", "2"], "--threads"),
    (["merge"], "Missing argument"),
    (["merge", "r.yaml"], "Missing argument"),
    (["merge", "r.yaml", "out", "--threads", "0"], "--threads"),
    (["merge", "r.yaml", "out", "--threads", "two"], "--threads"),
    (["merge", "r.yaml", "out", "--seed", "-1"], "--seed"),
    (["merge", "r.yaml", "out", "--out-shard-size", "5B"], "Did you mean 5GB"),
    (["merge", "r.yaml", "out", "--max-memory", "much"], "expected a size such as 5GB"),
    (["diff", "a"], "Missing argument"),
    (["plan", "r.yaml", "out"], "unexpected extra argument"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    found = run(*arguments)
    assert found.code == 2
    assert message in found.err
    assert not found.out
    assert "Traceback" not in found.err


@pytest.mark.parametrize("verb", sorted(OPTIONS_OF))
def test_options_of_mergekit_are_answered(verb: str) -> None:
    known = run(verb, "--help").out
    hints = {option: answer(verb, option) for option in OPTIONS_OF[verb]}
    assert all(
        hint == f"{option} is an option of mergekit; {OPTIONS_OF[verb][option]}" for option, hint in hints.items()
    )
    ours = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", known))
    assert [hint for hint in hints.values() if set(re.findall(r"use (--[a-z-]+)", str(hint))) - ours] == []
    # options that our verb has, too, are never asked for
    option = next(option for option in OPTIONS_OF[verb] if option not in ours)
    found = run(verb, "r.yaml", "out", option, "x")
    assert (found.code, found.out) == (2, "")
    assert f"Error: {hints[option]}\n" in found.err


def test_negated_options_of_mergekit_are_answered() -> None:
    (line,) = [line for line in run("merge", "r.yaml", "out", "--no-cuda").err.splitlines() if line.startswith("Error")]
    assert line == "Error: --no-cuda is an option of mergekit; leave it out, as --cuda is not an option here"
    assert answer("merge", "--no-nothing") is None


@pytest.mark.parametrize("tool", sorted(COMMANDS))
def test_commands_of_mergekit_are_answered(tool: str) -> None:
    name = tool if tool == "bakllama" else f"mergekit-{tool}"
    found = run(name, "recipe.yml", "out")
    assert (found.code, found.out) == (2, "")
    (line,) = [line for line in found.err.splitlines() if line.startswith("Error")]
    assert line.startswith(f"Error: {name} is a command of mergekit; ")
    (verb,) = re.findall(r"merganser ([a-z]+)", line) or ["merge"]
    assert run(verb, "--help").code == 0


def test_options_of_nobody_are_refused() -> None:
    assert "No such option: --cuda" in run("inspect", "a", "--cuda").err
    assert "mergekit" not in run("merge", "--thread", "2").err


def test_the_documents_list_the_options_of_mergekit() -> None:
    text = (Path(__file__).parents[2] / "docs" / "coming-from-mergekit.md").read_text(encoding="utf-8")
    assert [option for option in OPTIONS if f"`{option}`" not in text and option.startswith("--")] == []
    assert [tool for tool in COMMANDS if tool not in text] == []


HEAVY = "torch, transformers, safetensors.torch, pandas, scipy, huggingface_hub, rich"
RECIPES = [
    ("typo", "merge_method: linear\nmodles: [a]\n"),
    ("method", "merge_method: tiees\nmodels: [{model: a}]\n"),
    ("parameter", "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nparameters: {denisty: 1}\n"),
    ("place", "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\ndensity: 1\n"),
    ("empty", ""),
]
WITHOUT_TORCH = [
    ["--help"],
    ["methods"],
    ["methods", "ties"],
    ["methods", "tiees"],
    ["schema"],
    ["merge", "--help"],
    ["merge", "nothing.yaml", "out"],
    *(["plan", f"{name}.yaml"] for name, _ in RECIPES),
    ["mix", "nothing.yaml", "out"],
    ["search", "nothing.yaml", "out", "--tasks", "t.txt"],
    ["merge", "r.yaml", "out", "--cuda"],
    ["merge", "r.yaml", "out", "--threads", "0"],
    ["mergekit-moe"],
    ["inspect", "here"],
    ["verify", "nothing"],
    ["report", "nothing"],
    ["restore", "nothing", "--task", "a", "--out", "b"],
]


def test_torch_is_not_imported_where_no_tensor_is_needed(tmp_path: Path) -> None:
    """Importing it takes most of a second; one process runs all of these."""
    write(tmp_path / "here", {"weight": torch.ones(2, 2)})
    for name, text in RECIPES:
        (tmp_path / f"{name}.yaml").write_text(text)
    code = f"""
import sys
from merganser.cli import main
for arguments in {WITHOUT_TORCH!r}:
    try:
        main(arguments)
    except SystemExit as end:
        loaded = [name for name in "{HEAVY}".split(", ") if name in sys.modules]
        print("###", end.code, arguments, loaded)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=os.environ
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("###")]
    assert len(lines) == len(WITHOUT_TORCH)
    assert [line for line in lines if not line.endswith("[]")] == []
    assert "defect" not in done.stderr


def test_the_shell_completes_verbs_and_options() -> None:
    def offered(words: str, at: int) -> set[str]:
        told = {"_MERGANSER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        code = "from merganser.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | told, capture_output=True, text=True, check=False
        )
        return set(done.stdout.split())

    assert offered("merganser me", 1) == {"merge", "methods"}
    assert "--overwrite" in offered("merganser merge --ov", 2)
