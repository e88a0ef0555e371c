"""`mamba3 compile`: what it reads of a program, what it refuses, and a real step for TPUs that are not here."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mamba3_jax.command import parse
from mamba3_jax.distributed import compile_command, compile_step, topology
from mamba3_jax.distributed.compile_step import Memory
from mamba3_jax.distributed.program import Buffer, Collective, collectives, largest_buffers
from mamba3_jax.models import PRESETS, preset
from mamba3_jax.ops.api import _log_choice
from mamba3_jax.training.config import TrainConfig
from pallas.tpu.chips import chip_of

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {name: ROOT / f"configs/lm/{name}.yaml" for name in (*PRESETS, "one_gpu", "tiny_cpu")}
NEEDS_LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
TINY = [
    "--run_dir=unused", "--model.mamba3.d_model=64", "--model.mamba3.d_state=16", "--model.n_layers=1", "--steps=10",
    "--model.vocab_size=512", "--data.context=64", "--data.batch_size=8", "--remat=blocks", "--mesh.fsdp=4",
]  # fmt: skip

# What TPU programs look like: a loop, a collective in an asynchronous chain, a fused reduction of which a part is kept.
HLO = """
%start (p: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {
  %p = bf16[2,8]{1,0} parameter(0)
  %gather = bf16[8,8]{1,0:T(8,128)} all-gather(%p), channel_id=7, dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %both = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%done (p.1: bf16[2,8]) -> bf16[8,8] {
  %p.1 = bf16[2,8]{1,0} parameter(0)
  ROOT %gather.1 = bf16[8,8]{1,0} all-gather(%p.1), channel_id=7, dimensions={0}, frontend_attributes={chain_id="1"}
}

%all-reduce-scatter.3 (p.2: f32[16], p.3: f32[4]) -> (f32[4], f32[1]) {
  %p.2 = f32[16]{0} parameter(0)
  %p.3 = f32[4]{0} parameter(1)
  %sum = (f32[16]{0}, f32[4]{0}) all-reduce(%p.2, %p.3), channel_id=1, to_apply=%add
  ROOT %parts = (f32[4]{0}, f32[1]{0}) custom-call(%sum), custom_call_target="Slice"
}

%body (state: (s32[], f32[16])) -> (s32[], f32[16]) {
  %state = (s32[], f32[16]{0}) parameter(0)
  %x = f32[16]{0} get-tuple-element(%state), index=1
  %moved = f32[16]{0} collective-permute(%x), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %kept = (f32[4]{0}, f32[1]{0}) fusion(%x, %y), kind=kCustom, calls=%all-reduce-scatter.3
}

%condition (state.1: (s32[], f32[16])) -> pred[] {
  %state.1 = (s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state.1), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

ENTRY %main (a: bf16[2,8]) -> f32[16] {
  %a = bf16[2,8]{1,0} parameter(0), metadata={op_name="state.parameters[\\'embedding\\'].value"}
  %s = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) fusion(%a), kind=kCustom, calls=%start
  %d = bf16[8,8]{1,0} fusion(%s), kind=kCustom, calls=%done
  %loop = (s32[], f32[16]{0}) while(%t), condition=%condition, body=%body, metadata={op_name="jit(train_step)/while"}
  %sum.1 = f32[] all-reduce(%norm), channel_id=11, to_apply=%add
}
"""
ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, color 1, page 0, preallocated-temp:
 value: <9 elsewhere @1> (size=4096,offset=0): f32[1024]{0:T(1024)S(1)}
allocation 1: size 32, page 0, parameter 0, shape |bf16[2,8]| at ShapeIndex {}:
 value: <1 a @0> (size=32,offset=0): bf16[2,8]{1,0}
allocation 2: size 192, page 0, preallocated-temp:
 value: <2 loop{1} (phi) @0> (size=64,offset=0): f32[16]{0}
 value: <3 x @0> (size=64,offset=0): f32[16]{0}
 value: <4 moved @0> (size=64,offset=64): f32[16]{0}
 value: <5 t @0> (size=512,offset=128): (s32[], f32[16]{0})
"""


def test_collectives_are_counted_once_each_and_in_loops_as_often_as_they_run():
    assert collectives(HLO) == {
        "all-gather": Collective(1, 8 * 8 * 2),
        "all-reduce": Collective(1, 4),
        "reduce-scatter": Collective(5, 5 * (16 + 4) * 4),
        "collective-permute": Collective(5, 5 * 16 * 4),
    }


def test_the_largest_buffers_are_places_in_a_devices_memory_with_what_fills_them():
    found = [Buffer(64, "f32[16]", 2, "while"), Buffer(32, "bf16[2,8]", 1, "state.parameters['embedding'].value")]
    assert largest_buffers(ASSIGNMENT, HLO, 4) == found and largest_buffers(ASSIGNMENT, HLO, 1) == found[:1]


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:2x2x2", "v5p:8x8", "v5e:0x2", "v5e:32x16", "v5e:2x-2"])
def test_a_topology_that_there_is_not_is_one_line_with_those_that_there_are(name):
    with pytest.raises(ValueError, match=f"^topology: got '{name}'; allowed: v4:AxBxC .*, v5e:AxB of up to 256 chips"):
        topology.topology_devices(name)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--topology=v5e:2x2"], "topology: got 'v5e:2x2', whose compiler libtpu is not installed; allowed: with"),
        (["--topology=v9:2x2"], "topology: got 'v9:2x2'; allowed: v4:AxBxC"),
        (["--topology=v5e:2x2", "--mesh.slices=-1", "--mesh.fsdp=1"], "mesh.slices: got -1; allowed: the number of"),
        (
            ["--topology=v5e:2x2", "--data.path=shards", "--model.vocab_size=null"],
            "model.vocab_size: got None; allowed: a number of tokens, because the data are not opened",
        ),
        ([], "topology"),
    ],
)
def test_a_mistake_is_one_line(options, message, monkeypatch, capsys):
    monkeypatch.setattr(compile_command.os, "environ", {**os.environ})
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        compile_command.main([*TINY, *options])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "message, report, helped",
    [
        ("Ran out of memory in memory space hbm. Used 32.00G of 15.75G hbm.", "does not fit into 15.75 GiB", True),
        ("Ran out of memory in memory space vmem: 17M, limit 16M.", "a kernel needs more of its own (vmem, ", False),
    ],
)
def test_what_overflows_is_told_from_what_else_may(message, report, helped, monkeypatch, capsys):
    """Fewer rows at once are no help for a kernel."""
    log = logging.getLogger("mamba3_jax.ops.api")

    class Step:
        def lower(self, state, batch):
            _log_choice("tpu", "tpu", "sequences")
            return self

        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    monkeypatch.setattr(compile_command, "ENVIRONMENT", {})
    monkeypatch.setattr(compile_step, "topology_devices", lambda name, slices: jax.devices()[:4])
    monkeypatch.setattr(compile_step, "chip_of", lambda kind: chip_of("TPU v5 lite"))
    monkeypatch.setattr(compile_step, "compile_train_step", lambda step, mesh: Step())
    assert compile_command.main([*TINY, "--topology=v5e:2x2"]) == 1
    out = capsys.readouterr().out
    assert report in out and message in out and ("--accumulation" in out) == helped
    assert "ssm on tpu: implementation 'tpu' for sequences" in out
    with pytest.raises(ZeroDivisionError), compile_step._choices():
        1 / 0
    assert (log.handlers, log.propagate, log.level) == ([], True, logging.NOTSET)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_of_what_its_name_says(name):
    config = parse("train", TrainConfig, ["--config", str(CONFIGS[name])])
    assert config.run_dir == f"results/{name}"
    if name in PRESETS:
        tokens = config.data.batch_size * config.data.context
        # 0.5M tokens a step, 100B in all, context 2048: test_models.py holds the presets to the published counts.
        assert config.model.lm(config.model.vocab_size) == preset(name)
        assert tokens == 2**19 and config.data.context == 2048 and abs(config.steps * tokens - 100e9) < tokens
        assert (config.optimizer.b1, config.optimizer.b2, config.optimizer.weight_decay) == (0.9, 0.95, 0.1)
        assert config.optimizer.clip_norm == 1 and config.optimizer.end_learning_rate == 1e-5


