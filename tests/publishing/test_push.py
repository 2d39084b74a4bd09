"""`merganser push`: what would be uploaded, the card, licences of inputs, and the upload, to a client that is not the Hub's."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

from merganser.checkpoint import folder as opening
from merganser.engine.merge import merge
from merganser.publishing import hub
from merganser.publishing.places import hide
from merganser.record import verify
from tests.cli.tiny import linear, names, run, state, write
from tests.making import read_json


class Api:
    """Stands for the client of the Hub."""

    def __init__(self) -> None:
        self.licences: dict[str, str | None] = {}
        self.files: list[str] | None = None
        self.created: dict[str, Any] = {}
        self.commits: list[dict[str, Path | bytes]] = []
        self.error: Exception | None = None

    def model_info(self, model: str, **_: Any) -> Any:
        if model not in self.licences:
            raise RepositoryNotFoundError("no", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]
        licence = self.licences[model]
        return SimpleNamespace(tags=["merge", *([f"license:{licence}"] if licence else [])])

    def repo_exists(self, repo: str) -> bool:
        return self.files is not None

    def list_repo_files(self, repo: str) -> list[str]:
        assert self.files is not None
        return self.files

    def create_repo(self, repo: str, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.created = {"repo": repo, **options}

    def create_commit(self, repo: str, operations: list[CommitOperationAdd], **_: Any) -> Any:
        self.commits.append(
            {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() if isinstance(each.path_or_fileobj, str)
             else each.path_or_fileobj for each in operations}  # type: ignore[misc]
        )  # fmt: skip
        return SimpleNamespace(commit_url=f"address of {repo}")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    made = Api()
    monkeypatch.setattr(hub, "make_api", lambda: made)
    return made


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: Api) -> Path:
    """A merge of a folder and a model of the Hub."""
    monkeypatch.chdir(tmp_path)
    own = write(tmp_path / "models" / "own", state(0))
    (own / "README.md").write_text("---\nlicense: MIT\n---\n# Mine\n")
    cached = write(Path("cache") / "theirs", state(1))
    monkeypatch.setattr(opening, "snapshot", lambda model, **_: cached)
    api.licences = {"org/theirs": "mit"}
    return merge(linear("models/own", "org/theirs"), "out").out


def test_a_dry_run_uploads_nothing(out: Path, api: Api) -> None:
    before = names(out)
    (out / "notes.txt").write_text("mine")
    found = run("push", out, "me/merged")
    assert found.code == 0, found.err
    assert found.out.startswith("out → me/merged · 5 files, ")
    assert "private if it is created" in found.out
    assert "not written by the merge, and not uploaded: notes.txt" in found.out
    assert "own         mit      its README.md" in found.out
    assert "org/theirs  mit      its page on the Hub" in found.out
    assert found.out.endswith("nothing was uploaded; add --yes to do it\n")
    assert found.err == ""
    assert (api.created, api.commits) == ({}, [])
    assert names(out) == sorted([*before, "notes.txt"])


def test_what_is_uploaded_can_be_verified(out: Path, api: Api, tmp_path: Path) -> None:
    written = (out / "README.md").read_text()
    found = run("push", out, "me/merged", "--yes", "--json")
    assert found.code == 0, found.err
    assert found.json["uploaded"] == "address of me/merged"
    assert api.created == {"repo": "me/merged", "private": True, "exist_ok": True, "repo_type": "model"}
    (commit,) = api.commits
    assert sorted(commit) == sorted(file["name"] for file in found.json["files"]) == names(out)
    sizes = {file["name"]: file["bytes"] for file in found.json["files"]}
    assert sizes == {name: len(data) for name, data in commit.items()}  # type: ignore[arg-type]
    copy = tmp_path / "downloaded"
    copy.mkdir()
    for name, data in commit.items():
        assert isinstance(data, bytes)
        (copy / name).write_bytes(data)
    assert verify(copy).ok
    card = (copy / "README.md").read_text()
    top = yaml.safe_load(card.split("---\n")[1])
    assert top["base_model"] == ["org/theirs"]
    assert (top["base_model_relation"], top["license"]) == ("merge", "mit")
    assert "merge_method: linear" in card
    assert card.endswith("| own | mit | its README.md |\n| org/theirs | mit | its page on the Hub |\n")
    assert (out / "README.md").read_text() == written


def test_licences_that_differ_or_are_not_known(out: Path, api: Api) -> None:
    api.licences = {"org/theirs": "cc-by-nc-4.0"}
    found = run("push", out, "me/merged", "--yes", "--public")
    assert found.code == 0
    assert found.err == (
        "warning: the inputs have different licences (cc-by-nc-4.0, mit): all of their terms apply to the merge\n"
        "warning: the card states no licence; give one with --license\n"
    )
    assert api.created["private"] is False
    assert b"license:" not in api.commits[0]["README.md"].split(b"---\n")[1]  # type: ignore[union-attr]
    api.licences = {}
    shutil.rmtree("models")
    found = run("push", out, "me/merged", "--license", "cc-by-4.0")
    assert "own         not known  the folder is no longer there" in found.out
    assert "the Hub could not be asked: there is no such repository" in found.out
    assert "license: cc-by-4.0" in found.out
    assert found.err == (
        "warning: the licence of own, org/theirs is not known: find out whether it allows a merge to be published\n"
    )


def test_no_path_of_this_machine_is_uploaded(tmp_path: Path, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the card, the record, the index of sidecars and the config of an adapter; what is uploaded can be verified."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    places = [tmp_path / "home" / "anna" / name for name in ("x/base", "x/tune", 'y/tüne "2"')]
    for seed, place in enumerate(places):
        place.mkdir(parents=True)
        write(place, state(seed))
    base, *models = map(str, places)
    recipe = {"merge_method": "tall_masks", "base_model": base, "models": [{"model": own} for own in models]}
    noted = f"# as in {tmp_path}/home/anna/notes\n{yaml.safe_dump(recipe, allow_unicode=True)}"
    (tmp_path / "recipe.yaml").write_text(noted)
    out = merge(str(tmp_path / "recipe.yaml"), tmp_path / "out").out
    before = {name: (out / name).read_bytes() for name in names(out) if (out / name).is_file()}
    assert str(tmp_path).encode() in before["merge.json"]
    found = run("push", out, "me/merged", "--yes", "--json")
    assert found.code == 0, found.err
    assert found.json["changed"] == ["sidecars/index.json"]
    assert {name: (out / name).read_bytes() for name in before} == before
    (commit,) = api.commits
    copy = tmp_path / "downloaded"
    for name, data in commit.items():
        content = data if isinstance(data, bytes) else data.read_bytes()
        if not name.endswith(".safetensors"):
            assert str(tmp_path) not in content.decode(), name
            assert "anna" not in content.decode().replace("~/anna/notes", ""), name
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    assert verify(copy).ok
    record = read_json(copy, "merge.json")
    assert record["models"] == ["base", "tune", 'tüne "2"']
    assert [entry["path"] for entry in record["inputs"]] == [f"{own}/model.safetensors" for own in record["models"]]
    loaded = yaml.safe_load(record["recipe"])
    assert [own["model"] for own in loaded["models"]] == ["tune", 'tüne "2"']
    assert read_json(copy / "sidecars", "index.json")["base"]["path"] == "base"


def test_what_replaces_a_path() -> None:
    hidden = hide(["/a/x/base", "/a/x/base/model.safetensors", "/b/base", "/a/tune"])
    text = "/a/x/base+/a/tune /b/base /a/x/base-2 base.safetensors"
    assert hidden(text) == "x/base+tune b/base x/base-2 base.safetensors"
    assert hidden("/a/x/base/model.safetensors") == "x/base/model.safetensors"
    assert hide([])(text) == text


REFUSED: list[tuple[list[str], str]] = [
    (["out", "merged"], "REPO must be the id of a model repository, as in owner/name, got 'merged'"),
    (["out", "../x"], "REPO must be the id"),
    (["out", "me/merged", "--license", "My Licence"], "--license must be an id of the Hub"),
    (["models", "me/merged"], "has no merge.json"),
    (["missing", "me/merged"], "no such folder"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refused(out: Path, api: Api, arguments: list[str], message: str) -> None:
    found = run("push", *arguments, "--yes")
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert api.commits == []


def test_what_was_changed_or_would_mix_is_refused(out: Path, api: Api) -> None:
    api.files = [".gitattributes", "README.md", "config.json", "model-00001-of-00002.safetensors"]
    found = run("push", out, "me/merged", "--yes", "-q")
    assert (found.code, found.out) == (2, "")
    assert "me/merged: holds model-00001-of-00002.safetensors, which programs would load beside" in found.err
    api.files, api.error = None, LocalTokenNotFoundError("no token")
    found = run("push", out, "me/merged", "--yes", "-q")
    assert (found.code, found.err) == (
        2,
        "error: me/merged: not uploaded: nobody is logged in here; run `hf auth login`\n",
    )
    config = read_json(out, "config.json")
    (out / "config.json").write_text(str(config))
    found = run("push", out, "me/merged", "--yes")
    assert found.code == 2
    assert "config.json: not as the merge wrote it" in found.err
    assert api.commits == []
