"""The demonstration of the README: merge four experts of a real language model, and see what the merges keep.

    scripts/demo

The base is SmolLM2-135M-Instruct, out of a package; the experts are it and the four small adapters of this repository.
Merging, measuring and reporting are done by the command line, on texts that none of the experts was trained on.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from benchmarks.zoo import shipped
from benchmarks.zoo.sources import SourceError

RECIPES = {
    "average": "merge_method: linear\nmodels:\n{models}parameters:\n  weight: 1.0\ndtype: bfloat16\n",
    "iso-c": "merge_method: iso_c\nbase_model: {base}\nmodels:\n{models}dtype: bfloat16\n",
    "ties": (
        "merge_method: ties\nbase_model: {base}\nmodels:\n{models}"
        "parameters:\n  weight: 1.0\n  density: 0.5\n  lambda: 1.0\ndtype: bfloat16\n"
    ),
}
REPORTED = "iso-c"
WINDOWS, CONTEXT, NEW_TOKENS = 6, 256, 40
PROMPTS = {
    "haskell": "Write a haskell function to add the squares of two numbers.\n```haskell\n",
    "middle_english": "And Jhesus wente out with hise disciplis, and seide to hem,",
}


def main() -> int:
    """Run the demonstration; the folder for its output is ./demo."""
    os.environ["TQDM_DISABLE"] = "1"  # progress is told here
    console = Console()
    out = Path("demo")
    out.mkdir(exist_ok=True)
    started = time.monotonic()
    console.print("1. SmolLM2-135M-Instruct and four experts (fetched and put together once, then kept in the cache)")
    try:
        zoo = shipped.unpack(lambda text: console.print(Text(f"   {text}")))
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    console.print("\n2. Three merges")
    # short names for the commands below; the models themselves stay in the cache
    base = link(out / "base", zoo.base)
    experts = {domain: link(out / domain, path) for domain, path in zoo.experts.items()}
    models = "".join(f"  - model: {path}\n" for path in experts.values())
    merged = {}
    for name, recipe in RECIPES.items():
        file, merged[name] = out / f"{name}.yaml", out / name
        file.write_text(recipe.format(base=base, models=models), encoding="utf-8")
        run(console, "merge", file, merged[name], "--overwrite")
    console.print("\n3. What they kept, in bits per byte of held-out texts (lower is better)")
    tasks = [str(link(out / f"{domain}.txt", texts["test"])) for domain, texts in zoo.texts.items()]
    lengths = ["--limit", WINDOWS, "--context", CONTEXT, "--stride", CONTEXT]
    models_and_base = [*merged.values(), "--base", base, "--experts", *(f"{d}={p}" for d, p in experts.items())]
    run(console, "eval", *models_and_base, "--tasks", *tasks, *lengths, "--json", out / "eval.json")
    console.print("\n4. What they write")
    for domain, prompt in PROMPTS.items():
        console.print(Text(f"\n{domain}: {prompt.strip()}", style="bold"))
        for name, path in {"base": base, **merged}.items():
            console.print(Text(f"[{name}]", style="cyan"), Text(written(path, prompt)), soft_wrap=True)
    console.print("\n5. A page to look at")
    run(console, "report", merged[REPORTED], "--eval", out / "eval.json", "--overwrite")
    console.print(
        f"\nMerged models are in {out}/, each with its run record. Load one with transformers:", soft_wrap=True
    )
    console.print(Text(f'  AutoModelForCausalLM.from_pretrained("{merged[REPORTED]}")'))
    console.print(f"Done in {time.monotonic() - started:.0f} s.")
    return 0


def link(name: Path, target: Path) -> Path:
    """Make a link, or make it anew; an own file or folder of that name is left, and an error."""
    if name.is_symlink():
        name.unlink()
    name.symlink_to(target)
    return name


def run(console: Console, *words: str | Path | int) -> None:
    """Show a command line and run it."""
    arguments = [str(word) for word in words]
    shown = Text("$ merganser " + " ".join(arguments))
    console.print(shown, soft_wrap=True)
    command = [sys.executable, "-m", "merganser", *arguments]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def written(path: Path, prompt: str) -> str:
    """Load a model with transformers and let it continue a prompt, by the likeliest token that it did not just say."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, repetition_penalty=1.2, do_sample=False, pad_token_id=0
        )
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    sys.exit(main())
