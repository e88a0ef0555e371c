"""`mamba3 train --tensorboard true`: what event files say is what the records say."""

import struct

import pytest

from mamba3_jax.training import tensorboard
from mamba3_jax.training.tensorboard import TensorBoard
from mamba3_jax.training.train_command import main


def events(folder):
    """Of all files, the oldest first; a record is a length, a checksum, the event, a checksum."""
    pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="needs the extra tensorboard")
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            yield pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16


def scalars(folder):
    return {(e.step, value.tag): value.simple_value for e in events(folder) for value in e.summary.value}


def test_every_number_is_there_under_its_name_and_step(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    board = TensorBoard(tmp_path, step=0)
    board.log(dict(step=3, loss=2.5, gradient_norm=None, mfu=0.25))
    board.log(dict(step=6, loss=2.0, validation_perplexity=8.0))
    board.close()
    assert scalars(tmp_path / tensorboard.FOLDER) == {
        (3, "loss"): 2.5, (3, "mfu"): 0.25, (6, "loss"): 2.0, (6, "validation_perplexity"): 8.0,
    }  # fmt: skip


def test_a_resumed_run_takes_the_place_of_what_was_written_after_its_checkpoint(tmp_path):
    """TensorBoard drops what is at or behind the step of a start mark."""
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    TensorBoard(tmp_path, step=40).close()
    starts = [e.step for e in events(tmp_path / tensorboard.FOLDER) if e.session_log.status == e.session_log.START]
    assert starts == [41]


def test_without_the_extra_it_is_one_line_before_any_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        main([f"--run_dir={tmp_path / 'run'}", "--model.mamba3.d_model=32", "--steps=1", "--tensorboard=true"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("tensorboard: got true without tensorboardX; allowed: ")
    assert err.count("\n") == 1 and not (tmp_path / "run").exists()
