"""`--stream`: models of the Hub merged, described and compared without a copy on the disk; the Hub misbehaves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from merganser.checkpoint.formats import safetensors
from merganser.checkpoint.ranges import fetch, pieces
from merganser.inspection import side_by_side
from merganser.record import verify
from tests.cli.tiny import CONFIG, linear, names, recipe, run, state, write
from tests.engine.interrupting import shrink_blocks
from tests.hub import SHA, TOKEN, Hub, serving
from tests.making import read_files, read_json, write_model

BIG = {"vocab": 600, "width": 8}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Models org/a (one file), org/b (three files) and here/c (a folder) in the current folder."""
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "hub", monkeypatch) as found:
        write(tmp_path / "hub" / "org" / "a", state(0, **BIG), vocab_size=600)
        write_model(tmp_path / "hub" / "org" / "b", state(1, **BIG), CONFIG | {"vocab_size": 600}, shards=3)
        write(tmp_path / "here" / "c", state(2, **BIG), vocab_size=600)
        recipe(tmp_path / "r.yaml", linear("org/a", "org/b", "here/c"))
        yield found


def stream(*arguments: object, verb: str = "merge") -> Any:
    return run(verb, *arguments, "--stream", "--cache-dir", "cache", "--threads", 2)


def weights_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".safetensors") or path.stat().st_size > 5_000]


def assert_same(folder: Path) -> None:
    """Compare the output with that of a merge of downloaded models; the card has its name as a title."""
    one, other = (read_files(folder / name) for name in ("out", "whole"))
    assert {**one, "README.md": b""} == {**other, "README.md": b""}


def test_nothing_is_kept_on_the_disk_and_the_bytes_are_the_same(hub: Hub, tmp_path: Path) -> None:
    planned = stream("r.yaml", "--json", verb="plan").json["stages"][0]
    headers = sum(end - start for _, start, end in hub.ranges)
    a, b = (entry["bytes"] for entry in planned["inputs"][:2])
    assert [entry["fetched"] for entry in planned["inputs"]] == [a, b, 0]
    hub.ranges.clear()
    found = stream("r.yaml", "out")
    assert found.code == 0, found.err
    # the headers are read once more
    assert sum(end - start for _, start, end in hub.ranges) == headers + a + b
    assert weights_in(tmp_path / "cache") == []
    assert verify(tmp_path / "out").ok
    inputs = read_json(tmp_path / "out", "merge.json")["inputs"]
    size = (hub.folder / "org" / "a" / "model.safetensors").stat().st_size
    assert inputs[0]["path"] == f"hf://org/a@{SHA}/model.safetensors"
    assert (inputs[0]["bytes"], inputs[0]["etag"]) == (size, Hub.oid(hub.folder / "org" / "a" / "model.safetensors"))
    whole = run("merge", "r.yaml", "whole", "--cache-dir", "other", "--threads", 2)
    assert whole.code == 0, whole.err
    assert_same(tmp_path)
    fetched = read_json(tmp_path / "whole", "merge.json")["inputs"]
    assert [each["xxh3_128_of_tensors"] for each in inputs] == [each["xxh3_128_of_tensors"] for each in fetched]
    # what is in the cache is read from there
    hub.ranges.clear()
    again = run("plan", "r.yaml", "--stream", "--cache-dir", "other", "--json")
    assert [entry["fetched"] for entry in again.json["stages"][0]["inputs"]] == [0, 0, 0]
    assert hub.ranges == []


def test_the_plan_says_what_is_fetched(hub: Hub) -> None:
    found = stream("r.yaml", verb="plan")
    assert (found.code, found.err) == (0, "")
    lines = found.out.splitlines()
    assert lines[2:4] == [
        "  model  org/a    1 file  21.3 KB  19 tensors  bfloat16 (21.3 KB fetched by ranges)",
        "  model  org/b   3 files  21.3 KB  19 tensors  bfloat16 (21.3 KB fetched by ranges)",
    ]
    assert "  fetched      42.7 KB from the Hub by ranges; its time is not counted below" in lines
    recipe(Path("t.yaml"), {"merge_method": "ties", "base_model": "org/a", "models": [
        {"model": "org/b", "parameters": {"weight": 1.0, "density": 0.5}}]})  # fmt: skip
    found = stream("t.yaml", verb="plan")
    assert found.code == 0, found.err
    assert " from the Hub by ranges at most, as every pass that does not fit into memory fetches again; " in found.out


