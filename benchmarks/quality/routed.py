"""What mixtures of experts, routed sidecars and gates keep: `python -m benchmarks.quality.routed --set NAME [--shipped]`.

A line per model of results/routed/SET.jsonl; what is there is not measured again. Routers and gates are made from the train texts,
and everything is measured as merges are. `python -m benchmarks.quality table` shows it.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.merge import hardware
from benchmarks.zoo import Zoo, load_zoo, shipped
from merganser import MergeError, merge
from merganser.mixture.run import mix
from merganser.runtime.routed.gated.making import make_gates
from merganser.runtime.routed.making import make_router

from . import settings
from .measured import evaluated
from .routed_table import FOLDER, cell
from .table import read

_AVERAGE = {"merge_method": "linear", "parameters": {"weight": 1}}


def main(arguments: list[str]) -> int:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.routed", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--set", default="four", help="which experts (see config.json)")
    parser.add_argument(
        "--models", nargs="+", choices=[*MODELS], default=[*MODELS], metavar="MODEL", help=", ".join(MODELS)
    )
    parser.add_argument("--shipped", action="store_true", help="take the unpacked adapters of the repository")
    parser.add_argument("--windows", type=int, default=None, help="windows of each text (default: as in config.json)")
    parser.add_argument(
        "--sequences", type=int, default=None, help="sequences of each train text (default: as in config.json)"
    )
    parser.add_argument("--work", type=Path, help="folder for what is kept meanwhile (default: in the zoo)")
    parser.add_argument("--threads", type=int, default=None, help="threads")
    parser.add_argument("--zoo", type=Path, help="folder of the zoo")
    options = parser.parse_args(arguments)
    from .__main__ import experts_of

    if options.threads:
        torch.set_num_threads(options.threads)
    config = settings.load_config()
    config["windows"] = options.windows or config["windows"]
    config["calibration"]["sequences"] = options.sequences or config["calibration"]["sequences"]
    zoo = shipped.unpacked(options.zoo) if options.shipped else load_zoo("real", options.zoo, experts=())
    experts = experts_of(zoo, config["sets"][options.set])
    file = Path(__file__).parent / "results" / FOLDER / f"{options.set}.jsonl"
    work = (options.work or zoo.folder / "quality") / "routed" / options.set
    run(options.models, config, zoo, experts, file, work)
    return 0


def run(
    chosen: Sequence[str], config: Mapping[str, Any], zoo: Zoo, experts: Mapping[str, Path], file: Path, work: Path
) -> None:
    """Make and measure models; continue from the results in the file.

    Args:
        chosen: Names of models, of `MODELS`.
        config: The settings that are measured.
        zoo: Base and texts.
        experts: The experts by domain.
        file: The results.
        work: Folder for outputs, which are removed, and for the measurements of base and experts, which are kept.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    known = read(file)
    for name in chosen:
        drawn = {key: config["calibration"][key] for key in ("sequences", "length")}
        wanted = {"model": name, "split": "test", "windows": config["windows"], "context": config["context"], **drawn}
        if any({key: line.get(key) for key in wanted} == wanted for line in known):
            continue
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        data = {domain: str(zoo.texts[domain]["train"]) for domain in experts}
        try:
            measured, extra = MODELS[name](out, zoo, experts, data, drawn)
            result = {**wanted, **_evaluated(measured, zoo, experts, config, work), **extra}
        except MergeError as error:
            result = {**wanted, "retention": None, "failed": str(error).replace(str(zoo.folder), "zoo")}
        shutil.rmtree(out, ignore_errors=True)
        result["hardware"] = hardware.describe(work)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(result) + "\n")
        sys.stdout.write(f"{name}: {cell(result)}\n")
        sys.stdout.flush()


_Made = tuple[str, dict[str, Any]]
"""A reference of what is measured, and further figures."""

_Make = Callable[[Path, Zoo, Mapping[str, Path], Mapping[str, str], Mapping[str, int]], _Made]


def _mixture(shared: Mapping[str, Any] | None) -> _Make:
    def make(
        out: Path, zoo: Zoo, experts: Mapping[str, Path], data: Mapping[str, str], drawn: Mapping[str, int]
    ) -> _Made:
        recipe: dict[str, Any] = {
            "base_model": str(zoo.base),
            "experts": [{"source_model": str(path), "data": data[domain]} for domain, path in experts.items()],
            "data": dict(drawn),
            "dtype": "float32",
        }
        if shared is not None:
            recipe["shared"] = dict(shared)
        return str(out), {"router_right": mix(recipe, out).record["mixture"]["router"]["right"]}

    return make


