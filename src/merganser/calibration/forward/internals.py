"""Uses of non-public parts of transformers that streaming needs; those of experts are in `experts.py`, and nowhere else.

model = build_skeleton(config)                      parameters on the meta device, buffers real
names = parameters_of(model, checkpoint.tensors)    checkpoint tensor -> parameter that it fills
load_tensors(model, {name: LazyTensor(...)}, names) fills these parameters, converted as `from_pretrained` does
empty_tensors(module)                               puts a module's parameters back on the meta device
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...checkpoint import TensorInfo
from ...errors import CheckpointError, UnsupportedError
from ...inference.libraries import quiet

__all__ = [
    "LazyTensor",
    "Target",
    "TensorReader",
    "build_skeleton",
    "empty_tensors",
    "is_causal",
    "linear_classes",
    "load_tensors",
    "parameters_of",
    "tie",
    "zero_tensors",
]


@dataclass(frozen=True, slots=True)
class Target:
    """The parameter that a checkpoint tensor fills.

    Args:
        parameter: Its name in the model.
        index: Index in the parameter if it stacks several tensors of one kind (experts), otherwise None.
        alone: Whether the tensor is the parameter as it is: nothing else fills it, and nothing is converted.
    """

    parameter: str
    index: int | None
    alone: bool


class TensorReader(Protocol):
    """Anything that reads tensors."""

    def tensor(self, info: TensorInfo, /) -> Tensor:
        """Return a tensor."""


class LazyTensor:
    """A checkpoint tensor that is read when it is indexed, like the lazy slices of transformers."""

    def __init__(self, tensor: TensorInfo, reader: TensorReader) -> None:
        self._tensor = tensor
        self._reader = reader

    def __getitem__(self, index: Any) -> Tensor:
        return self._reader.tensor(self._tensor)[index]


def build_skeleton(config: Any, dtype: torch.dtype) -> Any:
    """Return a model whose parameters take no memory; its buffers are real.

    Buffers such as rotary frequencies are in no checkpoint; the constructor computes them.

    Args:
        config: A config of transformers; changed in place.
        dtype: Dtype of the parameters, except those that the class keeps in float32.

    Raises:
        UnsupportedError: transformers has no such model, cannot build it, or is too old.
    """
    _conversion()
    kind = _model_class(config)
    for part in configs_of(config):
        part.use_cache = False
    try:
        with quiet(), _parameters_on_meta():
            model = kind._from_config(config, dtype=dtype)
    except Exception as error:
        raise UnsupportedError(f"{kind.__name__}: transformers cannot build the model: {error}") from None
    for pattern, kept in model._get_dtype_plan(dtype).items():
        _set_dtype(model, pattern, kept)
    return model.eval().requires_grad_(False)


def configs_of(config: Any) -> list[Any]:
    """Return a config of transformers and those that it holds, of a text model or a decoder for example."""
    found = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    return [config, *(part for part in found if part is not None)]


def _model_class(config: Any) -> Any:
    """Return the class that config.json names, else the model type's class with a head, else the one without a head."""
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM

    for name in config.architectures or ():
        kind = getattr(transformers, name, None)
        if kind is not None:
            return kind
    for auto in (AutoModelForCausalLM, AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise UnsupportedError(
        f"transformers has no model of type {config.model_type!r}; a newer transformers may, or use a method without data"
    )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        # skip parameters on meta: they may be tied, and a copy would no longer be
        return None if parameter.is_meta else nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


def _set_dtype(model: nn.Module, pattern: str, dtype: torch.dtype) -> None:
    # in these regular expressions, transformers means any text by *
    matches = re.compile(pattern.replace("*", ".*")).search
    for name, parameter in list(model.named_parameters()):
        if matches(name):
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner)._parameters[own] = nn.Parameter(parameter.to(dtype), requires_grad=False)


def parameters_of(model: Any, names: Iterable[str]) -> dict[str, Target]:
    """Return the parameter or buffer of a model that each checkpoint tensor fills.

    Args:
        model: A skeleton.
        names: The checkpoint's tensors. Tensors that fill nothing are missing in the result.

    Raises:
        UnsupportedError: The installed version of transformers converts checkpoints differently.
    """
    renamings, converters = _transforms(model)
    # stack experts in the order of transformers: experts.10 after experts.9
    from transformers.core_model_loading import dot_natural_key

    state = model.state_dict()
    whole = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Target] = {}
    filled: Counter[str] = Counter()
    stacked: dict[tuple[str, str], int] = {}
    for name in sorted(names, key=dot_natural_key):
        parameter, pattern = _renamed(name, renamings, converters, model.base_model_prefix, state)
        if parameter not in state:
            continue
        index = None
        if pattern is not None and "*" in pattern:
            index = stacked.get((parameter, pattern), 0)
            stacked[parameter, pattern] = index + 1
        filled[parameter] += 1
        found[name] = Target(parameter, index, alone=pattern is None and parameter in whole)
    return {name: replace(own, alone=own.alone and filled[own.parameter] == 1) for name, own in found.items()}


