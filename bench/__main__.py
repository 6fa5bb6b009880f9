"""python -m bench: measures on this machine's GPU, or its CPU, and writes rows, table and plot."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

from bench import report
from bench.provenance import file_stem

HERE = Path(__file__).parent
PARTS = ("solvers", "entropy", "eigh", "sweep", "training")


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, epilog="Other options go to pytest.")
    parser.add_argument(
        "--output", type=Path, default=HERE / "results" / f"{file_stem(device)}.json"
    )
    options, for_pytest = parser.parse_known_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    status = pytest.main(
        [
            *(str(HERE / f"bench_{name}.py") for name in PARTS),
            f"--benchmark-json={options.output}",
            "--benchmark-quiet",
            *for_pytest,
        ]
    )
    # Interrupted or with failures, pytest has still written the rows that it got.
    measured = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)
    if status in measured and options.output.exists():
        report.write(options.output)
    return status


if __name__ == "__main__":
    sys.exit(main())
