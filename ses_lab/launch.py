"""Many runs through an existing scheduler: processes of this machine, or Slurm, by submitit.

Each run is a job of its own, in its own folder. The folders are the state: what failed or was
preempted keeps its checkpoint, and the same launch again goes on with whatever is not finished.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from ses_lab.config import RunConfig
from ses_lab.folder import RunFolder
from ses_lab.names import ConfigError


class _Job:
    """What the scheduler runs; pickled, so imports of torch happen over there."""

    def __call__(self, config: dict[str, Any], folder: str) -> None:
        from ses_lab import training

        if submitit.JobEnvironment().num_tasks > 1:
            # Every rank sees all GPUs of its node and takes the one of its LOCAL_RANK.
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        training.run(RunConfig.parse(config), folder)

    def checkpoint(self, config: dict[str, Any], folder: str) -> DelayedSubmission:
        """Preempted, or out of time: queue again, to go on from the last epoch."""
        return DelayedSubmission(self, config, folder)


def launch(
    runs: Mapping[Path, RunConfig],
    *,
    logs: Path,
    cluster: str = "local",
    limit: int = 2,
    devices: Sequence[str] = (),
    poll: float = 1.0,
    **parameters: Any,
) -> dict[Path, str]:
    """Runs that are not finished, at most ``limit`` in the queue at once; folder -> what failed.

    Returns when none is left. ``{}`` says that all are finished. A run whose teacher, or start, is
    another one of them waits for it, and fails with it.

    Raises:
        ConfigError: submitit knows no such cluster or parameter, or the machine has no scheduler.

    Args:
        logs: folder for the output of the jobs.
        cluster: "local" or "slurm".
        devices: one run at a time on each of these, ``["cuda:0", "cuda:1"]``, whatever ``limit``.
        poll: seconds between looks at the queue.
        parameters: of ``submitit.AutoExecutor.update_parameters``: ``timeout_min``,
            ``tasks_per_node`` (ranks of one run), ``slurm_partition``, ...
    """
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
        executor.update_parameters(**{"timeout_min": 24 * 60, **parameters})
    except (ValueError, NameError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"cluster {cluster}: {error}") from error
    free = list(devices) or ["auto"] * limit
    waiting = {path: config for path, config in runs.items() if not RunFolder(path).finished()}
    queued: list[tuple[submitit.Job, Path, str]] = []
    failed: dict[Path, str] = {}
    try:
        while waiting or queued:
            for path, config in list(waiting.items()):
                sources = {Path(s.run) for s in (config.teacher, config.init_from) if s}
                if lost := sources & failed.keys():
                    del waiting[path]
                    failed[path] = f"{lost.pop()} failed, which it starts from"
                elif free and not sources & {*waiting, *(other for _, other, _ in queued)}:
                    del waiting[path]
                    device = free.pop()
                    document = config.to_dict()
                    if devices:
                        document["device"] = device
                    queued.append((executor.submit(_Job(), document, str(path)), path, device))
            time.sleep(poll)
            for entry in [entry for entry in queued if entry[0].done()]:
                job, path, device = entry
                queued.remove(entry)
                free.append(device)
                if not RunFolder(path).finished():
                    failed[path] = str(job.exception() or "ended without an error").strip()
    except BaseException:
        for job, _, _ in queued:
            job.cancel()
        raise
    return failed
