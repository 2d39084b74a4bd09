"""Language models and their tokenizers, through transformers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from ..anatomy.settings.config import with_older_rotary_keys
from ..checkpoint.files.sidefiles import copy_file, is_tokenizer_file
from ..errors import CheckpointError, UnsupportedError
from .libraries import explained, quiet
from .stored import Source, xxh3_of_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# Models often have a few hundred more embedding rows than tokens, as padding. If more than half of the rows have no
# token, the tokenizer belongs to another model.
_LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and its special tokens at the start of a text.

    Args:
        encoder: The tokenizer of transformers.
        prefix: Tokens that it adds at the start of every text (BOS), usually one or none.
        start: Token that replaces an empty context: BOS, else EOS; None if it has neither.
        hash: Hash of its files.
    """

    encoder: Any
    prefix: tuple[int, ...]
    start: int | None
    hash: str

    @cached_property
    def size(self) -> int:
        """One more than its highest token; found once, since reading a vocabulary takes as long as merging a small model."""
        tokens: dict[str, int] = self.encoder.get_vocab()
        return 1 + max(tokens.values())

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens at its start or end."""
        found: list[int] = self.encoder(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def ids_and_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a text, and for each token the index after its last character."""
        found = self.encoder(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found["input_ids"], [end for _, end in found["offset_mapping"]]


@dataclass(frozen=True)
class LanguageModel:
    """A language model whose config and tokenizer are loaded, and whose weights are not.

    Args:
        source: Source of the weights.
        config: Its config, as transformers reads it.
        tokenizer: Its tokenizer.
        positions: Largest number of tokens in its context window; None without such a limit.
    """

    source: Source
    config: Any
    tokenizer: Tokenizer
    positions: int | None

    def load(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Any:
        """Return the transformers model with its weights, in evaluation mode.

        Args:
            tensors: Its weights, from `source.read()`.
            dtype: Dtype of the weights.
            device: Device of the weights.

        Raises:
            CheckpointError: The weights do not match the config, or the tokenizer does not match the vocabulary.
        """
        from transformers import AutoModelForCausalLM

        kind: Any = AutoModelForCausalLM._model_mapping[type(self.config)]
        with explained(CheckpointError, f"{self.source.reference}: transformers cannot load the model"), quiet():
            model, info = kind.from_pretrained(
                None, config=self.config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
            )
        if info["missing_keys"]:
            names = sorted(info["missing_keys"])
            raise CheckpointError(
                f"{self.source.reference}: {names[0]} is missing"
                f"{f', and {len(names) - 1} more tensors' if len(names) > 1 else ''}; {kind.__name__} needs it; fetch the model again"
            )
        _check_vocabulary(self, model.get_input_embeddings().weight.shape[0])
        return model.eval().to(device)


class Reused:
    """A loaded model whose weights are overwritten with those of the next, where that is the same as loading it again.

    Args:
        dtype: Dtype of the weights.
        device: Device of the weights.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._model: Any = None
        self._config: Mapping[str, Any] = {}
        self._plain = False
        self.loads = 0

    def load(self, opened: LanguageModel, tensors: Mapping[str, Tensor], same: Collection[str] = frozenset()) -> Any:
        """Return the model with these weights, in evaluation mode; the one returned before is no longer valid.

        Args:
            opened: The model.
            tensors: Its weights. Where they overwrite others, each is asked for once, and may be computed then.
            same: Names of those that the model returned before has already.

        Raises:
            CheckpointError: As `LanguageModel.load`.
        """
        # a merge says its rotary settings in more keys than the models that transformers wrote, and means the same
        config = with_older_rotary_keys(opened.source.config)
        known = self._plain and config == self._config and self._named_alike(tensors)
        if known and self._overwritten(tensors, same):
            return self._model
        tensors = dict(tensors)
        self._model = opened.load(tensors, self._dtype, self._device)
        self._config = config
        self.loads += 1
        # transformers may rename, split or join weights: they are overwritten only where it stored them as they are
        self._plain = self._fits(tensors) and all(
            parameter.equal(tensors[name].to(parameter)) for name, parameter in self._model.named_parameters()
        )
        return self._model

    def _overwritten(self, tensors: Mapping[str, Tensor], same: Collection[str]) -> bool:
        """Overwrite the weights; return whether all have the shapes of those that were there."""
        for name, parameter in self._model.named_parameters():
            if name not in same:
                tensor = tensors[name]
                if tensor.shape != parameter.shape:
                    return False
                parameter.data.copy_(tensor)
        return True

    def _fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether every weight of the model is a tensor of the same name and shape, and there are no others."""
        return self._named_alike(tensors) and all(
            tensors[name].shape == parameter.shape for name, parameter in self._model.named_parameters()
        )

    def _named_alike(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether every weight of the model is a tensor of the same name, and there are no others."""
        found = dict(self._model.named_parameters())
        # under a second name for the same weight; buffers are not overwritten, so a model that stores some does not fit
        shared = {*self._model.state_dict()} - found.keys() - dict(self._model.named_buffers()).keys()
        return {*tensors} - shared == found.keys()


def open_model(source: Source, tokenizers: dict[str, Tokenizer] | None = None) -> LanguageModel:
    """Read config and tokenizer of a model, and check that it is a language model.

    Args:
        source: The model.
        tokenizers: Cache of loaded tokenizers, by hash, since models of one base usually share theirs; it is updated.

    Raises:
        CheckpointError: It is not a language model, has no tokenizer, or one that does not match its vocabulary.
        UnsupportedError: transformers is not installed, or the tokenizer has no tokenizer.json.
    """
    try:
        from transformers import AutoConfig
    except ImportError:
        raise UnsupportedError(
            "evaluating needs transformers, which is not installed: pip install 'merganser[transformers]'"
        ) from None
    _check_kind(source)
    with _folder(source) as folder:
        with explained(CheckpointError, f"{source.reference}: transformers cannot load config.json"), quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _check_architecture(source, config)
        tokenizer = _load_tokenizer(source, folder, config.model_type, {} if tokenizers is None else tokenizers)
    opened = LanguageModel(source, config, tokenizer, positions_of(config))
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is not None:
        _check_vocabulary(opened, rows)
    return opened


def open_tokenizer(source: Source) -> Tokenizer:
    """Read the tokenizer of a model of any kind.

    Raises:
        CheckpointError: The model has no tokenizer, or transformers cannot load it.
        UnsupportedError: The tokenizer cannot map tokens to characters.
    """
    with _folder(source) as folder:
        return _load_tokenizer(source, folder, str(source.config.get("model_type")), {})


def _load_tokenizer(source: Source, folder: Path, model_type: str, known: dict[str, Tokenizer]) -> Tokenizer:
    from transformers import AutoTokenizer

    names = sorted(name for name in {*source.files, *source.texts} if is_tokenizer_file(name))
    if not any("chat_template" not in name for name in names):
        raise CheckpointError(
            f"{source.reference}: has no tokenizer; put the tokenizer's files (tokenizer.json, ...) next to its weights"
        )
    files = [xxh3_of_file(source.files[name]) if name in source.files else source.texts[name] for name in names]
    # the config is part of the hash, since it may name the class that reads the files
    digest = xxhash.xxh3_128_hexdigest("\0".join([model_type, *names, *files]).encode())
    if digest not in known:
        with explained(CheckpointError, f"{source.reference}: transformers cannot load the tokenizer"), quiet():
            encoder = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        known[digest] = _tokenizer(source, encoder, digest)
    return known[digest]


def _check_kind(source: Source) -> None:
    if not source.config:
        raise CheckpointError(f"{source.reference}: has no config.json, so it is not known what model this is")
    architectures = source.config.get("architectures") or []
    if architectures and not any(str(name).endswith(_HEADS) for name in architectures):
        raise CheckpointError(
            f"{source.reference}: is not a language model: config.json says {architectures[0]}, and only models that "
            "predict the next token can be evaluated (LlamaForCausalLM and the like)"
        )


def _check_architecture(source: Source, config: Any) -> None:
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise CheckpointError(
            f"{source.reference}: is not a language model: model_type is {config.model_type!r}, and transformers has no "
            "model of that type that predicts the next token"
        )


def _check_vocabulary(model: LanguageModel, rows: int) -> None:
    tokens = model.tokenizer.size
    if tokens > rows or tokens < _LEAST_SHARE * rows:
        raise CheckpointError(
            f"{model.source.reference}: the tokenizer does not match the model: it has {tokens:,} tokens, and the model "
            f"{rows:,} embeddings; use the tokenizer that the model was trained with"
        )


def _tokenizer(source: Source, tokenizer: Any, digest: str) -> Tokenizer:
    if not tokenizer.is_fast:
        raise UnsupportedError(
            f"{source.reference}: {type(tokenizer).__name__} does not map tokens to characters; "
            "a tokenizer.json is needed"
        )
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return Tokenizer(tokenizer, tuple(whole[:before]), start, digest)


def positions_of(config: Any) -> int | None:
    """Return the size of the context window in the config, in tokens; None without such a limit."""
    text = config.get_text_config()
    found = (
        getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    )
    return next((value for value in found if isinstance(value, int) and value > 0), None)


@contextmanager
def _folder(source: Source) -> Iterator[Path]:
    """Write the config and side files of a model, except code, into a temporary folder that transformers can read."""
    with tempfile.TemporaryDirectory(prefix="merganser-") as name:
        folder = Path(name)
        for relative, path in source.files.items():
            if relative.endswith(".py"):
                continue
            copy_file(path, folder / relative)
        for relative, text in source.texts.items():
            (folder / relative).write_text(text, encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(source.config), encoding="utf-8")
        yield folder
