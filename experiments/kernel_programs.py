"""What experiments/kernel_latency.py times: cells, their inputs and functions, and the bytes and FLOPs they need."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba3_jax.ops import EULER, SSMState, ssm, ssm_step

# By backend: implementations of the operator, with the one of its decode step, and of attention.
OPERATORS = {
    "gpu": {"chunked": "recurrent", "triton": "triton"},
    "tpu": {"chunked": "recurrent", "tpu": "tpu"},
    "cpu": {"chunked": "recurrent"},
}
ATTENTIONS = {"gpu": ("xla", "cudnn"), "tpu": ("xla",), "cpu": ("xla",)}
PASSES = ("forward", "forward_backward")
# Decode steps of one call, each on its own token: one takes about as long as it takes to call a program.
DECODE_STEPS = 8
PER_TOKEN = ("x", "B", "C", "dt", "A", "lam", "omega", "z")


class Shape(NamedTuple):
    """Sizes by the letters of ops/api.py; attention has no n and g."""

    b: int
    t: int
    h: int
    p: int = 64
    n: int = 128
    g: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From text like "b=8 t=2048 h=64 n=64", in any order; p, n and g may be left out."""
        try:
            shape = cls(**{name: int(size) for name, size in (word.split("=") for word in text.split())})
        except (ValueError, TypeError):
            raise ValueError(f"shapes: got {text!r}; allowed: text like 'b=8 t=2048 h=64 p=64 n=128 g=1'") from None
        if min(shape) < 1 or shape.n % 4 or shape.h % shape.g:
            raise ValueError(f"shapes: got {text!r}; allowed: positive sizes, n a multiple of 4, g a divisor of h")
        return shape

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self._asdict().items() if size)


class Cell(NamedTuple):
    """One row of the results. The rank `r` is 1 but for MIMO; `state_dtype` is that of a decode step's state."""

    what: str
    model: str
    implementation: str
    shape: Shape | None = None
    dtype: str = "bfloat16"
    r: int = 1
    state_dtype: str = "float32"

    @property
    def name(self) -> str:
        """What --only matches."""
        parts = [self.what, self.model, self.implementation]
        if self.shape:
            parts += [str(self.shape), self.dtype]
        return ",".join(parts + [f"state {self.state_dtype}"] * (self.what == "decode"))


def cells(config, backend: str) -> list[Cell]:
    """All cells, those that share inputs side by side."""
    operators, rank = OPERATORS[backend], config.mimo_rank
    shapes = [Shape.parse(text) for text in config.shapes]
    rows = [shapes[0]._replace(b=1, t=t) for t in config.lengths]
    batch = shapes[0]._replace(b=config.decode_batch)
    siso, mimo = [("siso", i, 1) for i in operators], [("mimo", i, rank) for i in operators]
    mamba2, attention = [("mamba2", "chunked", 1)], [("attention", i, 1) for i in ATTENTIONS[backend]]
    found = [Cell("ceiling", "copy", "xla"), Cell("ceiling", "matmul", "xla")]

    def add(what, forms, shape, state_dtype="float32"):
        for model, implementation, r in forms:
            sizes = shape._replace(n=0, g=0) if model == "attention" else shape
            found.append(Cell(what, model, implementation, sizes, config.dtype, r, state_dtype))

    for shape in shapes:
        for forms in (siso, mimo, mamba2, attention):
            for what in PASSES:
                add(what, forms, shape)
    for n, dtype in itertools.product(config.decode_n, config.state_dtypes):
        steps = [(model, operators[i], r) for model, i, r in siso + mimo + mamba2]
        add("decode", steps, batch._replace(t=1, n=n), dtype)
    for shape in (batch._replace(t=t) for t in config.prefill_lengths):
        for forms in (siso, mimo):
            for what in ("prefill", "prefill_decode"):
                add(what, forms, shape)
    for shape in shapes:
        t = min(shape.t, config.oracle_tokens)
        add("accuracy", siso + mimo, shape._replace(b=1, t=t, h=2, g=min(shape.g, 2)))
    for shape in rows:
        for forms in (siso, attention):
            for what in PASSES:
                add(what, forms, shape)
    return list(dict.fromkeys(found))


