"""Small checkpoints that transformers itself writes and loads, and recipes for them."""

from __future__ import annotations

import json

import torch
import transformers
from safetensors.torch import save_file

from tests.anatomy.architectures import ARCHITECTURES
from tests.making import make_recipe, read_json


def save(folder, name, **settings):
    """Write a small model with transformers itself; the same settings give the same weights."""
    kind, own, auto = ARCHITECTURES[name]
    torch.manual_seed(len(folder.name))
    config = transformers.AutoConfig.for_model(kind, **{**own, **settings})
    getattr(transformers, f"AutoModelFor{auto}").from_config(config).save_pretrained(folder)
    return folder


def change(folder, tensors=None, **config):
    """Write other tensors and settings into a checkpoint; a setting of None is removed."""
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = {**read_json(folder, "config.json"), **config}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    return folder


def loads_fully(folder, kind=transformers.AutoModelForCausalLM):
    """Return the model, once transformers has found every tensor, and no other, in the file."""
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


def classifier(folder, labels, seed, auto="SequenceClassification"):
    """A fine-tune of BERT: trunks of one shape, heads of their own."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        "bert", vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    config.num_labels = labels
    getattr(transformers, f"AutoModelFor{auto}").from_config(config).save_pretrained(folder)
    return folder


def linear(*models, base=None, **keys):
    return make_recipe("linear", models, base, {"weight": 1.0}, **keys)
