"""Errors of one step of the library's discretisation on systems with a known solution, and lambda trained to be small.

Takes h'(s) = a(s) h(s) + u(s), a = A + i omega, u = B x, with a known solution, and lets `ops.ssm` take one step of
size dt. For integral(u) = int exp(int_s^end a) u(s) ds over the step,

    exponential-Euler    lambda = 1                 error of the integral O(dt^2)
    trapezoid            lambda = 1/2 + O(dt)       error of the integral O(dt^3)

The step is exp(dt a(end)) h + integral: where a varies, freezing it at the step's end is O(dt^2) whatever lambda is.
With stationary u and constant A, the lambda of least squared error is 1/2 + dt A / 12 + O(dt^2): a Fourier mode nu of u
has d = i nu - a, g' = d g, error of the trapezoid dt^3 g'' / 12, and Re(conj(d) d^2) = -A |d|^2.

Source: section 3.1 of arXiv:2603.15569. `measure` and `learn` are to be called under `jax.enable_x64(True)`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Complex, Float, Inexact, PRNGKeyArray

from mamba3_jax.ops import SSMState, ssm
from mamba3_jax.ops.discretization import EULER, FIXED_TRAPEZOID

Quantity = Literal["integral", "step", "global"]
QUANTITIES: dict[Quantity, str] = {
    "integral": "Local error of the state-input integral",
    "step": "Local error of the whole step",
    "global": "Global error at the horizon",
}
FREE, NUMBER = "learned at each dt by itself", "learned, one number for all dt"
LINEAR, STEP = "learned, linear in token and step", "learned, linear in step, no bias"
FIXED = ("exponential-Euler", "lambda = 0.6", "trapezoid")
# The order as dt goes to 0: only what is tied to 1/2 there keeps the third.
LEARNED_ORDER = {FREE: 3, NUMBER: 2, LINEAR: 2, STEP: 3}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure, and how long to train.

    Attributes:
        dts: step sizes, decreasing; slopes are fitted over the smaller half.
        starts: steps per system and step size, at times from 0 to 2; errors are root mean squares over them.
        horizon: time over which the global error grows; a multiple of every step size.
        systems: random systems to train lambda on, and as many others to test it on.
        modulation: how far the random systems with varying A swing, as a fraction of A and omega.
        seeds: of the random systems; one training each.
        train_steps: steps of Adam, all systems and step sizes at once.
        learning_rate: its peak; a cosine takes it to 0.
    """

    dts: tuple[float, ...] = tuple(2.0**-k for k in range(2, 11))
    starts: int = 16
    horizon: float = 1.0
    systems: int = 1024
    modulation: float = 0.5
    seeds: tuple[int, ...] = (0, 1, 2)
    train_steps: int = 2000
    learning_rate: float = 0.1

    def __post_init__(self):
        if len(self.dts) < 4 or min(self.dts) <= 0 or any(a <= b for a, b in zip(self.dts, self.dts[1:])):
            raise ValueError(f"dts: got {list(self.dts)}; allowed: at least 4 positive step sizes, decreasing")
        for name in ("starts", "systems", "train_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a positive integer")
        if any(self.horizon < dt or not (self.horizon / dt).is_integer() for dt in self.dts):
            raise ValueError(f"horizon: got {self.horizon}; allowed: a multiple of every one of dts={list(self.dts)}")
        if not 0 <= self.modulation < 1:
            raise ValueError(f"modulation: got {self.modulation}; allowed: 0 <= modulation < 1, so that A < 0")
        if not self.seeds:
            raise ValueError("seeds: got none; allowed: at least one")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate: got {self.learning_rate}; allowed: a positive number")


