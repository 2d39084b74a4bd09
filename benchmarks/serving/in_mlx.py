"""Run models in mlx-lm: `PYTHON in_mlx.py JOBS.json ANSWERS.jsonl`, with the Python that has mlx-lm.

A job either continues prompts, or quantises a model by `mlx_lm.convert` and stores what mlx restores of its weights. This
file uses nothing of Merganser.
"""

import os
import sys
from pathlib import Path
from typing import Any

from answering import NEW_TOKENS, run

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
VERSIONS = ("mlx", "mlx-lm", "transformers", "numpy")


def main() -> int:
    """Answer the jobs, a line each."""
    run(lambda job: quantise(job) if "bits" in job else answer(job), VERSIONS)
    return 0


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Load a model, and continue the prompts, in float32."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    model, tokenizer = load(job["model"])
    model.set_dtype(mx.float32)
    answers = []
    for prompt in job["prompts"]:
        logits = model(mx.array([prompt]))[0].astype(mx.float32)
        said = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        logprobs = [float(said[at, token]) for at, token in enumerate(prompt[1:])]
        tokens = []
        for token, own in generate_step(mx.array(prompt), model, max_tokens=NEW_TOKENS):
            tokens.append(int(token))
            logprobs.append(float(own[int(token)]))
        answers.append({"tokens": tokens, "logprobs": logprobs})
    return {"answers": answers, "tokens_of_texts": [tokenizer.encode(text) for text in job["texts"]]}


def quantise(job: dict[str, Any]) -> dict[str, Any]:
    """Quantise a model, and store its dequantised weights, with arithmetic in float32 and in the dtype of the scales."""
    import mlx.core as mx
    from mlx_lm import convert

    mx.set_default_device(mx.cpu)
    out = Path(job["out"])
    if not out.exists():
        sizes = {"q_bits": job["bits"], "q_group_size": job["group"]}
        convert(job["model"], mlx_path=str(out), quantize=True, dtype=job["dtype"], **sizes)
    stored: dict[str, Any] = {}
    for file in sorted(out.glob("*.safetensors")):
        stored |= mx.load(str(file))
    wide, own = {}, {}
    for name, weight in stored.items():
        stem = name.removesuffix(".weight")
        if weight.dtype != mx.uint32:
            continue
        scales, biases = stored[f"{stem}.scales"], stored[f"{stem}.biases"]
        sizes = {"group_size": job["group"], "bits": job["bits"]}
        both = (scales.astype(mx.float32), biases.astype(mx.float32))
        wide[name] = mx.dequantize(weight, *both, **sizes).astype(mx.float32)
        own[name] = mx.dequantize(weight, scales, biases, **sizes)
    beside = Path(f"{out}-restored")
    beside.mkdir(exist_ok=True)
    mx.save_safetensors(str(beside / "wide.safetensors"), wide)
    mx.save_safetensors(str(beside / "own.safetensors"), own)
    return {"quantised": len(wide)}


if __name__ == "__main__":
    sys.exit(main())
