"""Settings that hold for every test."""

import os

# The suite is bound by compilation. This turns off LLVM's optimisations only: XLA's own passes, which decide what is
# computed and in which order, run as for users.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
# The tolerances are those of a CPU's float32, whatever accelerator the machine has.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402  (after XLA_FLAGS)

jax.config.update("jax_numpy_rank_promotion", "raise")
# More devices than the sweeps of the tests have runs, so that what is spread over devices is spread here too.
jax.config.update("jax_num_cpu_devices", 4)
# Starts JAX with them: an experiment that is run later finds it running and keeps them.
assert jax.device_count() == 4 or jax.default_backend() != "cpu"
