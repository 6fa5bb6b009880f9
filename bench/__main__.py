"""python -m bench: measures on this machine's GPU, or its CPU.

The rows of the run go behind those of earlier runs, and a table and a plot are made from all.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from bench import report
from bench.provenance import add_isa, file_stem

HERE = Path(__file__).parent
PARTS = ("solvers", "entropy", "eigh", "sweep", "training")


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, epilog="Other options go to pytest.")
    parser.add_argument(
        "--output", type=Path, default=HERE / "results" / f"{file_stem(device)}.json"
    )
    add_isa(parser)
    options, for_pytest = parser.parse_known_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run.json")
        status = pytest.main(
            [
                *(str(HERE / f"bench_{name}.py") for name in PARTS),
                f"--benchmark-json={run}",
                "--benchmark-quiet",
                *for_pytest,
            ]
        )
        # Interrupted or with failures, pytest has still written the rows that it got.
        text = run.read_text() if run.exists() else ""
    if text and (rows := json.loads(text)["rows"]):
        report.append(options.output, rows)
        report.write(options.output)
    return status


if __name__ == "__main__":
    sys.exit(main())