@dataclasses.dataclass(frozen=True)
class System:
    """h' = a h + u with a known solution: h is chosen, and u follows. One system, or one per row, at times (b,).

    Attributes:
        state: h.
        rate: a = A + i omega.
        total_rate: an antiderivative of `rate`.
        varying: whether `rate` depends on time.
    """

    state: Callable[[Float[Array, " b"]], Inexact[Array, " b"]]
    rate: Callable[[Float[Array, " b"]], Inexact[Array, " b"]]
    total_rate: Callable[[Float[Array, " b"]], Inexact[Array, " b"]]
    varying: bool

    @classmethod
    def constant(cls, rate: complex, state: Callable) -> "System":
        return cls(state, lambda s: rate + 0 * s, lambda s: rate * s, varying=False)

    def input(self, s: Float[Array, " b"]) -> Inexact[Array, " b"]:
        """u = h' - a h."""
        h, velocity = jax.jvp(self.state, (s,), (jnp.ones_like(s),))
        return velocity - self.rate(s) * h


SYSTEMS = {
    "constant A, polynomial u": System.constant(-1.0, lambda s: 1 + s - s**2 / 2 + s**3 / 3),
    "constant A, trigonometric u": System.constant(-2.0, lambda s: jnp.sin(3 * s) + jnp.cos(s) / 2),
    "constant A and omega": System.constant(-0.5 + 2j, lambda s: jnp.exp(1j * s) + s**2 / 2 - 1j * s),
    "varying A": System(
        state=lambda s: jnp.sin(3 * s) + jnp.cos(s) / 2,
        rate=lambda s: -1 - jnp.sin(2 * s) / 2,
        total_rate=lambda s: -s + jnp.cos(2 * s) / 4,
        varying=True,
    ),
    "varying A and omega": System(
        state=lambda s: jnp.exp(1j * s) + s**2 / 2 - 1j * s,
        rate=lambda s: -1 - jnp.cos(s) / 2 + 1j * (1 + jnp.sin(2 * s)),
        total_rate=lambda s: -s - jnp.sin(s) / 2 + 1j * (s - jnp.cos(2 * s) / 2),
        varying=True,
    ),
}


def random_systems(key: PRNGKeyArray, count: int, modulation: float, modes: int = 3) -> System:
    """One random system per row: A in [-2, -1/2], |omega| <= 2, h a stationary sum of modes of frequency up to 3."""
    draws = jax.random.uniform(key, (4 + 2 * modes, count), minval=-1)
    a = -jnp.exp2(draws[0]) + 2j * draws[1]
    swing, phase = 2 + draws[2], np.pi * draws[3]
    frequency, amplitude = 3 * draws[4 : 4 + modes].T, jnp.exp(1j * np.pi * draws[4 + modes :].T)
    return System(
        state=lambda s: jnp.sum(amplitude * jnp.exp(1j * frequency * s[:, None]), axis=1),
        rate=lambda s: a * (1 + modulation * jnp.sin(swing * s + phase)),
        total_rate=lambda s: a * (s - modulation / swing * jnp.cos(swing * s + phase)),
        varying=True,
    )


class Scheme(NamedTuple):
    """A fixed lambda, and whether a step gets the rate at its end, as the model does, or its mean over the step."""

    lam: float
    mean_rate: bool = False


SCHEMES = {
    "exponential-Euler": Scheme(EULER),
    "trapezoid": Scheme(FIXED_TRAPEZOID),
    "lambda = 0.6": Scheme(0.6),
    "trapezoid, mean of A": Scheme(FIXED_TRAPEZOID, mean_rate=True),
}


def theory(quantity: Quantity, scheme: Scheme, varying: bool) -> int:
    """The order that follows from section 3.1, and from where a step takes its rate."""
    integral = 3 if scheme.lam == FIXED_TRAPEZOID else 2
    step = min(integral, 2 if varying and not scheme.mean_rate else 3)
    return dict(integral=integral, step=step)[quantity] if quantity != "global" else step - 1


class Tokens(NamedTuple):
    """What the library is given for t steps: their sizes, the rate of each, and the input at each end."""

    dt: Float[Array, "b t"]
    rate: Complex[Array, "b t"]
    u: Complex[Array, "b t+1"]


