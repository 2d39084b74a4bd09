"""The demonstration of the README: make small models, merge them with several recipes, and measure the results.

    scripts/demo

Everything is real: a base and four experts are trained (a few minutes, once), merged by the command line, loaded with
transformers, and measured on texts that none of them was trained on.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.zoo import Zoo, load_zoo
from benchmarks.zoo.loss import loss_of_text

TOKENS = 4096

MERGES = {
    "average": "merge_method: linear\nmodels:\n{models}parameters:\n  weight: 1.0\n",
    "task arithmetic": "merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n{models}parameters:\n  weight: 0.3\n",
    "TIES": (
        "merge_method: ties\nbase_model: {base}\nmodels:\n{models}parameters:\n  weight: 1.0\n  density: 0.5\n"
        "  lambda: 0.5\n"
    ),
    "DARE-TIES": (
        "merge_method: dare_ties\nbase_model: {base}\nmodels:\n{models}parameters:\n  weight: 0.3\n  density: 0.5\n"
    ),
}


def main() -> int:
    """Run the demonstration; the folder for its output is ./demo."""
    console = Console()
    out = Path("demo")
    out.mkdir(exist_ok=True)
    started = time.monotonic()
    console.print("1. A base and four experts (trained once, then kept in the cache)")
    subprocess.run([sys.executable, "-m", "benchmarks.zoo", "tiny"], check=True)
    zoo = load_zoo("tiny")
    console.print("\n2. Merges")
    merged = {name: merge(console, zoo, name, recipe, out) for name, recipe in MERGES.items()}
    console.print("\n3. Held-out loss in bits per byte; lower is better")
    models = {"base": zoo.base, **{f"{d} expert".replace("_", " "): path for d, path in zoo.experts.items()}, **merged}
    console.print(table(zoo, models))
    console.print(f"\nMerged models lie in {out}/, each with its run record. Load one with transformers:")
    console.print(Text(f'  AutoModelForCausalLM.from_pretrained("{merged["TIES"]}")'))
    console.print(f"Done in {time.monotonic() - started:.0f} s.")
    return 0


def merge(console: Console, zoo: Zoo, name: str, recipe: str, out: Path) -> Path:
    """Write a recipe and run it by the command line."""
    slug = name.lower().replace(" ", "-")
    file, target = out / f"{slug}.yaml", out / slug
    models = "".join(f"  - model: {path}\n" for path in zoo.experts.values())
    file.write_text(recipe.format(base=zoo.base, models=models), encoding="utf-8")
    console.print(Text(f"$ merganser merge {file} {target} --overwrite"))
    command = [sys.executable, "-m", "merganser", "merge", str(file), str(target), "--overwrite"]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return target


def measure(zoo: Zoo, path: Path, domains: list[str]) -> dict[str, float]:
    """Load a model with transformers and measure it on every domain, in bits per byte."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    return {
        d: loss_of_text(model, tokenizer, zoo.texts[d]["test"], max_tokens=TOKENS, window=128).bits_per_byte
        for d in domains
    }


def _header(word: str) -> str:
    """Set a long word in two lines, so that the table fits a terminal of 80 columns."""
    return word.replace("_", "\n") if "_" in word or len(word) < 9 else f"{word[:5]}-\n{word[5:]}"


def table(zoo: Zoo, models: dict[str, Path]) -> Table:
    """Measure every model on every domain."""
    domains = [*zoo.experts, zoo.retained]
    losses = {name: measure(zoo, path, domains) for name, path in models.items()}
    base = losses["base"]
    gain = {domain: base[domain] - losses[f"{domain} expert".replace("_", " ")][domain] for domain in zoo.experts}
    result = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("model", no_wrap=True)
    for domain in domains:
        result.add_column(_header(domain), justify="right")
    result.add_column(_header("recovered"), justify="right")
    result.add_column(_header("forgotten"), justify="right")
    for name, row in losses.items():
        shares = [(base[d] - row[d]) / gain[d] for d in zoo.experts]
        is_expert = name.endswith(" expert")
        result.add_row(
            name,
            *(f"{row[d]:.3f}" for d in domains),
            "" if is_expert else f"{sum(shares) / len(shares):.0%}",
            f"{row[zoo.retained] - base[zoo.retained]:+.3f}",
        )
    result.caption = (
        f"recovered: mean share of the experts' gain over the base that is kept; forgotten: loss on {zoo.retained} "
        f"above the base's. First {TOKENS:,} tokens of each held-out text."
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
