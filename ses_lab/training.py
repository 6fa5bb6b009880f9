"""The one training loop: :func:`run` trains a configuration in a folder, from wherever it is.

All randomness of a step is a function of (seed, epoch, batch, rank), so a checkpoint holds no
state of a generator, and what follows a resumption is bit for bit what would have followed. That
is on the same machine with as many threads; on CUDA, where PyTorch's kernels are deterministic.

An epoch ends with, in this order: a row of ``metrics.jsonl``, ``best.pt`` if it is, and the
checkpoint, which knows how many rows are its own. A kill in between repeats the epoch.

Under torchrun every rank takes its share of each batch: DistributedDataParallel averages the
gradients, SES takes the entropies of the global batch, batch norms see their rank's share. Rank 0
writes; all ranks read the folder.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import ses_kernels
from ses_lab import build, spectra
from ses_lab.config import RunConfig
from ses_lab.curves import DPI, curves
from ses_lab.engine import Ranks, Training, peak_memory, ranks
from ses_lab.folder import RunFolder, atomic, write_json
from ses_lab.sinks import Sink, connect


class DivergedError(FloatingPointError):
    """The training loss is no longer finite."""


def run(config: RunConfig, folder: str | os.PathLike, sinks: Sequence[Sink] = ()) -> dict[str, Any]:
    """Trains ``config`` in ``folder``, from its checkpoint if there is one; the last metrics.

    A finished run is left as it is. Call it in every process under torchrun.

    Args:
        folder: of this one run, ``root / config.path`` by convention.
        sinks: told of every step and every epoch, in rank 0, like those of ``config.sinks``.

    Raises:
        ConfigError: the configuration does not fit its data and model, or a sink is not there; the
            folder stays free.
        FolderInUseError, OtherRunError: see :meth:`RunFolder.claim`.
        DivergedError: the loss is no longer finite. Like any other error it leaves the state
            "failed", and a later start goes on from the last checkpoint.
    """
    folder, here = RunFolder(folder), ranks(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_deterministic(here.device))
        # Before the folder is claimed: a configuration that fits no model does not stay in it.
        training = None if folder.finished() else Training(config, here)
        refused: Exception | None = None
        if here.main:
            try:
                ours = connect(config.sinks) if training is not None else []
                stack.enter_context(folder.claim(config))
            except Exception as error:
                refused = error
        if refused := here.share(refused):
            raise refused
        if here.share(folder.finished()):
            return folder.rows()[-1]
        try:
            return _train(training, folder, here, [*ours, *sinks] if here.main else ())
        except BaseException as error:
            if here.main:
                state = "failed" if isinstance(error, Exception) else "interrupted"
                folder.write_status(state=state, error=traceback.format_exc())
            raise


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """The caller's generators stay as they are; on CUDA, deterministic kernels where there are."""
    if device.type != "cuda":
        with torch.random.fork_rng(devices=[]):
            yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not without it
    mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    with torch.random.fork_rng(devices=[device]):
        try:
            torch.set_deterministic_debug_mode("warn")
            torch.backends.cudnn.benchmark = False
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            torch.backends.cudnn.benchmark = benchmark


def _train(
    training: Training, folder: RunFolder, here: Ranks, sinks: Sequence[Sink]
) -> dict[str, Any]:
    config = training.config
    done, best = 0, None
    if (folder / "checkpoint.pt").exists():
        state = folder.load("checkpoint.pt")
        training.load_state_dict(state)
        done, best = state["epoch"], state["best"]
    else:
        training.regime.train()
        order = training.order(0)
        training.regime.prepare(training.batch(indices)[0] for indices in order)
    training.start()
    rows = folder.rows()[:done]
    if here.main:
        folder.cut(done)
        folder.write_status(
            state="running", error=None, epoch=done, epochs=config.epochs, best=best,
            pid=os.getpid(), host=socket.gethostname(), ranks=here.world, device=str(here.device),
            threads=torch.get_num_threads(), torch=torch.__version__,
            ses_kernels=ses_kernels.__version__,
        )  # fmt: skip
    patience = config.patience or config.epochs

    def ended(epoch: int) -> bool:
        return epoch == config.epochs or (best is not None and epoch - best["epoch"] >= patience)

    per_epoch = training.batches * training.regime.replays
    with contextlib.ExitStack() as stack:
        for sink in sinks:
            sink.start(config, folder.path, rows, per_epoch * training.batch_size)
            stack.callback(lambda sink=sink: sink.close(ended(len(rows))))
        for epoch in range(done + 1, config.epochs + 1):
            if ended(epoch - 1):
                break
            began = time.perf_counter()
            row = {"epoch": epoch, "step": epoch * per_epoch}
            row["lr"] = training.optimizer.param_groups[-1]["lr"]
            row |= training.epoch(epoch, sinks)
            row["seconds"] = time.perf_counter() - began  # of training alone
            if not math.isfinite(row["train_loss"]):
                raise DivergedError(
                    f"the training loss is {row['train_loss']} in epoch {epoch}: lower the "
                    "learning rate, warm up or clip"
                )
            row |= {f"test_{k}": v for k, v in training.evaluate(training.test).items()}
            if training.validation is not None:
                held_out = training.evaluate(training.validation)
                row |= {f"val_{k}": v for k, v in held_out.items()}
            if config.rank_samples is not None and here.main:
                row |= training.effective_ranks(epoch)
            best = _best(training, row, best)
            last = ended(epoch)
            if config.probe_every and here.main and (last or epoch % config.probe_every == 0):
                row["probes"] = training.probe()
            rows.append(row)
            if here.main:
                _commit(folder, training, rows, best, last)
            for sink in sinks:
                sink.log(row)
    if here.main:
        figure = curves(rows, config.objective)
        with atomic(folder / "curves.png") as file:
            figure.savefig(file, format="png", dpi=DPI)
        folder.write_status(state="finished")
    return here.share(rows[-1])


def _best(training: Training, row: dict[str, Any], best: dict[str, Any] | None) -> dict[str, Any]:
    """The best epoch so far, by accuracy, or by loss where there is none; the first of equals."""
    split = "test" if training.validation is None else "val"
    value = row.get(f"{split}_accuracy", -row[f"{split}_loss"])
    value = -math.inf if math.isnan(value) else value
    if best is None or value > best["value"]:
        return {"epoch": row["epoch"], "value": value}
    return best


def _commit(
    folder: RunFolder,
    training: Training,
    rows: list[dict[str, Any]],
    best: dict[str, Any],
    last: bool,
) -> None:
    """The end of an epoch on the disk."""
    config, row = training.config, rows[-1]
    epoch = row["epoch"]
    if last or (config.spectra_every and epoch % config.spectra_every == 0):
        (folder / "spectra").mkdir(exist_ok=True)
        write_json(folder / f"spectra/{epoch:04d}.json", spectra.table(training.model))
        with atomic(folder / f"spectra/{epoch:04d}.npz") as file:
            spectra.save(file, training.model)
    folder.append(row)
    if best["epoch"] == epoch:
        folder.save("best.pt", {**build.weights(training.regime), "epoch": epoch})
    folder.save("checkpoint.pt", {**training.state_dict(), "epoch": epoch, "best": best})
    memory = max(folder.status().get("peak_memory", 0), peak_memory(training.ranks.device))
    folder.write_status(epoch=epoch, best=best, last=row, peak_memory=memory)
