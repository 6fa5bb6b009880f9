"""The demo runs from start to end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_digits(tmp_path: Path) -> None:
    picture = tmp_path / "digits.png"
    command = [sys.executable, "examples/digits.py", "--epochs", "1", "--output", str(picture)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for column in ("accuracy", "ms per step", "target H", "H without", "H with", "rank with"):
        assert column in done.stdout
    layers = [line.split() for line in done.stdout.splitlines() if line[:5].strip().isdigit()]
    assert [row[1] for row in layers] == ["16", "16", "32", "32", "64", "64"]
    assert "5/5" in done.stderr  # the progress bar
    assert picture.read_bytes().startswith(b"\x89PNG")
