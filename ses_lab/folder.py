"""The run folder: files that anyone can read, and that a kill at any moment leaves whole.

============================  ====================================================================
``config.yaml``               the RunConfig
``status.json``               state: running, finished or failed; progress, last metrics, versions,
                              peak memory of the device in bytes
``metrics.jsonl``             one row per epoch
``checkpoint.pt``             everything needed to go on, and how many rows are its own
``best.pt``                   weights of the epoch of best validation (else test) accuracy
``curves.png``, ``spectra/``  loss and accuracy against epochs; spectra of the weights
``probes.json``               one entry per probe, by ``ses-lab probe``
``lock``                      held by the one process that may write
============================  ====================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from ses_lab.config import ConfigError, RunConfig, read_yaml


class FolderInUseError(RuntimeError):
    """Another process trains in this folder."""


class OtherRunError(RuntimeError):
    """The folder holds a run of another configuration."""


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file that appears at ``path`` whole, on the disk, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)  # the new name itself has to reach the disk
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _plain(value: Any) -> Any:
    """NaN and infinity are no JSON: null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | os.PathLike, value: Any) -> None:
    with atomic(path) as file:
        file.write(json.dumps(_plain(value), indent=1, allow_nan=False).encode() + b"\n")


class RunFolder:
    """One folder of one run. Reading needs no lock; writing happens inside :meth:`claim`."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextlib.contextmanager
    def claim(self, config: RunConfig) -> Iterator[None]:
        """Alone in the folder, which holds ``config`` from then on.

        Raises:
            FolderInUseError: another process is in it, here or on a machine that shares the disk.
            OtherRunError: it holds another configuration; the message names the keys.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self / "lock", "a") as lock:  # the kernel lets go of it when the process dies
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = self.status()
                raise FolderInUseError(
                    f"{self.path} is in use by process {owner.get('pid', '?')} on "
                    f"{owner.get('host', '?')}: wait for it, or end it and start again"
                ) from None
            self._own(config)
            yield

    def _own(self, config: RunConfig) -> None:
        if (self / "config.yaml").exists():
            there, ours = self.config().identity(), config.identity()
            changed = [f"{key} is {there[key]!r} there and {ours[key]!r} here"
                       for key in ours if there[key] != ours[key]]  # fmt: skip
            if changed:
                raise OtherRunError(
                    f"{self.path} holds another run: {'; '.join(changed)}. Give this one a "
                    "`method` of its own, or move the folder away"
                )
            return
        document = config.to_dict()
        del document["device"]  # of this start; another may be on another machine
        with atomic(self / "config.yaml") as file:
            file.write(yaml.safe_dump(document, sort_keys=False).encode())

    # ---- what is in it ----

    def config(self) -> RunConfig:
        """Raises ConfigError where there is no run, or one that this version cannot read."""
        if not (self / "config.yaml").exists():
            raise ConfigError(f"{self.path} holds no run: it has no config.yaml")
        return RunConfig.parse(read_yaml(self / "config.yaml"))

    def status(self) -> dict[str, Any]:
        """``{}`` before the first start."""
        return self.read_json("status.json")

    def finished(self) -> bool:
        return self.status().get("state") == "finished"

    def read_json(self, name: str) -> dict[str, Any]:
        """``{}`` where there is no such file."""
        try:
            return json.loads((self / name).read_text())
        except FileNotFoundError:
            return {}

    def rows(self) -> list[dict[str, Any]]:
        """The metrics, one row per epoch. A last line that a kill cut short is no row."""
        try:
            lines = (self / "metrics.jsonl").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def load(self, name: str) -> Any:
        """A ``.pt`` file on the CPU, tensors and plain containers only (``weights_only``)."""
        import torch

        try:
            return torch.load(self / name, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.path} has no {name}: the run has not got so far; start it again to go on"
            ) from None

    # ---- writing, inside claim() ----

    def write_status(self, **changes: Any) -> None:
        write_json(self / "status.json", {**self.status(), **changes})

    def save(self, name: str, value: Any) -> None:
        import torch

        with atomic(self / name) as file:
            torch.save(value, file)

    def append(self, row: dict[str, Any]) -> None:
        with open(self / "metrics.jsonl", "a") as file:
            file.write(json.dumps(_plain(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def cut(self, count: int) -> None:
        """Back to the first ``count`` rows: those after them are of epochs to be run again."""
        rows = self.rows()
        if len(rows) < count:
            raise RuntimeError(
                f"{self / 'metrics.jsonl'} has {len(rows)} rows and checkpoint.pt goes on from "
                f"{count}: rows were deleted. Delete checkpoint.pt too, to train from the start"
            )
        with atomic(self / "metrics.jsonl") as file:
            file.write("".join(json.dumps(_plain(row)) + "\n" for row in rows[:count]).encode())
