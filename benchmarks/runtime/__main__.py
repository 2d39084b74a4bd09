"""`python -m benchmarks.runtime MODEL TEXT [options]`: compressed caches at equal bytes, beside SnapKV.

A prompt is run through the model once; each cache is given the same keys, values and queries, which are those that it
would see in `generate`, and goes on from there. A method that holds numbers beside keys and values gets as many entries
fewer. A cache without a budget (MiniCache, Task-KV and, with `--heads`, RazorAttention) is compared with a SnapKV that
takes its bytes behind that prompt. `--pools 9` adds the methods that choose entries by scores with a wider maximum over
neighbours, each beside itself at the default.

Scales: `likelihood`, bits per token of what follows, one call; `needles`, a number hidden at depths of prompts of several
lengths; `ruler`, generated tasks of RULER's kinds; `speed`, processor seconds. Before any of them, all caches are checked
on one prompt; exit code 1 and a message if a check fails. The result is JSON: of every cache its figure, and how much more
than its comparison of equal bytes it has ("more"), with the 95 % bootstrap interval of paired differences.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from merganser.runtime import MergedCache, RetrievalHeads

from .checks import WrongResultError, check
from .contenders import METHODS, Field, Make
from .scales import likelihoods, needle_grid, ruler, speed
from .tasks import TASKS, Maker, beginning, encoder

SCALES = ("likelihood", "needles", "ruler", "speed")
UNBOUNDED = ["minicache", "task_kv"]


def texts(tokens: list[int], start: list[int], options: argparse.Namespace) -> list[Tensor]:
    """Parts of the text, each a prompt, which begins with `start`, and what follows."""
    step = options.prompt + options.following - len(start)
    parts = [[*start, *tokens[at : at + step]] for at in range(0, len(tokens) - step + 1, step)]
    return [torch.tensor([part]) for part in parts[: options.texts]]


def parsed(arguments: list[str]) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime")
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--scales", nargs="+", default=SCALES, choices=SCALES)
    parser.add_argument("--budget", type=int, default=128, help="entries of SnapKV per layer and head")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens before compression")
    parser.add_argument("--following", type=int, default=128, help="tokens whose bits are counted")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024], help="of the needle grid's prompts")
    parser.add_argument("--depths", type=int, default=5, help="of the needle grid")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--items", type=int, default=4, help="prompts per task")
    parser.add_argument("--seed", type=int, default=0, help="of needles and tasks")
    parser.add_argument("--steps", type=int, default=32, help="tokens that are timed")
    parser.add_argument("--repeats", type=int, default=2, help="of the timing")
    parser.add_argument("--queries", type=int, default=512, help="last queries of the prompt that caches may look at")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--unbounded", nargs="*", default=UNBOUNDED, choices=UNBOUNDED, help="caches without a budget")
    parser.add_argument("--pools", type=int, nargs="+", default=[], help="further values of pool, beside the defaults")
    parser.add_argument(
        "--heads", type=Path, help="retrieval heads, written by RetrievalHeads.save: adds RazorAttention"
    )
    return parser.parse_args(arguments)


def mixed(model: Any) -> bool:
    """Whether some layers have a sliding window, so that MiniCache finds no pairs next to each other."""
    return any(each.is_sliding for each in MergedCache("snapkv", model, budget=99).layers)


def unbounded(model: Any, options: argparse.Namespace) -> dict[str, Make]:
    """The caches without a budget, of those that the model can have."""
    made: dict[str, Make] = {
        name: lambda name=name: MergedCache(name, model)
        for name in options.unbounded
        if name == "task_kv" or not mixed(model)
    }
    if options.heads:
        heads = RetrievalHeads.load(options.heads)
        made["razor_attention"] = lambda: MergedCache("razor_attention", model, heads=heads, window=options.budget)
    return made


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    encode, start = encoder(tokenizer), beginning(tokenizer)
    tokens, methods = encode(options.text.read_text(encoding="utf-8")), sorted({*options.methods, "snapkv"})
    field = Field(model, options.budget, methods, unbounded(model, options), options.pools)
    prompt = torch.tensor([[*start, *tokens][: options.prompt]])

    def maker(length: int) -> Maker:
        return Maker(encode, tokens, length, options.seed, start)

    runs: dict[str, Callable[[], Any]] = {
        "likelihood": lambda: likelihoods(model, field, texts(tokens, start, options), options.prompt, options.queries),
        "needles": lambda: needle_grid(
            model, tokenizer, field, [maker(each) for each in options.lengths], options.depths, options.queries
        ),
        "ruler": lambda: ruler(
            model, tokenizer, field, maker(options.prompt), options.tasks, options.items, options.queries
        ),
        "speed": lambda: speed(model, field, prompt, options.steps, options.repeats, options.queries),
    }
    try:
        check(model, prompt, field, methods, options.budget, options.queries)
        result = {name: runs[name]() for name in options.scales}
    except (WrongResultError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps({"threads": torch.get_num_threads(), **result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
