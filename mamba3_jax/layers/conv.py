"""A short causal depthwise convolution (the one that Mamba-3 drops; section 3.4 and table 5a of arXiv:2603.15569)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mamba3_jax.layers.parameters import Undecayed


def check_tail(tail: Array | None, conv_width: int) -> None:
    """Raises ValueError for a mixer's state that has a convolution's tail where its config has no taps, or has none."""
    if (tail is None) != (conv_width == 0):
        raise ValueError(f"state: got one of another config; allowed: of conv_width {conv_width}")


class CausalConv(nnx.Module):
    """y_t = silu(bias + sum_w weight_w x_{t-w}), per channel, within one document; `silu=False` leaves the silu out.

    `tail` is what passes between calls: the last width - 1 inputs, in order.
    """

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs, silu: bool = True):
        bound = width**-0.5
        self.silu = silu
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), (width, channels), minval=-bound, maxval=bound))
        self.bias = Undecayed(jnp.zeros(channels))

    def __call__(
        self, x: Float[Array, "b t d"], tail: Float[Array, "b w d"], segment_ids: Int[Array, "b t"] | None = None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b w d"]]:
        weight, past = self.weight[...].astype(x.dtype), self.weight.shape[0] - 1
        t = x.shape[1]
        padded = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
        if segment_ids is not None:
            # The tail continues the document that is open at the row's start.
            ids = jnp.concatenate([jnp.repeat(segment_ids[:, :1], past, axis=1), segment_ids], axis=1)
        y = self.bias[...].astype(x.dtype)[None, None]
        for back in range(past + 1):
            term = padded[:, past - back : past - back + t]
            if segment_ids is not None:
                same = ids[:, past - back : past - back + t] == segment_ids
                term = jnp.where(same[..., None], term, 0)
            y = y + weight[back][None, None] * term
        return jax.nn.silu(y) if self.silu else y, self._next_tail(padded, None if segment_ids is None else ids)

    def empty_tail(self, b: int) -> Float[Array, "b w d"]:
        """The tail before the first token."""
        return jnp.zeros((b, self.weight.shape[0] - 1, self.weight.shape[1]))

    def _next_tail(self, padded, ids):
        past = self.weight.shape[0] - 1
        tail = padded[:, padded.shape[1] - past :].astype(jnp.promote_types(padded.dtype, jnp.float32))
        if ids is None:
            return tail
        same = ids[:, ids.shape[1] - past :] == ids[:, -1:]
        return jnp.where(same[..., None], tail, 0)
