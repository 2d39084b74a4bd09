"""`python -m benchmarks.llama_cpp [setup|bytes|files|loads|mixtures|all] [options]`: our outputs in llama.cpp.

`setup`: fetch and build llama.cpp.
`bytes`: K types of real weights, beside `ggml_quantize_chunk`.
`files`: merges written as GGUF, every tensor beside what llama-quantize makes of the merge in F32 (the function of the library
that it calls).
`loads`: the same merges loaded in llama.cpp, and merges in safetensors through the commands of docs/formats.md; logits and perplexity
beside those of transformers.
`mixtures`: mixtures of experts through the converter, loaded.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merganser.checkpoint.formats.gguf.header import read_gguf_header
from merganser.checkpoint.formats.gguf.names import family_of, gguf_name
from merganser.engine.merge import merge, plan
from merganser.engine.run import run_plan
from merganser.mixture import load_mixture, plan_mixture
from merganser.recipe.fields.gguf import GGUF_TYPES, SAME

from ..merge import hardware
from . import checks, models
from .peer import Peer, PeerError, folder, set_up

TYPES = tuple(kind for kind in GGUF_TYPES if kind != SAME)
_WRITTEN = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")


def measure_bytes(peer: Peer, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the first rows of several matrices of SmolLM2, cut to rows of 256."""
    import numpy as np

    from merganser.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(models.zoo() / "experts" / "maths"))
    names = [name for name in checkpoint.tensors if ".0." in name or ".15." in name or "embed" in name]
    with checkpoint.reader() as reader:
        pieces = [reader.tensor(checkpoint.tensors[name]).float().numpy().ravel()[: 256 * 400] for name in names]
    values = np.concatenate([piece[: len(piece) // 256 * 256] for piece in pieces]).reshape(-1, 256)
    return checks.compare_bytes(peer, values, options.work)


def families(peer: Peer, options: argparse.Namespace) -> list[tuple[models.Family, Path]]:
    """Return the families, each with a GGUF file of its base."""
    found = [models.smollm2(), models.wide(options.work, tied=False), models.wide(options.work, tied=True)]
    return [(family, _donor(peer, family, options.work)) for family in found]


def measure_files(peer: Peer, options: argparse.Namespace) -> dict[str, Any]:
    """Write some types of each family, and compare with llama-quantize; of all types, the choice for each tensor."""
    found: dict[str, Any] = {}
    for family, donor in families(peer, options):
        found[family.name] = _compare_files(peer, family, donor, options)
    return found


def _compare_files(peer: Peer, family: models.Family, donor: Path, options: argparse.Namespace) -> dict[str, Any]:
    wide = _merged(family, "F32", donor, options.work)
    planned = {kind: _planned(family, kind, donor) for kind in TYPES if kind not in ("F32", "F16", "BF16")}
    found = {"types": checks.compare_types(peer, wide, planned)}
    theirs = options.work / "theirs.gguf"
    for kind in options.types:
        ours = _merged(family, kind, donor, options.work)
        peer.quantise(wide, theirs, kind)
        found[kind] = checks.compare_files(ours, theirs)
    theirs.unlink(missing_ok=True)
    return found


def measure_loads(peer: Peer, options: argparse.Namespace) -> dict[str, Any]:
    """Load merges in llama.cpp, written by us, and by its own tools from merges in safetensors."""
    text = _text(options.work)
    found: dict[str, Any] = {}
    for family, donor in families(peer, options)[:2]:
        plain = options.work / f"{donor.stem}-plain"
        merge({**family.recipe, "out_dtype": "float32"}, plain, overwrite=True)
        reference = checks.reference_logits(plain, text.read_text(encoding="utf-8"))
        for kind in ("F32", "F16", "BF16", *options.types):
            file = _merged(family, kind, donor, options.work)
            found[f"{family.name} {kind}"] = checks.compare_logits(peer, file, text, options.work, reference)
        converted, small = options.work / "OUT-F16.gguf", options.work / "OUT-Q4_K_M.gguf"
        half = merge(family.recipe, options.work / "OUT", overwrite=True).out
        peer.convert(half, converted, "f16")
        peer.quantise(converted, small, "Q4_K_M")
        for file in (converted, small):
            told = checks.compare_logits(peer, file, text, options.work, reference)
            found[f"{family.name}, {file.name} by the commands of the documents"] = told
    return found


def measure_mixtures(peer: Peer, options: argparse.Namespace) -> dict[str, Any]:
    """Build mixtures, convert and load them; and write them as GGUF ourselves, with the metadata of what was converted."""
    text = _text(options.work)
    small = models.wide(options.work, tied=False).models
    large = [models.zoo() / "experts" / name for name in ("haskell", "maths")]
    found: dict[str, Any] = {}
    for name, experts, architecture in (
        ("random-x8-mixtral", [*small] * 4, "mixtral"),
        ("random-x2-qwen2_moe", small, "qwen2_moe"),
        ("SmolLM2-135M-x2-mixtral", large, "mixtral"),
    ):
        place = options.work / name
        file = options.work / f"{name}.gguf"
        run_plan(plan_mixture(load_mixture(models.mixture_recipe(experts, architecture))), place, overwrite=True)
        peer.convert(place, file, "f32")
        reference = checks.reference_logits(place, text.read_text(encoding="utf-8"))
        own: dict[str, Any] = {"converted": checks.compare_logits(peer, file, text, options.work, reference)}
        family = models.Family(name, [place])
        if architecture == "mixtral" and experts != large:
            own |= _compare_files(peer, family, file, options)
            ours = _merged(family, "Q4_K_M", file, options.work)
            own["Q4_K_M, loaded"] = checks.compare_logits(peer, ours, text, options.work, reference)
        found[name] = own
    return found


def _text(work: Path) -> Path:
    found = work / "text.txt"
    found.write_text((models.zoo() / "texts" / "english.test.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8")
    return found


def _planned(family: models.Family, kind: str, donor: Path) -> dict[str, str]:
    """Return the type of each tensor by its name in the file."""
    planned = plan(_recipe(family, kind, donor))
    own = family_of(str(donor), read_gguf_header(donor).architecture)
    found = {}
    for tensor in planned.tensors:
        named = gguf_name(own, tensor.name)
        assert named is not None
        assert tensor.gguf is not None
        found[named.name] = tensor.gguf.type.name
    return found


def _recipe(family: models.Family, kind: str, donor: Path) -> dict[str, Any]:
    return {**family.recipe, "gguf": {"type": kind, "metadata": str(donor)}}


def _donor(peer: Peer, family: models.Family, work: Path) -> Path:
    """Return a GGUF file of the family's base, made by llama.cpp's converter; its folder has config and tokenizer."""
    file = work / f"{family.name.replace(', ', '-').replace(' ', '-')}.gguf"
    if not file.exists():
        peer.convert(family.models[0], file, "bf16" if family.name.startswith("Smol") else "f32")
    return file


def _merged(family: models.Family, kind: str, donor: Path, work: Path) -> Path:
    """Return the merge as a GGUF file of a type."""
    out = work / f"{donor.stem}-{kind}"
    merge(_recipe(family, kind, donor), out, overwrite=True)
    return out / f"model-{kind}.gguf"


_PARTS = {"bytes": measure_bytes, "files": measure_files, "loads": measure_loads, "mixtures": measure_mixtures}


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, and write results.json."""
    parser = argparse.ArgumentParser(prog="scripts/bench llama-cpp", description=__doc__, allow_abbrev=False)
    parser.add_argument("part", choices=["setup", *_PARTS, "all"], nargs="?", default="all")
    parser.add_argument("--types", type=lambda text: text.split(","), default=[*_WRITTEN], metavar="TYPE,...")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for models and outputs (default: a temporary folder)")
    parser.add_argument("--peer-folder", type=Path, metavar="DIR", help="llama.cpp (default: $MERGANSER_LLAMA_CPP)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json", metavar="FILE")
    options = parser.parse_args(given)
    cache = Path(os.environ.get("MERGANSER_BENCH") or Path.home() / ".cache/merganser/bench")
    place = folder(cache, options.peer_folder)
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or Path(temporary)
        options.work.mkdir(parents=True, exist_ok=True)
        try:
            if options.part == "setup":
                set_up(place)
                return 0
            peer = Peer(place)
            for part in _PARTS if options.part == "all" else [options.part]:
                _keep(options.out, part, _PARTS[part](peer, options), options.work)
        except (PeerError, FileNotFoundError) as error:
            sys.stderr.write(f"bench: {error}\n")
            return 2
    return 0


def _keep(file: Path, part: str, found: dict[str, Any], work: Path) -> None:
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    results[part] = {"machine": hardware.describe(work), **found}
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({part: found}, indent=1) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
