"""`mamba3 compile --config FILE --topology v5e:16x16`: a training step for TPUs that are not here.

    mamba3 compile --config configs/lm/mamba3-siso-1.5b.yaml --topology v5e:16x16
    mamba3 compile --config configs/lm/mamba3-siso-1.5b.yaml --topology v5p:8x8x8 --mesh.fsdp 256 --mesh.sequence 2
    mamba3 compile --config configs/lm/mamba3-mimo-440m.yaml --topology v6e:8x8 --mesh.slices 2

The very step of `mamba3 train`, with any of its options, is compiled as a pod would; the data are not opened. The
report has memory per device, collectives and the time below which no step can be; the exit status is 1 if it does not
fit. Needs the extra `tpu`, and no accelerator.
"""

import json
import os
from pathlib import Path

from mamba3_jax.command import fail, parse

# No accelerator is asked for, libtpu does not look for TPUs of this machine, several processes may use it at once, and
# its log is quiet.
ENVIRONMENT = dict(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_MIN_LOG_LEVEL="3",
    TPU_STDERR_LOG_LEVEL="3",
    TF_CPP_MIN_LOG_LEVEL="3",
)


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    os.environ.update(ENVIRONMENT)
    # JAX reads the environment when it is imported.
    from mamba3_jax.distributed.compile_report import advice, render
    from mamba3_jax.distributed.compile_step import CompileConfig, compile_step

    config = parse("compile", CompileConfig, argv)
    try:
        program = compile_step(config)
        if config.summary is not None:
            Path(config.summary).write_text(json.dumps(program.summary, indent=2) + "\n")
    except (ValueError, NotImplementedError) as error:
        fail(" ".join(str(error).split()))
    except OSError as error:
        fail(f"summary: got {config.summary} ({error.strerror}); allowed: a file that can be written")
    print(render(program))
    if program.exhausts_hbm:
        print("\n".join(["to make it smaller, the most useful first:", *advice(config, program)]))
    return int(not program.fits)