def test_several_passes_and_pieces(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1 << 10)
    models = [{"model": each, "parameters": {"weight": 1.0, "density": 0.5}} for each in ("org/b", "here/c")]
    recipe(Path("t.yaml"), {"merge_method": "ties", "base_model": "org/a", "models": models})
    found = stream("t.yaml", "out")
    assert found.code == 0, found.err
    assert run("merge", "t.yaml", "whole", "--cache-dir", "other").code == 0
    assert_same(tmp_path)


def test_quantised_weights_and_adapters(hub: Hub, tmp_path: Path) -> None:
    from tests.checkpoint.making import write_shards

    own = state(3, **BIG)
    name = "model.layers.0.mlp.up_proj.weight"
    own[name] = torch.zeros(16, 8, dtype=torch.float8_e4m3fn)
    own[f"{name}_scale_inv"] = torch.ones(1, 1)
    quantised = hub.folder / "org" / "q"
    write(quantised, own, vocab_size=600, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    adapter = {f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight": torch.ones(*shape)
               for x, shape in (("A", (2, 8)), ("B", (16, 2)))}  # fmt: skip
    write_shards(tmp_path / "lora", {"adapter_model.safetensors": adapter})
    (tmp_path / "lora" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}'
    )
    recipe(Path("q.yaml"), linear("org/a+lora", "org/q", quantised="allow"))
    found = stream("q.yaml", "out")
    assert found.code == 0, found.err
    assert run("merge", "q.yaml", "whole", "--cache-dir", "other").code == 0
    assert_same(tmp_path)
    assert weights_in(tmp_path / "cache") == []


def test_large_files_are_redirected(hub: Hub, tmp_path: Path) -> None:
    hub.redirects = True
    found = stream("r.yaml", "out")
    assert found.code == 0, found.err
    # the other host has ETags of its own, and gets no token
    assert set(hub.authorised) == {False}
    assert run("merge", "r.yaml", "whole", "--cache-dir", "other").code == 0
    assert_same(tmp_path)


def test_what_breaks_is_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    for fault in ("cut", "hang up", "503", "429"):
        hub.faults.extend([fault, fault, "ok"])
    found = stream("r.yaml", "out")
    assert found.code == 0, found.err
    assert not hub.faults
    assert verify(tmp_path / "out").ok


