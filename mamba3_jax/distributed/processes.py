"""Several processes: how they find each other, who writes files, and what they agree on.

On every host, and for one process after the other with JAX_PROCESS_ID = 0, 1, ...:

    JAX_COORDINATOR_ADDRESS=10.0.0.1:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 mamba3 train ...

Every process runs the same program; what they say to each other comes in the same order on all of them.
"""

import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Else XLA's CPU backend runs what is independent in an order of each process's own, and collectives that meet out of
# order wait for each other for ever.
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
# Bytes of one that all processes raise.
LONGEST_MESSAGE = 2000
ADDRESS, COUNT, INDEX = VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(cluster: bool = False) -> None:
    """Joins the other processes; to be called before anything asks for devices, and once only has an effect.

    Without the environment's variables and without `cluster` there are no others.

    Args:
        cluster: whether JAX looks for the others itself, on a TPU pod or under Slurm, MPI or Kubernetes.

    Raises:
        ValueError: a variable is missing or malformed, or there is no cluster.
        RuntimeError: the others do not answer.
    """
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if jax.distributed.is_initialized() or not (given or cluster):
        return
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {IN_ORDER}"
    if not given:
        jax.distributed.initialize()
        return
    for name in VARIABLES:
        if name not in given:
            raise ValueError(f"{name}: got nothing beside {next(iter(given))}; allowed: all of {', '.join(VARIABLES)}")
    host, _, port = given[ADDRESS].rpartition(":")
    if not (host and port.isdecimal()):
        raise ValueError(f"{ADDRESS}: got {given[ADDRESS]!r}; allowed: host:port, as 10.0.0.1:1234")
    for name in (COUNT, INDEX):
        if not given[name].isdecimal():
            raise ValueError(f"{name}: got {given[name]!r}; allowed: a number")
    count, index = int(given[COUNT]), int(given[INDEX])
    if index >= count:
        raise ValueError(f"{INDEX}: got {index}; allowed: below {COUNT}, {count}")
    jax.distributed.initialize(given[ADDRESS], count, index)


def is_first() -> bool:
    """Whether this process writes what there is once: metrics, figures, the model."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process is here."""
    multihost_utils.sync_global_devices(what)


def raise_everywhere(check: Callable[[], None]) -> None:
    """Calls what may raise a ValueError on the first process, and raises its message on all of them."""
    message = ""
    if is_first():
        try:
            check()
        except ValueError as error:
            message = str(error)
    if jax.process_count() > 1:
        letters = np.zeros(LONGEST_MESSAGE, np.uint8)
        told = np.frombuffer(message.encode()[:LONGEST_MESSAGE], np.uint8)
        letters[: told.size] = told
        message = multihost_utils.broadcast_one_to_all(letters).tobytes().rstrip(b"\0").decode(errors="ignore")
    if message:
        raise ValueError(message)


def whole(array: jax.Array) -> np.ndarray:
    """All of an array that is cut over devices, on the host of every process."""
    return multihost_utils.process_allgather(array, tiled=True)


def anywhere() -> Callable[[bool], bool]:
    """A question to all processes, for each of them to ask once a step: was the flag true on any?

    Of several processes it is answered a step late, so that none waits for the others.
    """
    if jax.process_count() == 1:
        return bool
    mesh = Mesh(np.asarray(jax.devices()), ("device",))
    shape, cut = (mesh.size,), NamedSharding(mesh, PartitionSpec("device"))
    join = jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    asked: list[jax.Array] = []

    def ask(flag: bool) -> bool:
        asked.append(join(jax.make_array_from_callback(shape, cut, lambda _: np.array([flag]))))
        return len(asked) > 1 and bool(asked.pop(0))

    return ask
