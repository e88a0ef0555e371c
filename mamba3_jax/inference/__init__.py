"""Using a trained model: generation and evaluation."""

from mamba3_jax.inference.decoding import Generated, GenerationState, Stream, generate, prefill
from mamba3_jax.inference.sampling import Sampling
from mamba3_jax.inference.saved_state import load_state, save_state

__all__ = ["Generated", "GenerationState", "Sampling", "Stream", "generate", "load_state", "prefill", "save_state"]
