"""Recipes: what to merge, and how."""

from .document.place import Place
from .fields.reference import ModelReference
from .fields.setting import Rule, Setting
from .load import load_recipe, load_recipes
from .model import Recipe, Slice, Source
from .names import check_names
from .resolver import Inputs, Resolver, check_layer_ranges, check_recipe, layer_depth
from .schema import json_schema

__all__ = [
    "Inputs",
    "ModelReference",
    "Place",
    "Recipe",
    "Resolver",
    "Rule",
    "Setting",
    "Slice",
    "Source",
    "check_layer_ranges",
    "check_names",
    "check_recipe",
    "json_schema",
    "layer_depth",
    "load_recipe",
    "load_recipes",
]
