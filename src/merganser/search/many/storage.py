"""Where trials are stored: a journal file, a database, or a server, by its address."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...errors import OutputError, UnsupportedError
from ...jsonfile import os_reason
from ...system import lock_within, open_binary, unlock

_SECONDS = 4.0
"""Seconds that a server has to take a connection."""
_PATIENCE = 60.0
"""Seconds to wait for what another process writes to the journal or the database."""
_PORTS = {
    "postgresql": 5432,
    "mysql": 3306,
    "mariadb": 3306,
    "mssql": 1433,
    "oracle": 1521,
    "redis": 6379,
    "grpc": 13000,
}
_FILES = ("sqlite",)
_BLOCK = 1 << 16


def shown(address: str) -> str:
    """Return an address without its password."""
    if "://" not in address:
        return address
    parts = urlsplit(address)
    if parts.password is None:
        return address
    return address.replace(f":{parts.password}@", ":***@", 1)


def open_storage(where: Path | str) -> Any:
    """Open what Optuna stores trials in.

    Args:
        where: The path of a journal, or an address: `sqlite:///FILE`, `postgresql://USER@HOST/NAME` and whatever else SQLAlchemy
            takes, `redis://HOST`, `grpc://HOST:PORT` of Optuna's proxy.

    Returns:
        A storage of Optuna.

    Raises:
        OutputError: Nothing answers there within seconds, or there is something else.
        UnsupportedError: The address is malformed, or needs a module that is not installed.
    """
    if isinstance(where, Path) or "://" not in where:
        text = str(where)
        kind = text.partition(":")[0]
        if kind in (*_PORTS, *_FILES) and text != kind and not Path(text).exists():
            raise UnsupportedError(f"storage {text}: an address begins with {kind}://; sqlite:///study.db is a file")
        return _open_journal(Path(text))
    scheme = where.partition("://")[0]
    kind = scheme.partition("+")[0].removesuffix("s" if scheme == "rediss" else "")
    if kind not in (*_PORTS, *_FILES):
        raise UnsupportedError(
            f"storage {shown(where)}: {kind}:// is not known; give the path of a journal, or one of sqlite:///FILE, "
            + ", ".join(f"{name}://" for name in _PORTS)
        )
    _require(kind)
    _knock(where, kind)
    if kind == "redis":
        return _open_redis(where)
    if kind == "grpc":
        return _open_grpc(where)
    return _open_database(where, kind)


def storage_errors() -> tuple[type[BaseException], ...]:
    """Return what a storage raises that cannot be read or written any more."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    found: list[type[BaseException]] = [OSError, StorageInternalError, SQLAlchemyError]
    for module, name in (("redis.exceptions", "RedisError"), ("grpc", "RpcError")):
        try:
            found.append(getattr(__import__(module, fromlist=[name]), name))
        except ImportError:
            continue
    return tuple(found)


def _require(kind: str) -> None:
    if kind not in ("redis", "grpc"):
        return
    package = {"redis": "redis", "grpc": "grpcio"}[kind]
    try:
        __import__(kind)
    except ImportError:
        raise UnsupportedError(
            f"storage: {kind}:// needs {package}, which is not installed: pip install {package}"
        ) from None


