"""A small Hub on this machine, which huggingface_hub talks to in place of the real one; it can misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from merganser.checkpoint.ranges import fetch

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_thisIsASecretThatMustNotBeShown"
_REVISIONS = ("main", "v1", SHA)


@dataclass
class Answer:
    """What a server answers; `sent` bytes of the body, if it is cut."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    sent: int | None = None


class Hub:
    """What the Hub answers for the models under a folder, and which files were fetched from it.

    Attributes:
        fetched: Names of the files of which some or all bytes were asked for.
        ranges: Byte ranges of weight files that were answered: name, first byte, and the one after the last.
        refusal: Status and error code of every answer.
        faults: What goes wrong with the next answers to ranges: "ok", "503", "cut", "hang up", or a name of `_spoilt`.
        redirects: Whether weights are redirected to another host, as large files are.
        authorised: Of every request to that host, whether it had a token.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        self.ranges: list[tuple[str, int, int]] = []
        self.revisions: set[str] = set()
        self.refusal: tuple[int, str] | None = None
        self.faults: deque[str] = deque()
        self.always: str | None = None
        self.redirects = False
        self.authorised: list[bool] = []
        self.address = ""
        self._lock = threading.Lock()

    def answer(self, path: str, wanted: str | None = None, token: bool = False) -> Answer:
        """Answer a request for a path, with the header Range."""
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        if parts[0] == "contents":
            self.authorised.append(token)
            return self.content("/".join(parts[3:]), self.files("/".join(parts[1:3])), wanted, own_etag=True)
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        model, verb, revision = "/".join(parts[:2]), *(parts[2:4] or ["revision", "main"])
        if self.refusal is not None:
            status, code = self.refusal
            return Answer(status, {"X-Error-Code": code, "X-Error-Message": f"token {TOKEN}"}, b"{}")
        if not (self.folder / model).is_dir():
            return Answer(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        if revision not in _REVISIONS:
            return Answer(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        self.revisions.add(revision)
        files = self.files(model)
        if verb == "resolve":
            name = "/".join(parts[4:])
            if self.redirects and name.endswith(".safetensors") and name in files:
                linked = {
                    "X-Linked-Etag": f'"{self.oid(files[name])}"',
                    "X-Linked-Size": str(files[name].stat().st_size),
                }
                place = f"{self.address.replace('127.0.0.1', 'localhost')}/contents/{model}/{name}?signature=x"
                return Answer(302, {"Location": place, "X-Repo-Commit": SHA, **linked})
            return self.content(name, files, wanted)
        if verb == "tree":
            listing = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": self.oid(path)}
                for name, path in files.items()
            ]
            return Answer(200, {}, json.dumps(listing).encode())
        siblings = [{"rfilename": name} for name in files]
        info = {"id": model, "sha": SHA, "siblings": siblings, "tags": [], "private": False}
        return Answer(200, {}, json.dumps(info).encode())

    def files(self, model: str) -> dict[str, Path]:
        """Return the files of a model."""
        found = {path.relative_to(self.folder / model).as_posix(): path for path in (self.folder / model).rglob("*")}
        return {name: path for name, path in found.items() if path.is_file()}

    def content(self, name: str, files: dict[str, Path], wanted: str | None, *, own_etag: bool = False) -> Answer:
        """Answer with a file, or a range of it."""
        if name not in files:
            return Answer(404, {"X-Error-Code": "EntryNotFound"})
        self.fetched.append(name)
        data = files[name].read_bytes()
        etag = f'"of-contents-{len(data)}"' if own_etag else f'"{self.oid(files[name])}"'
        headers = {"X-Repo-Commit": SHA, "ETag": etag}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
        if match is None:
            return Answer(200, headers, data)
        start, end = int(match[1]), int(match[2]) + 1
        with self._lock:
            fault = self.faults.popleft() if self.faults else self.always or "ok"
        if start >= len(data):
            return Answer(416, {"Content-Range": f"bytes */{len(data)}"})
        part = data[start:end]
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        if fault in ("ok", "cut"):
            self.ranges.append((name, start, end))
        return self._spoilt(fault, Answer(206, headers, part), data)

    def _spoilt(self, fault: str, answer: Answer, data: bytes) -> Answer:
        """Return what a server with a fault answers."""
        size, headers, whole = (
            len(data),
            answer.headers,
            {k: v for k, v in answer.headers.items() if k != "Content-Range"},
        )
        faulty = {
            "ok": answer,
            "cut": Answer(206, headers, answer.body, sent=len(answer.body) // 2),
            "hang up": Answer(206, headers, answer.body, sent=-1),
            "503": Answer(503, {}),
            "429": Answer(429, {}),
            "401": Answer(401, {"X-Error-Code": "RepoNotFound"}),
            "403": Answer(403, {"X-Error-Code": "GatedRepo"}),
            "404": Answer(404, {"X-Error-Code": "EntryNotFound"}),
            "416": Answer(416, {"Content-Range": f"bytes */{size}"}),
            "ignores ranges": Answer(200, whole, data),
            "no Content-Range": Answer(206, whole, answer.body),
            "another range": Answer(206, {**headers, "Content-Range": f"bytes 1-{len(answer.body)}/{size}"}, answer.body),
            "no numbers": Answer(206, {**headers, "Content-Range": "bytes many-more/all"}, answer.body),
            "another size": Answer(206, {**headers, "Content-Range": headers["Content-Range"].replace(f"/{size}", "/99")}, answer.body),
            "too long": Answer(206, headers, answer.body + b"more"),
            "another ETag": Answer(206, {**headers, "ETag": '"other"'}, answer.body),
        }  # fmt: skip
        return faulty[fault]

    @staticmethod
    def oid(path: Path) -> str:
        """Return the hash that stands for a file."""
        return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Yield a Hub that serves the models under a folder."""
    hub = Hub(folder)
    folder.mkdir(exist_ok=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            token = "Authorization" in self.headers
            answer = hub.answer(self.path, self.headers.get("Range"), token)
            if answer.sent == -1:
                return
            self.send_response(answer.status)
            for key, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(answer.body[: answer.sent])

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(fetch, "_WAIT", 0.0)
    disable_progress_bars()
    try:
        yield hub
    finally:
        enable_progress_bars()
        close_session()
        server.shutdown()
        thread.join()
        server.server_close()
