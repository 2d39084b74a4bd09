"""`merganser restore`: a task's own checkpoint from a merge with sidecars, or what stands in the way."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merganser import restore, verify
from merganser.errors import CheckpointError, NotFoundError, UnsupportedError
from merganser.inference.sources import open_source
from tests.cli.test_process import process
from tests.cli.tiny import linear, names, recipe, run, state, write


def emr(*models: str, **more: Any) -> dict[str, Any]:
    return {"merge_method": "emr", "base_model": "a", "models": [{"model": model} for model in models], **more}


@pytest.fixture
def near(models: Path) -> Path:
    """The base a, and b and c that are near it."""
    base = state(0, dtype=torch.float32)
    for seed, name in enumerate("bc", start=1):
        generator = torch.Generator().manual_seed(seed)
        tuned = {key: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for key, tensor in base.items()}
        write(models / name, {key: tensor.bfloat16() for key, tensor in tuned.items()})
    return models


@pytest.fixture
def out(near: Path) -> Path:
    assert run("merge", recipe(near / "r.yaml", emr("b", "c")), "out", "--quiet").code == 0
    return near / "out"


def text(found: Any) -> str:
    """Return what a process printed, without the time it took."""
    return re.sub(r"[0-9.]+ s\b", "1.0 s", found.stdout)


def test_a_task_comes_back(out: Path) -> None:
    described = json.loads((out / "merge.json").read_text())["sidecars"]["tasks"][1]
    size = (out / "model.safetensors").stat().st_size
    found = process("restore", "out", "--task", "c")
    assert (found.returncode, found.stderr) == (0, "")
    assert text(found) == (
        "c of out · 19 tensors · 1,576 parameters · 1.0 s\n"
        f"wrote out-c (1 file, {size / 1000:.2f} KB)\n"
        f"off by {described['error']:.3g} of the model's norm, "
        f"{described['error_of_task_vector']:.3g} of its task vector's\n"
    )
    assert names(out.parent / "out-c") == ["config.json", "merge.json", "model.safetensors", "tokenizer.json"]
    restored, model = (load_file(out.parent / name / "model.safetensors") for name in ("out-c", "c"))
    assert restored.keys() == model.keys()
    assert all(restored[name].dtype == model[name].dtype for name in model)
    assert run("verify", "out-c").code == 0


def test_where_and_how(out: Path) -> None:
    assert run("restore", "out", "--task", "b", "--out", "again/b", "--quiet").out == ""
    described = run("restore", out, "--task", "b", "--out", "other", "--json").json
    assert described["out"] == "other"
    assert described["record"]["restored"]["method"] == "emr"
    assert described["record"]["restored"]["task"]["name"] == "b"
    weights = "model.safetensors"
    assert (out.parent / "again/b" / weights).read_bytes() == (out.parent / "other" / weights).read_bytes()
    assert run("restore", "out", "--task", "b", "--out", "other", "--overwrite", "-q").code == 0


def test_from_inside_of_the_output(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out)
    assert run("restore", ".", "--task", "b").out.splitlines()[1].startswith(f"wrote {out.parent / 'out-b'} (1 file, ")


def error(*arguments: object) -> str:
    """Return the one line of error that the command ends with; nothing is left behind."""
    before = set(Path.cwd().rglob("*"))
    found = run("restore", *arguments)
    assert (found.code, found.out) == (2, ""), found.err
    assert found.err.count("\n") == 1
    assert set(Path.cwd().rglob("*")) == before
    return found.err.removesuffix("\n")


def test_errors_of_the_process(out: Path) -> None:
    before = set(Path.cwd().rglob("*"))
    found = process("restore", "out", "--task", "d")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "error: out: no task 'd'. Tasks: b, c\n"
    found = process("restore", "out")
    assert found.returncode == 2
    assert "Missing option '--task'" in found.stderr
    assert set(Path.cwd().rglob("*")) == before


def test_no_such_task(out: Path) -> None:
    assert error("out", "--task", "d") == "error: out: no task 'd'. Tasks: b, c"
    assert (
        run("merge", recipe(out.parent / "n.yaml", emr("b") | {"models": [{"model": "b", "name": "math"}]}), "two").code
        == 0
    )
    assert error("two", "--task", "maht") == "error: two: no task 'maht'. Did you mean 'math'? Tasks: math"


def test_no_sidecars(near: Path) -> None:
    assert run("merge", recipe(near / "r.yaml", linear("a", "b")), "plain").code == 0
    assert error("plain", "--task", "b") == (
        "error: plain: has no sidecars: linear stores nothing for single tasks; methods that do are "
        "emr, one_bit, rmm, skillpack, tall_masks, twin"
    )
    assert error("a", "--task", "b") == "error: a: has no merge.json; only what merganser wrote can be restored from"
    assert error("nothing", "--task", "b") == "error: nothing: no such folder"
    assert error("r.yaml", "--task", "b") == "error: r.yaml: is not a folder"


def test_the_target_exists(out: Path) -> None:
    assert run("restore", "out", "--task", "b", "-q").code == 0
    assert error("out", "--task", "b") == (
        "error: out-b: exists; choose another target, or allow it to be replaced with --overwrite"
    )
    assert error("out", "--task", "b", "--out", "out", "--overwrite") == (
        "error: out: out, which is read, is in this folder; choose another target"
    )
    assert error("out", "--task", "b", "--out", "a", "--overwrite") == (
        "error: a: was not written by merganser (it has no merge.json) and holds 'config.json'; move it away, or choose "
        "another target"
    )


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "file", ["sidecars/b/parts.safetensors", "sidecars/index.json", "model.safetensors", "config.json"]
)
def test_a_damaged_file(out: Path, file: str) -> None:
    flip(out / file)
    found = error("out", "--task", "b")
    assert re.fullmatch(
        rf"error: out/{file}: has sha256 [0-9a-f]{{64}}, was written with [0-9a-f]{{64}}; "
        "fetch the output again, or merge again",
        found,
    )
    assert not verify(out).ok
    # what is not read need not be sound
    assert run("restore", "out", "--task", "c").code == (0 if "/b/" in file else 2)


def test_a_missing_file(out: Path) -> None:
    (out / "sidecars/b/parts.safetensors").unlink()
    assert error("out", "--task", "b") == (
        "error: out/sidecars/b/parts.safetensors: is missing; fetch the output again, or merge again"
    )


def test_the_base_is_gone_or_elsewhere_or_another(out: Path) -> None:
    base = out.parent / "a"
    base.rename(out.parent / "moved")
    assert error("out", "--task", "b") == (
        f"error: out: b is restored with the base of the merge, {base}, and that was not found; say where it is with "
        f"--base (model '{base}' not found: no such file or folder)"
    )
    assert run("restore", "out", "--task", "b", "--base", "moved").code == 0
    shutil.rmtree(out.parent / "out-b")
    assert error("out", "--task", "b", "--base", "c") == (
        "error: c/model.safetensors: is not the base of this merge: tensor 'lm_head.weight' differs from the one "
        "that was merged; name the right base with --base"
    )
    write(out.parent / "small", state(0, layers=1))
    assert error("out", "--task", "b", "--base", "small") == (
        "error: small: is not the base of this merge: tensor 'model.layers.1.input_layernorm.weight' is missing; "
        "name it with --base"
    )
    assert error("out", "--task", "b", "--base", "nope/nope/nope") == (
        "error: model 'nope/nope/nope' not found: no such file or folder"
    )


def test_the_base_is_not_needed(near: Path) -> None:
    document = emr("b", "c") | {"merge_method": "twin"}
    assert run("merge", recipe(near / "r.yaml", document), "out", "-q").code == 0
    shutil.rmtree(near / "a")
    assert run("restore", "out", "--task", "b", "-q").code == 0


def rewrite(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the index, and its hash in the run record with it."""
    file, record = out / "sidecars/index.json", out / "merge.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    written = json.loads(record.read_text())
    for entry in written["outputs"]:
        if entry["file"] == "sidecars/index.json":
            entry |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    record.write_text(json.dumps(written))


