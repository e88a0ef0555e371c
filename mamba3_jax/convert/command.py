"""`mamba3 convert SOURCE DESTINATION`: a released checkpoint to a model directory of ours, or back.

The direction is SOURCE's: what has a config.json is imported, what has a model.yaml (or is a run directory that holds
one) is exported. Nothing is written unless everything is.
"""

import dataclasses
import importlib.util
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Literal

from flax import nnx
from flax.traverse_util import flatten_dict

from mamba3_jax.command import fail, parse
from mamba3_jax.convert import plausibility
from mamba3_jax.convert.files import SAFETENSORS, TORCH, read_json
from mamba3_jax.convert.released import CONFIG, Released, read_released, write_released
from mamba3_jax.convert.released_config import (
    RELEASED_ACTIVATION,
    config_from_released,
    config_to_released,
    unrecorded,
)
from mamba3_jax.data.tokenizer import JsonTokenizer
from mamba3_jax.files import check_new, whole_directory
from mamba3_jax.layers.mamba3 import AActivation
from mamba3_jax.models import LMConfig
from mamba3_jax.models.checkpoint import CONFIG as MODEL_CONFIG
from mamba3_jax.models.checkpoint import MODEL, TOKENIZER, load_model, model_directory, save_model

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
DOWNLOADED = [CONFIG, TOKENIZER, "*.safetensors", "pytorch_model*.bin", "*.index.json"]


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """One conversion.

    Attributes:
        source: a directory with a released checkpoint (config.json) or with a model of ours (model.yaml, or a run), or
            the name of a repository, such as state-spaces/mamba3-siso-187m, if huggingface_hub is installed.
        destination: a directory that is not there yet, or is empty.
        format: of an export: "torch" (pytorch_model.bin, which the official code reads) or "safetensors".
            Default: torch.
        a_activation: of an import: which one the model was trained with, which the released format does not say.
            Default: heavy_tail, the activation of all official code that writes this format.
        dtype: of an import: "float32" or "bfloat16" for the matrix products. Default: the embedding's.
        tokenizer: the model's tokenizer.json. Default: the one in SOURCE, if there is one.
    """

    source: str
    destination: Path
    format: Literal["torch", "safetensors"] | None = None
    a_activation: AActivation | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    tokenizer: Path | None = None


def main(argv: list[str]) -> int:
    """Runs `mamba3 convert`; returns the exit status."""
    if len(argv) > 1 and not argv[1].startswith("-"):
        argv = [argv[0], f"--destination={argv[1]}", *argv[2:]]
    config = parse("convert", ConvertConfig, argv, positional="source")
    start = time.perf_counter()
    try:
        check_new("destination", config.destination)
        source = _local(config.source)
        if (source / CONFIG).is_file():
            _import(config, source)
        elif any((directory / MODEL_CONFIG).is_file() for directory in (source, source / MODEL)):
            _export(config, model_directory(source))
        else:
            allowed = f"a released checkpoint ({CONFIG}), a model of ours ({MODEL_CONFIG}) or a run that holds one"
            raise ValueError(f"source: got {source}, which is none; allowed: {allowed}")
    except (ValueError, OSError) as error:
        fail(" ".join(str(error).split()))
    print(f"wrote {config.destination} in {time.perf_counter() - start:.1f} s")
    return 0


def _import(options: ConvertConfig, source: Path) -> None:
    if options.format is not None:
        raise ValueError(f"format: got {options.format!r} for an import; allowed: for an export of a model of ours")
    activation = options.a_activation or RELEASED_ACTIVATION
    released = read_released(source, a_activation=activation, dtype=options.dtype)
    _describe(source, released.tensors, released.parameters)
    tokenizer = _tokenizer(options.tokenizer, source, released.config)
    save_model(options.destination, released.config, released.parameters, tokenizer)
    _check_plausibility(released, tokenizer)


