"""The differentiable boundary of the kernels, and how they run on several devices.

Rows of the batch and heads know nothing of one another, so under `jit` with shardings every device runs the kernels on
its own of both (`custom_partitioning`); time and the state are gathered. What rows or heads share, the biases or the B
of a group, receives the sum over devices.
"""

import functools
import itertools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas.triton.backward import backward
from pallas.triton.block_sizes import BlockSizes
from pallas.triton.forward import forward
from pallas.triton.operands import ARGUMENT_AXES, THETA0_AXES, Arguments
from pallas.triton.tiles import Tiling

# Axes of the arrays that are not arguments.
_Y, _STATE = "b rows h p", "b h n p"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def ssm(
    inputs: Arguments, h0: jax.Array | None, tiling: Tiling, segments: int, blocks: BlockSizes
) -> tuple[jax.Array, jax.Array]:
    """y and the last state from h0 (b, h, n, p), None for 0, both states in kernel order and float32. See `Arguments`.

    Kept for the backward pass are the arguments, the last state and the angles that chunks start from. The states that
    they start from are made again: at TUNING.md's shape that took 0.21 ms, and kept they would be n / c times as large
    as x in every layer.

    Inside a `shard_map` of the caller's it computes what it is given; `check_vma` must be False there, as for every
    Pallas kernel that does not say how its outputs vary.
    """
    return _forward(inputs, h0, tiling, segments, blocks)[0]


def _forward_to_differentiate(inputs, h0, *static):
    return _forward(*custom_vjp_primal_tree_values((inputs, h0)), *static)


def _backward_of_used(*args):
    """The last state is dropped where whole sequences train: what it would receive is then None, and not zeros."""
    *static, saved, (dy, dlast) = args
    dy = jnp.zeros(dy.shape, dy.dtype) if isinstance(dy, SymbolicZero) else dy
    dlast = None if isinstance(dlast, SymbolicZero) else dlast
    return _backward(*static, saved, (dy, dlast))


# Jitted, so that the layers of a model that is not scanned share what JAX makes of the kernels: they are traced and
# lowered once a shape, which takes longer than all the rest of a layer.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _forward(inputs, h0, tiling, segments, blocks):
    start = None if h0 is None else _STATE
    outs = _Y, _STATE, _theta0(tiling)
    run = _Sharded(forward, (_axes(inputs), start), outs, inputs, tiling, segments, blocks)
    y, last, theta0 = run(inputs, h0)
    return (y, last), (inputs._replace(turned=None), h0, theta0, last)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(tiling, segments, blocks, saved, grads):
    inputs, h0, theta0, last = saved
    dy, dlast = grads
    last = None if dlast is None else last
    axes = _axes(inputs)
    start, end = (None if u is None else _STATE for u in (h0, dlast))
    outs = axes._replace(segment_ids=None), start
    run = _Sharded(backward, (axes, start, _theta0(tiling), end, _Y, end), outs, inputs, tiling, segments, blocks)
    return run(inputs, h0, theta0, last, dy, dlast)


ssm.defvjp(_forward_to_differentiate, _backward_of_used, symbolic_zeros=True)


def _axes(inputs: Arguments) -> Arguments:
    """The axes of the arguments that are there, as one string each."""
    named = inputs._asdict().items()
    return Arguments(**{name: None if a is None else " ".join(ARGUMENT_AXES[name]) for name, a in named})


def _theta0(tiling: Tiling) -> str | None:
    return " ".join(THETA0_AXES) if tiling.s else None