def run_command(*options) -> subprocess.CompletedProcess:
    # A process of its own, because JAX reads the command's environment once.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    line = [sys.executable, "-m", "mamba3_jax.cli", "compile", *TINY, *options]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.tpu_compile
@NEEDS_LIBTPU
def test_a_step_for_two_slices_cuts_the_state_and_fits(tmp_path):
    done = run_command("--topology=v5e:2x2", "--mesh.slices=2", f"--summary={tmp_path / 'summary.json'}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["devices"] == 8 and summary["mesh"] | {"slice": 2, "fsdp": 4} == summary["mesh"]
    # Parameters and two moments, float32, mostly in quarters; what is small is whole, and padded.
    whole = 12 * summary["parameters"]
    assert whole / 4 < summary["memory"]["arguments"] < whole / 2
    assert summary["memory"]["aliased"] > 0.95 * summary["memory"]["outputs"]
    assert summary["memory"]["peak"] < summary["hbm_bytes"] and summary["collectives"]["all-gather"]["count"] > 4
    # Of everything that is set aside the peak is the part that is live.
    assert summary["memory"]["peak"] < Memory(**summary["memory"]).reserved and "reserved, the sum: " in done.stdout
    assert "ssm on tpu: implementation 'tpu'" in done.stdout and "2 slices of v5e:2x2: 8 x TPU v5 lite" in done.stdout


@pytest.mark.tpu_compile
@NEEDS_LIBTPU
def test_a_step_that_does_not_fit_says_by_which_buffers_and_what_to_change():
    rows = ["--data.batch_size=8192", "--data.context=8192", "--loss_chunk=8192"]
    done = run_command("--topology=v5e:2x2", *rows)
    assert done.returncode == 1, done.stderr
    report, _, advice = done.stdout.partition("to make it smaller, the most useful first:\n")
    # The logits of 2048 rows: four bytes for each of 512 entries.
    assert "does not fit into 15.75 GiB: RESOURCE_EXHAUSTED" in report and "32.00 GiB  f32[2048,8192,512" in report
    assert [line.split()[0] for line in advice.splitlines()] == ["--accumulation", "--loss_chunk", "a"]
    assert "--accumulation 2048: one row" in advice and "--loss_chunk 64: 32.00 GiB of logits become 0.25 GiB" in advice