def tokens(system: System, times: Float[Array, "b t+1"], mean_rate: bool = False) -> Tokens:
    """The system sampled at `times`, which may repeat: a step of size 0 leaves the state as it is."""
    at = functools.partial(jax.vmap, in_axes=1, out_axes=1)
    dt = jnp.diff(times)
    rate = at(system.rate)(times[:, 1:])
    if mean_rate:
        rate = jnp.diff(at(system.total_rate)(times)) / jnp.where(dt > 0, dt, 1)
    return Tokens(dt, rate.astype(complex), at(system.input)(times).astype(complex))


@jax.jit
def advance(h: Inexact[Array, " b"], given: Tokens, lam: Float[Array, " b"] | float) -> Complex[Array, " b"]:
    """The state that `ops.ssm` reaches from `h`. One channel pair per row: the real part, and minus the imaginary."""

    def pair(z):
        return jnp.stack([z.real, -z.imag], -1)

    dt, rate = given.dt[..., None], given.rate[..., None]
    lam = jnp.broadcast_to(jnp.asarray(lam, dt.dtype).reshape(-1, 1, 1), dt.shape)
    B = pair(given.u)[:, :, None, None]  # and x = 1, so that u = B x
    x = jnp.ones_like(dt)[..., None]
    before = SSMState(angle=0 * x[:, 0], ssm=pair(h.astype(complex))[:, None, None], k=B[:, 0], v=x[:, 0])
    # B stands in for the readout C, which nothing here looks at.
    _, after = ssm(x, B[:, 1:], B[:, 1:], dt, rate.real, lam, rate.imag[..., None], initial_state=before)
    first, second = after.ssm[:, 0, 0, 0], after.ssm[:, 0, 0, 1]
    return (first - 1j * second) * jnp.exp(1j * after.angle[:, 0, 0])


def integral_error(
    system: System, times: Float[Array, "b 2"], lam: Float[Array, " b"] | float, mean_rate: bool = False
) -> Complex[Array, " b"]:
    """The library's step from h = 0, less the exact integral of u over the step."""
    start, end = times.T
    decay = jnp.exp(system.total_rate(end) - system.total_rate(start))
    exact = system.state(end) - decay * system.state(start)
    return advance(jnp.zeros_like(start), tokens(system, times, mean_rate), lam) - exact


def state_error(
    system: System, times: Float[Array, "b t+1"], lam: Float[Array, " b"] | float, mean_rate: bool = False
) -> Complex[Array, " b"]:
    """The library's last state, from the exact first one, less the exact last one."""
    return advance(system.state(times[:, 0]), tokens(system, times, mean_rate), lam) - system.state(times[:, -1])


def one_step(start: Float[Array, " b"], dt: Float[Array, ""]) -> Float[Array, "b 2"]:
    """Both ends of one step."""
    return jnp.stack([start, start + dt], axis=1)


def rms(error: Inexact[Array, "*axes b"]) -> Float[Array, "*axes"]:
    """Root mean square over the rows."""
    return jnp.sqrt(jnp.mean(jnp.abs(error) ** 2, axis=-1))


def slope(dts: tuple[float, ...], values) -> float:
    """Least-squares slope of log value against log dt over the smaller half of the step sizes."""
    half = len(dts) // 2
    return float(np.polyfit(np.log(dts[half:]), np.log(np.asarray(values)[half:]), 1)[0])


def measure(config: Config, system: System, scheme: Scheme) -> dict[Quantity, dict]:
    """Errors at every step size of one system and scheme, their slope, and what theory says."""
    start, dts = jnp.linspace(0.0, 2.0, config.starts), jnp.asarray(config.dts)
    most = round(config.horizon / config.dts[-1])

    def errors(dt):
        # One length for every dt: rows that have reached the horizon stay there.
        way = start[:, None] + jnp.minimum(dt * jnp.arange(most + 1), config.horizon)[None]
        return {
            "integral": rms(integral_error(system, one_step(start, dt), *scheme)),
            "step": rms(state_error(system, one_step(start, dt), *scheme)),
            "global": rms(state_error(system, way, *scheme)),
        }

    measured = jax.vmap(errors)(dts)
    return {
        quantity: dict(
            slope=slope(config.dts, measured[quantity]),
            theory=theory(quantity, scheme, system.varying),
            errors=measured[quantity].tolist(),
        )
        for quantity in QUANTITIES
    }


