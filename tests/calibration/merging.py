"""Tiny models that are merged block by block, and their data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from merganser.calibration.single.preparation import prepare
from merganser.calibration.within import calibrate_within
from merganser.engine.merge import merge
from merganser.engine.planner.planner import build_plan
from merganser.recipe import load_recipe
from merganser.statistics import Statistics
from tests.calibration.families import FAMILIES, save
from tests.evaluation.tiny import add_tokenizer, text

LENGTH = 16

BLOCKS = {
    "llama": [f"model.layers.{i}" for i in range(4)],
    "gpt2": [f"transformer.h.{i}" for i in range(4)],
    "t5": [*(f"encoder.block.{i}" for i in range(3)), *(f"decoder.block.{i}" for i in range(2))],
}


@dataclass
class Family:
    """A base, models that differ from it in every tensor, and data for each model."""

    name: str
    base: Path
    models: list[Path]
    data: list[Path]

    def recipe(self, method: str, statistics: Sequence[Statistics] = (), **parameters: Any) -> dict[str, Any]:
        models = [{"model": str(model)} for model in self.models]
        for entry, own in zip(models, statistics, strict=False):
            entry["statistics"] = str(own.path)
        found = {"merge_method": method, "base_model": str(self.base), "models": models}
        return found | ({"parameters": parameters} if parameters else {})

    def calibrate(self, method: str, out: Path, *, batch_tokens: int = 2048, **parameters: Any) -> list[Statistics]:
        plan = build_plan(load_recipe(self.recipe(method, **parameters)), measured=False)
        with ExitStack() as stack:
            prepared = [
                stack.enter_context(prepare(model, [data], choice=choice(), batch_tokens=batch_tokens))
                for model, data in zip(self.models, self.data, strict=True)
            ]
            return calibrate_within(plan, prepared, out)

    def merged(self, method: str, folder: Path, **parameters: Any) -> dict[str, torch.Tensor]:
        """Calibrate and merge; return the tensors that were written."""
        found = self.calibrate(method, folder / "statistics", **parameters)
        merge(self.recipe(method, found, **parameters), folder / "out")
        return load_file(folder / "out/model.safetensors")

    def open(self, folder: Path) -> Any:
        return getattr(transformers, FAMILIES[self.name][1]).from_pretrained(folder).eval()

    def sequences(self, model: int) -> list[dict[str, torch.Tensor]]:
        """The tokens of a model's data, one sequence at a time, without padding."""
        encode = transformers.AutoTokenizer.from_pretrained(self.base)
        found = []
        for line in self.data[model].read_text().splitlines():
            record = json.loads(line)
            if self.name == "t5":
                prompt, completion = (encode(record[key])["input_ids"] for key in ("prompt", "completion"))
                found.append(
                    {
                        "input_ids": torch.tensor([prompt[:LENGTH]]),
                        "decoder_input_ids": torch.tensor([[0, *completion[: LENGTH - 1]]]),
                    }
                )
                continue
            ids = encode(record["text"])["input_ids"]
            found += [{"input_ids": torch.tensor([ids[i : i + LENGTH]])} for i in range(0, len(ids), LENGTH)]
        return found


def choice() -> Any:
    from merganser.statistics import Choice

    return Choice(length=LENGTH)


def make_family(root: Path, name: str, count: int = 2, *, base: Path | None = None) -> Family:
    """Write a base, `count` models around it, and a file of texts for each."""
    if base is None:
        base = save(root / "base", name)
        add_tokenizer(base)
    weights = load_file(base / "model.safetensors")
    models, data = [], []
    for k in range(count):
        folder = root / f"model{k}"
        shutil.copytree(base, folder)
        generator = torch.Generator().manual_seed(k)
        moved = {n: w + 0.05 * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
        save_file(moved, folder / "model.safetensors", {"format": "pt"})
        models.append(folder)
        data.append(_texts(root / f"data{k}.jsonl", k, pairs=name == "t5"))
    return Family(name, base, models, data)


def _texts(file: Path, seed: int, *, pairs: bool) -> Path:
    words = [text(100 * seed + i, 6 + 3 * i).strip() for i in range(8)]
    if pairs:
        lines = [{"prompt": a, "completion": b} for a, b in zip(words[::2], words[1::2], strict=True)]
    else:
        lines = [{"text": each} for each in words[:4]]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file