def arrays(model: str, shape: Shape, r: int, dtype: str) -> dict[str, jax.Array]:
    """Random inputs of one layer's operator by the names of its arguments, and the output's cotangent dy.

    Two draws of uniform numbers with variance 1: each draw takes about as long to compile as what is to be timed.
    """
    b, t, h, p, n, g = shape
    draw = functools.partial(jax.random.uniform, minval=-(3**0.5), maxval=3**0.5)
    key, wide = jax.random.split(jax.random.key(0, impl="rbg"))
    if model == "attention":
        return dict(zip(("query", "key", "value", "dy"), draw(wide, (4, b, t, h, p), dtype)))
    names = ("x", "z", "dy")
    sizes = dict.fromkeys(("B", "C"), (b, t, r, g, n)) | dict.fromkeys(("dt", "A"), (b, t, h)) | dict(D=(h,))
    if model == "mamba2":
        names = ("x", "dy")
    else:
        sizes |= dict(lam=(b, t, h), omega=(b, t, 1, n // 4), B_bias=(h, r, n), C_bias=(h, r, n))
    if model == "mimo":
        sizes |= dict.fromkeys(("mimo_x", "mimo_z", "mimo_o"), (h, r, p))
    ends = list(itertools.accumulate(map(math.prod, sizes.values())))
    parts = jnp.split(draw(key, ends[-1:]), ends[:-1])
    a = dict(zip(names, draw(wide, (len(names), b, t, h, p), dtype)))
    a |= {name: part.reshape(size) for (name, size), part in zip(sizes.items(), parts)}
    bounded = dict(
        B=lambda u: u.astype(dtype),
        C=lambda u: u.astype(dtype),
        dt=lambda u: jax.nn.softplus(u - 3),
        A=lambda u: -1 - jnp.abs(u),
        lam=jax.nn.sigmoid,
        omega=lambda u: jnp.pi * jnp.tanh(u),
        **dict.fromkeys(("mimo_x", "mimo_z", "mimo_o"), lambda u: u / r),
    )
    return {name: bounded[name](u) if name in bounded else u for name, u in a.items()}


def fewest_bytes(what: str, a: int, y: int, state: int, t: int) -> int:
    """Bytes that must cross device memory: each input read once and each output written once, pass by pass.

    Args:
        what: forward: reads a, writes y. forward_backward: besides reads a and dy, writes the gradients of a. decode:
            reads a and the state, writes y and the state. prefill: reads a, writes y and the state. prefill_decode:
            prefill, then t steps over the same tokens.
        a, y, state: bytes of the inputs, of the output and of the state.
        t: tokens.
    """
    return {
        "forward": a + y,
        "forward_backward": 3 * a + 2 * y,
        "decode": a + y + 2 * state,
        "prefill": a + y + state,
        "prefill_decode": 2 * a + 2 * y + (2 * t + 1) * state,
    }[what]


def flops(what: str, model: str, shape: Shape, r: int) -> int:
    """Multiplications and additions of the matrix products that define the operator, whatever the algorithm adds.

    The SSM, per token and head: k v^T into the state and q^T out of it, 2 r p n each. Attention, per head and pair
    j <= i of tokens: q k and the weighted v, 2 p each. A backward pass has two products for each of the forward pass's.
    """
    b, t, h, p, n, _ = shape
    forward = 2 * b * h * t * (t + 1) * p if model == "attention" else 4 * b * t * h * r * p * n
    return forward * {"forward_backward": 3, "prefill_decode": 2}.get(what, 1)


def apply(model: str, implementation: str, a: dict):
    """(y, final state) of the operator, None for attention's state."""
    if model == "attention":
        return jax.nn.dot_product_attention(**a, is_causal=True, implementation=implementation), None
    return ssm(**a, **_options(model), implementation=implementation)


def _options(model: str) -> dict:
    return dict(lam=EULER, rotation="none") if model == "mamba2" else {}


def _step(model: str, implementation: str, a: dict, state: SSMState):
    """A decode step whose state keeps its dtypes."""
    y, new = ssm_step(**a, **_options(model), state=state, implementation=implementation)
    return y, jax.tree.map(lambda u, old: u.astype(old.dtype), new, state)


def forward_backward(model: str, implementation: str, a: dict, dy: jax.Array):
    """y, and the gradient of sum(y dy) with respect to every array of `a`."""
    y, pull = jax.vjp(lambda a: apply(model, implementation, a)[0], a)
    # In a model dy comes of y: XLA must not begin the backward pass, nor take its memory, before there is y.
    y, dy = jax.lax.optimization_barrier((y, dy))
    return y, pull(dy)[0]


def _prefill_decode(cell: Cell, a: dict):
    """All outputs of the prefill, the last of the decode steps, and the state."""
    y, state = apply(cell.model, cell.implementation, a)
    decoder = OPERATORS[jax.default_backend()][cell.implementation]

    def body(i, carry):
        index = functools.partial(jax.lax.dynamic_index_in_dim, index=i, axis=1, keepdims=False)
        token = {name: index(u) if name in PER_TOKEN else u for name, u in a.items()}
        return _step(cell.model, decoder, token, carry[1])

    return y, *jax.lax.fori_loop(0, cell.shape.t, body, (y[:, -1], state))


def _decode(cell: Cell, tokens: list[dict], state: SSMState):
    """The outputs of steps on one token after the other, and the state."""
    outputs = []
    for token in tokens:
        # Where tokens are generated the next one is not there before the step: XLA must neither prepare it earlier nor
        # carry the state from step to step in registers.
        token, state = jax.lax.optimization_barrier((token, state))
        y, state = _step(cell.model, cell.implementation, token, state)
        outputs.append(y)
    return outputs, state


class Program(NamedTuple):
    """A function, what makes its arguments, which of these it may overwrite, and how often it does what is timed."""

    function: Callable
    arguments: Callable[[], tuple]
    donated: tuple[int, ...] = ()
    times: int = 1


def program(cell: Cell, config) -> Program:
    """What a cell runs. The last argument and the last result of decode steps are their state."""
    form = (cell.model, cell.implementation)
    a = functools.partial(arrays, cell.model, cell.shape, cell.r, cell.dtype)

    def inputs_and_dy():
        inputs = a()
        dy = inputs.pop("dy")
        return inputs, dy

    def inputs():
        return inputs_and_dy()[:1]

    def tokens_and_state():
        row = arrays(cell.model, cell.shape._replace(t=DECODE_STEPS), cell.r, cell.dtype)
        del row["dy"]
        tokens = [{name: u[:, i] if name in PER_TOKEN else u for name, u in row.items()} for i in range(DECODE_STEPS)]
        keys = jax.random.split(jax.random.key(1, impl="rbg"), 4)
        return tokens, SSMState(*(jax.random.uniform(k, *u, -1, 1) for k, u in zip(keys, _state(cell))))

    match cell.what:
        case "forward":
            return Program(lambda a: apply(*form, a)[0], inputs)
        case "forward_backward":
            return Program(functools.partial(forward_backward, *form), inputs_and_dy)
        case "prefill":
            return Program(functools.partial(apply, *form), inputs)
        case "prefill_decode":
            return Program(functools.partial(_prefill_decode, cell), inputs)
        case "decode":
            return Program(functools.partial(_decode, cell), tokens_and_state, (1,), DECODE_STEPS)
        case "ceiling":
            # Negation, not a copy: a kernel that reads and writes each element once, and that XLA does not drop.
            function = jnp.negative if cell.model == "copy" else jnp.matmul
            return Program(function, lambda: _ceiling_arguments(cell.model, config))


def counts(cell: Cell, config) -> tuple[int, int]:
    """(bytes, FLOPs) that a cell's mathematics needs."""
    if cell.what == "ceiling":
        arguments = jax.eval_shape(lambda: _ceiling_arguments(cell.model, config))
        operations = 2 * config.matmul_size**3 if cell.model == "matmul" else 0
        return size(arguments) + size(arguments[0]), operations
    a = jax.eval_shape(lambda: arrays(cell.model, cell.shape, cell.r, cell.dtype))
    y = size(a.pop("dy"))
    state = 0 if cell.model == "attention" else sum(math.prod(u) * jnp.dtype(d).itemsize for u, d in _state(cell))
    total = fewest_bytes(cell.what, size(a), y, state, cell.shape.t)
    return total, flops(cell.what, cell.model, cell.shape, cell.r)


def size(arrays) -> int:
    """Bytes of a tree of arrays."""
    return sum(math.prod(u.shape) * u.dtype.itemsize for u in jax.tree.leaves(arrays))


def _state(cell: Cell) -> list[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of a state's arrays: the angle is float32 whatever the rest is."""
    b, _, h, p, n, _ = cell.shape
    shapes = SSMState.shapes(b, h, p, n, cell.r, 0 if cell.model == "mamba2" else n // 4)
    return list(zip(shapes, ("float32", *3 * (cell.state_dtype,))))


def _ceiling_arguments(model: str, config) -> tuple[jax.Array, ...]:
    """One vector to negate, or two matrices to multiply."""
    keys = jax.random.split(jax.random.key(0, impl="rbg"))
    if model == "copy":
        return (jax.random.uniform(keys[0], (config.copy_mib << 19,), jnp.bfloat16, -1, 1),)
    return tuple(jax.random.uniform(key, (config.matmul_size,) * 2, jnp.bfloat16, -1, 1) for key in keys)
