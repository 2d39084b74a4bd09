"""Hints for the options of mergekit's commands that merganser does not have."""

from __future__ import annotations

_STREAMS = "not needed: tensors are streamed, in little memory"
_ADAPTER = "not needed: an adapter is applied while its model is read, in float32"
_VERBOSE = "not needed: progress is shown on a terminal"
_STAGES = "use --keep-stages, which keeps the results of a recipe's other documents in .OUT.stages"
OPTIONS = {
    "--cuda": "use --device cuda",
    "--read-to-gpu": "use --device cuda",
    "--gpu-rich": "use --device cuda, which takes every GPU",
    "--multi-gpu": "use --device cuda, which takes every GPU",
    "--num-threads": "use --threads",
    "-j": "use --threads",
    "--random-seed": "use --seed",
    "--transformers-cache": "use --cache-dir",
    "--intermediate-dir": _STAGES,
    "-I": _STAGES,
    "--out-path": "give it as the second argument: merganser merge RECIPE OUT",
    "--no-lazy": "use --fresh",
    "--lazy": "not needed: the same command continues an interrupted merge",
    "--lazy-unpickle": _STREAMS,
    "--low-cpu-memory": _STREAMS,
    "--async-write": _STREAMS,
    "--write-threads": _STREAMS,
    "--clone-tensors": _STREAMS,
    "--copy-tokenizer": "not needed: the tokenizer and other files of the donor are always copied",
    "--no-copy-tokenizer": "not available: the tokenizer and other files of the donor are always copied",
    "--trust-remote-code": "not needed: no code of a model is run",
    "--safe-serialization": "not needed: the output is safetensors",
    "--no-safe-serialization": "not available: the output is safetensors",
    "--write-model-card": "not available: merge.json records the merge, and merganser report shows it",
    "--no-write-model-card": "not needed: no model card is written",
    "--allow-crimes": "not available: tensors are matched by name and shape, and what differs is refused with a list",
    "--unsafe-truncate-embeddings": "not available: tokenizer_source in the recipe matches rows by token",
    "--lora-merge-cache": _ADAPTER,
    "--lora-merge-dtype": _ADAPTER,
    "--verbose": _VERBOSE,
    "-v": _VERBOSE,
}


def answer(verb: str, option: str | None) -> str | None:
    """Return what replaces an option of mergekit; None for any other option, and for verbs that mergekit lacks."""
    if verb not in ("merge", "plan") or option not in OPTIONS:
        return None
    return f"{option} is an option of mergekit; {OPTIONS[option]}"
