"""The recurrence, one token after the other: the oracle of every faster form, and the decode step.

Two ways to write it, equal by propositions 2 to 4 of arXiv:2603.15569:

    complex   H_t = alpha_t e^{i phi_t} (H_{t-1} + carry_t conj(b_{t-1}) v_{t-1}^T) + gamma_t conj(b_t) v_t^T
              y_t = Re(c_t^T H_t)          with phi_t = dt_t omega_t and one complex channel per pair of real ones
    real      h_t = alpha_t (h_{t-1} + carry_t k_{t-1} v_{t-1}^T) + gamma_t k_t v_t^T
              y_t = q_t^T h_t              with k_t = R(theta_t) B_t, q_t = R(theta_t) C_t, theta_t = sum of phi

Both sum k v^T over the ranks of MIMO. Everything is computed in the state's dtype at full matmul precision.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float

from mamba3_jax.ops.discretization import Coefficients, document_starts
from mamba3_jax.ops.inputs import Inputs, expand_ranks, per_head
from mamba3_jax.ops.rotation import rotate, split_pairs, turns, wrap
from mamba3_jax.ops.state import SSMState


class _Token(NamedTuple):
    """One token of every row; B and C per head, not yet rotated. All with a leading time axis when scanned."""

    x: Float[Array, "*t b h p"]
    B: Float[Array, "*t b h r n"]
    C: Float[Array, "*t b h r n"]
    coefficients: Coefficients
    turn: Float[Array, "*t b h s"]
    starts: Bool[Array, "*t b"]


def recurrent(inputs: Inputs, state: SSMState) -> tuple[Float[Array, "b t r h p"], SSMState]:
    """The real form with rotations."""
    with jax.default_matmul_precision("highest"):
        state, o = jax.lax.scan(lambda s, token: _step(token, s, inputs.mimo_x), state, _tokens(inputs, state))
    return jnp.moveaxis(o, (0, 3), (1, 2)), state


def _step(token: _Token, state: SSMState, mimo_x) -> tuple[SSMState, Float[Array, "b h r p"]]:
    state = state.map(lambda a: jnp.where(jnp.expand_dims(token.starts, range(1, a.ndim)), 0, a))
    log_decay, gamma, carry = (u[..., None, None] for u in token.coefficients)
    angle = wrap(state.angle + token.turn)
    k = rotate(token.B, angle[:, :, None])
    q = rotate(token.C, angle[:, :, None])
    previous = _outer(expand_ranks(state.v, mimo_x), state.k)
    current = _outer(expand_ranks(token.x, mimo_x), k)
    ssm = jnp.exp(log_decay) * (state.ssm + carry * previous) + gamma * current
    o = jnp.einsum("bhpn,bhrn->bhrp", ssm, q)
    return SSMState(angle, ssm, k, token.x), o


def complex_recurrence(inputs: Inputs, state: SSMState) -> tuple[Float[Array, "b t r h p"], SSMState]:
    """The literal complex-valued form. For readers and tests: `recurrent` is the same function of real arrays."""
    n = state.ssm.shape[-1]

    def body(carried, token: _Token):
        H, b, v, theta = jax.tree.map(
            lambda a: jnp.where(jnp.expand_dims(token.starts, range(1, a.ndim)), 0, a), carried
        )
        log_decay, gamma, carry = (u[..., None, None] for u in token.coefficients)
        spin = _phase(token.turn, n)[:, :, None]
        b_new, c = _as_complex(token.B, token.turn.shape[-1]), _as_complex(token.C, token.turn.shape[-1])
        previous = _outer(expand_ranks(v, inputs.mimo_x), b.conj())
        current = _outer(expand_ranks(token.x, inputs.mimo_x), b_new.conj())
        H = jnp.exp(log_decay) * spin * (H + carry * previous) + gamma * current
        y = jnp.einsum("bhpm,bhrm->bhrp", H, c).real
        return (H, b_new, token.x, wrap(theta + token.turn)), y

    s = state.angle.shape[-1]
    spin = _phase(state.angle, n)[:, :, None]
    start = (_as_complex(state.ssm, s).conj() * spin, _as_complex(state.k, s) * spin.conj(), state.v, state.angle)
    with jax.default_matmul_precision("highest"):
        (H, b, v, theta), y = jax.lax.scan(body, start, _tokens(inputs, state))
    spin = _phase(theta, n)[:, :, None]
    final = SSMState(theta, _as_real(H.conj() * spin, s), _as_real(b * spin, s), v)
    return jnp.moveaxis(y, (0, 3), (1, 2)), final


def _tokens(inputs: Inputs, state: SSMState) -> _Token:
    dtype = state.ssm.dtype
    x = inputs.x.astype(dtype)
    starts = jnp.zeros(x.shape[:2], bool) if inputs.segment_ids is None else document_starts(inputs.segment_ids)
    tokens = _Token(
        x=x,
        B=per_head(inputs.B, inputs.B_bias, dtype),
        C=per_head(inputs.C, inputs.C_bias, dtype),
        coefficients=inputs.coefficients,
        turn=turns(inputs.omega, inputs.clock),
        starts=starts,
    )
    return jax.tree.map(lambda u: jnp.moveaxis(u, 1, 0), tokens)


def _outer(v: Float[Array, "b h r p"], k: Array) -> Array:
    """sum over ranks of v k^T."""
    return jnp.einsum("bhrp,bhrn->bhpn", v, k)


def _phase(angle: Float[Array, "b h s"], n: int) -> Complex[Array, "b h m"]:
    """e^{i angle} for all n/2 complex channels; those without an angle stand still."""
    return jnp.exp(1j * jnp.pad(angle, ((0, 0), (0, 0), (0, n // 2 - angle.shape[-1]))))


def _as_complex(u: Float[Array, "*shape n"], s: int) -> Complex[Array, "*shape m"]:
    """first + i second. Channels that do not turn are paired off halfway: without a turn any pairing is the same."""
    first, second, rest = split_pairs(u, s)
    still = jnp.split(rest, 2, axis=-1)
    return jnp.concatenate([first, still[0]], -1) + 1j * jnp.concatenate([second, still[1]], -1)


def _as_real(z: Complex[Array, "*shape m"], s: int) -> Float[Array, "*shape n"]:
    """The inverse of `_as_complex`."""
    return jnp.concatenate([z.real[..., :s], z.imag[..., :s], z.real[..., s:], z.imag[..., s:]], -1)
