"""Mamba-3 (arXiv:2603.15569) in JAX: the operator in `ops`, Flax NNX layers in `layers`, models in `models`."""
