"""The Mamba-3 state-space operator: checks its arguments, prepares them, and picks the implementation.

Letters, here and in every shape, einsum string and annotation of this library (the paper's, sizes in lower case):

    b batch    t time      h heads    g groups (heads of a group share B and C)
    p head dim n state dim r MIMO rank (SISO: 1)       s rotated channel pairs       d model dim     c chunk

    B, C   input and output projections, after their RMSNorm      x   input           z   gate
    dt     step size > 0         A    decay rate < 0              lam trapezoid weight in [0, 1]
    omega  angular velocity      D    skip                        mimo_x, mimo_z, mimo_o   rank projections

What it computes is in discretization.py (time steps), rotation.py (angles), recurrent.py (the recurrence) and output.py
(skip, gate, ranks).
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mamba3_jax.checks import check_array, check_choice, check_rank, check_segment_ids
from mamba3_jax.distributed import operator as distributed
from mamba3_jax.distributed.rules import cutting_mesh
from mamba3_jax.ops import output
from mamba3_jax.ops.chunked import chunked, default_chunk_size
from mamba3_jax.ops.decode import decode
from mamba3_jax.ops.discretization import exponential_trapezoidal
from mamba3_jax.ops.inputs import Inputs
from mamba3_jax.ops.recurrent import recurrent
from mamba3_jax.ops.rotation import (
    Pairing,
    Rotation,
    from_interleaved,
    from_pair_order,
    to_interleaved,
    to_pair_order,
)
from mamba3_jax.ops.state import SSMState
from mamba3_jax.ops.tpu import refusal as tpu_refusal
from mamba3_jax.ops.tpu import slower_than_chunked, tpu
from mamba3_jax.ops.triton import refusal as triton_refusal
from mamba3_jax.ops.triton import triton
from pallas.tpu.cost_model import Sizes

Implementation = Literal["recurrent", "chunked", "triton", "tpu"]

# The kernels of each platform, and what they need.
KERNELS = {"cuda": "triton", "tpu": "tpu"}
DEVICES = {"triton": "an NVIDIA GPU", "tpu": "a TPU"}

_log = logging.getLogger(__name__)


def ssm(
    x: Float[Array, "b t h p"],
    B: Float[Array, "b t r g n"],
    C: Float[Array, "b t r g n"],
    dt: Float[Array, "b t h"],
    A: Float[Array, "b t h"],
    lam: Float[Array, "b t h"] | float,
    omega: Float[Array, "b t #h s"] | Float[Array, " s"] | None = None,
    *,
    B_bias: Float[Array, "h r n"] | None = None,
    C_bias: Float[Array, "h r n"] | None = None,
    D: Float[Array, " h"] | None = None,
    z: Float[Array, "b t h p"] | None = None,
    mimo_x: Float[Array, "h r p"] | None = None,
    mimo_z: Float[Array, "h r p"] | None = None,
    mimo_o: Float[Array, "h r p"] | None = None,
    rotation: Rotation = "data_dependent",
    initial_state: SSMState | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: Implementation | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "b t h p"] | Float[Array, "b t r h p"], SSMState]:
    """The Mamba-3 SSM over whole sequences (sections 3.1 to 3.3 of arXiv:2603.15569).

    Differentiable in every floating-point argument, the initial state included. Under an ambient mesh of this library's
    axes (`jax.set_mesh`) every device computes its rows, heads and tokens; see distributed/operator.py.

    Args:
        x: input, in the dtype of the matrix products and of the output.
        B, C: projections shared by the h/g consecutive heads of a group, normalised, before bias and rotation.
        dt: step size, positive.
        A: decay rate per unit of time, negative.
        lam: weight of the step's right end: an array (trapezoidal), 0.5 (fixed trapezoid) or 1.0 (exponential-Euler).
        omega: angular velocity in radians per unit of time, one row for all heads or one per head; s = n/4 (rope
            fraction 0.5) or n/2 (1.0). For rotation "rope": (s,), radians per token. For "none": None.
        B_bias, C_bias: added per head before the rotation; None is zero.
        D: skip from input to output; None is no skip.
        z: gate; None is no gate.
        mimo_x: expands x to r ranks. Makes the operator MIMO, which also pairs channels (i, i + n/2) instead of
            SISO's (2i, 2i+1).
        mimo_z: expands the gate to ranks; required by MIMO with a gate.
        mimo_o: contracts the ranks of the output; None returns them, before the head axis.
        rotation: "data_dependent" (theta advances by dt omega), "rope" (by omega per token) or "none".
        initial_state: what a previous call returned; None is zero. It continues the document open at each row's start.
        segment_ids: document of each token, non-decreasing along t; every document after a row's first starts from
            zero. Checked where it is concrete, which inside jit it is not.
        implementation: None picks by backend and shape; an explicit choice never falls back. "triton", the kernels for
            NVIDIA GPUs, runs under `jit` with shardings on each device's rows and heads, and inside a `shard_map` over
            all axes of the mesh with check_vma=False; "tpu", those for TPUs, on one device and inside such a shard_map.
        chunk_size: largest chunk of "chunked", where that is picked; None takes a measured default. The kernels choose
            theirs, and by name they refuse it.

    Returns:
        y, and the state after the last token (of the last document of each row).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or value, named with what is allowed.
        NotImplementedError: an explicit implementation that cannot do this call.
    """
    call = _check(
        x, B, C, dt, A, lam, omega, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, rotation, segment_ids, chunk_size
    )
    if implementation in DEVICES and chunk_size is not None:
        raise ValueError(
            f"chunk_size: got {chunk_size} for implementation {implementation!r}; allowed: None, since the kernels "
            "choose theirs"
        )
    if initial_state is not None:
        _check_state(initial_state, call)
    if (mesh := cutting_mesh()) is not None:
        tokens = dict(x=x, B=B, C=C, dt=dt, A=A, lam=lam, omega=omega, z=z, segment_ids=segment_ids)
        weights = dict(B_bias=B_bias, C_bias=C_bias, D=D, mimo_x=mimo_x, mimo_z=mimo_z, mimo_o=mimo_o)
        options = dict(rotation=rotation, implementation=implementation, chunk_size=chunk_size)
        return distributed.on_mesh(mesh, ssm, **tokens, **weights, **options, initial_state=initial_state)
    refusals = {"triton": triton_refusal, "tpu": tpu_refusal}
    refusals = {name: functools.partial(refusal, x, B, C, omega, z) for name, refusal in refusals.items()}
    picked = _choose(implementation, call, x.dtype.itemsize, refusals)
    # The kernels want neighbouring pairs, which for SISO are those of the checkpoint: nothing to move.
    orders = (to_interleaved, from_interleaved) if picked == "triton" else (to_pair_order, from_pair_order)
    to_order, from_order = (functools.partial(f, s=call.s, pairing=call.pairing) for f in orders)
    state = _prepare_state(initial_state, call, to_order)
    inputs = Inputs(
        x=x,
        B=to_order(B),
        C=to_order(C),
        B_bias=_prepare_bias(B_bias, call, to_order),
        C_bias=_prepare_bias(C_bias, call, to_order),
        coefficients=exponential_trapezoidal(
            dt.astype(call.dtype), A.astype(call.dtype), jnp.broadcast_to(jnp.asarray(lam, call.dtype), dt.shape)
        ),
        **_prepare_turns(omega, dt, rotation, call),
        mimo_x=None if mimo_x is None else mimo_x.astype(call.dtype),
        segment_ids=segment_ids,
    )
    match picked:
        case "triton":
            before = None if initial_state is None else state
            y, state = triton(inputs, before, D=D, z=z, mimo_z=mimo_z, mimo_o=mimo_o)
        case "tpu":
            y, state = tpu(inputs, state, D=D, z=z, mimo_z=mimo_z, mimo_o=mimo_o)
        case "recurrent":
            o, state = recurrent(inputs, state)
            y = _epilogue(o, x, D, z, mimo_x, mimo_z, mimo_o)
        case "chunked":
            o, state = chunked(inputs, state, chunk_size or default_chunk_size(_platform(), call.r))
            y = _epilogue(o, x, D, z, mimo_x, mimo_z, mimo_o)
    return y.astype(x.dtype), state._replace(ssm=from_order(state.ssm), k=from_order(state.k))


def _epilogue(o: Float[Array, "b t r h p"], x, D, z, mimo_x, mimo_z, mimo_o) -> Array:
    o = output.gate(output.skip(o, x, D, mimo_x), z, mimo_z)
    if mimo_x is None:
        return o[:, :, 0]
    return o if mimo_o is None else output.reduce_ranks(o, mimo_o)


def ssm_step(
    x: Float[Array, "b h p"],
    B: Float[Array, "b r g n"],
    C: Float[Array, "b r g n"],
    dt: Float[Array, "b h"],
    A: Float[Array, "b h"],
    lam: Float[Array, "b h"] | float,
    omega: Float[Array, " b #h s"] | Float[Array, " s"] | None = None,
    *,
    state: SSMState,
    B_bias: Float[Array, "h r n"] | None = None,
    C_bias: Float[Array, "h r n"] | None = None,
    D: Float[Array, " h"] | None = None,
    z: Float[Array, "b h p"] | None = None,
    mimo_x: Float[Array, "h r p"] | None = None,
    mimo_z: Float[Array, "h r p"] | None = None,
    mimo_o: Float[Array, "h r p"] | None = None,
    rotation: Rotation = "data_dependent",
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "b h p"] | Float[Array, "b r h p"], SSMState]:
    """One decode step: `ssm` of a single token, without the time axis. Arguments, errors and source as there.

    Start from `SSMState.zeros` or from the state that a prefill with `ssm` returned. On one GPU or TPU a kernel does
    it, which keeps the dtypes of the state (its ssm, k and v may be bfloat16).
    """

    for name, value, letters in (("x", x, "b h p"), ("B", B, "b r g n"), ("C", C, "b r g n"), ("dt", dt, "b h")):
        check_rank(name, value, letters)

    def with_time(u):
        return u[:, None] if getattr(u, "ndim", 0) > 1 else u

    tokens = [with_time(u) for u in (x, B, C, dt, A, lam, omega)]
    shared = dict(B_bias=B_bias, C_bias=C_bias, D=D, mimo_x=mimo_x, mimo_z=mimo_z, mimo_o=mimo_o, rotation=rotation)
    if implementation in DEVICES:
        _check_device(implementation)
    _check_state(state, _check(*tokens, z=with_time(z), **shared, segment_ids=None, chunk_size=None))
    if (mesh := cutting_mesh()) is not None:
        token = dict(x=x, B=B, C=C, dt=dt, A=A, lam=lam, omega=omega, z=z)
        return distributed.on_mesh(mesh, ssm_step, **token, **shared, state=state, implementation=implementation)
    kernel = implementation if implementation in DEVICES else _step_kernel() if implementation is None else None
    if kernel is not None:
        try:
            result = decode(x, B, C, dt, A, lam, omega, z=z, **shared, state=state, kernel=kernel)
            _log_choice(kernel, _platform(), "steps")
            return result
        except NotImplementedError as reason:
            # The kernel refuses sizes and dtypes before it computes.
            if implementation == kernel:
                raise
            _log_choice("recurrent", _platform(), f"steps ({reason})")
            implementation = "recurrent"
    y, state = ssm(*tokens, z=with_time(z), **shared, initial_state=state, implementation=implementation)
    return y[:, 0], state


def _choose(
    implementation: Implementation | None, call: "_Call", itemsize: int, refusals: dict[str, Callable]
) -> str:
    """`refusals` say why kernels cannot do the call, or None; `itemsize` is that of x."""
    if implementation is None:
        picked, what = ("recurrent", "one token") if call.t == 1 else ("chunked", "sequences")
        kernel = KERNELS.get(_platform())
        if call.t > 1 and kernel is not None:
            reason = refusals[kernel]()
            if reason is None and kernel == "tpu":
                sizes = Sizes(*(getattr(call, name) for name in Sizes._fields[:-1]), itemsize)
                reason = _spread() or slower_than_chunked(sizes)
            picked, what = (picked, f"sequences ({reason})") if reason else (kernel, what)
        _log_choice(picked, _platform(), what)
        return picked
    check_choice("implementation", implementation, get_args(Implementation))
    if implementation in DEVICES:
        _check_device(implementation)
        if reason := refusals[implementation]():
            raise NotImplementedError(reason)
    return implementation


def _platform() -> str:
    """What the call is compiled for, "cuda" on GPUs that have kernels; the mesh may be of another machine."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    device = jax.local_devices()[0]
    if abstract is not None and abstract.platform != device.platform:
        return abstract.platform
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def _step_kernel() -> str | None:
    """Of several devices each could hold a part of the state, which the decode kernels would gather."""
    return None if _spread() else KERNELS.get(_platform())


