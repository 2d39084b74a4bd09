"""What transformers says of the same tokens, and how far another program is from it."""

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .work import Work


def prompts_of(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of the texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in texts]


def load(case: Case, work: Work, adapter: Path | None = None) -> Any:
    """Load in transformers, in float32, what a case is compared with."""
    from transformers import AutoModelForCausalLM

    folder = case.make(work)
    model = AutoModelForCausalLM.from_pretrained(
        case.reference(work) if case.reference else folder, dtype=torch.float32
    )
    if case.define:
        put_experts(model, folder)
    if adapter is not None:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def put_experts(model: Any, folder: Path) -> None:
    """Put the experts of a DeepSeek-MoE checkpoint into a Llama, by their definition (Dai et al. 2024)."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = {name: own.float() for name, own in load_file(folder / "model.safetensors").items()}

    def gated(name: str, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (weights[f"{name}.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def block(name: str, x: torch.Tensor) -> torch.Tensor:
        shares = (x @ weights[f"{name}.gate.weight"].T).softmax(-1)
        best = shares.topk(config["num_experts_per_tok"])
        kept = torch.zeros_like(shares).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
        found = gated(f"{name}.shared_experts", x) if config["n_shared_experts"] else torch.zeros_like(x)
        for expert in range(config["n_routed_experts"]):
            found = found + kept[..., expert, None] * gated(f"{name}.experts.{expert}", x)
        return found

    for number, layer in enumerate(model.model.layers):
        name = f"model.layers.{number}.mlp"
        layer.mlp.forward = partial(gated if number < config["first_k_dense_replace"] else block, name)


def compared(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Mapping[str, Any]]
) -> dict[str, float | int]:
    """Compare what another program said with what a model says of the same tokens.

    Each new token is compared with the likeliest one after the tokens before it; if all are equal, both generate the same.

    Args:
        model: A model of transformers.
        prompts: Tokens of the prompts.
        answers: For each, its new `tokens`, and `logprobs` of these or of all tokens but the first.

    Returns:
        Numbers of `tokens` and of those that are `same`, and the `largest` and `mean` difference of log-probabilities, nats.
    """
    same = count = 0
    apart = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer["tokens"]]])
        with torch.inference_mode():
            said = model(input_ids=ids).logits[0].double().log_softmax(-1)
        own = said[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        own = own[-len(answer["logprobs"]) :]
        apart.append((own - torch.tensor(answer["logprobs"], dtype=torch.float64)).abs())
        likeliest = said[len(prompt) - 1 : -1].argmax(-1)
        same += int((likeliest == torch.tensor(answer["tokens"])).sum())
        count += len(answer["tokens"])
    whole = torch.cat(apart)
    largest = float(whole.max()) if bool(whole.isfinite().all()) else float("inf")
    return {"tokens": count, "same": same, "largest": largest, "mean": float(whole.mean())}


def stored_alike(folder: Path) -> dict[str, Any]:
    """Compare the weights that mlx restored of a folder with what our reader restores, bit for bit."""
    from safetensors.torch import load_file

    from merganser.checkpoint import open_checkpoint

    wide, theirs = (load_file(Path(f"{folder}-restored") / f"{kind}.safetensors") for kind in ("wide", "own"))
    checkpoint = open_checkpoint(str(folder))
    found = {"tensors": len(wide), "equal": 0, "equal_in_own_dtype": 0, "largest": 0.0}
    with checkpoint.reader() as reader:
        for name, tensor in wide.items():
            ours = reader.tensor(checkpoint.tensors[name])
            found["equal"] += int(torch.equal(ours, tensor))
            found["equal_in_own_dtype"] += int(torch.equal(ours.to(theirs[name].dtype), theirs[name]))
            found["largest"] = max(found["largest"], float((ours - tensor).abs().max() / tensor.abs().max()))
    return found