DAMAGES: list[tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = [
    (lambda index: index.pop("tasks"), CheckpointError, r"index\.json: is damaged, or no index of sidecars: 'tasks'"),
    (lambda index: index.update(format=9), UnsupportedError, r"format 9 is of a later version; this one reads 1"),
    (
        lambda index: index.update(version=7),
        UnsupportedError,
        r"was written by emr version 7, here is version 1; restore",
    ),
    (lambda index: index.update(method="linear"), UnsupportedError, r"was written by linear version 1"),
    (
        lambda index: index["parameters"][0].update(rescale_by="x"),
        CheckpointError,
        r"rescale_by must be one of sum, mean",
    ),
    (lambda index: index["parameters"].clear(), CheckpointError, r"is damaged, or no index of sidecars"),
    (lambda index: index["tasks"][0]["parts"].clear(), CheckpointError, r"part '.*\.mask' is missing, must be uint8"),
    (lambda index: index["tasks"][0]["parts"].append("../a/x"), CheckpointError, r"file '\.\./a/x' would be outside"),
    (
        lambda index: index["tasks"][0]["files"].update(x="/etc/passwd"),
        CheckpointError,
        r"file '/etc/passwd' would be outside",
    ),
    (lambda index: index["tasks"][0]["files"].update(x="README"), CheckpointError, r"does not name 'README' among the"),
    (
        lambda index: index["tasks"][0]["files"].update(x=3),
        CheckpointError,
        r"the name of a file must be a text, found 3",
    ),
    (lambda index: index["tasks"][0]["files"].update({"C:\\x": "README"}), CheckpointError, r"would be outside"),
    (
        lambda index: index["tensors"].update({"more.weight": {"dtypes": "float32", "kept": "merged"}}),
        CheckpointError,
        r"tensor 'more\.weight' is missing",
    ),
    (lambda index: index["tensors"]["model.norm.weight"].update(dtypes="float77"), CheckpointError, r"'float77'"),
    (lambda index: index["tensors"]["model.norm.weight"].update(base="x"), CheckpointError, r"tensor 'x' is missing"),
    (lambda index: index["tensors"]["model.norm.weight"].update(xxh3_128="00"), CheckpointError, r"is not the base of"),
    (
        lambda index: index["tensors"]["model.norm.weight"].update(kept="own"),
        CheckpointError,
        r"norm\.weight\.own' is m",
    ),
]


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "merge.json"])
def test_a_file_may_not_take_the_place_of_what_is_restored(name: str, out: Path) -> None:
    rewrite(out, lambda index: index["tasks"][0]["files"].update({name: "config.json"}))
    with pytest.raises(CheckpointError, match=rf"file '{name}' would take the place of what is restored"):
        restore(out, "b")