@torch.inference_mode()
def right_windows(out: Path, texts: Mapping[str, Path], config: Mapping[str, Any]) -> dict[str, float]:
    """Return for each expert for which share of windows it is the first choice most often, over all tokens and layers.

    Args:
        out: A mixture whose experts are those of the texts, in their order.
        texts: Test text of each expert.
        config: Number and length of the windows.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    length, found = config["context"], {}
    for number, (domain, file) in enumerate(texts.items()):
        ids = tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"][: length * config["windows"]]
        most = []
        for start in range(0, len(ids), length):
            window = torch.tensor([ids[start : start + length]])
            logits = model(window, output_router_logits=True, use_cache=False).router_logits
            first = torch.cat([own.argmax(-1) for own in logits])
            most.append(int(first.bincount(minlength=len(texts)).argmax()))
        found[domain] = most.count(number) / len(most)
    return found


def _sidecars(method: str, choice: str) -> _Make:
    def make(
        out: Path, zoo: Zoo, experts: Mapping[str, Path], data: Mapping[str, str], drawn: Mapping[str, int]
    ) -> _Made:
        given = settings.published(settings.load_config(), method)
        models = [
            {"model": str(path), "name": domain, **({"parameters": given["each"]} if given["each"] else {})}
            for domain, path in experts.items()
        ]
        recipe = {"merge_method": method, "base_model": str(zoo.base), "models": models, "parameters": given["shared"]}
        record = merge(recipe, out).record["sidecars"]
        if choice == "auto":
            make_router(out, _each(data), length=drawn["length"], windows=drawn["sequences"])
        size = record["shared_bytes"] + sum(task["bytes"] for task in record["tasks"])
        return f"{out}#{choice}", {"stored_share": size / sum(task["full_bytes"] for task in record["tasks"])}

    return make


def _gates(kind: str) -> _Make:
    def make(
        out: Path, zoo: Zoo, experts: Mapping[str, Path], data: Mapping[str, str], drawn: Mapping[str, int]
    ) -> _Made:
        out.mkdir(parents=True)
        for domain, path in experts.items():
            (out / domain).symlink_to(path.resolve(), target_is_directory=True)
        reference = f"{zoo.base}+{out}"
        report = make_gates(reference, _each(data), kind, length=drawn["length"], windows=drawn["sequences"])
        size = sum(file.stat().st_size for path in experts.values() for file in path.glob("*.safetensors"))
        return f"{reference}#gates", {"stored_share": report.part_bytes / size}

    return make


MODELS: dict[str, _Make] = {
    "mixture": _mixture(None),
    "mixture, averaged": _mixture(_AVERAGE),
    "twin, routed": _sidecars("twin", "auto"),
    "twin, told": _sidecars("twin", "told"),
    "emr, routed": _sidecars("emr", "auto"),
    "emr, told": _sidecars("emr", "told"),
    "skillpack, routed": _sidecars("skillpack", "auto"),
    "skillpack, told": _sidecars("skillpack", "told"),
    "wemoe gates": _gates("wemoe"),
    "e-wemoe gates": _gates("e-wemoe"),
}


def _each(data: Mapping[str, str]) -> dict[str, Sequence[str | Path]]:
    return {domain: [file] for domain, file in data.items()}


def _evaluated(
    reference: str, zoo: Zoo, experts: Mapping[str, Path], config: Mapping[str, Any], work: Path
) -> dict[str, Any]:
    """Measure a model on the test texts of the experts' domains, and on what none was trained on."""
    found = evaluated(reference, experts, zoo, config, "test", work)
    content = json.loads((work / "test.json").read_text(encoding="utf-8"))
    shares = {domain: found.right("merge", domain) for domain in experts if found.models["merge"].failed is None}
    right = {domain: share for domain, share in shares.items() if share is not None}
    if "#" not in reference and not found.models["merge"].failed:
        right = right_windows(Path(reference), {domain: zoo.texts[domain]["test"] for domain in experts}, config)
    return {
        "retention": content["retention"]["models"]["merge"],
        "failed": found.models["merge"].failed,
        **({"right": right} if right else {}),
    }


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
