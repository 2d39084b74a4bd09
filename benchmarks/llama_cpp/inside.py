"""What is asked of llama.cpp's Python bindings, in the environment that has them.

`inside.py rows IN.npy TYPE OUT.npy` quantises rows of float32, and prints the processor seconds.
`inside.py types FILE NUMBER,...` prints the type that each tensor gets in files of the types with these numbers.
`inside.py file FILE OUT NUMBER` quantises a file as llama-quantize does, whose work is this function of the library.
`inside.py logits FILE TEXT OUT.npy N` computes the logits of a text's first N tokens, and prints the tokens and the seconds.
"""

import ctypes
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import llama_cpp


def rows(given: str, kind: str, out: str) -> dict[str, Any]:
    """Quantise without an importance matrix."""
    values = np.load(given)
    base = ctypes.CDLL(str(next(Path(llama_cpp.llama_cpp._base_path).glob("libggml-base.so"))))
    quantise = base.ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    quantise.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    size = base.ggml_row_size
    size.restype, size.argtypes = ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]
    number = getattr(llama_cpp, f"GGML_TYPE_{kind}")
    count, width = values.shape
    found = np.empty((count, size(number, width)), np.uint8)
    start = time.process_time()
    quantise(number, values.ctypes.data, found.ctypes.data, 0, count, width, None)
    seconds = time.process_time() - start
    np.save(out, found)
    return {"cpu_seconds": seconds}


_LINE = re.compile(r"\] (\S+)\s+- \[.*?type =\s*(\w+),.*?(?:\((\w+)\))?$")


def types(given: str, numbers: str) -> dict[str, Any]:
    """Ask which types would be chosen."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def hear(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        lines.append(text.decode())

    llama_cpp.llama_log_set(hear, ctypes.c_void_p(0))
    found: dict[str, Any] = {}
    for number in numbers.split(","):
        lines.clear()
        _quantise(given, given + ".unwritten", int(number), dry=True)
        matches = filter(None, map(_LINE.search, "".join(lines).splitlines()))
        found[number] = {match[1]: (match[3] or match[2]).upper() for match in matches}
    return found


def file(given: str, out: str, number: str) -> dict[str, Any]:
    """Quantise a file."""
    start = time.process_time()
    _quantise(given, out, int(number), dry=False)
    return {"cpu_seconds": time.process_time() - start}


def _quantise(given: str, out: str, number: int, *, dry: bool) -> None:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.dry_run = number, 1, dry
    if llama_cpp.llama_model_quantize(given.encode(), out.encode(), ctypes.byref(settings)):
        raise SystemExit(f"{given}: llama.cpp could not quantise it")


def logits(file: str, text: str, out: str, most: str) -> dict[str, Any]:
    """Load a file and compute logits; keys and values are kept in float32, so that the weights alone are rounded."""
    start = time.process_time()
    wide = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        file,
        n_ctx=512,
        n_batch=512,
        n_ubatch=512,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
        type_k=wide,
        type_v=wide,
    )
    tokens = model.tokenize(Path(text).read_bytes(), add_bos=False)[: int(most)]
    model.eval(tokens)
    np.save(out, model.scores[: len(tokens)])
    answer = model.create_completion(tokens[:32], max_tokens=16, temperature=0.0)
    told = {key: model.metadata.get(key) for key in ("general.architecture", "general.name", "general.file_type")}
    return {
        "tokens": tokens,
        "continued": answer["choices"][0]["text"],
        "metadata": told,
        "cpu_seconds": time.process_time() - start,
    }


if __name__ == "__main__":
    asked = {"rows": rows, "types": types, "file": file, "logits": logits}[sys.argv[1]]
    print(json.dumps(asked(*sys.argv[2:])))
