"""The official checkpoint's names and layouts against our modules'; tests/golden/README.md, sections 2 and 3."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from mamba3_jax.layers import Mamba3, Mamba3Config
from mamba3_jax.models import LM, LMConfig

# Official name -> path in our module. Matrices are (out, in) there and (in, out) here.
MIXER = {name: (name,) for name in ("dt_bias", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")} | {
    "in_proj.weight": ("in_proj", "kernel"),
    "B_norm.weight": ("B_norm", "weight"),
    "C_norm.weight": ("C_norm", "weight"),
    "norm.weight": ("norm_weight",),
    "out_proj.weight": ("out_proj", "kernel"),
}
BLOCK = {f"mixer.{name}": ("mixer", *path) for name, path in MIXER.items()} | {
    "norm.weight": ("norm", "weight"),
    "norm2.weight": ("norm2", "weight"),
    "mlp.fc1.weight": ("mlp", "fc1", "kernel"),
    "mlp.fc2.weight": ("mlp", "fc2", "kernel"),
}


def lm_names(n_layers: int) -> dict[str, tuple]:
    blocks = {f"backbone.layers.{i}.{k}": ("blocks", i, *path) for i in range(n_layers) for k, path in BLOCK.items()}
    return blocks | {
        "backbone.embedding.weight": ("embedding",),
        "backbone.norm_f.weight": ("norm", "weight"),
        "lm_head.weight": ("head",),
    }


def load(module: nnx.Module, official: dict[str, np.ndarray], names: dict[str, tuple], dtype) -> None:
    """Sets the parameters of a module, abstract or not; every official one is used and every one of ours is set."""
    state = nnx.state(module)
    shapes = {path: value.shape for path, value in flatten_dict(nnx.to_pure_dict(state)).items()}
    ours = {}
    for name, value in official.items():
        path = names[name]
        value = value.T if path[-1] == "kernel" else value
        if path[-1] == "norm_weight":
            value = value.reshape(shapes[path])
        ours[path] = jnp.asarray(value, dtype)
    assert {path: value.shape for path, value in ours.items()} == shapes
    nnx.replace_by_pure_dict(state, unflatten_dict(ours))
    nnx.update(module, state)


def to_official(state: nnx.State, names: dict[str, tuple]) -> dict[str, np.ndarray]:
    """Our parameters, or their gradients, in official names and layouts."""
    ours = flatten_dict(nnx.to_pure_dict(state))
    official = {}
    for name, path in names.items():
        if path in ours:
            value = np.asarray(ours.pop(path))
            value = value.T if path[-1] == "kernel" else value
            official[name] = value.reshape(-1) if path[-1] == "norm_weight" else value
    assert not ours, f"no official name for {list(ours)}"
    return official


def mixer_config(options: dict, d_model: int, a_activation: str) -> Mamba3Config:
    """From the official constructor's arguments; those absent keep its defaults. It does not record the activation."""
    return Mamba3Config(
        d_model=d_model,
        d_state=options["d_state"],
        expand=options["expand"],
        head_dim=options["headdim"],
        ngroups=options["ngroups"],
        mimo_rank=options["mimo_rank"] if options.get("is_mimo", False) else None,
        rope_fraction=options.get("rope_fraction", 0.5),
        a_activation=a_activation,
        A_floor=options.get("A_floor", 1e-4),
        output_norm="before_gate" if options.get("is_outproj_norm", False) else "none",
        chunk_size=options["chunk_size"],
    )


def load_mixer(arrays: dict[str, np.ndarray], meta: dict, dtype) -> Mamba3:
    """The module of a golden file, computing in `dtype`."""
    options = json.loads(str(arrays["config"]))
    config = mixer_config(options, options["d_model"], meta["A_activation"])
    mixer = nnx.eval_shape(lambda: Mamba3(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    official = {name.removeprefix("param."): a for name, a in arrays.items() if name.startswith("param.")}
    load(mixer, official, MIXER, dtype)
    return mixer


def load_lm(folder: Path) -> LM:
    """The float32 model of a checkpoint folder without attention; the newest release's activation wrote all of them."""
    options = json.loads((folder / "config.json").read_text())
    assert not options["attn_layer_idx"]
    config = LMConfig(
        mixer=mixer_config(options["ssm_cfg"], options["d_model"], "heavy_tail"),
        n_layers=options["n_layer"],
        vocab_size=options["vocab_size"],
        mlp_width=options["d_intermediate"],
        tie_embeddings=options["tie_embeddings"],
        vocab_multiple=options["pad_vocab_size_multiple"],
    )
    model = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))
    load(model, read_safetensors(folder / "model.safetensors"), lm_names(config.n_layers), jnp.float32)
    return model


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Eight bytes of header size, a JSON header, then the arrays."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    dtypes = {"F32": np.float32, "BF16": jnp.bfloat16}
    arrays = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            flat = np.frombuffer(data[start + first : start + last], dtypes[entry["dtype"]])
            arrays[name] = flat.reshape(entry["shape"])
    return arrays
