"""What is compared: bytes of types, tensors of files, and what models compute."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from merganser.checkpoint.formats.gguf.encode import WRITABLE
from merganser.checkpoint.formats.gguf.k_quants import K_TYPES, quantise_k
from merganser.checkpoint.formats.gguf.mixes import FILE_TYPES

from .peer import Peer

Array = np.ndarray[Any, np.dtype[Any]]
TOKENS = 200


def compare_bytes(peer: Peer, values: Array, work: Path) -> dict[str, Any]:
    """Quantise rows [rows, columns] with ours and with `ggml_quantize_chunk`."""
    import gguf
    from gguf.quants import dequantize

    np.save(work / "rows.npy", values)
    found = {}
    for kind in K_TYPES:
        told = json.loads(peer.call("rows", str(work / "rows.npy"), kind, str(work / "out.npy")).splitlines()[-1])
        theirs = np.load(work / "out.npy")
        start = time.process_time()
        ours = quantise_k(values, kind)
        seconds = time.process_time() - start
        size = WRITABLE[kind].nbytes
        same = (ours.reshape(-1, size) == theirs.reshape(-1, size)).all(axis=1)
        errors = [
            float(
                np.sqrt(
                    np.mean((dequantize(each.reshape(theirs.shape), gguf.GGMLQuantizationType[kind]) - values) ** 2)
                )
            )
            for each in (ours, theirs)
        ]
        found[kind] = {
            "blocks": len(same),
            "equal": int(same.sum()),
            "relative_error": errors[0] / float(np.sqrt(np.mean(values**2))),
            "error_over_theirs": errors[0] / errors[1],
            "cpu_seconds": seconds,
            "cpu_seconds_theirs": told["cpu_seconds"],
        }
    return found


def compare_types(peer: Peer, file: Path, planned: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Compare the types that were planned, by kind of file and tensor, with those that llama.cpp chooses for a file in F32."""
    numbers = {kind: str(FILE_TYPES[kind]) for kind in planned}
    told = json.loads(peer.call("types", str(file), ",".join(numbers.values())).splitlines()[-1])
    wrong = [
        f"{kind}: {name}: {ours}, not {told[numbers[kind]].get(name)}"
        for kind, own in planned.items()
        for name, ours in own.items()
        if told[numbers[kind]].get(name) != ours
    ]
    return {"kinds": len(planned), "tensors": sum(map(len, planned.values())), "different": wrong}


def compare_files(ours: Path, theirs: Path) -> dict[str, Any]:
    """Compare types and bytes of every tensor of two files."""
    import gguf

    mine, other = ({tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors} for file in (ours, theirs))
    types: dict[str, int] = {}
    wrong = []
    for name, tensor in other.items():
        own = mine.get(name)
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
        if own is None or own.tensor_type != tensor.tensor_type:
            wrong.append(f"{name}: {own.tensor_type.name if own else 'missing'}, not {tensor.tensor_type.name}")
        elif not np.array_equal(own.data, tensor.data):
            wrong.append(f"{name}: other bytes")
    wrong += [f"{name}: not in theirs" for name in mine.keys() - other.keys()]
    return {"tensors": len(other), "types": types, "different": wrong}


def reference_logits(model: Path, text: str) -> tuple[list[int], Array]:
    """Return the tokens of a text and what transformers computes of them, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"][:TOKENS]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return tokens, loaded(torch.tensor([tokens])).logits[0].numpy()


def compare_logits(
    peer: Peer, file: Path, text: Path, work: Path, reference: tuple[list[int], Array]
) -> dict[str, Any]:
    """Load a file in llama.cpp and compare tokens, logits and perplexity with those of transformers."""
    out = work / "logits.npy"
    told = json.loads(peer.call("logits", str(file), str(text), str(out), str(TOKENS)).splitlines()[-1])
    tokens, wanted = reference
    got = np.load(out)
    ours, theirs = _log_softmax(got), _log_softmax(wanted)
    return {
        "same_tokens": told["tokens"] == tokens,
        "perplexity": _perplexity(ours, tokens),
        "perplexity_of_transformers": _perplexity(theirs, tokens),
        "largest_difference": float(np.abs(got - wanted).max()),
        "spread_of_logits": float(wanted.std()),
        "divergence": float((np.exp(theirs) * (theirs - ours)).sum(axis=-1).mean()),
        "same_first_choice": float((got.argmax(axis=-1) == wanted.argmax(axis=-1)).mean()),
        "continued": told["continued"],
        "cpu_seconds": told["cpu_seconds"],
    }


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def _perplexity(logarithms: Array, tokens: list[int]) -> float:
    return float(np.exp(-logarithms[np.arange(len(tokens) - 1), tokens[1:]].mean()))
