"""Two and three gloo ranks under torchrun; the assertions are in distributed_*cases.py."""

import pathlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("cases", ["distributed_cases", "distributed_regularizer_cases"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one_process(ranks, cases):
    script = pathlib.Path(__file__).with_name(f"{cases}.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={ranks}", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert f"{ranks} ranks equal one process" in done.stdout
