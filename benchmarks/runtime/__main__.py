"""`python -m benchmarks.runtime MODEL TEXT [options]`: caches at equal bytes, beside SnapKV.

A prompt is run through the model once; each cache is given the same keys, values and queries, which are those that it
would see in `generate`, and goes on from there. A method that holds numbers beside keys and values gets as many entries
fewer; MiniCache and, with `--heads`, RazorAttention have no budget, and their bytes are in the result. Two tasks: bits per token of the text that follows the prompt, one call, and a number hidden at several depths.
"""

import argparse
import inspect
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from merganser.runtime import LAYERS, MergedCache, RetrievalHeads

METHODS = sorted(name for name, layer in LAYERS.items() if "budget" in inspect.signature(layer).parameters)
NEEDLE = " The secret number of the house is {}. Remember it."
QUESTION = " The secret number of the house is"


class Prompt:
    """A prompt that ran once: keys, values and the last queries of every layer."""

    def __init__(self, model: Any, tokens: Tensor, queries: int):
        cache = MergedCache("snapkv", model, budget=tokens.shape[1] + queries + 99, window=queries)
        with torch.no_grad():
            self.logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        self.layers = [(each.keys, each.values, each.queries, each.scaling) for each in cache.layers]
        cache.close()

    def into(self, cache: Any) -> Any:
        """Let a cache see the prompt."""
        for layer, (keys, values, queries, scaling) in zip(cache.layers, self.layers, strict=True):
            if wanted := layer.queries_wanted():
                layer.observe(queries[:, :, -wanted:], scaling)
            layer.update(keys, values)
        return cache


def bits(model: Any, prompt: Prompt, cache: Any, following: Tensor) -> float:
    """Mean bits per token of what follows, all in one call."""
    with torch.no_grad():
        logits = model(following[:, :-1], past_key_values=prompt.into(cache)).logits
    logits = torch.cat((prompt.logits[:, None], logits), dim=1).log_softmax(-1)
    return float(-logits.gather(-1, following[..., None]).mean()) / math.log(2)


def answer(model: Any, prompt: Prompt, cache: Any, count: int) -> list[int]:
    """The next tokens, greedily."""
    prompt.into(cache)
    found, logits = [], prompt.logits
    for _ in range(count):
        found.append(int(logits.argmax()))
        with torch.no_grad():
            logits = model(torch.tensor([found[-1:]]), past_key_values=cache).logits[:, -1]
    return found


def budget(method: str, entries: int, width: int) -> int:
    """As many entries as take the bytes of `entries` of SnapKV; `width`: bytes of a key and a value."""
    beside = LAYERS[method](budget=99).first(torch.zeros(1, 1, 1, 1))
    return entries * width // (width + 4 * len(beside))


def caches(model: Any, entries: int, methods: list[str]) -> dict[str, Any]:
    """The whole cache, and one of each method, as functions that make them."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = 2 * head * next(model.parameters()).element_size()
    made: dict[str, Any] = {"whole": lambda: MergedCache("snapkv", model, budget=10**9)}
    for method in methods:
        own = budget(method, entries, width)
        made[method] = lambda method=method, own=own: MergedCache(method, model, budget=own)
    return made


def texts(tokens: list[int], options: argparse.Namespace) -> list[Tensor]:
    step = options.prompt + options.following
    parts = [tokens[at : at + step] for at in range(0, len(tokens) - step + 1, step)]
    return [torch.tensor([part]) for part in parts[: options.texts]]


def likelihoods(model: Any, made: dict[str, Any], parts: list[Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Bits per token: the mean over texts, and mean and standard error of the difference from SnapKV."""
    found: dict[str, list[float]] = {name: [] for name in made}
    for part in parts:
        prompt = Prompt(model, part[:, : options.prompt], options.queries)
        for name, make in made.items():
            found[name].append(bits(model, prompt, make(), part[:, options.prompt :]))
    result = {}
    for name, own in found.items():
        values = torch.tensor(own, dtype=torch.float64)
        more = values - torch.tensor(found["snapkv"], dtype=torch.float64)
        error = float(more.std() / math.sqrt(len(own))) if len(own) > 1 else math.nan
        result[name] = {"bits": float(values.mean()), "more": float(more.mean()), "error": error}
        result[name]["bytes"] = prompt.into(made[name]()).stored_bytes()
    return result


def needles(
    model: Any, encoder: Any, made: dict[str, Any], tokens: list[int], options: argparse.Namespace
) -> dict[str, list[bool]]:
    """Whether each cache repeats the number, by depth."""
    found: dict[str, list[bool]] = {name: [] for name in made}
    for at in range(options.depths):
        number = str(7_140 + 613 * at)
        needle, question = encoder(NEEDLE.format(number)).input_ids, encoder(QUESTION).input_ids
        wanted = encoder(f"{QUESTION} {number}").input_ids[len(question) :]
        free = options.prompt - len(needle) - len(question)
        before = round(free * (at + 0.5) / options.depths)
        whole = [*tokens[:before], *needle, *tokens[before:free], *question]
        prompt = Prompt(model, torch.tensor([whole]), options.queries)
        for name, make in made.items():
            found[name].append(answer(model, prompt, make(), len(wanted)) == wanted)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime")
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--budget", type=int, default=128, help="entries of SnapKV per layer and head")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens before compression")
    parser.add_argument("--following", type=int, default=128, help="tokens whose bits are counted")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--queries", type=int, default=512, help="last queries of the prompt that caches may look at")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument(
        "--heads", type=Path, help="retrieval heads, written by RetrievalHeads.save: adds RazorAttention"
    )
    options = parser.parse_args(arguments)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    encoder = AutoTokenizer.from_pretrained(options.model)
    tokens = encoder(options.text.read_text(encoding="utf-8"), verbose=False).input_ids
    made = caches(model, options.budget, sorted({*options.methods, "snapkv"}))
    made["minicache"] = lambda: MergedCache("minicache", model)
    if options.heads:
        heads = RetrievalHeads.load(options.heads)
        made["razor_attention"] = lambda: MergedCache("razor_attention", model, heads=heads, window=options.budget)
    parts = texts(tokens, options)
    result = {
        "likelihoods": likelihoods(model, made, parts, options) if parts else {},
        "needles": needles(model, encoder, made, tokens, options),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