@pytest.mark.parametrize(("change", "kind", "message"), DAMAGES)
def test_a_wrong_index(out: Path, change: Callable[[dict[str, Any]], Any], kind: type[Exception], message: str) -> None:
    rewrite(out, change)
    with pytest.raises(kind, match=message):
        restore(out, "b")
    assert "out-b" not in names(out.parent)
    assert ".out-b.merging" not in names(out.parent)


def test_a_record_that_says_nothing_of_tasks(out: Path) -> None:
    record = json.loads((out / "merge.json").read_text())
    for sidecars, message in (
        ([], r"merge\.json: sidecars: must be an object, found \[\]"),
        ({}, "sidecars: has no 'tasks'"),
        ({"tasks": 3}, r"sidecars\.tasks: must be a list"),
        ({"tasks": [3]}, r"sidecars\.tasks\[0\]: must be an object"),
        ({"tasks": [{"name": 3}]}, r"sidecars\.tasks\[0\]\.name: must be a text"),
        ({"tasks": [{"name": "b", "error": "x"}]}, r"sidecars\.tasks\[0\]\.error: must be a finite number"),
    ):
        (out / "merge.json").write_text(json.dumps(record | {"sidecars": sidecars}))
        with pytest.raises(CheckpointError, match=message):
            restore(out, "b")
    (out / "merge.json").write_text(json.dumps({"outputs": record["outputs"]}))
    with pytest.raises(NotFoundError, match="out: has no sidecars: what wrote it stores nothing for single tasks"):
        restore(out, "b")


def test_files_of_a_task_stay_inside_of_its_folder(out: Path) -> None:
    rewrite(out, lambda index: index["tasks"][0]["files"].update({"../../escaped": "config.json"}))
    with pytest.raises(CheckpointError, match=r"is damaged, or no index of sidecars: file '../../escaped'"):
        restore(out, "b")
    assert not (out.parent.parent / "escaped").exists()


