"""The run folder: whole files, one writer, one configuration."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ses_lab.config import ConfigError, RunConfig
from ses_lab.folder import FolderInUseError, OtherRunError, RunFolder, atomic, write_json

CONFIG = RunConfig.parse({"dataset": "digits", "model": "resnet20", "seed": 1})


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "f"
    with atomic(path) as file:
        file.write(b"old")

    def interrupted():
        with atomic(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    with atomic(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["f"]


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "f", {"a": [float("nan"), 1.5], "b": {"c": float("inf")}})
    text = (tmp_path / "f").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, 1.5], "b": {"c": None}}


def test_one_process_at_a_time(tmp_path):
    folder = RunFolder(tmp_path / "run")
    code = (
        "import sys; from ses_lab.folder import RunFolder; f = RunFolder(sys.argv[1])\n"
        "with f.claim(f.config()):\n"
        "    f.write_status(pid=7, host='there'); print(1, flush=True); input()"
    )
    with folder.claim(CONFIG):
        pass
    command = [sys.executable, "-c", code, folder.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with (
            pytest.raises(FolderInUseError, match="in use by process 7 on there"),
            folder.claim(CONFIG),
        ):
            pass
        other.kill()
    with folder.claim(CONFIG):  # the kernel has let go of it
        pass


def test_another_configuration_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.claim(CONFIG):
        pass
    assert folder.config() == CONFIG
    other = RunConfig.parse({**CONFIG.to_dict(), "seed": 2, "clip": 1.0})
    with (
        pytest.raises(
            OtherRunError, match=r"clip is None there and 1\.0 here; seed is 1 there and 2"
        ),
        folder.claim(other),
    ):
        pass
    with folder.claim(RunConfig.parse({**CONFIG.to_dict(), "device": "cpu"})):
        pass
    with pytest.raises(ConfigError, match=r"holds no run: it has no config\.yaml"):
        RunFolder(tmp_path / "nothing").config()


def test_rows(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.rows() == []
    rows = [{"epoch": i, "loss": 0.1 * i} for i in range(3)]
    for row in rows:
        folder.append(row)
    assert folder.rows() == rows
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')  # a kill in the middle of a line
    assert folder.rows() == rows
    folder.cut(2)
    folder.append(rows[2])
    assert folder.rows() == rows
    with pytest.raises(RuntimeError, match=r"has 3 rows and checkpoint\.pt goes on from 4"):
        folder.cut(4)


def test_nothing_but_tensors_is_unpickled(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save("a.pt", {"x": torch.arange(3), "lr": 0.1})
    assert folder.load("a.pt")["x"].tolist() == [0, 1, 2]
    folder.save("b.pt", {"x": subprocess.Popen})
    with pytest.raises(Exception, match="Popen was not an allowed global"):
        folder.load("b.pt")
    with pytest.raises(FileNotFoundError, match=r"has no best\.pt"):
        folder.load("best.pt")


def test_status(tmp_path):
    folder = RunFolder(tmp_path)
    assert (folder.status(), folder.finished()) == ({}, False)
    folder.write_status(state="running", epoch=1)
    folder.write_status(state="finished")
    assert (folder.status(), folder.finished()) == ({"state": "finished", "epoch": 1}, True)
