"""The operator on a mesh: `ssm` and `ssm_step` of every device's rows, heads and tokens in one `jax.shard_map`.

Rows and heads know nothing of one another. Along time, a span of tokens takes the state that enters it to

    S     = e^a (S_in + carry_0 v_in k_in^T) + R(theta_in) S_span        a = sum of log alpha over the span
    theta = theta_in + theta_span      k = R(theta_in) k_span      v = v_span

where S_span, theta_span, k_span, v_span are what the span makes of a zero state, and R acts on the state axis; if a
document begins in the span, nothing of what enters is left. So with time cut along the mesh axis `sequence`, exactly:

    1. every device runs its span from a zero state, for the state alone
    2. the spans' states are gathered, one per device, and passed through in order: the state that enters each
    3. every device runs its span from that state
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mamba3_jax.distributed import rules
from mamba3_jax.ops.discretization import document_starts, exponential_trapezoidal
from mamba3_jax.ops.inputs import expand_ranks
from mamba3_jax.ops.rotation import from_pair_order, rotate, to_pair_order, wrap
from mamba3_jax.ops.state import SSMState

SEQUENCE = "sequence"

# The axes of the arguments, in the letters of ops/api.py. Of a state they begin so.
_AXES = dict(
    x="b t h p", B="b t r g n", C="b t r g n", dt="b t h", A="b t h", lam="b t h", z="b t h p", segment_ids="b t",
    B_bias="h r n", C_bias="h r n", D="h", mimo_x="h r p", mimo_z="h r p", mimo_o="h r p",
    initial_state="b h", state="b h",
)  # fmt: skip


def on_mesh(mesh: AbstractMesh, operator: Callable[..., tuple[Array, SSMState]], **arguments):
    """`operator(**arguments)`, of every device's parts of the arrays.

    Rows are cut along (slice, data, fsdp), heads along tensor, and groups with their heads where they come out even:
    otherwise every device takes the group of its heads. Tokens are cut along sequence, but for a single one.

    Args:
        mesh: the ambient one, `rules.cutting_mesh`.
        operator: `ops.ssm` or `ops.ssm_step`.
        arguments: its own, checked; the arrays of `ssm_step` have no time axis.

    Returns:
        y, and the state, which is the same on all devices along sequence.

    Raises:
        ValueError: a size that the mesh does not divide.
    """
    arrays = {name: a for name, a in arguments.items() if not isinstance(a, str | int | float | None)}
    b, h, g = arrays["x"].shape[0], arrays["x"].shape[-2], arrays["B"].shape[-2]
    has_time = arrays["x"].ndim == 4
    t = arrays["x"].shape[1] if has_time else 1
    _check_sizes(mesh, g, batch=b, heads=h, **(dict(time=t) if t > 1 else {}))
    by_groups = g % rules.ways(mesh, "heads") == 0
    logical = dict(b="batch", t="time" if t > 1 else None, h="heads", g="heads" if by_groups else None)

    def spec(letters: str) -> PartitionSpec:
        return rules.spec(*(logical.get(letter) for letter in letters.split() if has_time or letter != "t"))

    run = functools.partial(_in_spans, operator) if t > 1 and mesh.shape[SEQUENCE] > 1 else operator

    def on_shard(arrays):
        if not by_groups:
            arrays = arrays | {name: _own_group(arrays[name], arrays["x"].shape[-2], h // g) for name in ("B", "C")}
        return run(**(arguments | arrays))

    axes = _AXES | dict(omega=_axes_of_omega(arrays.get("omega"), h))
    ranks_stay = "mimo_x" in arrays and "mimo_o" not in arrays
    mapped = jax.shard_map(
        on_shard,
        in_specs=({name: spec(axes[name]) for name in arrays},),
        out_specs=(spec("b t r h p" if ranks_stay else "b t h p"), spec("b h")),
        check_vma=False,  # which the kernels inside cannot answer
    )
    return mapped(arrays)


def _axes_of_omega(omega: Array | None, h: int) -> str:
    if omega is None or omega.ndim == 1:
        return "s"
    return "b t h s" if omega.shape[-2] == h else "b t one s"


def _check_sizes(mesh: AbstractMesh, g: int, **sizes: int) -> None:
    words = dict(batch="b={} rows", heads="h={} heads", time="t={} tokens")
    for axis, size in sizes.items():
        ways = rules.ways(mesh, axis)
        if size % ways:
            named = " x ".join(f"{name}={mesh.shape[name]}" for name in rules.LOGICAL_AXES[axis])
            got = words[axis].format(size)
            raise ValueError(f"x: got {got} on a mesh of {named}; allowed: a multiple of {ways}")
    ways = rules.ways(mesh, "heads")
    if g % ways and ways % g:
        raise ValueError(f"B: got ngroups g={g} on a mesh of tensor={ways}; allowed: a multiple or a divisor of {ways}")


def _own_group(u: Float[Array, "*batch r g n"], heads: int, heads_per_group: int) -> Float[Array, "*batch r one n"]:
    """Of all groups the one that this device's heads share."""
    group = lax.axis_index(rules.LOGICAL_AXES["heads"]) * heads // heads_per_group
    return lax.dynamic_slice_in_dim(u, group, 1, axis=u.ndim - 2)


