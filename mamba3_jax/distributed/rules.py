"""The one table of what is cut: logical axes of arrays -> axes of the mesh, and parameters -> their logical axes.

An axis of a size that its mesh axes do not divide is cut by the last ones of them that do, or stays whole. Norms, most
biases and convolutions stay whole, because they are small. Parts of a matrix that a layer splits along its channels
straddle any cut of them. So the matrices of Mamba-3 and of the MLP that are split are cut along their input, for
storage alone, and their layers exchange the parts (`exchanged`); those of the baselines are cut along fsdp only.
"""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from mamba3_jax.distributed.mesh import AXES

# The logical axes of an array, one after the other.
Cut = tuple[str | None, ...]

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("slice", "data", "fsdp"),
    "copies": ("slice", "data"),
    "time": ("sequence",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "storage": ("tensor", "fsdp"),
}

# By the end of a parameter's dotted path.
PARAMETERS: dict[str, Cut] = {
    "embedding": ("vocab", "embed"),
    "head": ("vocab", "embed"),
    "in_proj.kernel": ("storage", None),
    "xBC_proj.kernel": ("embed", None),
    "qkv_proj.kernel": ("embed", None),
    "rate_proj.kernel": ("embed", None),
    "z_proj.kernel": ("embed", "heads"),
    "dt_proj.kernel": ("embed", "heads"),
    "out_proj.kernel": ("heads", "embed"),
    "fc1.kernel": ("storage", None),
    "fc2.kernel": ("mlp", "embed"),
    "B_bias": ("heads", None, None),
    "C_bias": ("heads", None, None),
    "mimo_x": ("heads", None, None),
    "mimo_z": ("heads", None, None),
    "mimo_o": ("heads", None, None),
    "dt_bias": ("heads",),
    "A_log": ("heads",),
    "D": ("heads",),
}


def spec(*axes: str | None) -> PartitionSpec:
    """How an array is cut whose axes have these logical names; None is whole."""
    return PartitionSpec(*(None if axis is None else LOGICAL_AXES[axis] for axis in axes))


def ways(mesh: Mesh | jax.sharding.AbstractMesh, axis: str) -> int:
    """In how many parts a logical axis is cut."""
    return math.prod(mesh.shape[name] for name in LOGICAL_AXES[axis])


def constrain(x: Shaped[Array, "*shape"], *axes: str | None) -> Shaped[Array, "*shape"]:
    """x, cut as its logical axes say under the ambient mesh.

    It is x itself without an ambient mesh of this library's axes, on one device, and inside `jax.shard_map`.
    """
    mesh = cutting_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, _dividing(mesh, axes, x.shape))


def gathered(matrix: Float[Array, "v d"]) -> Float[Array, "v d"]:
    """A matrix of the vocabulary as it is used: d whole."""
    return _recut(matrix, there=[("vocab", None)], back=[("vocab", "embed")])


def exchanged(part: Float[Array, "*shape"], axis: str | None) -> Float[Array, "*shape"]:
    """Some channels (d, ..., channels) of a matrix that is cut for storage, as they are used: d whole, channels cut
    along `axis`, if there is one.

    In two steps, which the compiler does not find by itself: d is gathered along fsdp, then exchanged along tensor.
    """
    inner = (None,) * (part.ndim - 2)
    there = [(axis, *inner, None), (None, *inner, axis)]
    return _recut(part, there, back=[("embed", *inner, axis), ("storage", *inner, None)])


def _recut(x: Float[Array, "*shape"], there: list[Cut], back: list[Cut]) -> Float[Array, "*shape"]:
    """x, cut one way after the other; its gradient is summed in the parts of `back`, where it would be summed whole."""

    def cut(x: Array, cuts: list[Cut]) -> Array:
        for axes in cuts:
            x = constrain(x, *axes)
        return x

    if cutting_mesh() is None:
        return x
    used = jax.custom_vjp(lambda x: cut(x, there))
    used.defvjp(lambda x: (cut(x, there), None), lambda _, gradient: (cut(gradient, back),))
    return used(x)


def cutting_mesh() -> jax.sharding.AbstractMesh | None:
    """The ambient mesh where it has this library's axes and several devices, and is not a `jax.shard_map`'s already."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.axis_names != AXES or mesh.size == 1 or mesh.manual_axes else mesh


def parameter_axes(path: str) -> tuple[str | None, ...]:
    """The logical axes of the parameter with this dotted path; none for those that stay whole."""
    parts = path.split(".")
    return PARAMETERS.get(parts[-1]) or PARAMETERS.get(".".join(parts[-2:]), ())


def parameter_shardings(mesh: Mesh, abstract: Any) -> Any:
    """The sharding of every parameter in a tree of shapes; whatever else is in it, such as counters, stays whole.

    An optimizer's state holds trees of the parameters' shape, and is cut like them.
    """

    def sharding(path, leaf) -> NamedSharding:
        names = [str(name) for name in map(_key, path) if name != "value"]
        return NamedSharding(mesh, _dividing(mesh, parameter_axes(".".join(names)), leaf.shape))

    return jax.tree_util.tree_map_with_path(sharding, abstract)


def _dividing(
    mesh: Mesh | jax.sharding.AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> PartitionSpec:
    """`spec`, where every axis is cut by the last ones of its mesh axes, as many as divide its size."""
    cuts = []
    for axis, size in zip(axes, shape):
        names = () if axis is None else LOGICAL_AXES[axis]
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[1:]
        cuts.append(names or None)
    return PartitionSpec(*cuts)


def _key(entry) -> Any:
    return jax.tree_util.keystr((entry,), simple=True)
