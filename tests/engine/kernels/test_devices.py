"""Work spread over several devices, as far as it goes without a GPU: two of them are the same CPU."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merganser.engine.kernels.devices import resolve_devices
from merganser.engine.merge import merge
from merganser.errors import UnsupportedError


@pytest.mark.parametrize("over", ["tensor", "model"])
def test_two_devices_give_the_bytes_of_one(tmp_path: Path, over: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for model in ("base", "a", "b"):
        (tmp_path / model).mkdir()
        tensors = {f"large{i}": torch.randn(900, 1024, generator=generator) for i in range(4)}
        tensors |= {f"small{i}": torch.randn(7, generator=generator) for i in range(9)}
        save_file(tensors, tmp_path / model / "model.safetensors")
    recipe = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / name), "parameters": {"density": 0.3}} for name in ("a", "b")],
        "parameters": {"weight": 0.5, "trim_over": over},
    }
    one = merge(recipe, tmp_path / "one", device="cpu")
    two = merge(recipe, tmp_path / "two", device="cpu,cpu", threads=4)
    assert two.record["device"] == "cpu,cpu"
    assert one.record["outputs"][0] == two.record["outputs"][0]


def test_auto_is_a_device_that_is_here() -> None:
    assert resolve_devices("auto")[0].type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps", "cpu,tpu", ""])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="--device"):
        resolve_devices(name)