def _spread() -> str | None:
    """Why arrays may lie on several devices without a kernel being told how: XLA cuts no kernel by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    named = mesh.axis_names or mesh.abstract_device
    uncut = [size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes]
    devices = math.prod(uncut) if named else jax.device_count()
    return None if devices == 1 else f"{devices} devices, among which only a mesh of this library cuts kernels"


def _check_device(kernel: str) -> None:
    if KERNELS.get(_platform()) != kernel:
        raise NotImplementedError(
            f"implementation: got {kernel!r} on a machine with {_platform()} devices, whose kernels need "
            f"{DEVICES[kernel]}; allowed: recurrent, chunked"
        )


@functools.cache
def _log_choice(picked: str, platform: str, what: str) -> None:
    """Cached, so that each choice is logged once."""
    _log.info("ssm on %s: implementation %r for %s", platform, picked, what)


class _Call(NamedTuple):
    """The sizes of a call that passed the checks, the dtype of its state, and how its channels pair."""

    b: int
    t: int
    h: int
    p: int
    r: int
    g: int
    n: int
    s: int
    dtype: jnp.dtype
    pairing: Pairing


def _check_state(state: SSMState, call: _Call) -> None:
    if not isinstance(state, SSMState):
        raise TypeError(f"initial_state: got {type(state).__name__}; allowed: SSMState, or None")
    for name, letters in zip(SSMState._fields, ("b h s", "b h p n", "b h r n", "b h p")):
        check_array(f"initial_state.{name}", getattr(state, name), letters, call._asdict())


def _prepare_state(state: SSMState | None, call: _Call, to_order: Callable[[Array], Array]) -> SSMState:
    if state is None:
        return SSMState.zeros(call.b, call.h, call.p, call.n, call.r, call.s, call.dtype)
    state = state.map(lambda a: a.astype(call.dtype))
    return state._replace(ssm=to_order(state.ssm), k=to_order(state.k))


def _prepare_bias(bias: Array | None, call: _Call, to_order: Callable[[Array], Array]) -> Array:
    if bias is None:
        return jnp.zeros((call.h, call.r, call.n), call.dtype)
    return to_order(bias.astype(call.dtype))


def _prepare_turns(omega: Array | None, dt: Array, rotation: Rotation, call: _Call) -> dict[str, Array]:
    clock = dt.astype(call.dtype)
    if rotation == "data_dependent":
        return dict(omega=omega.astype(call.dtype), clock=clock)
    frequencies = jnp.zeros(0) if rotation == "none" else omega
    frequencies = jnp.broadcast_to(frequencies.astype(call.dtype)[None, None, None], (call.b, call.t, 1, call.s))
    return dict(omega=frequencies, clock=jnp.ones_like(clock))


def _check(
    x, B, C, dt, A, lam, omega, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, rotation, segment_ids, chunk_size
) -> _Call:
    b, t, h, p = check_rank("x", x, "b t h p")
    _, _, r, g, n = check_rank("B", B, "b t r g n")
    sizes = dict(b=b, t=t, h=h, p=p, r=r, g=g, n=n)
    arrays = {
        "b t h p": dict(x=x, z=z),
        "b t r g n": dict(B=B, C=C),
        "b t h": dict(dt=dt, A=A) | ({} if isinstance(lam, float | int) else dict(lam=lam)),
        "h r n": dict(B_bias=B_bias, C_bias=C_bias),
        "h r p": dict(mimo_x=mimo_x, mimo_z=mimo_z, mimo_o=mimo_o),
        "h": dict(D=D),
    }
    for shape, named in arrays.items():
        for name, value in named.items():
            if value is not None:
                check_array(name, value, shape, sizes)
    if isinstance(lam, float | int) and not 0 <= lam <= 1:
        raise ValueError(f"lam: got {lam}; allowed: an array (b, t, h) or a number from 0 to 1")
    if t == 0:
        raise ValueError("x: got t=0 tokens; allowed: at least 1")
    if g < 1 or h % g:
        raise ValueError(f"B: got ngroups g={g}; allowed: a divisor of the h={h} heads of x")
    if n % 2:
        raise ValueError(f"B: got state size n={n}; allowed: an even n, because channels turn in pairs")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size: got {chunk_size!r}; allowed: a positive integer or None")
    _check_ranks(r, z, mimo_x, mimo_z, mimo_o)
    check_segment_ids(segment_ids, sizes)
    s = _check_omega(omega, rotation, sizes)
    pairing = "interleaved" if mimo_x is None else "half"
    return _Call(**sizes, s=s, dtype=jnp.promote_types(x.dtype, jnp.float32), pairing=pairing)


def _check_ranks(r, z, mimo_x, mimo_z, mimo_o) -> None:
    if mimo_x is None:
        if r != 1:
            raise ValueError(f"mimo_x: got None with B of rank r={r}; allowed: an array (h, r, p), or r=1 (SISO)")
        for name, value in (("mimo_z", mimo_z), ("mimo_o", mimo_o)):
            if value is not None:
                raise ValueError(f"{name}: got an array without mimo_x; allowed: None for SISO")
    elif (z is None) != (mimo_z is None):
        raise ValueError("mimo_z: got one of z and mimo_z without the other; allowed: both (a gate) or neither")


def _check_omega(omega, rotation: Rotation, sizes: dict[str, int]) -> int:
    """The number of rotated pairs."""
    check_choice("rotation", rotation, get_args(Rotation))
    if rotation == "none":
        if omega is not None:
            raise ValueError('omega: got an array with rotation "none"; allowed: None')
        return 0
    if omega is None:
        raise ValueError(f'omega: got None with rotation "{rotation}"; allowed: an array, or rotation "none"')
    n = sizes["n"]
    allowed = {n // 4: 0.5, n // 2: 1.0}
    s = check_rank("omega", omega, "b t h s" if rotation == "data_dependent" else "s")[-1]
    if s not in allowed or s == 0:
        text = " or ".join(f"s={k} (rope_fraction {v})" for k, v in allowed.items() if k)
        raise ValueError(f"omega: got s={s} pairs, rope_fraction {2 * s / n:g} of n={n}; allowed: {text}")
    if rotation == "data_dependent":
        heads = 1 if omega.shape[2] == 1 else sizes["h"]
        check_array("omega", omega, "b t h s", sizes | dict(h=heads, s=s))
    else:
        check_array("omega", omega, "s", dict(s=s))
    return s