NAMES = ["../m1", "a/b", "/etc/cron.d/x", "..", ".hidden", "-x", "", "a\\b", "a\0b", "a\nb", "\ud800", 3, None, ["b"]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wanted", ["own", "other"])
def test_names_of_tasks_are_names_of_folders(name: Any, wanted: str, out: Path) -> None:
    rewrite(out, lambda index: index["tasks"][0].update(name=name))
    before = names(out.parent)
    with pytest.raises(CheckpointError, match="must be usable as the name of a folder: letters, digits"):
        restore(out, str(name) if wanted == "own" else "c")
    assert names(out.parent) == before


@pytest.mark.parametrize("task", ["../m1", "a/b", "/etc/x"])
def test_a_task_that_is_not_there_makes_no_folder(task: str, out: Path) -> None:
    with pytest.raises(NotFoundError, match="no task"):
        restore(out, task)


def test_a_model_and_its_files_are_not_read_from_elsewhere(out: Path) -> None:
    (out.parent / "secret.json").write_text("{}")
    rewrite(out, lambda index: index["tasks"][0]["files"].update({"tokenizer.json": "../secret.json"}))
    with ExitStack() as stack, pytest.raises(CheckpointError, match=r"file '\.\./secret\.json' would be outside"):
        open_source(f"{out}#b", stack)
    rewrite(out, lambda index: index["tasks"][0]["files"].update({"tokenizer.json": "sidecars/b/x.json"}))
    (out / "sidecars/b/x.json").symlink_to("../../../secret.json")
    with ExitStack() as stack, pytest.raises(CheckpointError, match="is a link that leaves the checkpoint's folder"):
        open_source(f"{out}#b", stack)
    with pytest.raises(CheckpointError, match=r"does not name 'sidecars/b/x\.json' among the files"):
        restore(out, "b")


def test_verify_looks_into_the_sidecars(out: Path) -> None:
    assert run("verify", "out").code == 0
    shutil.copy(out / "model.safetensors", out / "sidecars/b/more.safetensors")
    flip(out / "sidecars/c/parts.safetensors")
    found = run("verify", "out")
    assert found.code == 2
    lines = dict(line.split(": ", 1) for line in found.out.splitlines())
    assert lines["sidecars/b/more.safetensors"] == "is new: it was not written by this merge, and loading may read it"
    assert lines["sidecars/c/parts.safetensors"].startswith("has sha256 ")


def test_progress_ends_at_all_bytes(out: Path) -> None:
    told: list[tuple[int, int]] = []
    restore(out, "b", progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    header = 8 + int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little")
    assert told[-1][1] - told[-1][0] == header


def test_a_merge_says_what_it_keeps(near: Path) -> None:
    found = run("merge", recipe(near / "r.yaml", emr("b", "c")), "out")
    assert found.code == 0
    b, c = json.loads((near / "out/merge.json").read_text())["sidecars"]["tasks"]
    # after the figures, the census, the length of the task vector, and what was written
    lines = found.out.splitlines()[2:]
    assert lines[2] == "keeps 2 tasks; they are restored with the base, with a relative error"
    header = ["task", "size", "of the model", "of its task vector", "of its worst tensor"]
    assert re.split(r"  +", lines[3].strip()) == header
    for line, task in zip(lines[4:6], (b, c), strict=True):
        worst = f"{task['worst']['error']:.3g} ({task['worst']['tensor']})"
        expected = [f"{task['bytes'] / 1000:.2f} KB", f"{100 * task['share']:.3g}% of a copy", f"{task['error']:.3g}"]
        assert re.split(r"  +", line.strip()) == [task["name"], *expected, f"{task['error_of_task_vector']:.3g}", worst]
    assert lines[7] == "restore:   merganser restore out --task b"


def test_a_plan_says_what_will_be_kept(near: Path) -> None:
    document = emr("b", "c") | {"merge_method": "rmm", "parameters": {"rank": 2}}
    found = run("plan", recipe(near / "r.yaml", document))
    lines = found.out.splitlines()
    start = lines.index("keeps")
    assert [re.split(r"  +", line.strip())[:2] for line in lines[start + 1 : start + 4]] == [
        ["sidecars/b", "b"],
        ["sidecars/c", "c"],
        ["sidecars/shared", "all"],
    ]
    assert lines[start + 4] == "expects"
    assert re.search(
        r"^  sidecars     [0-9.]+ KB read, [0-9.]+ KB written, to be restored with the base$", found.out, re.M
    )
    planned = run("plan", "r.yaml", "--json").json["stages"][0]["sidecars"]
    assert run("merge", "r.yaml", "out").code == 0
    parts = {path.parent.name: path.stat().st_size for path in (near / "out/sidecars").glob("*/parts.safetensors")}
    assert {task["name"]: task["bytes"] for task in planned["tasks"]} == parts
    assert planned["shared_bytes"] == (near / "out/sidecars/shared.safetensors").stat().st_size
