"""A run directory: the unit of resume. It holds config.yaml, metrics.jsonl and checkpoints/.

A directory belongs to one configuration. Opening it with another is refused; opening it with the same continues from
the newest checkpoint, and metrics written after that checkpoint are dropped, because they will be written again.

A checkpoint holds the checksums of its files, written before it gets its name, and is restored only as it was saved.
One without them, of an earlier version, is restored as it is.

Several processes open the same one, on a file system that they share. Each writes its part of a checkpoint, and the
first one everything else.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mamba3_jax.checks import check_shapes
from mamba3_jax.checksums import CHECKSUMS, check_files, write_checksums
from mamba3_jax.distributed.processes import is_first, raise_everywhere, wait_for_all
from mamba3_jax.files import unfinished, whole_file

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
# Of a checkpoint: the parts that are written here, with checksums; the storage library writes more beside them.
PARTS = ("arrays", "extra")


class RunDirectory:
    """Config, metrics and checkpoints of one run, under `path`.

    Args:
        path: created if it does not exist.
        config: the configuration as text; the same text resumes.
        option: what the user calls `path`, for messages.
        fixed: of a configuration's text, what a resumption may not change.

    Raises:
        ValueError: `path` belongs to another configuration, or is not a run directory and not empty.
    """

    def __init__(self, path: Path, config: str, option: str = "results_dir", fixed: Callable[[str], str] = str):
        self.path = path
        existing = path / CONFIG
        if existing.exists():
            check_same_config(path, config, option, fixed)
        elif path.exists() and (not path.is_dir() or any(p != unfinished(existing) for p in path.iterdir())):
            raise ValueError(f"{option}: got {path}, which holds other files; allowed: a run or a new path")
        wait_for_all("have looked at the run directory")
        path.mkdir(parents=True, exist_ok=True)
        if not existing.exists():
            self.write(CONFIG, config)
        wait_for_all("have a run directory")
        self._checkpoints = ocp.CheckpointManager(
            (path / CHECKPOINTS).absolute(),
            # Named here, so that a checkpoint can be asked for its shapes before it is read.
            item_handlers=dict(arrays=ocp.StandardCheckpointHandler(), extra=ocp.JsonCheckpointHandler()),
            # A process that was killed leaves the checkpoint that it was writing under a temporary name.
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
                cleanup_tmp_directories=True,
            ),
        )
        self._saving: int | None = None

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        return self._checkpoints.latest_step()

    def restore(self, like: Any, accept: Callable[[dict], None] | None = None) -> tuple[Any, dict] | None:
        """The newest checkpoint's (arrays, extra), shaped as `like`; None if there is none yet.

        Drops the metrics that were written after it.

        Args:
            like: arrays, or their shapes.
            accept: called with extra before any metrics are dropped; may raise, and then nothing changes.

        Raises:
            ValueError: a file of the checkpoint is not as it was saved, with the older checkpoint that there is; or
                its arrays are not those of `like`, with the first that differs.
        """
        step = self.latest_step
        if step is None:
            if is_first():
                (self.path / METRICS).unlink(missing_ok=True)
            return None
        raise_everywhere(lambda: self._check_files(step))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        self._check_shapes(step, abstract)
        restored = self._checkpoints.restore(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract), extra=ocp.args.JsonRestore())
        )
        lines = restored.extra.pop("metrics_lines")
        if accept is not None:
            accept(restored.extra)
        self._truncate_metrics(lines)
        return restored.arrays, restored.extra

    def save(self, step: int, arrays: Any, extra: dict) -> None:
        """Starts to write a checkpoint; the two newest are kept."""
        extra = extra | {"metrics_lines": len(self.metrics()) if is_first() else None}
        # As saving does anyway: the one before still needs its own step.
        self._checkpoints.wait_until_finished()
        self._saving = step
        self._checkpoints.save(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), extra=ocp.args.JsonSave(extra))
        )

    def log(self, record: dict, name: str = METRICS) -> None:
        """Appends one line to metrics.jsonl, or to another file, which a resumption does not touch."""
        if not is_first():
            return
        with (self.path / name).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict]:
        """All lines of metrics.jsonl."""
        path = self.path / METRICS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def write(self, name: str, text: str) -> None:
        """Writes a file whole or not at all."""
        if not is_first():
            return
        with whole_file(self.path / name) as temporary:
            temporary.write_text(text)

    def close(self) -> None:
        """Waits until the checkpoints are on disk."""
        self._checkpoints.wait_until_finished()
        self._checkpoints.close()

    def _write_checksums(self) -> None:
        """Of the checkpoint that is complete but for its name, by the thread that writes it."""
        if not is_first():
            return
        for folder in (self.path / CHECKPOINTS).glob(f"{self._saving}.*"):
            write_checksums(folder / CHECKSUMS, folder, PARTS)

    def _check_files(self, step: int) -> None:
        folder = self.path / CHECKPOINTS / str(step)
        if not (folder / CHECKSUMS).exists():
            return
        try:
            check_files(folder / CHECKSUMS, folder, PARTS)
        except ValueError as error:
            older = max((other for other in self._checkpoints.all_steps() if other < step), default=None)
            then = "the first step" if older is None else f"the checkpoint of step {older}"
            raise ValueError(f"{error}; without {folder} the run goes on from {then}") from error

    def _check_shapes(self, step: int, abstract: Any) -> None:
        stored = _shapes(self._checkpoints.item_metadata(step).arrays.tree)
        check_shapes(f"{self.path / CHECKPOINTS / str(step)}", stored, _shapes(abstract))

    def _truncate_metrics(self, lines: int) -> None:
        kept = (self.path / METRICS).read_text().splitlines(keepends=True)[:lines] if lines else []
        self.write(METRICS, "".join(kept))


def has_checkpoint(path: Path) -> bool:
    """Whether the run directory at `path`, if there is one, can be resumed from a checkpoint."""
    return (path / CHECKPOINTS).is_dir() and bool(ocp.utils.checkpoint_steps(path / CHECKPOINTS))


def check_same_config(path: Path, config: str, option: str = "results_dir", fixed: Callable[[str], str] = str) -> None:
    """Raises ValueError, naming the first difference, if the run directory at `path` is of another configuration."""
    before, now = (fixed(text).splitlines() for text in ((path / CONFIG).read_text(), config))
    if before == now:
        return
    changed = next((f"{b.strip()!r} there, {n.strip()!r} here" for b, n in zip(before, now) if b != n), "its length")
    raise ValueError(
        f"{option}: got {path}, a run of another config ({changed}); allowed: a run of this config, or a new path"
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """By the dotted name of each array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}
