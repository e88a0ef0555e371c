"""A run's numbers for TensorBoard, with the extra `tensorboard`."""

import importlib.util
from pathlib import Path

FOLDER = "tensorboard"


def check_installed() -> None:
    """Raises ValueError, in one line, without the extra."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ValueError(
            "tensorboard: got true without tensorboardX; allowed: with the extra tensorboard, "
            "pip install 'mamba3-jax-pallas[tensorboard]' or uv sync --extra tensorboard"
        )


class TensorBoard:
    """Event files in a run directory; `tensorboard --logdir RUN_DIR` shows them.

    Args:
        run_dir: the run's.
        step: that the run goes on from; what an earlier process wrote of later steps is not shown.
    """

    def __init__(self, run_dir: Path, step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / FOLDER), purge_step=step + 1)

    def log(self, record: dict) -> None:
        """One line of metrics.jsonl or timing.jsonl, without what was not finite."""
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