def _conversion() -> tuple[Any, ...]:
    """Return the modules of transformers that turn a checkpoint's tensors into parameters.

    Raises:
        UnsupportedError: transformers is too old to have them.
    """
    try:
        return tuple(import_module(f"transformers.{name}") for name in ("conversion_mapping", "core_model_loading"))
    except ImportError:
        import transformers

        raise UnsupportedError(
            f"calibrating needs transformers 5.2 or newer, installed is {transformers.__version__}: "
            "pip install --upgrade transformers"
        ) from None


def _transforms(model: Any) -> tuple[list[Any], list[Any]]:
    conversion, loading = _conversion()
    mapping = conversion.get_model_conversion_mapping(model)
    return (
        [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)],
        [entry for entry in mapping if isinstance(entry, loading.WeightConverter)],
    )


def _renamed(
    name: str, renamings: list[Any], converters: list[Any], prefix: str, state: dict[str, Tensor]
) -> tuple[str, str | None]:
    from transformers.core_model_loading import rename_source_key

    parameter, pattern = rename_source_key(name, renamings, converters, prefix, state)
    if parameter not in state and name in state:
        # transformers also falls back to the unchanged name
        return rename_source_key(name, [], [], prefix, state)
    return parameter, pattern


def load_tensors(model: Any, tensors: Mapping[str, LazyTensor], targets: Mapping[str, Target]) -> None:
    """Fill the parameters that the given checkpoint tensors belong to, in the dtypes of the skeleton.

    Args:
        model: A skeleton.
        tensors: Tensors by their names in the checkpoint.
        targets: From `parameters_of`.

    Raises:
        CheckpointError: A tensor does not have the shape that the model needs, or cannot be converted.
    """
    rest: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if targets[name].alone:
            _fill(model, targets[name].parameter, tensor)
        else:
            rest[name] = tensor
    if rest:
        _convert(model, rest)


def _fill(model: Any, parameter: str, tensor: LazyTensor) -> None:
    """Set a parameter to a tensor, without the machinery of transformers, which takes longer than the reading."""
    owner, _, name = parameter.rpartition(".")
    module = model.get_submodule(owner)
    wanted = module._parameters[name]
    value = tensor[...].to(wanted.dtype)
    if value.shape != wanted.shape:
        raise _misshapen(parameter, value.shape, wanted.shape)
    module._parameters[name] = nn.Parameter(value, requires_grad=value.is_floating_point())


def _convert(model: Any, tensors: dict[str, LazyTensor]) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    mapping: Any = get_model_conversion_mapping(model)
    settings = LoadStateDictConfig(weight_mapping=mapping)
    # an argument that older versions must have, and newer ones do not know
    old = "tp_plan" in inspect.signature(convert_and_load_state_dict_in_model).parameters
    with quiet():
        info, _ = convert_and_load_state_dict_in_model(model, tensors, settings, **({"tp_plan": None} if old else {}))
    for name, found, wanted in sorted(info.mismatched_keys):
        raise _misshapen(name, found, wanted)
    for name, problem in info.conversion_errors.items():
        raise CheckpointError(f"{name}: transformers cannot convert it: {problem}")


def _misshapen(name: str, found: Iterable[int], wanted: Iterable[int]) -> CheckpointError:
    return CheckpointError(f"{name}: has shape {list(found)}, config.json asks for {list(wanted)}")


def empty_tensors(module: nn.Module) -> None:
    """Move all parameters of a module back to the meta device; its buffers, which are small, stay."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def zero_tensors(module: nn.Module) -> None:
    """Let all parameters of a module be zero; they share the memory of the largest, which the system maps when it is used."""
    parameters = [p for p in module.parameters() if p is not None]
    largest = max((p.numel() * p.element_size() for p in parameters), default=0)
    zeros = torch.from_numpy(numpy.zeros(largest + 16, dtype=numpy.uint8))
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is not None:
                zero = zeros[: p.numel() * p.element_size()].view(p.dtype).view(p.shape)
                owner._parameters[name] = nn.Parameter(zero, requires_grad=False)


def is_causal(model: Any) -> bool:
    """Return whether a model is one of those that read text from left to right, and not one that fills in masked tokens."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    kind = type(model.config.get_text_config())
    return kind in AutoModelForCausalLM._model_mapping and kind not in AutoModelForMaskedLM._model_mapping


def tie(model: Any) -> None:
    """Tie parameters again that share one tensor, such as an output matrix and the embedding."""
    model.tie_weights()


def linear_classes() -> dict[type[nn.Module], int]:
    """Return the module classes that multiply by a matrix, and the weight's axis that is contracted with the input."""
    from transformers.pytorch_utils import Conv1D

    return {nn.Linear: 1, Conv1D: 0}
