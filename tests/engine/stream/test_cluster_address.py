"""Addresses at which no Ray cluster answers are refused within seconds, before anything is written."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from merganser.engine.stream import cluster
from merganser.errors import MergeError


@contextmanager
def server(answer: bytes | None) -> Iterator[str]:
    """A server that takes one connection and sends an answer; None: it says nothing while the connection lasts."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                if answer is None:
                    # until the other side closes
                    connection.recv(1 << 16)
                else:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize("prefix", ["", "ray://"])
@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"SSH", None])
def test_a_server_that_is_not_ray(answer: bytes | None, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_SECONDS", 0.2)
    with (
        server(answer) as address,
        pytest.raises(MergeError, match=rf"^--cluster {prefix}127.*: no Ray cluster answers"),
    ):
        cluster._knock(prefix + address)


def test_a_server_of_grpc_is_left_to_ray() -> None:
    # an empty frame of settings, as every server of HTTP/2 sends first
    with server(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])) as address:
        cluster._knock(address)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999", "no.such.host.invalid:6379"])
def test_nothing_listens(address: str) -> None:
    with pytest.raises(MergeError, match="no Ray cluster answers there: "):
        cluster._knock(address)


@pytest.mark.parametrize("address", ["auto", "local", "somewhere", ""])
def test_what_is_no_host_and_port_is_left_to_ray(address: str) -> None:
    cluster._knock(address)


def test_what_ray_refuses_is_no_defect_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def full(value: object) -> None:
        raise ray.exceptions.ObjectStoreFullError("the store is full\nand more")

    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "put", full)
    with pytest.raises(MergeError, match=r"^--cluster: Ray cannot go on: .*the store is full$"):
        cluster.Cluster("auto").share(None)  # type: ignore[arg-type]


def test_a_failure_to_connect_is_no_defect_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def refuse(**_: object) -> None:
        raise ray.exceptions.AuthenticationError("no token")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(MergeError, match=r"no Ray cluster answers there: .*no token"):
        cluster.Cluster("auto")
