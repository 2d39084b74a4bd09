"""Merge in new processes, to find results that depend on Python's hash seed."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import islice
from typing import Any

from ..method import MergeMethod
from .cases import cases, make_inputs, merge


def check_reproducible(methods: Iterable[MergeMethod]) -> None:
    """Check that this process and two new ones, with other hash seeds, give the same bytes.

    Args:
        methods: All methods to check; they must be importable by their module and name.
    """
    names = [f"{method.combine.__module__}:{method.name}" for method in methods]
    command = [sys.executable, "-c", "from merganser.testing.processes import write_digests; write_digests()", *names]
    path = os.pathsep.join(p for p in sys.path if p)
    seeds = [seed for seed in ("0", "1", "2") if seed != os.environ.get("PYTHONHASHSEED")][:2]
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in seeds
    ]
    answers = [_digests(names), *(json.loads(process.communicate()[0]) for process in running)]
    hashes = {answer["hash"] for answer in answers}
    if len(hashes) != len(answers):
        raise AssertionError(f"the processes must differ in their hashes, got {hashes}")
    unstable = [name for name in names if len({answer["digests"][name] for answer in answers}) > 1]
    if unstable:
        raise AssertionError(f"three processes give different results: {', '.join(unstable)}")


def write_digests() -> None:
    """Print as JSON the hash of a string, and digests of merges by each method named on the command line."""
    sys.stdout.write(json.dumps(_digests(sys.argv[1:])))


def _digests(references: Iterable[str]) -> dict[str, Any]:
    digests = {}
    for reference in references:
        module, name = reference.split(":")
        method = getattr(importlib.import_module(module), name)
        digest = hashlib.sha256()
        for with_base, parameters in islice(cases(method), 4):
            digest.update(merge(method, make_inputs(method, with_base), parameters, seed=3).numpy().tobytes())
        digests[reference] = digest.hexdigest()
    return {"hash": hash("merganser"), "digests": digests}