class Span(NamedTuple):
    """What consecutive tokens make of the state that enters them; with a leading axis for several spans.

    Attributes:
        end: the state after the last token, if zero enters.
        log_decay: sum of log alpha.
        carry: the first token's, which weighs what the trapezoid owes from before.
        restarts: whether a document begins, at the first token or later.
    """

    end: SSMState
    log_decay: Float[Array, "*spans b h"]
    carry: Float[Array, "*spans b h"]
    restarts: Bool[Array, "*spans b"]


def passed(state: SSMState, span: Span, mimo_x: Float[Array, "h r p"] | None) -> SSMState:
    """The state after the span that `state` enters."""
    state = _zero_where(span.restarts, state)
    owed = jnp.einsum("bhrp,bhrn->bhpn", expand_ranks(state.v, mimo_x), state.k, precision="highest")
    decay, carry = (u[..., None, None] for u in (jnp.exp(span.log_decay), span.carry))

    def turned(u: Float[Array, "b h _ n"]) -> Float[Array, "b h _ n"]:
        s, pairing = state.angle.shape[-1], "interleaved" if mimo_x is None else "half"
        return from_pair_order(rotate(to_pair_order(u, s, pairing), state.angle[:, :, None]), s, pairing)

    return SSMState(
        angle=wrap(state.angle + span.end.angle),
        ssm=decay * (state.ssm + carry * owed) + turned(span.end.ssm),
        k=turned(span.end.k),
        v=span.end.v,
    )


def _in_spans(ssm, *, initial_state: SSMState | None = None, segment_ids: Int[Array, "b t"] | None = None, **inputs):
    """`ssm` of this device's tokens, continuing those of the devices before it along `sequence`."""
    run = functools.partial(ssm, **inputs, segment_ids=segment_ids)
    begins = _begins_document(segment_ids, inputs["dt"].shape[0])
    # What only the outputs need is not computed, as nobody asks for them; kernels do all at once, here without a gate.
    _, end = run(D=None, z=None, mimo_z=None)
    span = _span(end, begins, segment_ids, inputs["dt"], inputs["A"], inputs["lam"])
    spans = lax.all_gather(span, SEQUENCE)

    first = end.map(jnp.zeros_like) if initial_state is None else initial_state
    first = jax.tree.map(lambda a, like: a.astype(like.dtype), first, end)
    mimo_x = inputs.get("mimo_x")
    last, entering = lax.scan(lambda state, span: (passed(state, span, mimo_x), state), first, spans)
    mine = entering.map(lambda a: lax.dynamic_index_in_dim(a, lax.axis_index(SEQUENCE), keepdims=False))
    y, _ = run(initial_state=_zero_where(begins, mine))
    return y, last


def _span(end: SSMState, begins, segment_ids, dt, A, lam) -> Span:
    dtype = end.ssm.dtype
    dt, A, lam = (jnp.broadcast_to(jnp.asarray(u, dtype), dt.shape) for u in (dt, A, lam))
    coefficients = exponential_trapezoidal(dt, A, lam)
    restarts = begins if segment_ids is None else begins | jnp.any(document_starts(segment_ids), axis=1)
    return Span(end, jnp.sum(coefficients.log_decay, axis=1), coefficients.carry[:, 0], restarts)


def _begins_document(segment_ids: Int[Array, "b t"] | None, b: int) -> Bool[Array, " b"]:
    """Whether this device's first token opens a document, which a row's very first one does not."""
    if segment_ids is None:
        return jnp.zeros(b, bool)
    devices = lax.axis_size(SEQUENCE)
    before = lax.ppermute(segment_ids[:, -1], SEQUENCE, [(i, i + 1) for i in range(devices - 1)])
    return (lax.axis_index(SEQUENCE) > 0) & (segment_ids[:, 0] != before)


def _zero_where(rows: Bool[Array, " b"], state: SSMState) -> SSMState:
    return state.map(lambda a: jnp.where(jnp.expand_dims(rows, range(1, a.ndim)), 0, a))