def _knock(address: str, kind: str) -> None:
    """Check that something takes connections at an address; clients would retry for minutes.

    Raises:
        OutputError: Nothing does.
        UnsupportedError: The address is malformed.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UnsupportedError(f"storage {address.partition('@')[2] or address}: is not an address: {error}") from None
    if kind in _FILES:
        if host:
            raise UnsupportedError(
                f"storage {shown(address)}: sqlite has no host; write sqlite:///FILE, with three slashes"
            )
        return
    if not host:
        raise UnsupportedError(f"storage {shown(address)}: names no host; write {kind}://HOST/...")
    try:
        socket.create_connection((host, port or _PORTS[kind]), timeout=_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise OutputError(
            f"storage {shown(address)}: nothing answers at {host}:{port or _PORTS[kind]}: {error}; start the database, or "
            "correct the address"
        ) from None


def _open_database(address: str, kind: str) -> Any:
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    # sqlite's own wait is five seconds, which many processes at once exceed
    more = {"connect_args": {"timeout": _PATIENCE}} if kind in _FILES else {}
    try:
        return RDBStorage(address, engine_kwargs=more)
    except ImportError as error:
        name = getattr(error.__cause__, "name", None) or "a module for this kind of database"
        raise UnsupportedError(f"storage {shown(address)}: needs {name}, which is not installed") from None
    except ArgumentError as error:
        raise UnsupportedError(f"storage {shown(address)}: is not an address: {error}") from None
    except (SQLAlchemyError, OSError, RuntimeError, ValueError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        raise OutputError(f"storage {shown(address)}: cannot be opened: {reason}") from None


def _open_redis(address: str) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalRedisBackend

    try:
        return JournalStorage(JournalRedisBackend(address))
    except storage_errors() as error:
        raise OutputError(f"storage {shown(address)}: cannot be opened: {error}") from None


def _open_grpc(address: str) -> Any:
    from optuna.storages import GrpcStorageProxy

    parts = urlsplit(address)
    return GrpcStorageProxy(host=parts.hostname or "", port=parts.port or _PORTS["grpc"])


def _open_journal(path: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    _check_journal(path)
    try:
        return JournalStorage(
            JournalFileBackend(
                str(path),
                lock_obj=_Lock(path),  # type: ignore[arg-type]
            )
        )
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path}: the journal of the study cannot be read: {error}") from None
    except OSError as error:
        raise OutputError(f"{path}: the journal of the study cannot be written: {os_reason(error)}") from None


def _check_journal(path: Path) -> None:
    """Refuse a file that is not a journal, before anything is written to it."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the path of a file")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}; make it first")
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            first = file.readline(_BLOCK)
        # half a line is what a process that was killed at once left
        if first.endswith(b"\n") and "op_code" not in json.loads(first):
            raise ValueError("its first line is not an entry of Optuna")
        if not first.endswith(b"\n") and not first.startswith(b'{"op_code"'[: len(first)]):
            raise ValueError("it is not a journal of Optuna")
    except (ValueError, TypeError) as error:
        raise OutputError(f"{path}: the journal of the study cannot be read: {error}") from None
    except OSError as error:
        raise OutputError(f"{path}: the journal of the study cannot be read: {os_reason(error)}") from None


class _Lock:
    """A lock of a journal, as Optuna takes one, which ends with its process; Optuna's own blocks the others for half a minute."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._other: Any = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        from optuna.storages.journal import JournalFileOpenLock

        self._descriptor = open_binary(self._path, os.O_RDWR | os.O_CREAT)
        self._other = None
        try:
            if lock_within(self._descriptor, _PATIENCE):
                _cut(self._descriptor)
            else:
                # a file system without locks
                self._other = JournalFileOpenLock(str(self._path))
                self._other.acquire()
        except BlockingIOError:
            os.close(self._descriptor)
            raise OutputError(
                f"{self._path}: another process holds its lock for more than {_PATIENCE:g} seconds; end it, or try again later"
            ) from None
        except BaseException:
            os.close(self._descriptor)
            raise
        return True

    def release(self) -> None:
        """Release it."""
        if self._other is not None:
            self._other.release()
        unlock(self._descriptor)
        os.close(self._descriptor)


def _cut(descriptor: int) -> None:
    """Remove half a line at the end of a locked file, of a process that was killed while it wrote."""
    end = size = os.lseek(descriptor, 0, os.SEEK_END)
    while end:
        start = max(end - _BLOCK, 0)
        os.lseek(descriptor, start, os.SEEK_SET)
        found = os.read(descriptor, end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