def test_a_run_that_lost_its_connection_continues(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_TRIES", 1)
    shrink_blocks(monkeypatch)
    hub.faults.extend(["ok"] * 12)
    hub.always = "hang up"
    found = stream("r.yaml", "out", "-q")
    assert found.code == 2
    last = found.err.splitlines()[-1]
    assert last.startswith("error: model 'org/")
    assert last.endswith("in 2 tries (RemoteProtocolError); run the same command again: a merge continues where it was")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.merging").exists()
    hub.always = None
    hub.ranges.clear()
    found = stream("r.yaml", "out")
    assert found.code == 0, found.err
    assert read_json(tmp_path / "out", "merge.json")["continued"] is True
    assert not (tmp_path / ".out.merging").exists()
    assert run("merge", "r.yaml", "whole", "--cache-dir", "other").code == 0
    assert_same(tmp_path)


MALFORMED = {
    "ignores ranges": "the server ignores the range that is asked for (it answers with status 200 and the whole file)",
    "no Content-Range": "answered with another range than bytes 0 to",
    "another range": "answered with another range than bytes 0 to",
    "no numbers": "Content-Range 'bytes many-more/all'",
    "another size": "was changed on the Hub while it was read (it has 99 bytes now, and had",
    "too long": "the server sent more than the range that was asked for",
    "416": "was changed on the Hub while it was read (it has no byte 0 any more); run the command again",
    "401": "model 'org/a' not found: no such folder, and the Hub has no such model, or it is private",
    "403": "model 'org/a': access is restricted; accept its terms on its page, then run `hf auth login`",
    "404": "model 'org/a': model.safetensors: the Hub has no such file at commit 0123456789ab",
}


@pytest.mark.parametrize(
    ("fault", "late"),
    [*((fault, False) for fault in MALFORMED), ("ignores ranges", True), ("416", True), ("403", True)],
)
def test_malformed_answers(fault: str, late: bool, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a header is read, and in the middle of the merge."""
    recipe(Path("r.yaml"), linear("org/a", "here/c"))
    if late:
        hub.faults.append("ok")
    hub.always = fault
    found = stream("r.yaml", "out")
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    first, _, second = MALFORMED[fault].partition(" 0 ")
    assert first in found.err
    assert second in found.err
    assert late or MALFORMED[fault] in found.err
    assert TOKEN not in found.err
    assert names(tmp_path) == ["cache", "here", "hub", "r.yaml"]


def test_a_file_that_changes_is_noticed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ETag is another one, and the Hub says so, too."""
    file = hub.folder / "org" / "a" / "model.safetensors"
    answer, count = Hub.content, 0

    def content(self: Hub, name: str, *given: Any, **more: Any) -> Any:
        nonlocal count
        count += name == file.name
        if count == 3:
            file.write_bytes(file.read_bytes()[:-1] + b"\x01")
        return answer(self, name, *given, **more)

    monkeypatch.setattr(Hub, "content", content)
    found = stream("r.yaml", "out")
    assert (found.code, found.out) == (2, "")
    assert found.err == (
        "error: model 'org/a': model.safetensors: was changed on the Hub while it was read (its contents are others now); run "
        "the command again\n"
    )
    assert "out" not in names(tmp_path)
    assert ".out.merging" not in names(tmp_path)


def test_what_cannot_be_streamed(hub: Hub) -> None:
    shutil.copytree(hub.folder / "org" / "a", hub.folder / "org" / "p")
    (hub.folder / "org" / "p" / "model.safetensors").unlink()
    torch.save(state(0), hub.folder / "org" / "p" / "pytorch_model.bin")
    base: dict[str, Any] = {"base_model": "org/a", "models": [{"model": "org/b", "parameters": {"weight": 1.0}}]}
    cases = [
        (linear("org/p", "org/a"), "pytorch_model.bin cannot be read by ranges, only safetensors can; leave --stream out"),
        ({"merge_method": "emr", "base_model": "org/a", "models": [{"model": "org/b"}]}, "--stream: emr reads its models again and again"),
        (linear("org/a", "org/b", align={"to": "org/a"}), "--stream: models are read once more to align them"),
        ({"merge_method": "fisher", **base, "data": {"files": ["x.txt"]}}, "--stream: the models are calibrated on data"),
    ]  # fmt: skip
    for document, message in cases:
        recipe(Path("x.yaml"), document)
        found = stream("x.yaml", "out")
        assert (found.code, found.out) == (2, "")
        assert message in found.err
    assert hub.ranges == []
    found = stream("r.yaml", "out", "--cluster", "local")
    assert found.code == 2
    assert "--stream: not with --cluster" in found.err


def test_without_a_network_the_cache_serves(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("plan", "r.yaml", "--cache-dir", "cache").code == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "fetched" not in stream("r.yaml", verb="plan").out
    shutil.rmtree(tmp_path / "cache")
    found = stream("r.yaml", verb="plan")
    assert found.code == 2
    assert "the cache does not have it, and the Hub cannot be reached" in found.err


def local(verb: str, *models: str) -> Any:
    """What the command finds in the folders of the same models."""
    return run(verb, *models, "--json").json


def requests(hub: Hub) -> int:
    found = len(hub.ranges)
    hub.ranges.clear()
    return found


def look(verb: str, *arguments: object) -> Any:
    found = run(verb, *arguments, "--stream", "--cache-dir", "cache", "--json")
    assert found.code == 0, found.err
    return found.json


def test_inspect_fetches_headers_alone(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the first request for a file asks for more than most headers have
    monkeypatch.setattr(safetensors, "_FIRST", 8)
    found = look("inspect", "org/b", "--tensors")
    folder = hub.folder / "org" / "b"
    assert sorted({name for name, _, _ in hub.ranges}) == sorted(path.name for path in folder.glob("*.safetensors"))
    for name, _, end in hub.ranges:
        data = (folder / name).read_bytes()
        assert end <= 8 + int.from_bytes(data[:8], "little")
    assert weights_in(tmp_path / "cache") == []
    expected = run("inspect", folder, "--tensors", "--json").json
    del expected["reference"], expected["path"], found["reference"], found["path"]
    assert found == expected


def test_diff_and_kinship_fetch_every_byte_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are smaller than what one request brings."""
    look("inspect", "org/a")
    look("inspect", "org/b")
    headers = requests(hub)
    monkeypatch.setattr(side_by_side, "BLOCK", 64)
    monkeypatch.setattr(pieces, "PIECE", 1 << 10)
    sizes = [tensor.numel() * tensor.element_size() for tensor in state(0, **BIG).values()]
    at_most = headers + 2 * sum(-(-size // 1024) for size in sizes)
    found = look("diff", "org/a", "org/b")
    assert sum(end - start for _, start, end in hub.ranges) > 2 * sum(sizes)
    assert requests(hub) == at_most
    expected = local("diff", str(hub.folder / "org" / "a"), str(hub.folder / "org" / "b"))
    assert {**found, "a": 0, "b": 0} == {**expected, "a": 0, "b": 0}
    found = look("inspect", "org/b", "here/c", "--base", "org/a")
    assert requests(hub) == at_most
    expected = local("inspect", str(hub.folder / "org" / "b"), "here/c", "--base", str(hub.folder / "org" / "a"))
    assert found["total"] == expected["total"]
    assert found["groups"] == expected["groups"]
    assert weights_in(tmp_path / "cache") == []


def test_looking_at_what_breaks(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_TRIES", 1)
    for arguments, good, message in (
        (["inspect", "org/a"], 0, "the Hub did not give byte 0 of"),
        (["diff", "org/a", "here/c"], 2, "the Hub did not give byte "),
        (["inspect", "org/a", "--base", "here/c"], 2, "the Hub did not give byte "),
    ):
        hub.always = None
        hub.faults.extend(["ok"] * good)
        hub.always = "hang up"
        found = run(*arguments, "--stream", "--cache-dir", "cache")
        assert (found.code, found.out) == (2, "")
        last = found.err.splitlines()[-1]
        assert message in last
        assert last.endswith("; run the same command again: a merge continues where it was")
        hub.faults.clear()
    assert names(tmp_path) == ["cache", "here", "hub", "r.yaml"]


def test_looking_at_what_cannot_be_streamed(hub: Hub) -> None:
    (hub.folder / "org" / "a" / "model.safetensors").unlink()
    torch.save(state(0), hub.folder / "org" / "a" / "pytorch_model.bin")
    for arguments in (["inspect", "org/a"], ["diff", "here/c", "org/a"], ["inspect", "org/b", "--base", "org/a"]):
        found = run(*arguments, "--stream", "--cache-dir", "cache")
        assert (found.code, found.out) == (2, "")
        assert found.err == (
            "error: model 'org/a': pytorch_model.bin cannot be read by ranges, only safetensors can; leave --stream out\n"
        )
    found = run("inspect", "here/c", "--seams", "--data", "r.yaml", "--stream")
    assert (found.code, found.out) == (2, "")
    assert found.err == "error: inspect: --stream is for inspecting without --seams; leave one of the two out\n"