def _export(options: ConvertConfig, directory: Path) -> None:
    for name in ("a_activation", "dtype"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name}: got {getattr(options, name)!r} for an export; allowed: for an import")
    model = load_model(directory)
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tokenizer = _tokenizer(options.tokenizer, directory, model.config)
    with whole_directory(options.destination) as temporary:
        form = SAFETENSORS if options.format == "safetensors" else TORCH
        tensors = write_released(temporary, model.config, parameters, form=form)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / TOKENIZER)
    _describe(directory, tensors, parameters)
    _report_unrecorded(model.config, options.destination, str(parameters["embedding"].dtype))


def _local(source: str) -> Path:
    """The directory, downloaded if it is a repository's name."""
    if Path(source).is_dir():
        return Path(source)
    allowed = "a directory, or a repository such as state-spaces/mamba3-siso-187m"
    if not REPOSITORY.fullmatch(source) or Path(source).exists():
        raise ValueError(f"source: got {source!r}; allowed: {allowed}")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError(
            f"source: got {source!r}, which is no directory; as a repository it needs: uv sync --extra hub"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=DOWNLOADED))
    except Exception as error:  # the library raises the network's errors as they come
        raise ValueError(f"source: got {source!r}; allowed: {allowed} ({error})") from None


def _tokenizer(given: Path | None, directory: Path, config: LMConfig) -> Path | None:
    """The tokenizer.json to copy, if there is one, whose ids the model has."""
    path = given or directory / TOKENIZER
    if given is None and not path.is_file():
        return None
    fields = read_json(path)
    try:
        vocabulary = fields["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        ids += [token["id"] for token in fields.get("added_tokens", [])]
        if not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError("ids are integers >= 0")
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"tokenizer: got {path} without a vocabulary; allowed: a tokenizer.json") from None
    size = 1 + max(ids)
    if size > config.vocab_size:
        raise ValueError(f"tokenizer: got {path} with {size} ids; allowed: at most the model's {config.vocab_size}")
    if importlib.util.find_spec("tokenizers") is not None:
        JsonTokenizer(path)
    return path


def _check_plausibility(released: Released, tokenizer: Path | None) -> None:
    """Says what the built-in text says about the import; a warning, not an error: what was written stays."""
    if tokenizer is None:
        print("perplexity: not checked, because there is no tokenizer.json")
        return
    try:
        tokens = JsonTokenizer(tokenizer).encode(plausibility.TEXT)
        if len(tokens) < 2:
            raise ValueError(f"the tokenizer makes {len(tokens)} tokens of the text")
        found = plausibility.measure(released.config, released.parameters, tokens)
    # Of the tokenizers library, or of memory that the model takes and its conversion did not.
    except Exception as error:
        print(f"perplexity: not checked ({' '.join(str(error).split()) or type(error).__name__:.300})")
        return
    print(f"perplexity: {found.chosen:.4g} on a short text, {found.other:.4g} with the other a_activation")
    complaint = plausibility.complaint(released.config, found)
    if complaint is not None:
        print(f"warning: {complaint}", file=sys.stderr)


def _report_unrecorded(config: LMConfig, directory: Path, dtype: str) -> None:
    """Says which fields an import of what was exported would not find again."""
    fields = config_to_released(config)
    reread = config_from_released(fields, directory / CONFIG, a_activation=RELEASED_ACTIVATION, dtype=dtype)
    lost = unrecorded(config, reread)
    if lost:
        print(f"warning: the released format does not record {', '.join(lost)}", file=sys.stderr)
    if config.mixer.a_activation != RELEASED_ACTIVATION:
        print(
            f"warning: the official code computes {RELEASED_ACTIVATION}, this model needs {config.mixer.a_activation}; "
            f"import it with --a_activation {config.mixer.a_activation}",
            file=sys.stderr,
        )


def _describe(source: Path, tensors: int, parameters: dict) -> None:
    arrays = flatten_dict(parameters).values()
    dtypes = ", ".join(sorted({str(a.dtype) for a in arrays}))
    print(f"read {source}: {tensors} tensors, {sum(a.size for a in arrays):,} parameters, {dtypes}")
