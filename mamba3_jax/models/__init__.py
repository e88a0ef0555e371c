"""Whole models built from the layers."""

from mamba3_jax.models.lm import LM, Cache, LMConfig, abstract_model, count_parameters
from mamba3_jax.models.presets import PRESETS, preset

__all__ = ["LM", "PRESETS", "Cache", "LMConfig", "abstract_model", "count_parameters", "preset"]
