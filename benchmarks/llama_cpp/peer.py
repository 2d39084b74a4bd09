"""llama.cpp with its Python bindings, in a folder of its own: built from the source distribution of llama-cpp-python."""

import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merganser.checkpoint.formats.gguf.mixes import FILE_TYPES

VERSION = "0.3.36"

_OPTIONS = (
    *(
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=ON",
        "-DGGML_NATIVE=OFF",
        "-DLLAMA_BUILD_SERVER=OFF",
        "-DLLAMA_BUILD_APP=OFF",
    ),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_COMMON=OFF"),
    "-DCMAKE_CXX_FLAGS_RELEASE=-O2",
)
_SENTENCEPIECE = "sentencepiece>=0.1.98,<0.3.0"


class PeerError(RuntimeError):
    """llama.cpp is not there."""


class Peer:
    """llama.cpp as it was built.

    Args:
        place: Its folder.
    """

    def __init__(self, place: Path) -> None:
        self.source = place / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
        self.library = place / "build" / "bin"
        self.python = place / "python" / "bin" / "python"
        self.packages = place / "packages"
        self.converter = self.source / "convert_hf_to_gguf.py"
        for needed in (self.converter, self.library / "libllama.so", self.python):
            if not needed.exists():
                raise PeerError(
                    f"{needed}: not there; make it with scripts/bench llama-cpp setup (a compiler and cmake are needed, and "
                    "some ten minutes), or name its folder in MERGANSER_LLAMA_CPP"
                )

    def call(self, *arguments: str) -> str:
        """Run `inside.py` where llama.cpp's bindings are, and return what it prints."""
        environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(self.library)}
        script = Path(__file__).with_name("inside.py")
        return _run([str(self.python), str(script), *arguments], env=environment)

    def convert(self, model: Path, file: Path, kind: str) -> str:
        """Run llama.cpp's converter by the command of docs/formats.md, with the packages of this process."""
        command = [sys.executable, str(self.converter), str(model), "--outtype", kind, "--outfile", str(file)]
        # the converter tries SentencePiece first, whatever the tokenizer is
        return _run(command, cwd=self.source, env={**os.environ, "PYTHONPATH": str(self.packages)})

    def quantise(self, file: Path, out: Path, kind: str) -> None:
        """Quantise a file as `llama-quantize FILE OUT KIND` does."""
        self.call("file", str(file), str(out), str(FILE_TYPES[kind]))


def folder(cache: Path, given: Path | None = None) -> Path:
    """Return where it lies: as given, `$MERGANSER_LLAMA_CPP`, or in the benchmark's folder."""
    return given or Path(os.environ.get("MERGANSER_LLAMA_CPP") or cache / "llama-cpp")


def set_up(place: Path) -> None:
    """Fetch and build; what is there is left."""
    place.mkdir(parents=True, exist_ok=True)
    source = place / f"llama_cpp_python-{VERSION}"
    if not source.exists():
        fetch = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(place)]
        _run([sys.executable, "-m", "pip", *fetch, f"llama-cpp-python=={VERSION}"])
        with tarfile.open(next(place.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(place, filter="data")
    python = place / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(python)])
        options = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
        _run([str(python / "bin" / "python"), "-m", "pip", "install", "--quiet", str(source)], env=options)
    if not (place / "packages").exists():
        _run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                str(place / "packages"),
                _SENTENCEPIECE,
            ]
        )
    build = place / "build"
    _run(["cmake", "-S", str(source / "vendor" / "llama.cpp"), "-B", str(build), *_OPTIONS])
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2")
    _run(["cmake", "--build", str(build), "--target", "llama", "--parallel", jobs])
    Peer(place)


def _run(command: Sequence[str], **options: Any) -> str:
    """Run a command and return what it prints.

    Raises:
        PeerError: It failed.
    """
    answer = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if answer.returncode:
        end = "\n".join((answer.stdout + answer.stderr).splitlines()[-20:])
        raise PeerError(f"{' '.join(command)}: exit code {answer.returncode}\n{end}")
    return answer.stdout + answer.stderr
