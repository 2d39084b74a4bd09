"""What is measured: every method; a memory limit; many tensors; the plan of a large model; scaling; kills."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from .checkpoints import Models, Shape, make_headers, settings_of, shape_of, tiny_of
from .measure import spread
from .session import Report, Session, bars

# Llama 3 70B, with the names of Qwen2
_SHAPE_70B = Shape(8192, 28672, 80, 128256, heads=64, kv_heads=8)


def methods(session: Session, report: Report, config: Mapping[str, Any]) -> None:
    """Measure every method on models of one size."""
    models, tiny = _pair(session, config["size"], config["models"])
    for name in config["methods"]:
        report.add({"method": name, **bars(name)}, partial(session.merge, name, models, tiny))


def max_memory(session: Session, report: Report, config: Mapping[str, Any]) -> None:
    """Measure what a memory limit costs in time, and whether it is kept."""
    models, tiny = _pair(session, config["size"], config["models"])
    limit = config["limit"]

    def measure(name: str) -> dict[str, Any]:
        free = session.merge(name, models, tiny)
        limited = session.merge(name, models, tiny, ["--max-memory", limit])
        ratio = limited["above_startup"]["median"] / free["above_startup"]["median"]
        kept = limited["peak_mb"] * 1e6 <= size_in_bytes(limit)
        return {**free, "limited": limited, "time_ratio": round(ratio, 3), "kept": kept}

    for name in config["methods"]:
        report.add({"method": name, "limit": limit, "bar": 1.5}, partial(measure, name))


def many_tensors(session: Session, report: Report, config: Mapping[str, Any]) -> None:
    """Measure models of very many small tensors."""

    def make(n_tensors: int) -> Models:
        tensors = [(f"tensor.{i:06}", (config["elements"],)) for i in range(n_tensors)]
        return session.make(f"many-{n_tensors}", tensors, config["models"], None)

    models, tiny = make(config["tensors"]), make(12)
    for name in config["methods"]:
        report.add({"method": name, "bar_seconds": 5.0}, partial(session.merge, name, models, tiny))


def plan_70b(session: Session, report: Report, config: Mapping[str, Any]) -> None:
    """Measure how long a plan takes for models in the shape of a 70 B model, of which only headers exist."""
    folder = session.models / f"headers-70b-{config['shards']}"
    names = ["base", *(f"expert-{i}" for i in range(1, config["models"] + 1))]
    for name in names:
        make_headers(folder / name, _SHAPE_70B, config["shards"])
    models = Models(folder / "base", tuple(folder / name for name in names[1:]), _SHAPE_70B.tensors)

    def measure(name: str) -> dict[str, Any]:
        file = session.write_recipe(name, models)
        session.run(file, verb="plan")
        runs = [session.run(file, verb="plan") for _ in range(session.runs)]
        return {
            "seconds": spread([usage.seconds for usage in runs]),
            "cpu_seconds": spread([usage.cpu_seconds for usage in runs]),
            "peak_mb": round(max(usage.peak_bytes for usage in runs) / 1e6, 1),
        }

    for name in config["methods"]:
        key = {"method": name, "bar_seconds": 2.0, "parameters": _SHAPE_70B.parameters}
        report.add(key, partial(measure, name))


def scaling(session: Session, report: Report, config: Mapping[str, Any]) -> None:
    """Measure time and memory against the size of the models, their number, and the number of threads."""
    points = [
        *(("size", size, size, config["size_models"]) for size in config["sizes"]),
        *(("models", n_models, config["models_size"], n_models) for n_models in config["models"]),
        *(("threads", threads, config["threads_size"], config["threads_models"]) for threads in config["threads"]),
    ]
    # by size, so that models are made once, and removed before the next ones need the room
    for size in sorted({size for _, _, size, _ in points}):
        with _borrowed(session.models / _folder(size)):
            for axis, value, _, n_models in [point for point in points if point[2] == size]:
                session.threads = int(value) if axis == "threads" else None
                parameters = shape_of(size).parameters
                for name in config["methods"]:
                    key = {"method": name, "axis": axis, "value": value, "parameters": parameters, "models": n_models}
                    report.add(key, partial(_measure, session, name, size, n_models))


def kills(session: Session, report: Report, config: Mapping[str, Any]) -> None:
    """Kill merges at random moments, continue them, and compare the bytes with those of a merge that nobody killed."""
    models, _ = _pair(session, config["size"], config["models"])
    random = Random(config["seed"])
    for name in config["methods"]:
        moments = [random.random() for _ in range(config["kills"])]
        report.add({"method": name}, partial(session.kill, name, models, moments))


def _measure(session: Session, name: str, size: float, n_models: int) -> dict[str, Any]:
    return session.merge(name, *_pair(session, size, n_models))


@contextmanager
def _borrowed(folder: Path) -> Iterator[None]:
    """Remove models behind their use, unless they were there before."""
    marker = folder / "borrowed"
    if not folder.exists():
        folder.mkdir(parents=True)
        marker.touch()
    try:
        yield
    finally:
        if marker.exists():
            shutil.rmtree(folder)


def _pair(session: Session, size: float, n_models: int) -> tuple[Models, Models]:
    """Make models of a size, and the smallest of the same names."""
    shape = shape_of(size)
    tiny = tiny_of(shape)
    return (
        session.make(_folder(size), shape.tensors, n_models, shape.config),
        session.make(f"tiny-{shape.layers}", tiny.tensors, n_models, tiny.config),
    )


def _folder(size: float) -> str:
    return f"{size:g}B"


def size_in_bytes(text: str) -> int:
    """Read a size such as 600MB or 1GiB."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
    for unit in sorted(units, key=len, reverse=True):
        if text.upper().endswith(unit):
            return int(float(text[: -len(unit)]) * units[unit])
    return int(text)


def shown(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings for a result file, with the shape that a size stands for."""
    given = dict(config)
    if "size" in given:
        given["shape"] = settings_of(shape_of(given["size"]))
    return given


SCENARIOS = {
    "methods": methods,
    "peer": methods,
    "max-memory": max_memory,
    "many-tensors": many_tensors,
    "plan-70b": plan_70b,
    "scaling": scaling,
    "kills": kills,
}
