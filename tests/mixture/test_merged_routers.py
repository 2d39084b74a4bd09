"""Routers of mixtures that are merged: their statistics, and the closed form that fits the merged one to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.calibration import calibrate
from merganser.engine.merge import merge
from merganser.statistics import Statistics
from tests.calibration.families import save
from tests.evaluation.tiny import add_tokenizer, text

ROUTERS = {
    "mixtral": "model.layers.{}.block_sparse_moe.gate.weight",
    "gpt-oss": "model.layers.{}.mlp.router.weight",
}


def measured(model: Path, out: Path, seed: int) -> Statistics:
    (out.parent / f"{out.name}.txt").write_text(text(seed, 400), encoding="utf-8")
    return calibrate(model, [str(out.parent / f"{out.name}.txt")], out, sequences=6, length=16)


def read(statistics: Statistics, kind: str, name: str) -> torch.Tensor:
    found = [load_file(file) for file in sorted(Path(statistics.path).rglob("*.safetensors"))]
    return next(tensors[f"{kind}/{name}"] for tensors in found if f"{kind}/{name}" in tensors)


@pytest.mark.parametrize("family", ROUTERS)
def test_a_router_reads_every_token_and_its_experts_two_of_each(tmp_path: Path, family: str) -> None:
    """Two experts compute each token, so the sums of all experts are twice those of the router."""
    model = save(tmp_path / "model", family)
    add_tokenizer(model)
    found = measured(model, tmp_path / "statistics", 1)
    router = ROUTERS[family].format(2)
    parent = router.rsplit(".", 2)[0]
    if family == "gpt-oss":
        experts, counts = (read(found, kind, f"{parent}.experts.gate_up_proj").sum(0) for kind in ("gram", "count"))
    else:
        names = [f"{parent}.experts.{expert}.w1.weight" for expert in range(4)]
        grams = [read(found, "gram", name) for name in names]
        experts = torch.stack(grams).sum(0)
        counts = torch.stack([read(found, "count", name) for name in names]).sum()
    assert int(read(found, "count", router)) == 6 * 16
    assert int(counts) == 2 * 6 * 16
    torch.testing.assert_close(2 * read(found, "gram", router), experts, rtol=1e-4, atol=1e-4)


def test_a_merged_router_is_fitted_to_those_of_the_models(tmp_path: Path) -> None:
    """Least squares: the errors on each model's own inputs are orthogonal to these inputs, as those of the average are not."""
    base = save(tmp_path / "base", "mixtral")
    add_tokenizer(base)
    weights, models, statistics = load_file(base / "model.safetensors"), [], []
    for seed in (1, 2):
        folder = tmp_path / f"m{seed}"
        folder.mkdir()
        for file in base.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        draw = torch.Generator().manual_seed(seed)
        moved = {name: each + 0.05 * torch.randn(each.shape, generator=draw) for name, each in weights.items()}
        save_file(moved, folder / "model.safetensors", {"format": "pt"})
        models.append(moved)
        statistics.append(measured(folder, tmp_path / f"s{seed}", seed))
    given = [{"model": str(tmp_path / f"m{k}"), "statistics": str(tmp_path / f"s{k}")} for k in (1, 2)]
    parameters = {"alpha": 1.0, "ridge": 1e-6, "limit": 1e6}
    written = {"merge_method": "regmean", "base_model": str(base), "models": given, "parameters": parameters}
    merge(written, tmp_path / "out")
    name = ROUTERS["mixtral"].format(1)
    grams = [read(own, "gram", name).double() / int(read(own, "count", name)) for own in statistics]

    def rest(router: torch.Tensor) -> float:
        errors = [(router - own[name]).double() @ gram for own, gram in zip(models, grams, strict=True)]
        return float(sum(errors, torch.zeros(1)).norm())

    merged = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert rest(merged) < 0.01 * rest((models[0][name] + models[1][name]) / 2)
