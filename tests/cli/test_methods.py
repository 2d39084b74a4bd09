"""`merganser methods`: the index and the page of a method."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytest
from torch import Tensor

from merganser import MergeError, load_recipe, plan
from merganser.catalogue import FIRST, described
from merganser.cli.methods import _page
from merganser.method import Fraction, Ignored, PerModel, Scale, Weight, default, merge_method
from merganser.method.description import citation, describe
from merganser.method.registry import every_method
from merganser.testing.passes import Pass, passes
from tests.cli.tiny import recipe, run


@merge_method(
    family="toys",
    cite="-",
    breaks={"order": "the first model leads"},
    mergekit={"int8_mask": Ignored("nothing is stored")},
)
def toy(
    base: Tensor,
    models: list[Tensor],
    *,
    weight: PerModel[Weight],
    density: PerModel[Fraction] = default(0.5),
    lambda_: Scale = default(1.0),
    normalize: bool = True,
    rule: Literal["strict", "loose"] = "strict",
) -> Tensor:
    """Do what toys do.

        merged = base + lambda * (sum_i weight_i * delta_i)

    Use when:
        You play, and have a great deal of time to read lines that are so long that they must be wrapped somewhere.

    Args:
        weight: Factor of each model.
        density: Share that is kept.
        lambda_: Factor of all.
        normalize: Divide by the sum of the weights.
        rule: Which of two.

    Differs from the paper:
        There is none.
    """
    raise AssertionError


def test_page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    between = Pass("measures cut, 2 of 2", True, ("exp", "merganser.by_rank"))
    how = [Pass("measures cut, 1 of 2", True), between, Pass("merges", False, reason="it looks at values")]
    _page(describe(toy), [asdict(one) for one in how])
    assert capsys.readouterr().out == (
        "toy · toys\n"
        "Do what toys do.\n"
        "\n"
        "    merged = base + lambda * (sum_i weight_i * delta_i)\n"
        "\n"
        "Use when\n"
        "  You play, and have a great deal of time to read lines that are so long\n"
        "  that they must be wrapped somewhere.\n"
        "\n"
        "Takes\n"
        "  1 or more models and a base; element by element\n"
        "\n"
        "Parameters\n"
        "  weight  any finite number; one value per model; required\n"
        "      Factor of each model.\n"
        "  density  a number between 0 and 1; one value per model; default 0.5\n"
        "      Share that is kept.\n"
        "  lambda  any finite number; default 1\n"
        "      Factor of all.\n"
        "  normalize  true or false; default true\n"
        "      Divide by the sum of the weights.\n"
        "  rule  one of strict, loose; default strict\n"
        "      Which of two.\n"
        "  int8_mask: accepted, without effect: nothing is stored\n"
        "\n"
        "Differs from the paper\n"
        "  There is none.\n"
        "\n"
        "Unlike other methods\n"
        "  the order of the models matters: the first model leads\n"
        "\n"
        "Passes over the inputs\n"
        "  measures cut, 1 of 2: fused\n"
        "  measures cut, 2 of 2: fused, with exp, merganser.by_rank in between\n"
        "  merges: operation by operation (it looks at values)\n"
        "\n"
        "Reference\n"
        "  no publication\n"
    )


def test_the_page_says_where_no_machine_code_can_be_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[_page.__module__], "why_not", lambda: "this processor lacks AVX2")
    said = "  here all run operation by operation (this processor lacks AVX2)\n"
    for fused in (True, False):
        _page(describe(toy), [asdict(Pass("merges", fused, reason="" if fused else "it looks at values"))])
        assert (said in capsys.readouterr().out) == fused


def test_index_has_every_method_under_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = run("methods")
    assert (found.code, found.err) == (0, "")
    family = ""
    seen = {}
    first: list[str] = []
    for line in found.out.splitlines():
        if line and not line.startswith(" "):
            family = line
        elif family not in ("Try first", "") and line.strip() and line[2] != " ":
            seen[line.split()[0]] = family
        if family == "Try first" and line.startswith("  ") and line[2] != " ":
            first.append(line.split()[0])
    assert seen == {name: method.family for name, method in every_method().items()}
    assert first == ["linear", "iso_c", "regmean"]
    assert [line for line in found.out.splitlines() if len(line) > 80] == []


def test_the_same_advice_everywhere() -> None:
    root = Path(__file__).parents[2]
    for page in ("README.md", "docs/choosing-a-method.md", "docs/quality.md"):
        text = (root / page).read_text(encoding="utf-8")
        start = min(text.index(f"`{name}`") for name in FIRST)
        assert all(f"`{name}`" in text[start : start + 1500] for name in FIRST), page
    assert "iso_c" in (root / "benchmarks" / "demo.py").read_text(encoding="utf-8")


def test_the_catalogue_is_up_to_date() -> None:
    found, how = described()
    assert found == {name: describe(method) for name, method in every_method().items()}
    assert how["ties"] == json.loads(json.dumps([asdict(one) for one in passes(every_method()["ties"])]))


@pytest.mark.parametrize("name", ["TIES", "Ties", "iso-c", "ISO_C"])
def test_names_are_found_in_any_case(name: str) -> None:
    assert run("methods", name, "--json").json["name"] == name.lower().replace("-", "_")
    assert load_recipe({"merge_method": name, "models": [{"model": "a"}]}).merge_method == name.lower().replace(
        "-", "_"
    )


REFUSED = [
    ({"merge_method": "teis"}, "unknown merge method 'teis'. Did you mean 'ties'?"),
    ({"parameters": {"denisty": 1}}, "unknown parameter 'denisty' of ties. Did you mean 'density'?"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_names_are_refused_before_torch_is_imported(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    file = recipe(tmp_path / "r.yaml", {"merge_method": "ties", "base_model": "b", "models": [{"model": "a"}]} | wrong)
    for verb in (["merge", str(file), "out"], ["plan", str(file)]):
        code = f"import sys; sys.modules['torch'] = None; from merganser.cli import main; main({verb})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr
    with pytest.raises(MergeError) as slow:
        plan(file)
    assert done.stderr == f"error: {slow.value}\n"


def test_methods_are_listed_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from merganser.cli import main; main(['methods', *sys.argv[1:]])"
    for name in ([], ["ties"], ["--json"]):
        done = subprocess.run([sys.executable, "-c", code, *name], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_every_page_and_json() -> None:
    every = run("methods", "--json").json
    assert sorted(method["name"] for method in every) == list(every_method())
    for method in every:
        page = run("methods", method["name"])
        assert page.code == 0
        assert method["formula"] in page.out
        for parameter in method["parameters"]:
            assert f"  {parameter['name']}  {parameter['allowed']}" in page.out
        own = run("methods", method["name"], "--json").json
        assert [one["what"] for one in own.pop("passes")][-1] == "merges"
        assert own == method


def test_unknown() -> None:
    found = run("methods", "teis")
    assert found.code == 2
    assert found.err == "error: unknown merge method 'teis'. Did you mean 'ties'? `merganser methods` lists all\n"
    assert run("methods", "xyzzyx").err.startswith("error: unknown merge method 'xyzzyx'. Known: ace, adamerging, ")


BIBLIOGRAPHY = """
@inproceedings{yadav2023ties,
  title     = {{TIES}-Merging: Resolving Interference When Merging Models},
  author    = {Yadav, Prateek and Tam, Derek and Choshen, Leshem},
  year      = {2023},
}

@article{two, author = "Ann A and Bob B",
  year = 1999,
  title = "A {Title}
     of two lines"
}
@misc{bare,
  title = {Only a title}
}
"""


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("yadav2023ties", "Yadav, Prateek et al., TIES-Merging: Resolving Interference When Merging Models, 2023"),
        ("two", "Ann A and Bob B, A Title of two lines, 1999"),
        ("bare", "Only a title"),
        ("yadav2023", None),
        ("-", None),
    ],
)
def test_citation(tmp_path: Path, key: str, text: str | None) -> None:
    file = tmp_path / "references.bib"
    file.write_text(BIBLIOGRAPHY)
    assert citation(key, file) == text


def test_without_a_bibliography(tmp_path: Path) -> None:
    assert citation("yadav2023ties", tmp_path / "references.bib") is None
