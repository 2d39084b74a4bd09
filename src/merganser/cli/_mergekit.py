"""Hints for the commands and options of mergekit that merganser does not have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

__all__ = ["COMMANDS", "OPTIONS", "OPTIONS_OF", "answer", "command"]

_STREAMS = "not needed: tensors are streamed, in little memory"
_ADAPTER = "not needed: an adapter is applied while its model is read, in float32"
_VERBOSE = "not needed: progress is shown on a terminal"
_STAGES = "use --keep-stages, which keeps the results of a recipe's other documents in .OUT.stages"
_NO_CARD = "not available: README.md of the output is always written, from the recipe"
_IN_RECIPE = "write it into a recipe: merganser merge RECIPE OUT"
_COMMON = {
    "--cuda": "use --device cuda",
    "--read-to-gpu": "use --device cuda",
    "--gpu-rich": "use --device cuda, which takes every GPU",
    "--multi-gpu": "use --device cuda, which takes every GPU",
    "--num-threads": "use --threads",
    "-j": "use --threads",
    "--random-seed": "use --seed",
    "--transformers-cache": "use --cache-dir",
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
    "--write-model-card": "not needed: the output gets a README.md, and merge.json records the merge",
    "--no-write-model-card": _NO_CARD,
    "--allow-crimes": "not available: tensors are matched by name and shape, and what differs is refused with a list",
    "--unsafe-truncate-embeddings": "not available: tokenizer_source in the recipe matches rows by token",
    "--lora-merge-cache": _ADAPTER,
    "--lora-merge-dtype": _ADAPTER,
    "--verbose": _VERBOSE,
    "-v": _VERBOSE,
}
"""Options that most commands of mergekit share."""

OPTIONS = {
    **_COMMON,
    "--intermediate-dir": _STAGES,
    "-I": _STAGES,
    "--out-path": "give it as the second argument: merganser merge RECIPE OUT",
    "--no-lazy": "use --fresh",
    "--lazy": "not needed: the same command continues an interrupted merge",
    "--tensor-intersection": "write 'unmatched: skip' into the recipe",
    "--tensor-union": "not available: 'unmatched: base' in the recipe keeps what the base has",
    "--merge": _IN_RECIPE,
    "--method": _IN_RECIPE,
    "--density": _IN_RECIPE,
    "--weight": _IN_RECIPE,
    "--base-model": _IN_RECIPE,
    "--normalize": _IN_RECIPE,
    "--no-normalize": _IN_RECIPE,
    "--int8-mask": "not needed: masks are never stored",
    "--bf16": "write 'dtype: bfloat16' into the recipe",
    "--naive-count": "not available: it has no effect in mergekit, either",
    "--print-yaml": "use merganser plan, which shows what a recipe does",
}
"""Options of mergekit-yaml, -multi, -pytorch and -legacy, and what merganser merge and plan have instead."""

_PREFIX = "not needed: tokens are matched by their text and bytes, for embedding and head alike"
_TRAINED = "not available: shared tokens are used whether they were trained or not"
_WEIGHED = "not available: --method says how rows are weighed"
_TRANSPLANT = {
    "-k": "use --k",
    "-a": "use --method",
    "--approximation-method": "use --method",
    "-c": "not available: --method interpolate compares tokens by their cosine",
    "--cosine-similarity": "not available: --method interpolate compares tokens by their cosine",
    "-nc": "not available: --method interpolate compares tokens by their cosine",
    "--no-cosine-similarity": "not available: --method interpolate compares tokens by their cosine",
    "-w": _WEIGHED,
    "--weight-scheme": _WEIGHED,
    "-s": "use --method subword",
    "--subword-method": "use --method subword",
    "--batch-size": "not needed: --max-memory limits memory",
    "-pm": _PREFIX,
    "--prefix-match": _PREFIX,
    "-bm": _PREFIX,
    "--byte-match": _PREFIX,
    "--magikarp": _TRAINED,
    "-nvn": "not available: rows get no noise",
    "--new-vocab-noise": "not available: rows get no noise",
    "-nvs": "not available: rows keep their scale",
    "--new-vocab-scale": "not available: rows keep their scale",
}
_SAVED = "use --embeddings save, and --others save for norms"
_EXTRACT = {
    "--model": "give it as the first argument: merganser extract FINETUNE --base CKPT --out DIR",
    "--base-model": "use --base",
    "--out-path": "use --out",
    "--max-rank": "use --rank",
    "--distribute-scale": "not needed: both factors get the root of the singular values",
    "--no-distribute-scale": "not available: both factors get the root of the singular values",
    "--embed-lora": "use --embeddings low-rank",
    "--save-module": _SAVED,
    "-e": "not available: every matrix that changed is factored",
    "--exclude-regex": "not available: every matrix that changed is factored",
    "-i": "not available: every matrix that changed is factored",
    "--include-regex": "not available: every matrix that changed is factored",
    "--sv-epsilon": "use --energy",
    "--skip-undecomposable": "use --others drop",
}
_QUANTISED = "not needed: one block of a model is in memory while prompts are read"
_MIX = {
    "--load-in-4bit": _QUANTISED,
    "--load-in-8bit": _QUANTISED,
    "--i-understand-this-is-not-useful-without-training": "not needed: 'gate_mode: random' in the recipe makes routers that know nothing",
}
_NO_REPORTS = "not available: trials are in the folder of the search, and merganser search prints them"
_PLACES = "not needed: trials run one after the other, in memory"
_SEARCH = {
    "--max-fevals": "use --trials",
    "--vllm": "use --command, which starts a program of yours for each trial",
    "-s": _PLACES,
    "--strategy": _PLACES,
    "--in-memory": "not needed: trials are merged in memory",
    "--storage-path": "give it as the second argument: merganser search RECIPE FOLDER",
    "--num-gpus": "use --device cuda",
    "--merge-cuda": "use --device cuda",
    "--batch-size": "use --batch-tokens",
    "--sigma0": "not available: the sampler chooses it",
    "--force-population-size": "not available: the sampler chooses it",
    "--task-search-path": "not available: --tasks takes names of lm-eval, or your own texts",
    "--wandb": _NO_REPORTS,
    "--wandb-project": _NO_REPORTS,
    "--wandb-entity": _NO_REPORTS,
    "--save-final-model": "not needed: the best recipe is in the folder; merganser merge makes it",
    "--no-save-final-model": "not needed: the best recipe is in the folder; merganser merge makes it",
    "--reshard": "not needed: files are read as they are",
    "--no-reshard": "not needed: files are read as they are",
    "--load-in-4bit": "use --dtype",
    "--load-in-8bit": "use --dtype",
    "--i-understand-the-depths-of-the-evils-i-am-unleashing": "not needed",
}
_NAMED = re.compile(r"use (--[a-z-]+)")


def _shared(*ours: str) -> dict[str, str]:
    """Return hints for the options that most commands share, where a verb has only these of our own."""
    here = "not available for this command"
    return {
        name: here if (own := _NAMED.match(hint)) and own[1] not in ours else hint for name, hint in _COMMON.items()
    }


OPTIONS_OF: Mapping[str, Mapping[str, str]] = {
    "merge": OPTIONS,
    "plan": {**OPTIONS, "--no-lazy": "not needed: a plan reads everything again"},
    "transplant": {**_shared("--threads", "--cache-dir"), **_TRANSPLANT},
    "extract": {**_shared("--cache-dir"), **_EXTRACT},
    "mix": {**_shared("--threads", "--seed", "--cache-dir"), **_MIX},
    "search": {**_shared("--seed", "--device", "--cache-dir"), **_SEARCH},
}
"""What replaces options of mergekit, by our verb."""

COMMANDS = {
    "yaml": "merganser merge RECIPE OUT runs its recipes unchanged",
    "multi": "merganser merge RECIPE OUT runs recipes of several documents",
    "mega": "merganser merge RECIPE OUT runs recipes of several documents",
    "pytorch": "merganser merge RECIPE OUT merges any checkpoint, also files without a config",
    "legacy": "write the options into a recipe, and merge it: merganser merge RECIPE OUT",
    "moe": "merganser mix RECIPE OUT builds mixtures of experts from its recipes",
    "tokensurgeon": "merganser transplant MODEL --tokenizer DONOR --out OUT gives a model another tokenizer",
    "extract-lora": "merganser extract FINETUNE --base CKPT --out DIR --rank N writes an adapter",
    "evolve": "merganser search RECIPE FOLDER reads its genomes, and finds the open values of recipes",
    "layershuffle": "write a recipe of passthrough with slices, and merge it: merganser merge RECIPE OUT",
    "bakllama": "write each of its layer_slices as a slice of a recipe of passthrough: merganser merge RECIPE OUT",
}
"""What replaces a command of mergekit, by its name without `mergekit-`."""


def command(name: str) -> str | None:
    """Return what replaces a command of mergekit; None for any other name."""
    short = name.removeprefix("mergekit-")
    if short not in COMMANDS or (short == name and short == "yaml"):
        return None
    full = short if short == "bakllama" else f"mergekit-{short}"
    return f"{full} is a command of mergekit; {COMMANDS[short]}"


def answer(verb: str, option: str | None, arguments: Sequence[str] = ()) -> str | None:
    """Return what replaces an option of mergekit; None for any other option, and for verbs that mergekit lacks.

    Args:
        verb: Our verb.
        option: The option that the verb does not have, as click names it: of `-pm` only `-p`.
        arguments: What was written on the command line.
    """
    known = OPTIONS_OF.get(verb, {})
    given = [argument.partition("=")[0] for argument in arguments]
    # click names only the first letter of a short option with two letters
    written = next(
        (each for each in given if each in known and option and len(option) == 2 and each.startswith(option)), option
    )
    if written is None:
        return None
    if written in known:
        return f"{written} is an option of mergekit; {known[written]}"
    positive = f"--{written.removeprefix('--no-')}"
    if written.startswith("--no-") and positive in known:
        return f"{written} is an option of mergekit; leave it out, as {positive} is not an option here"
    return None
