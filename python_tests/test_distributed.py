"""Three gloo ranks under torchrun; the assertions are in distributed_cases.py."""

import pathlib
import subprocess
import sys


def test_ranks_equal_one_process():
    script = pathlib.Path(__file__).with_name("distributed_cases.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node=3", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.splitlines() == [
        f"{name}: {ranks} ranks equal one process"
        for ranks in (3, 2)
        for name in ("tensors", "SESRegularizer")
    ]
