"""Settings that hold for every test."""

import os
import tempfile

# A GPU is used where JAX_PLATFORMS=cuda asks for it, which the tests of its kernels are made for.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"
if os.environ["JAX_PLATFORMS"].startswith("cpu"):
    # The suite is bound by compilation. This turns off LLVM's optimisations only: XLA's own passes, which decide what
    # is computed and in which order, run as for users.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
# What is compiled twice, as by a run and the same run resumed, is compiled once: in a folder that lives as long as this
# process and is its own, because JAX's files can be read while another process writes them.
_compiled = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
os.environ |= {"JAX_COMPILATION_CACHE_DIR": _compiled.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"}

import jax  # noqa: E402  (after XLA_FLAGS)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# More devices than the sweeps of the tests have runs, so that what is spread over devices is spread here too.
jax.config.update("jax_num_cpu_devices", 4)
# Starts JAX with them: an experiment that is run later finds it running and keeps them.
assert jax.device_count() == 4 or jax.default_backend() != "cpu"
if jax.default_backend() == "gpu":
    # What the kernels are compared with in float32 is float32 throughout: a GPU's default is TF32.
    jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def release_programs():
    """A compiled program on a CPU takes several of the memory maps of its process, 65530 by Linux's default. Those of
    tests/test_generate.py alone are 10,000, and in whole runs XLA ended a worker there by a segmentation fault."""
    yield
    jax.clear_caches()


def pytest_unconfigure():
    _compiled.cleanup()
