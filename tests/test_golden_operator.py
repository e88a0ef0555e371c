"""The operator against the official implementation: outputs, states and gradients of every golden file."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_data as golden
from mamba3_jax.layers.norm import rms_norm
from mamba3_jax.ops import output
from mamba3_jax.ops.state import SSMState

PARAMETERS = (
    *("Q", "K", "V", "ADT", "DT", "Trap", "Q_bias", "K_bias", "Angles"),
    *("D", "Z", "MIMO_V", "MIMO_Z", "MIMO_Out", "norm_weight"),
    *("init_angle", "init_ssm", "init_k", "init_v"),
)
STATE = ("angle", "ssm", "k", "v")

CASES = [
    pytest.param(name, implementation, dtype, id=f"{name}-{implementation}-{np.dtype(dtype)}")
    for name in golden.files("*_op_*")
    for implementation in ("recurrent", "chunked")
    for dtype in (np.float32, np.float64)
    if dtype == np.float32 or golden.is_float64(golden.load(name)[0])
]


def _run(args: dict, implementation: str):
    """y and the final state of one row of tokens; with a fused norm, normalised as the layer does it."""
    if "norm_weight" not in args:
        state = golden.state_from(args, "init", "MIMO_V" in args)
        return golden.run_operator(args, implementation, initial_state=state)
    inner = {k: v for k, v in args.items() if k not in ("Z", "MIMO_Z", "MIMO_Out")}
    o, state = golden.run_operator(inner, implementation)
    o = output.gate(rms_norm(o, args["norm_weight"]), args["Z"], args["MIMO_Z"])
    return output.reduce_ranks(o, args["MIMO_Out"]), state


def _run_documents(args: dict, lengths: list[int], implementation: str):
    """A packed file, document by document, because each document has its own initial and final state there."""
    time_axis = dict(Q=1, K=1, V=1, Z=1, Angles=1, ADT=2, DT=2, Trap=2)
    ys, states, start = [], [], 0
    for i, length in enumerate(lengths):
        cut = {}
        for k, v in args.items():
            if k in time_axis:
                cut[k] = jax.lax.slice_in_dim(v, start, start + length, axis=time_axis[k])
            else:
                cut[k] = v[i : i + 1] if k.startswith("init_") else v
        y, state = _run(cut, implementation)
        ys.append(y)
        states.append(state)
        start += length
    return jnp.concatenate(ys, axis=1), SSMState(*(jnp.concatenate(parts) for parts in zip(*states)))


def _loss(arrays, run, args):
    y, state = run(args)
    loss = jnp.sum(y * arrays["dy"])
    if "dfinal_ssm" in arrays:
        cotangent = golden.state_from(arrays, "dfinal", "MIMO_V" in args)
        loss += sum(jnp.sum(a * b) for a, b in zip(state, cotangent))
    return loss, (y, state)


def _check(arrays, dtype, run, long: bool) -> SSMState:
    """Outputs and gradients of `run` against the file; returns the states for the caller to place."""
    args = {k: jnp.asarray(v, dtype) for k, v in arrays.items() if k in PARAMETERS}
    (_, (y, state)), grads = jax.jit(jax.value_and_grad(functools.partial(_loss, arrays, run), has_aux=True))(args)
    factor = 10 if long and dtype == np.float32 else 1
    tolerance = {k: factor * v for k, v in golden.TOLERANCES[dtype].items()}
    golden.assert_close(y, arrays["y"], tolerance["value"], "y")
    # A gradient that vanishes holds rounding noise, so the floor of the scale is 1/1000 of the file's largest.
    largest = max(np.max(np.abs(v)) for k, v in arrays.items() if k.startswith("grad."))
    for name, grad in grads.items():
        expected = arrays[f"grad.{name}"]
        scale = max(np.max(np.abs(expected)), 1e-3 * largest)
        golden.assert_close(grad, expected, tolerance["gradient"], f"grad.{name}", scale)
    return state, tolerance["value"]


@pytest.mark.parametrize("name, implementation, dtype", CASES)
def test_values_states_and_gradients(name, implementation, dtype):
    arrays, meta = golden.load(name)
    with jax.enable_x64(dtype == np.float64):
        if "cu_seqlens" in arrays:
            lengths = np.diff(arrays["cu_seqlens"]).tolist()
            run = functools.partial(_run_documents, lengths=lengths, implementation=implementation)
        else:
            run = functools.partial(_run, implementation=implementation)
        state, rtol = _check(arrays, dtype, run, long=name.endswith("long"))
        golden.assert_state_close(state, golden.state_from(arrays, "final", meta["kind"] == "mimo"), rtol)


@pytest.mark.parametrize("implementation", ["recurrent", "chunked"])
@pytest.mark.parametrize("name", [n for n in golden.files("*_op_*packed*") if "init" not in n])
def test_packed_row_with_segment_ids(name, implementation):
    """One call with segment_ids: outputs and gradients of all documents, and the last document's state."""
    arrays, meta = golden.load(name)
    lengths = np.diff(arrays["cu_seqlens"])
    ids = jnp.asarray(np.repeat(np.arange(len(lengths)), lengths)[None], jnp.int32)

    def run(args):
        if "norm_weight" not in args:
            return golden.run_operator(args, implementation, segment_ids=ids, chunk_size=16)
        inner = {k: v for k, v in args.items() if k not in ("Z", "MIMO_Z", "MIMO_Out")}
        o, state = golden.run_operator(inner, implementation, segment_ids=ids, chunk_size=16)
        o = output.gate(rms_norm(o, args["norm_weight"]), args["Z"], args["MIMO_Z"])
        return output.reduce_ranks(o, args["MIMO_Out"]), state

    state, rtol = _check(arrays, np.float32, run, long=False)
    expected = golden.state_from(arrays, "final", meta["kind"] == "mimo")
    golden.assert_state_close(state, expected.map(lambda a: a[-1:]), rtol)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", golden.files("*_op_*step"))
def test_states_after_every_token(name, dtype):
    """Decoding token by token: every output and all four states after it."""
    arrays, meta = golden.load(name)
    mimo = meta["kind"] == "mimo"
    rtol = golden.TOLERANCES[dtype]["value"]
    with jax.enable_x64(dtype == np.float64):
        args = {k: jnp.asarray(v, dtype) for k, v in arrays.items() if k in PARAMETERS}
        state = None
        for t in range(meta["L"]):
            cut = {k: v[:, t : t + 1] for k, v in args.items() if k in ("Q", "K", "V", "Z", "Angles")}
            cut |= {k: v[:, :, t : t + 1] for k, v in args.items() if k in ("ADT", "DT", "Trap")}
            y, state = golden.run_operator(args | cut, None, initial_state=state)
            golden.assert_close(y[:, 0], arrays["y"][:, t], rtol, f"y[{t}]", scale=np.max(np.abs(arrays["y"])))
            expected = golden.state_from({f"step_{k}": arrays[f"step_{k}"][t] for k in STATE}, "step", mimo)
            golden.assert_state_close(state, expected, rtol)
