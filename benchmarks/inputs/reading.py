"""Read a Q4_K GGUF file of 0.5 B, tensor by tensor on two threads, beside the package gguf on one."""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 2
_LAYERS, _WIDTH, _INNER, _KEYS, _TOKENS = 24, 1024, 4864, 128, 151_936
"""Qwen2.5-0.5B, but for its width of 896, which is not a multiple of the 256 values of a block."""


def shapes() -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield names and shapes of the weight matrices."""
    yield "token_embd.weight", (_TOKENS, _WIDTH)
    parts = {"attn_q": (_WIDTH, _WIDTH), "attn_k": (_KEYS, _WIDTH), "attn_v": (_KEYS, _WIDTH)}
    parts |= {"attn_output": (_WIDTH, _WIDTH), "ffn_gate": (_INNER, _WIDTH), "ffn_up": (_INNER, _WIDTH)}
    parts |= {"ffn_down": (_WIDTH, _INNER)}
    for layer in range(_LAYERS):
        for name, shape in parts.items():
            yield f"blk.{layer}.{name}.weight", shape


def make(file: Path) -> None:
    """Write the file: random blocks with finite scales."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_K
    values, size = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(0)
    part = file.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "qwen2")
    for key, number in {"attention.head_count": 8, "attention.head_count_kv": 1, "block_count": _LAYERS}.items():
        writer.add_uint32(f"qwen2.{key}", number)
    writer.add_uint32("qwen2.embedding_length", _WIDTH)
    for name, (rows, width) in shapes():
        blocks = draw.integers(0, 256, (rows, width // values, size), dtype=np.uint8)
        # the two scales are float16: a small exponent
        blocks[:, :, [1, 3]] &= 0x3B
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(file)


def measure(options: argparse.Namespace, _: Path) -> dict[str, Any]:
    """Read the file with both, each in a process of its own, in turns; the best counts."""
    file = options.folder / "q4_k.gguf"
    if not file.exists():
        make(file)
    runs: dict[str, list[dict[str, Any]]] = {"merganser": [], "gguf": []}
    for _ in range(options.runs):
        for name, own in runs.items():
            command = [sys.executable, "-m", "benchmarks.inputs.reading", name, str(file)]
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
            own.append(json.loads(answer.stdout))
    best = {name: min(own, key=lambda found: found["cpu_seconds"]) for name, own in runs.items()}
    ours, theirs = best["merganser"], best["gguf"]
    return {
        "values": sum(math.prod(shape) for _, shape in shapes()),
        **best,
        # of wall time on two quiet cores, were nothing lost between the threads
        "ratio_of_cpu_seconds": theirs["cpu_seconds"] / ours["cpu_seconds"],
        "ratio_of_seconds": theirs["seconds"] / ours["seconds"],
        "bar": 1.8,
    }


def read(name: str, file: Path) -> dict[str, Any]:
    """Read all tensors and forget them; the time and memory of a process start with the first tensor."""
    work = _ours(file) if name == "merganser" else _theirs(file)
    next(work)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    count = next(work)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "more_memory_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
        "tensors": count,
    }


def _ours(file: Path) -> Iterator[int]:
    import torch

    from merganser.checkpoint import Reader, open_checkpoint

    tensors = list(open_checkpoint(str(file)).tensors.values())
    torch.set_num_threads(1)
    # values as a merge reads them: a block of 524,288 at a time into a buffer of the thread
    pieces = [(tensor, at) for tensor in tensors for at in range(0, tensor.nbytes, 1 << 21)]
    pool = ThreadPoolExecutor(THREADS)
    with Reader() as reader:

        def do(part: int) -> None:
            buffer = memoryview(bytearray(1 << 21))
            for tensor, at in pieces[part::THREADS]:
                reader.read_into(tensor, at, buffer[: min(1 << 21, tensor.nbytes - at)])

        import gguf.quants  # noqa: F401  # part of the start

        yield 0
        list(pool.map(do, range(THREADS)))
        yield len(tensors)
    pool.shutdown()


def _theirs(file: Path) -> Iterator[int]:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = GGUFReader(file).tensors
    yield 0
    for tensor in tensors:
        dequantize(tensor.data, tensor.tensor_type)
    yield len(tensors)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(read(sys.argv[1], Path(sys.argv[2]))))
