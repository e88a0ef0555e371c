"""The step of jax-linear-attention 0.1.0, timed in a process of its own: two do not share a GPU, nor need it our jax.

    python training_peer.py DIR '{"preset": "mamba3-1p3b", "b": 16, "t": 4096, "steps": 6}' '["device", ...]'

DIR holds its packages. The last line of the output is a row, empty on a device that is named. As for our own steps,
its preset trains in bfloat16 with AdamW, float32 master weights and random tokens, and the median of `steps` steps
after two counts. Which settings its published figure had is not known, so it is timed in several ways: `WAYS`, of its
options that trade memory for time. The fastest counts.
"""

import dataclasses
import itertools
import json
import os
import statistics
import sys
import time

NAME = "jax-linear-attention 0.1.0"
# What its README reports of mamba3-1p3b on one H100, of 2026-10-20: tokens/s and its own MFU.
REPORTED = (32976, 0.326)
PRESET = "mamba3-1p3b"
WARM = 2
# (rows at once, options of its model): activations kept with the lean backward passes, or blocks computed again.
LEAN = dict(remat="none", lean_vjp=True, lean_remat_core=True)
WAYS = ((4, LEAN), (2, LEAN), (16, dict(remat="full")))


def measure(preset: str, b: int, t: int, steps: int, ways=WAYS) -> dict:
    """The fastest way's figures, and all of them."""
    import jax

    tried = []
    for rows, options in ways:
        if b % rows:
            continue
        try:
            times = _times(preset, options, b // rows, rows, t, steps)
            tried.append(dict(rows_at_once=rows, **options, s=statistics.median(times)))
        except Exception as error:  # most likely it does not fit
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            tried.append(dict(rows_at_once=rows, **options, reason=reason))
    row = dict(peer=NAME, preset=preset, device=device(), jax=jax.__version__, tokens=b * t, tried=tried)
    measured = [way for way in tried if "s" in way]
    if not measured:
        return row | dict(reason="; ".join(way["reason"] for way in tried))
    return row | min(measured, key=lambda way: way["s"])


def device() -> str:
    """As experiments/measured.py names it."""
    import jax

    return f"{jax.devices()[0].device_kind} ({jax.default_backend()})"


def _times(preset: str, options: dict, accumulation: int, b: int, t: int, steps: int) -> list[float]:
    import jax
    import numpy as np

    state, step = _state_and_step(preset, options)
    vocabulary = state[0].config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, (accumulation, b, t + 1), np.int32)
    batch = dict(input_ids=jax.device_put(tokens[..., :-1]), labels=jax.device_put(tokens[..., 1:]))
    key, ends = jax.random.key(1), [time.perf_counter()]
    for _ in range(WARM + steps):
        model, optimizer_state, metrics, key = step(*state, batch, key)
        state = (model, optimizer_state)
        if not np.isfinite(float(metrics["loss"])):
            raise FloatingPointError(f"loss: got {metrics['loss']}; allowed: a finite one")
        ends.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(ends)][WARM:]


def _state_and_step(preset: str, options: dict):
    """((model, optimizer state), step) as its trainer makes them."""
    import equinox as eqx
    import jax
    from jla.config import OptimConfig
    from jla.models import build_model, get_preset
    from jla.training.optimizers import optimizer_from_config
    from jla.training.schedulers import create_schedule
    from jla.training.step import LossConfig, build_train_step, lm_loss

    config = dataclasses.replace(get_preset(preset), **options)
    abstract = eqx.filter_eval_shape(build_model, config, key=jax.random.key(0))
    draw = jax.jit(lambda key: eqx.filter(build_model(config, key=key), eqx.is_array))
    rest = eqx.filter(abstract, lambda leaf: not isinstance(leaf, jax.ShapeDtypeStruct))
    model = eqx.combine(draw(jax.random.key(0, impl="rbg")), rest)
    optim = OptimConfig()
    schedule = create_schedule(optim.lr, optim.schedule, warmup_steps=100, total_steps=1000)
    optimizer = optimizer_from_config(optim, schedule)
    optimizer_state = jax.jit(optimizer.init)(eqx.filter(model, eqx.is_inexact_array))
    # Its fused cross-entropy, with the gradient made in the forward pass, where its kernels run.
    fused = jax.default_backend() == "gpu"
    loss = LossConfig(impl="auto" if fused else "xla", grad_in_forward=fused)
    return (model, optimizer_state), build_train_step(optimizer, lm_loss(loss))


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    sys.path.insert(0, sys.argv[1])
    known = device() in json.loads(sys.argv[3])
    print(json.dumps({} if known else measure(**json.loads(sys.argv[2]))))