class _Sharded:
    """`function(*args, tiling, segments, blocks)` on every device's rows of the batch and heads.

    `in_axes` and `out_axes` are trees like its arguments and results, of axes such as "b t h p". Several groups are on
    every device, which takes those of its heads.
    """

    def __init__(
        self, function, in_axes, out_axes, inputs: Arguments, tiling: Tiling, segments: int, blocks: BlockSizes
    ):
        self._function, self._in_axes, self._out_axes = function, in_axes, out_axes
        self._tiling, self._segments, self._blocks = tiling, segments, blocks
        self._heads, self._groups = inputs.x.shape[2], inputs.B.shape[2]

    def __call__(self, *args):
        def call(*args):
            return self._function(*args, self._tiling, self._segments, self._blocks)

        sharded = custom_partitioning(call)
        # Shardings come undecoded: that of B may be one that no PartitionSpec says.
        sharded.def_partition(self._partition, self._infer, decode_shardings=False, sharding_rule=self._rule)
        batched = custom_vmap(sharded)

        @batched.def_vmap
        def _(size, in_batched, *args):
            # Runs of a sweep side by side: mapped over devices, if at all, by whoever maps over runs.
            out = jax.vmap(call, jax.tree.map(lambda mapped: 0 if mapped else None, in_batched), axis_size=size)(*args)
            return out, jax.tree.map(lambda _: True, out)

        return batched(*args)

    def _rule(self, *_) -> tuple[str, dict]:
        """Shardy's: of all axes only the batch and the heads may be sharded."""
        ins, outs = (", ".join(jax.tree.leaves(axes)) for axes in (self._in_axes, self._out_axes))
        # In the order of their first mention, which Shardy asks for.
        named = dict.fromkeys(re.findall(r"\w+", f"{ins} {outs}"))
        return f"{ins} -> {outs}", dict(need_replication_factors=tuple(axis for axis in named if axis not in "bh"))

    def _infer(self, mesh: Mesh, args, _):
        """What the partitioner before Shardy asks."""
        return _Cut.of(mesh, args[0], self._groups).shardings(self._out_axes)

    def _partition(self, mesh: Mesh, args, _):
        cut = _Cut.of(mesh, args[0], self._groups)
        per_group = self._heads // self._groups

        def on_shard(inputs, *rest):
            h = inputs.x.shape[2]
            first = lax.axis_index(cut.heads) * h // per_group if cut.heads else 0
            mine = [lax.dynamic_slice_in_dim(u, first, max(1, h // per_group), 2) for u in (inputs.B, inputs.C)]
            inputs = inputs._replace(B=mine[0], C=mine[1])
            out = self._function(inputs, *rest, self._tiling, self._segments_of(inputs), self._blocks)
            return jax.tree.map(functools.partial(of_all, first), self._out_axes, out)

        def of_all(first, axes: str, u):
            """A result of all devices: the sum over those that do not hold parts of it."""
            axes = axes.split()
            if "g" in axes:
                whole = jnp.zeros((*u.shape[:2], self._groups, u.shape[3]), u.dtype)
                u = lax.dynamic_update_slice_in_dim(whole, u, first, 2)
            over = (() if "b" in axes else cut.batch) + (() if "h" in axes else cut.heads)
            return lax.psum(u, over) if over else u

        return cut.mesh, on_shard, cut.shardings(self._out_axes), cut.shardings(self._in_axes)

    def _segments_of(self, shard: Arguments) -> int:
        """More of them where a shard's rows and heads alone leave its device empty."""
        b, t, h, _ = shard.x.shape
        segments, chunks = self._segments, t // self._tiling.c
        while b * h * segments < self._blocks.programs and chunks % (2 * segments) == 0:
            segments *= 2
        return segments


class _Cut(NamedTuple):
    """How batch and heads lie on the devices: the axes of the mesh that cut them."""

    mesh: Mesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]

    @classmethod
    def of(cls, mesh: Mesh, inputs: Arguments, groups: int) -> "_Cut":
        """As the partitioner cut x; () where that does not come out even, or between heads of different groups."""
        x = inputs.x
        # Devices in the order of the program's partitions.
        found = x.sharding.devices_indices_map(x.shape)
        if mesh.empty:
            mesh = Mesh(np.array(list(found)), ("devices",))
        per_group = x.shape[2] // groups

        def axes(dim: int, fits) -> tuple[str, ...]:
            for names in _ordered_subsets(mesh.axis_names):
                each, rest = divmod(x.shape[dim], math.prod(mesh.shape[name] for name in names))
                if rest == 0 and fits(each):
                    same = NamedSharding(mesh, PartitionSpec(*(None,) * dim, names)).devices_indices_map(x.shape)
                    if all(same[device][dim] == where[dim] for device, where in found.items()):
                        return names
            return ()

        whole_groups = axes(2, lambda h: h % per_group == 0 or per_group % h == 0)
        return cls(mesh, axes(0, lambda b: True), whole_groups)

    def shardings(self, axes):
        """Of arrays with these axes."""
        by = dict(b=self.batch or None, h=self.heads or None)
        return jax.tree.map(lambda u: NamedSharding(self.mesh, PartitionSpec(*map(by.get, u.split()))), axes)


def _ordered_subsets(names: tuple[str, ...]):
    return itertools.chain.from_iterable(itertools.permutations(names, k) for k in range(len(names) + 1))
