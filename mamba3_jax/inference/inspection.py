"""What a model is made of and what its layers do with a text: parameters, state, decays, angles.

    half-life   ln 2 / (|A| dt) tokens: after so many, half of what a head has stored is left
    turn        omega dt radians per token: how far a pair of state channels turns; a half turn flips its sign
    lambda      weight of the trapezoid's current token; 1 is exponential-Euler

Decays are those of Mamba-3, Mamba-2 and Gated DeltaNet (whose delta rule also overwrites, which no half-life shows);
turns and lambda are Mamba-3's. Attention has none of them.
"""

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mamba3_jax.layers import GatedDeltaNet, Mamba2, Mamba3
from mamba3_jax.models import LM
from mamba3_jax.models.lm import Block
from mamba3_jax.ops.rotation import wrap

PERCENTILES = (5, 50, 95)


class ParameterRow(NamedTuple):
    """Parameters of one name, of all blocks that have it.

    Attributes:
        name: dotted; the block's number is a star.
        shape: of one of them.
        count: arrays.
        parameters: numbers in all of them.
        dtype: as stored.
        bytes: of all of them.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    parameters: int
    dtype: str
    bytes: int


class StateRow(NamedTuple):
    """State of one sequence in all layers of a kind.

    Attributes:
        kind: the mixer.
        layers: how many.
        bytes: before the first token.
        bytes_per_token: that each token adds; 0 but for attention.
    """

    kind: str
    layers: int
    bytes: int
    bytes_per_token: int


@dataclasses.dataclass(frozen=True)
class Spread:
    """Percentiles of everything measured, and the median over tokens of each head, or of each head's pairs."""

    low: float
    median: float
    high: float
    by_head: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class LayerDynamics:
    """One layer on a text; what a kind of layer does not have is None.

    Attributes:
        kind: the mixer.
        half_life: tokens.
        turn: radians per token, modulo a full turn, in [0, pi]; the medians are of head 0's pairs, then head 1's, ...
        above_quarter: share of heads, pairs and tokens that turn by more than pi/2.
        lam: mean of lambda.
    """

    kind: str
    half_life: Spread | None = None
    turn: Spread | None = None
    above_quarter: float | None = None
    lam: float | None = None


def parameter_table(model: LM) -> list[ParameterRow]:
    """Every parameter, those of equal name in several blocks together. Takes abstract models too."""
    found: dict[tuple, list] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param))):
        name = re.sub(r"\bblocks\.\d+\b", "blocks.*", ".".join(str(key.key) for key in path))
        found.setdefault((name, leaf.shape, str(leaf.dtype)), []).append(leaf)
    rows = []
    for (name, shape, dtype), leaves in found.items():
        parameters = sum(leaf.size for leaf in leaves)
        rows.append(ParameterRow(name, shape, len(leaves), parameters, dtype, parameters * leaves[0].dtype.itemsize))
    return rows


def state_table(model: LM) -> list[StateRow]:
    """The state of one sequence by kind of layer. Takes abstract models too."""
    sizes = [
        [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) for state in cache]
        for cache in (jax.eval_shape(functools.partial(model.empty_cache, 1, capacity)) for capacity in (0, 1))
    ]
    rows: dict[str, StateRow] = {}
    for block, empty, one in zip(model.blocks, *sizes):
        kind = type(block.mixer).__name__
        before = rows.get(kind, StateRow(kind, 0, 0, 0))
        rows[kind] = StateRow(kind, before.layers + 1, before.bytes + empty, before.bytes_per_token + one - empty)
    return list(rows.values())


def layer_dynamics(model: LM, tokens: Int[Array, "b t"]) -> list[LayerDynamics]:
    """Runs the blocks one after the other and measures each mixer on what it reads. Blocks of a kind compile once."""
    x = model.embedding[...][tokens]
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    layers = []
    for block in model.blocks:
        x, measured = _run_block(*nnx.split(block), x)
        kind = type(block.mixer).__name__
        if measured is None:
            layers.append(LayerDynamics(kind))
            continue
        turn = None if measured.turn is None else np.abs(np.asarray(wrap(measured.turn), np.float64))
        layers.append(
            LayerDynamics(
                kind,
                half_life=_spread(np.log(2) / np.asarray(measured.rate, np.float64)),
                turn=None if turn is None else _spread(turn),
                above_quarter=None if turn is None else float(np.mean(turn > np.pi / 2)),
                lam=None if measured.lam is None else float(np.mean(measured.lam)),
            )
        )
    return layers


class _Measured(NamedTuple):
    """rate: |A| dt of every token; turn: omega dt, or RoPE's angle, of every token."""

    rate: Float[Array, "b t h"]
    turn: Float[Array, "b t h s"] | None = None
    lam: Float[Array, "b t h"] | float | None = None


@functools.partial(jax.jit, static_argnums=0)
def _run_block(
    graph: nnx.GraphDef, parameters: nnx.State, x: Float[Array, "b t d"]
) -> tuple[Float[Array, "b t d"], _Measured | None]:
    block = nnx.merge(graph, parameters)
    return block(x, None, None)[0], _measure(block, block.norm(x).astype(block.dtype))


def _measure(block: Block, u: Float[Array, "b t d"]) -> _Measured | None:
    """Of a mixer that has decays, from its input."""
    mixer = block.mixer
    match mixer:
        case Mamba3():
            dynamics = mixer.dynamics(u)
            dt, omega = dynamics["dt"], dynamics["omega"]
            turn = None
            if mixer.config.rotation == "data_dependent":
                turn = omega * dt[..., None]
            elif mixer.config.rotation == "rope":
                turn = jnp.broadcast_to(omega, (*dt.shape[:2], 1, omega.size))
            return _Measured(-dynamics["A"] * dt, turn, dynamics["lam"])
        case Mamba2():
            dt = jax.nn.softplus(mixer.dt_proj(u) + mixer.dt_bias[...][None, None])
            return _Measured(jnp.exp(mixer.A_log[...])[None, None] * dt)
        case GatedDeltaNet():
            raw, _ = jnp.split(mixer.rate_proj(u), 2, axis=-1)
            dt = jax.nn.softplus(raw + mixer.dt_bias[...][None, None])
            return _Measured(jnp.exp(mixer.A_log[...])[None, None] * dt)
    return None


def _spread(values: Float[np.ndarray, "b t h *pairs"]) -> Spread:
    low, median, high = np.percentile(values, PERCENTILES)
    by_head = np.median(values, axis=(0, 1)).ravel()
    return Spread(float(low), float(median), float(high), tuple(by_head.tolist()))
