"""Experts of unequal sizes as one model of transformers: their outputs are weighted and added."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor

from ....errors import NonFiniteError, NotFoundError, ParameterError
from .caches import ExpertCaches
from .settings import MixtureSettings
from .tables import Tables
from .weighing import inverse_perplexities, means_so_far, top_softmax

__all__ = ["Mixture"]

library: Any = transformers
Output: Any = library.modeling_outputs.CausalLMOutputWithPast

_REFUSED = (
    "assistant_model",
    "cache_implementation",
    "inputs_embeds",
    "output_attentions",
    "output_hidden_states",
    "past_key_values",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
)

_OF_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "cache_implementation")

Ran = dict[int, tuple[Tensor, Tensor, Any]]
"""By expert: the rows that it read, what it gives for them, and its cache of them."""


class MixtureConfig(library.PretrainedConfig):  # type: ignore[misc]
    """What `generate` asks of a config."""

    model_type = "merganser_mixture"


class Mixture(library.PreTrainedModel, library.GenerationMixin):  # type: ignore[misc]
    """Experts that read the same tokens, and the weights by which their outputs are added.

        output = head(sum_k a_k r_k),    a = softmax(top-K(scores of the text))

    `r_k` is what expert k makes of the text. Where experts have their own embeddings and heads, `head_k r_k` are added in
    place of `r_k`: this is what projections between the experts and a shared head that lose nothing would give.

    Called with tokens alone, the weights at each token are those of the text up to it, so no logits depend on later tokens.
    With a cache, the weights stay as they are after the tokens of the first call, the prompt.

    Args:
        names: Names of the experts.
        experts: Models of transformers.
        positions: Most tokens that each can see; None without a limit.
        vocabulary: Number of logits.
        settings: How they are mixed.
        tables: Embedding and head that they share; None where each has its own.
    """

    config_class = MixtureConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self,
        names: tuple[str, ...],
        experts: Sequence[Any],
        positions: Sequence[int | None],
        vocabulary: int,
        settings: MixtureSettings,
        tables: Tables | None,
    ) -> None:
        super().__init__(MixtureConfig(vocab_size=vocabulary))
        self.names = names
        self.experts: Any = torch.nn.ModuleList(experts)
        self.positions = positions
        self.vocabulary = vocabulary
        self.settings = settings
        self.tables = tables
        self.router: tuple[Tensor, Tensor] | None = None
        self.told: int | None = None
        self.generation_config = _common_generation([expert.generation_config for expert in experts])
        self.eval().requires_grad_(False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ExpertCaches | None = None,
        weights: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> Any:
        """Return the logits.

        Args:
            input_ids: Tokens, shape [rows, length].
            attention_mask: 1 for tokens and 0 for padding, also of those in the cache; None without padding.
            position_ids: Positions of the tokens; by default without padding.
            past_key_values: What an earlier call left.
            weights: Of the experts, shape [rows, experts], or [rows, length, experts] for each token; by default those of the
                text up to each token, or those in the cache.
            use_cache: Whether to keep what a later call needs.
            logits_to_keep: The last so many logits, or those at these positions; 0 for all.
            return_dict: Makes no difference.

        Raises:
            NotFoundError: A router is to give the weights, and there is none.
            ParameterError: The text is longer than what an expert that has a weight can see.
        """
        ids = input_ids.to(self.device)
        mask = None if attention_mask is None else attention_mask.to(self.device)
        call = _Call(ids, mask, _places(position_ids, mask, ids.shape[1]), logits_to_keep)
        if past_key_values is not None and past_key_values.length:
            return self._further(call, past_key_values)
        ran: Ran = {}
        if weights is None:
            every, ran = self._weighed(call, bool(use_cache))
        else:
            given = weights.to(self.device)
            every = given if given.dim() == 3 else given[:, None].expand(-1, ids.shape[1], -1)
        here = call.kept(every)
        needed = (here > 0).any(1)
        if use_cache:
            needed = needed | (every[:, -1] > 0)
        for number in range(len(self.names)):
            rows = needed[:, number].nonzero().flatten()
            if len(rows) and number not in ran:
                ran[number] = rows, *self._run(number, rows, call, None, bool(use_cache))
        logits = self._mixed(here, {k: (rows, output) for k, (rows, output, _) in ran.items() if needed[:, k].any()})
        if not use_cache:
            return Output(logits=logits)
        found = ExpertCaches(self.names) if past_key_values is None else past_key_values
        found.begin(every[:, -1], {k: (rows, cache) for k, (rows, _, cache) in ran.items()}, ids.shape[1])
        return Output(logits=logits, past_key_values=found)

    def _further(self, call: _Call, cache: ExpertCaches) -> Any:
        """Read tokens behind those in a cache, with the experts that have a weight."""
        outputs = {}
        for number, (rows, own) in enumerate(zip(cache.rows, cache.caches, strict=True)):
            if own is not None:
                output, cache.caches[number] = self._run(number, rows, call, own, True)
                outputs[number] = rows, output
        cache.length += call.ids.shape[1]
        here = call.kept(cache.weights[:, None].expand(-1, call.ids.shape[1], -1))
        return Output(logits=self._mixed(here, outputs), past_key_values=cache)

    def weights_so_far(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return the weights of the experts after each token, float32, shape [rows, length, experts].

        Args:
            ids: Tokens, shape [rows, length].
            mask: 1 for tokens and 0 for padding; None without padding.
        """
        return self._weighed(_Call(ids, mask, _places(None, mask, ids.shape[1]), 1), False)[0]

    def _weighed(self, call: _Call, use_cache: bool) -> tuple[Tensor, Ran]:
        """Return the weights after each token, and what experts gave on the way to them."""
        ids, count = call.ids, len(self.names)
        if self.told is not None or count == 1:
            return self._only(self.told or 0, ids), {}
        counted = torch.ones_like(ids) if call.mask is None else call.mask
        if self.settings.by == "router":
            return top_softmax(self.scores(self.read(ids, counted)), self.settings.top), {}
        whole = _Call(ids, call.mask, call.positions, 0)
        rows, columns, ran = torch.arange(len(ids), device=ids.device), [], {}
        for number, name in enumerate(self.names):
            output, cache = self._run(number, rows, whole, None, use_cache)
            logits = output if self.tables is None else self._finished(output, self._only(number, ids))
            columns.append(inverse_perplexities(logits, ids, counted))
            if columns[-1].isnan().any():
                raise NonFiniteError(f"{name}: gives NaN for this text, so it has no perplexity")
            ran[number] = rows, call.kept(output), cache
        return top_softmax(torch.stack(columns, -1), self.settings.top), ran

    def _only(self, number: int, ids: Tensor) -> Tensor:
        """Return weights that are those of one expert, shape [rows, length, experts]."""
        found = torch.zeros(len(self.names), device=ids.device)
        found[number] = 1
        return found.expand(*ids.shape, len(self.names))

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return what the router reads, the mean over the tokens so far of the experts' average embedding, padded with zeros.

        Args:
            ids: Tokens, shape [rows, length].
            mask: 1 for tokens and 0 for padding, in the same shape.

        Returns:
            float32, shape [rows, length, largest width].
        """
        if self.tables is not None:
            return means_so_far(torch.nn.functional.embedding(ids, self.tables.embedding), mask)
        tables = [expert.get_input_embeddings()(ids).float() for expert in self.experts]
        width = max(table.shape[-1] for table in tables)
        padded = [torch.nn.functional.pad(table, (0, width - table.shape[-1])) for table in tables]
        return means_so_far(torch.stack(padded).mean(0), mask)

    def scores(self, read: Tensor) -> Tensor:
        """Return the router's scores of what it reads, shape [..., experts].

        Raises:
            NotFoundError: There is no router.
        """
        if self.router is None:
            raise NotFoundError("the mixture has no router; make one from text with fit(), or set the task")
        weight, bias = self.router
        return read @ weight.T + bias

    def alone(self, number: int, ids: Tensor) -> Tensor:
        """Return the logits of one expert with its own embedding and head, shape [rows, length, vocabulary]."""
        logits: Tensor = self.experts[number](input_ids=ids.to(self.device), use_cache=False).logits
        return logits[..., : self.vocabulary]

    def _run(self, number: int, rows: Tensor, call: _Call, cache: Any, use_cache: bool) -> tuple[Tensor, Any]:
        """Run an expert on some rows; return what is to be added up, and its cache."""
        expert = self.experts[number]
        if cache is None:
            self._check_length(number, call.ids.shape[1] if call.mask is None else int(call.mask.sum(1).max()))
        target = expert if self.tables is None else expert.base_model
        known = signature(target.forward).parameters
        given: dict[str, Any] = {"attention_mask": call.of(call.mask, rows), "use_cache": use_cache}
        if call.positions is not None and "position_ids" in known:
            given["position_ids"] = call.of(call.positions, rows)
        if cache is not None:
            given["past_key_values"] = cache
        ids = call.of(call.ids, rows)
        if self.tables is not None:
            made = target(inputs_embeds=self.tables.embed(number, ids), **given)
            output = call.kept(self.tables.leave(number, made.last_hidden_state))
        elif "logits_to_keep" in known:
            made = target(input_ids=ids, **given, logits_to_keep=call.keep)
            output = made.logits[..., : self.vocabulary]
        else:
            made = target(input_ids=ids, **given)
            output = call.kept(made.logits)[..., : self.vocabulary]
        return output, getattr(made, "past_key_values", None)

    def _check_length(self, number: int, length: int) -> None:
        most = self.positions[number]
        if most is not None and length > most:
            raise ParameterError(f"{self.names[number]}: can see {most} tokens at once, and a text has {length}")

    def _mixed(self, weights: Tensor, outputs: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """Return the logits of weighted outputs.

        Args:
            weights: Shape [rows, kept, experts].
            outputs: By expert, its rows, and what it gives for them.
        """
        total: Tensor | None = None
        dtype = torch.float32
        for number, (rows, output) in sorted(outputs.items()):
            dtype = output.dtype
            part = weights[rows][..., number, None] * output.float()
            if len(rows) == len(weights):
                total = part if total is None else total + part
            else:
                total = part.new_zeros(len(weights), *part.shape[1:]) if total is None else total
                total = total.index_add(0, rows, part)
        assert total is not None
        return self._finished(total.to(dtype), weights)

    def _finished(self, total: Tensor, weights: Tensor) -> Tensor:
        return total if self.tables is None else self.tables.logits(total, weights)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **options: Any) -> Any:
        """Return what `generate` of transformers does; the weights of a row are those of its prompt.

        Prompts that are padded on the right are padded on the left instead, where tokens can follow them.

        Raises:
            ParameterError: An option is not possible with a mixture.
        """
        ids = options.pop("input_ids", None) if inputs is None else inputs
        if ids is None:
            raise ParameterError("generate: prompts are needed (input_ids)")
        settings = options.get("generation_config") or self.generation_config
        for name in _REFUSED:
            if options.get(name) or (name in settings.to_dict() and getattr(settings, name)):
                raise ParameterError(f"generate of a mixture takes no {name}")
        given = options.pop("attention_mask", None)
        ids = ids.to(self.device)
        mask = torch.ones_like(ids) if given is None else given.to(self.device)
        ids, mask = _padded_left(ids, mask)
        more = int(options.get("max_new_tokens") or 1) - 1
        for number in range(len(self.names)):
            self._check_length(number, int(mask.sum(1).max()) + more)
        if options.get("use_cache", settings.use_cache) is False:
            options["weights"] = self.weights_so_far(ids, mask)[:, -1]
        else:
            options["past_key_values"] = ExpertCaches(self.names)
        return super().generate(input_ids=ids, attention_mask=mask, **options)


class _Call:
    """What the model is called with.

    Args:
        ids: Tokens, shape [rows, length].
        mask: 1 for tokens and 0 for padding, also of those in a cache; None without padding.
        positions: Positions of the tokens; None where they are counted from the first.
        keep: As `logits_to_keep`.
    """

    def __init__(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, keep: int | Tensor) -> None:
        self.ids, self.mask, self.positions, self.keep = ids, mask, positions, keep

    def of(self, values: Tensor | None, rows: Tensor) -> Any:
        """Return some rows."""
        return values if values is None or len(values) == len(rows) or len(values) == 1 else values[rows]

    def kept(self, values: Tensor) -> Tensor:
        """Return what is kept of the second axis."""
        if isinstance(self.keep, Tensor):
            return values[:, self.keep]
        return values[:, -self.keep :] if self.keep else values


def _places(given: Tensor | None, mask: Tensor | None, length: int) -> Tensor | None:
    """Return positions that do not count padding on the left; None where there is none."""
    if given is not None:
        return given
    if mask is None or bool(mask[:, 0].all()):
        return None
    return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]


def _padded_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move padding from the end of rows to their beginning."""
    if bool(mask[:, -1].all()):
        return ids, mask
    # padding first, tokens behind it in their order
    order = mask.long().argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def _common_generation(each: Sequence[Any]) -> Any:
    """Return the settings for `generate` of all experts: a text ends where one of them would end it."""
    plain = [{k: v for k, v in config.to_dict().items() if k not in _OF_TOKENS and k[0] != "_"} for config in each]
    first = each[0]
    if all(config == plain[0] for config in plain):
        found = copy.deepcopy(first)
    else:
        # settings of sampling that not all experts have are nobody's
        found = library.GenerationConfig(bos_token_id=first.bos_token_id, pad_token_id=first.pad_token_id)
    found.cache_implementation = None
    ends: set[int] = set()
    for config in each:
        own = config.eos_token_id
        ends.update([] if own is None else [own] if isinstance(own, int) else own)
    found.eos_token_id = None if not ends else first.eos_token_id if len(each) == 1 else sorted(ends)
    return found