def features(system: System, start: Float[Array, " b"], dts: Float[Array, " d"]) -> dict[str, Float[Array, "d b _"]]:
    """What each learned lambda = sigmoid(w . features) sees of a step.

    LINEAR sees 1, |u| at the step's end and start, dt A and dt |omega|; STEP the last two only.
    """
    given = jax.vmap(lambda dt: tokens(system, one_step(start, dt)))(dts)
    turn = given.rate[..., 0] * dts[:, None]
    ones = jnp.ones_like(turn.real)
    step = [turn.real, jnp.abs(turn.imag)]
    token = [ones, jnp.abs(given.u[..., 1]), jnp.abs(given.u[..., 0])]
    return {
        FREE: jnp.broadcast_to(jnp.eye(len(dts))[:, None], (*ones.shape, len(dts))),
        NUMBER: ones[..., None],
        LINEAR: jnp.stack(token + step, -1),
        STEP: jnp.stack(step, -1),
    }


class Learned(NamedTuple):
    """A lambda on systems that it was not trained on.

    Attributes:
        error: root mean square error of the integral.
        lam: mean lambda.
        distance: root mean square of lambda - 1/2.
        weights: w of sigmoid(w . features); none for a fixed lambda.
    """

    error: Float[Array, "*seeds d"]
    lam: Float[Array, "*seeds d"]
    distance: Float[Array, "*seeds d"]
    weights: Float[Array, "*seeds _"]


@jax.jit(static_argnames="config")
def learn(key: PRNGKeyArray, config: Config, modulation: float) -> dict[str, Learned]:
    """Trains each learned lambda on random systems and tests it, and the fixed ones, on others.

    The loss is the integral's squared error in units of exponential-Euler's at the same dt, so that every dt counts. A
    step is affine in lambda, so that training needs the library's errors at lambda = 0 and 1 only.
    """
    system = random_systems(key, 2 * config.systems, modulation)
    start, dts = jnp.zeros(2 * config.systems), jnp.asarray(config.dts)
    train, test = np.s_[:, : config.systems], np.s_[:, config.systems :]

    def errors(lam):
        return jax.vmap(lambda dt, lam: integral_error(system, one_step(start, dt), lam))(dts, lam)

    ones = jnp.ones((len(config.dts), 2 * config.systems))
    left, right = jax.lax.map(lambda lam: errors(lam * ones)[train], jnp.array([0.0, EULER]))
    seen = features(system, start, dts)

    def loss(w):
        """Summed over the kinds of lambda: Adam takes each weight by itself, so that each trains as if alone."""
        lams = [jax.nn.sigmoid(seen[name][train] @ w[name]) for name in LEARNED_ORDER]
        return sum(jnp.mean((rms(left + lam * (right - left)) / rms(right)) ** 2) for lam in lams)

    w = {name: jnp.zeros(seen[name].shape[-1]) for name in LEARNED_ORDER}
    w = descend(loss, w, config.train_steps, config.learning_rate)
    lams = {name: SCHEMES[name].lam * ones for name in FIXED}
    lams |= {name: jax.nn.sigmoid(seen[name] @ w[name]) for name in LEARNED_ORDER}
    tested = jax.lax.map(errors, jnp.stack(list(lams.values())))
    return {
        name: Learned(
            error=rms(error[test]),
            lam=jnp.mean(lam[test], axis=-1),
            distance=rms(lam[test] - FIXED_TRAPEZOID),
            weights=w.get(name, jnp.zeros(0)),
        )
        for (name, lam), error in zip(lams.items(), tested)
    }


def descend[Weights](loss: Callable[[Weights], Array], w: Weights, steps: int, learning_rate: float) -> Weights:
    """Adam with a cosine to 0."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def step(carried, _):
        w, state = carried
        update, state = optimizer.update(jax.grad(loss)(w), state)
        return (optax.apply_updates(w, update), state), None

    return jax.lax.scan(step, (w, optimizer.init(w)), length=steps)[0][0]
