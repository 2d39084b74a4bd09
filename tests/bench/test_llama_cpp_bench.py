"""Outputs in llama.cpp: comparisons that see a difference; llama.cpp itself is not needed here."""

import json

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from benchmarks.llama_cpp import __main__ as command
from benchmarks.llama_cpp import checks
from tests.checkpoint.gguf.making import random_blocks, written


def test_files_are_compared_tensor_by_tensor(tmp_path):
    rows = random_blocks(T.Q4_K, 2, 1)
    other = rows.copy()
    other[1, 20] ^= 1
    tensors = {"a": (rows, T.Q4_K), "b": (rows, T.Q4_K), "c": (np.zeros(4, np.float32), T.F32)}
    ours = written(tmp_path / "ours.gguf", "llama", {**tensors, "e": tensors["c"]})
    theirs = written(
        tmp_path / "theirs.gguf", "llama", {**tensors, "b": (other, T.Q4_K), "c": (np.zeros(4, np.float16), T.F16)}
    )
    found = checks.compare_files(ours, theirs)
    assert found["types"] == {"Q4_K": 2, "F16": 1}
    assert found["different"] == ["b: other bytes", "c: F32, not F16", "e: not in theirs"]


class Peer:
    """Answers as llama.cpp would: logits that are those of transformers, but for one."""

    def __init__(self, logits):
        self.logits = logits

    def call(self, part, file, text, out, most):
        np.save(out, self.logits)
        return "noise\n" + json.dumps({"tokens": [0, 1, 2], "continued": "x", "cpu_seconds": 1.0})


def test_logits_are_compared(tmp_path):
    wanted = np.log(np.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]], np.float32))
    same = checks.compare_logits(Peer(wanted + 3), tmp_path, tmp_path, tmp_path, ([0, 1, 2], wanted))
    assert same["perplexity"] == pytest.approx((0.5 * 0.8) ** -0.5)
    assert same["divergence"] == pytest.approx(0, abs=1e-6)
    assert (same["same_tokens"], same["same_first_choice"]) == (True, 1)
    other = wanted.copy()
    other[1] = other[1, ::-1]
    found = checks.compare_logits(Peer(other), tmp_path, tmp_path, tmp_path, ([0, 1, 0], wanted))
    assert found["divergence"] > 0.1
    assert (found["same_tokens"], found["same_first_choice"]) == (False, pytest.approx(2 / 3))


def test_without_llama_cpp_it_says_how_to_make_it(tmp_path, capsys):
    assert command.main(["bytes", "--peer-folder", str(tmp_path), "--work", str(tmp_path / "w")]) == 2
    assert "scripts/bench llama-cpp setup" in capsys.readouterr().err
