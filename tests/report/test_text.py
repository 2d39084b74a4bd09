"""The report in a terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.cli.tiny import run
from tests.report.making import evaluation, measured, write_evaluation


def test_text(out: Path) -> None:
    file = out / "merge.json"
    record = json.loads(file.read_text())
    record |= {
        "created": "2026-01-02T03:04:05Z",
        "timings": {"merge_seconds": 1.0, "seconds": 2.5},
        "workers": 1,
        "compiled": False,
    }
    record["versions"] = {"merganser": "0.1.0"}
    file.write_text(json.dumps(record))
    found = run("report", "out", "--text")
    assert (found.code, found.err) == (0, "")
    assert not (out / "report.html").exists()
    text = re.sub(r"\b[0-9a-f]{32,64}\b", "HASH", found.out)
    assert text.startswith(
        "out\n"
        "task_arithmetic · 4 checkpoints · 19 tensors · 1,576 parameters · float32 · 2.5\n"
        "s · 2026-01-02T03:04:05Z\n"
        "\n"
        "Verdict\n"
        "What this merge can do was not measured. To see it here:\n"
    )
    rows = [line.split() for line in text.splitlines()]
    assert ["base", "base,", "donor", "8.14", "KB", "19", "of", "19", "base"] in rows
    total = record["movement"]["total"]
    shares = [f"{share:.1%}" for share in total["rounding"]]
    distances = [*total["models"], total["merged"]]
    for name, value, share in zip(("one", "two", "three", "merge"), distances, [*shares, "-"], strict=True):
        assert [name, f"{value:.3g}", share] in rows
    assert f"The merged task vector is {total['length']:.2g} times as long as the models'" in text
    assert not [line for line in text.splitlines() if len(line) > 80]
    cosines = [f"{value:.3f}" for value in total["cosines"]]
    assert ["1", "one", "·", cosines[0], cosines[1]] in rows
    assert ["3", "three", cosines[1], cosines[2], "·"] in rows
    # what a page folds is too long for a terminal
    assert "model.layers.0" not in text
    assert "\nRecipe\n  merge_method: task_arithmetic\n  base_model: base\n" in text
    assert "  merganser inspect one two three --base base\n" in text
    assert text.endswith(
        "The run\n"
        "  merganser                        0.1.0\n"
        "  device                           cpu\n"
        "  threads                          1\n"
        f"  fused kernels                    {'yes' if record['compiled'] else 'no'}\n"
        "  continued after an interruption  no\n"
        "  seed                             0\n"
        "  compat                           none\n"
        "  merge seconds                    1.000\n"
        "  seconds                          2.500\n"
    )


def test_strips_rise_with_the_numbers(out: Path) -> None:
    file = out / "merge.json"
    record = json.loads(file.read_text())
    for entry in record["layers"]:
        if entry["layer"] is not None:
            entry |= {"models": [0.0, 0.5, 1.0], "merged": 0.49 + entry["layer"]}
    file.write_text(json.dumps(record))
    lines = run("report", "out", "--text").out.splitlines()
    start = lines.index("one (█ = 1.49)")
    assert lines[start : start + 4] == ["one (█ = 1.49)", "  attention  ▁▁", "  mlp        ▁▁", "  norm       ▁▁"]
    assert "  attention  ▃▃" in lines[start + 4 : start + 8]
    assert lines[start + 12 : start + 14] == ["merge (█ = 1.49)", "  attention  ▃█"]


def test_evaluation(out: Path) -> None:
    found = evaluation(out)
    found["results"]["merge-1"]["maths"] = {"failed": "NaN in the logits", "items": 0, "metrics": {}}
    found["retention"]["models"]["merge-1"]["recovered"]["maths"] = None
    found["retention"]["domains"]["maths"] |= {"counted": False, "reason": "no gain"}
    found["warnings"] = ["64 items are few"]
    write_evaluation(out.parent / "eval.json", found)
    text = run("report", "out", "--text", "--eval", "eval.json").out
    section = text.partition("What it can do\n")[2].partition("\nWhat was merged\n")[0]
    assert section.startswith(
        "This merge is merge-1. ± is one standard error.\n"
        "scores (↑ higher is better, ↓ lower is better)\n"
        "                 is          french: bits per byte ↓  maths: bits per byte ↓\n"
        "  base           base                1.5000 ± 0.0100         1.5000 ± 0.0100\n"
        "  expert-french  expert              1.4000 ± 0.0100         1.4333 ± 0.0100\n"
        "  expert-maths   expert              1.3600 ± 0.0100         1.4067 ± 0.0100\n"
        "  merge-1        this merge          1.3200 ± 0.0100                  failed\n"
        "                 english: accuracy ↑\n"
        "  base               0.6100 ± 0.0600\n"
        "  expert-french      0.6060 ± 0.0600\n"
        "  expert-maths       0.6044 ± 0.0600\n"
        "  merge-1            0.6028 ± 0.0600\n"
        "Bits per byte: how many bits the model needs for a byte of text; 8 is knowing\n"
        "nothing.\n"
        "Accuracy: the share of questions that were answered right.\n"
        "difference from base, paired item by item where that was possible\n"
        "                                french ↓           maths ↓         english ↑\n"
        "  merge-1 (this merge)  -0.1000 ± 0.0020  -0.1000 ± 0.0020  -0.1000 ± 0.0020\n"
        "kept and lost\n"
        "                        mean recovered       worst recovered    forgotten\n"
        "  expert-french           20.0 ± 2.0 %  10.0 ± 3.0 % (maths)  0.7 ± 2.0 %\n"
    )
    assert "failed\n  merge-1 on maths: NaN in the logits\n" in section
    assert "  merge-1 (this merge): recovered 36.0 ± 2.0 %, forgotten 1.2 ± 2.0 %\n" in section
    assert "warnings\n  64 items are few\n" in section
    assert "domains that do not count\n  maths: no gain\n" in section
    assert "    maths   not counted\n" in section
    assert f"  merge-1\n    french  {'█' * 14}{'·' * 26} 36 %\n" in section
    assert " ".join(section.split()).endswith(
        "eval.json, 2026-11-21T10:30:00Z, 2 min 3 s; french has 64 windows, maths has 64 windows, "
        "english has 64 questions, limit 64, context 512, dtype bfloat16."
    )


def said(out: Path, **changes: object) -> str:
    found = evaluation(out)
    found["models"]["merge-1"] |= changes
    write_evaluation(out.parent / "eval.json", found)
    text = run("report", "out", "--text", "--eval", "eval.json").out
    section = text.partition("What it can do\n")[2]
    return " ".join(section.partition("\nscores (")[0].split())


def test_an_evaluation_of_another_checkpoint(out: Path) -> None:
    assert said(out).startswith("This merge is merge-1.")
    own = evaluation(out)["models"]["merge-1"]["hash"]
    assert said(out, hash="0") == (
        f"eval.json is an evaluation of another checkpoint: merge-1 lay at {out} as this merge does, and was not the same "
        f"(its hash was 0, that of the merge is {own}). Evaluate out again. ± is one standard error."
    )
    assert said(out, hash="0", reference="elsewhere") == (
        "eval.json is an evaluation of other checkpoints: this merge is not among them. ± is one standard error."
    )
    # the very same merge, wherever it lay
    assert said(out, reference="elsewhere").startswith("This merge is merge-1.")


def test_an_evaluation_without_experts(out: Path) -> None:
    found = evaluation(out) | {"retention": None}
    write_evaluation(out.parent / "eval.json", found)
    text = run("report", "out", "--text", "--eval", "eval.json").out
    assert "What was kept and lost is shown if eval gets both --base and --experts.\n" in text
    assert "kept and lost\n" not in text


def test_no_retained_tasks_and_no_errors(out: Path) -> None:
    found = evaluation(out)
    for kept in found["retention"]["models"].values():
        kept |= {"mean_forgotten": None, "forgotten": {}, "worst": None, "mean": measured(0.5, None)}
    write_evaluation(out.parent / "eval.json", found)
    text = run("report", "out", "--text", "--eval", "eval.json").out
    kept = text.partition("kept and lost\n")[2]
    row = next(line.split() for line in kept.splitlines() if line.startswith("  merge-1 (this merge)"))
    assert row == ["merge-1", "(this", "merge)", "50.0", "%", "-", "-"]
    assert "Kept 50.0 % of what the experts gained, on average over their domains. It keeps" in text
    assert "against what was forgotten" not in text
