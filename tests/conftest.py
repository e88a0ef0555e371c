"""Settings that hold for every test."""

import os

# The suite is bound by compilation. This turns off LLVM's optimisations only: XLA's own passes, which decide what is
# computed and in which order, run as for users.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax  # noqa: E402  (after XLA_FLAGS)

jax.config.update("jax_numpy_rank_promotion", "raise")
