"""Training of the tiny zoo: plain PyTorch on one thread, in the worker processes of jobs.py."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import jobs
from .book import appears_whole

Report = Callable[..., None]
SHARDS = 2  # a batch of the base is always summed from two halves, so one worker and two get the same model


@dataclass(frozen=True)
class Settings:
    """How one model is trained; everything that changes the outcome is in here."""

    steps: int
    learning_rate: float
    batch: int = 32
    length: int = 128
    warmup: int = 20
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.length

    def record(self) -> dict[str, Any]:
        return asdict(self)


def rate(step: int, settings: Settings) -> float:
    """Learning rate of a step: linear warm-up, then linear decay to a tenth."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    left = (settings.steps - step) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.1 + 0.9 * left)


def batches(streams: list[tuple[np.ndarray, float]], settings: Settings, shard: int, shards: int) -> Any:
    """Yield one shard of each step's batch, `(batch / shards, length + 1)` int64, drawn from the token streams.

    Each row comes from one stream, chosen with its share, at a random place. The draw of a step is the same
    however many shards read it.
    """
    import torch

    draw = np.random.default_rng(settings.seed)
    shares = np.array([share for _, share in streams])
    rows = range(shard * settings.batch // shards, (shard + 1) * settings.batch // shards)
    for _ in range(settings.steps):
        chosen = draw.choice(len(streams), size=settings.batch, p=shares / shares.sum())
        places = draw.random(settings.batch)
        batch = []
        for row in rows:
            tokens = streams[chosen[row]][0]
            start = int(places[row] * (len(tokens) - settings.length - 1))
            batch.append(tokens[start : start + settings.length + 1])
        yield torch.from_numpy(np.stack(batch).astype(np.int64))


def loss_of(model: Any, rows: Any) -> Any:
    """Mean next-token loss in nats."""
    import torch

    # float32 throughout: bfloat16 gains a tenth where the processor has it and costs much more where it has not
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def optimise(
    report: Report,
    model: Any,
    streams: list[tuple[np.ndarray, float]],
    settings: Settings,
    mine: list[int],
    shards: int,
    exchange: Path | None,
) -> None:
    """Train in place on the shards `mine` of each batch; the gradient is the mean over all shards.

    With `exchange` the gradients of the other shards come from another worker through that file.
    """
    import torch

    model.train()
    parameters = list(model.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    if exchange is None:
        table = torch.zeros(2 * shards * size)
    else:
        table = torch.from_file(str(exchange), shared=True, size=2 * shards * size)
    table = table.view(2, shards, size)  # two slots in turn, so that one meeting per step is enough
    optimiser = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    sources = [batches(streams, settings, shard, shards) for shard in mine]
    for step in range(settings.steps):
        slot = table[step % 2]
        for shard, source in zip(mine, sources, strict=True):
            model.zero_grad(set_to_none=True)
            loss = loss_of(model, next(source))
            loss.backward()
            torch.cat([parameter.grad.flatten() for parameter in parameters], out=slot[shard])
        if exchange is not None:
            jobs.meet()
        mean = slot.sum(0).div_(shards)
        torch._foreach_copy_(
            [parameter.grad for parameter in parameters],
            [part.view_as(p) for part, p in zip(mean.split([p.numel() for p in parameters]), parameters, strict=True)],
        )
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        for group in optimiser.param_groups:
            group["lr"] = rate(step, settings)
        optimiser.step()
        if step % 5 == 4 or step + 1 == settings.steps:
            done = (step + 1) * settings.batch * settings.length
            report(done, f"step {step + 1}/{settings.steps} loss {loss.item():.2f}")


def train_base(
    report: Report,
    target: Path,
    architecture: dict[str, Any],
    tokenizer: Path,
    streams: list[tuple[Path, float]],
    settings: Settings,
    mine: list[int],
    exchange: Path | None,
) -> None:
    """Make the base from scratch; called by one worker with both shards, or by two with one each."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)  # the same first weights in each worker
    model = LlamaForCausalLM(LlamaConfig(**architecture))
    optimise(report, model, _open(streams), settings, mine, SHARDS, exchange)
    if 0 in mine:
        save(model, sorted(tokenizer.iterdir()), target)


def train_expert(
    report: Report, target: Path, base: Path, tokenizer: Path, streams: list[tuple[Path, float]], settings: Settings
) -> None:
    """Fine-tune the base on the streams of one domain."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimise(report, model, _open(streams), settings, [0], 1, None)
    save(model, sorted(tokenizer.iterdir()), target)


def _open(streams: list[tuple[Path, float]]) -> list[tuple[np.ndarray, float]]:
    return [(np.load(path, mmap_mode="r"), share) for path, share in streams]


def save(model: Any, tokenizer: list[Path], target: Path) -> None:
    """Write a bfloat16 checkpoint with the files of its tokenizer; the folder appears whole."""
    import shutil

    import torch

    with appears_whole(target) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        for file in tokenizer:
            shutil.copy(file, folder)
