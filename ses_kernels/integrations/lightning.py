"""Spectral Entropy Shaping as a Lightning callback."""

import functools
import inspect
from collections.abc import Mapping
from contextlib import ExitStack

import torch

from ses_kernels.regularizer import SESRegularizer

try:
    from lightning.pytorch import Callback
except ImportError:  # the same library under its older name
    from pytorch_lightning import Callback


class SESCallback(Callback):
    """Adds the penalty of a :class:`SESRegularizer` to the loss that ``training_step`` returns:

        trainer = Trainer(callbacks=[SESCallback(beta=0.7, lambda_ses=0.01, hook_last_n=3)])

    Args:
        sync_dist: entropies of the global batch, over all ranks. (``process_group=`` wants a group
            that Lightning makes only when ``fit`` starts.)
        **options: those of :class:`SESRegularizer`. Layers have the names that they have in
            ``pl_module.named_modules()``.

    Raises:
        ValueError: from ``fit``, with ``automatic_optimization=False``: such a ``training_step``
            calls ``backward`` itself, and has to add ``SESRegularizer.loss()`` itself.

    From ``fit`` on, ``regularizer`` is the :class:`SESRegularizer`; it and the wrapper around
    ``training_step`` act until ``fit`` ends or fails. With ``accumulate_grad_batches`` the penalty
    is the mean over the micro-batches. A ``training_step`` that returns None counts no step. Every
    ``log_every_n_steps`` steps the penalty (``ses/loss``) and the entropies in nats
    (``ses/H/<layer>``) that were last measured are logged, each rank's own unless ``sync_dist``;
    other steps do not wait for the device. A checkpoint holds the step that ``every_k`` counts.
    """

    def __init__(self, *, sync_dist: bool = False, **options) -> None:
        self.regularizer: SESRegularizer | None = None
        self._sync_dist, self._options = sync_dist, options
        self._state: dict = {}  # of a checkpoint, which may be read before there is a regulariser
        self._undo = ExitStack()

    # Not in setup(): a module may build its layers in its own setup() or in configure_model(), and
    # both come after that of a callback.
    def on_fit_start(self, trainer, pl_module) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                "SESCallback needs automatic optimization, and "
                f"{type(pl_module).__name__}.automatic_optimization is False: make a "
                "SESRegularizer in the module and add its loss() before manual_backward()"
            )
        options = self._options
        if self._sync_dist and torch.distributed.is_initialized():
            options = {**options, "process_group": torch.distributed.group.WORLD}
        state = self.state_dict()
        self.regularizer = SESRegularizer(pl_module, **options)
        self._undo.callback(self.regularizer.close)
        if state:
            self.regularizer.load_state_dict(state)
        self._penalty = torch.zeros(())  # of the last measured step
        self._wrap(pl_module)

    def _wrap(self, pl_module) -> None:
        """Adds the penalty before anyone else sees the loss.

        Hooks come too late: at `on_before_backward` the loss is divided by the number of
        micro-batches and, under float16, scaled. As an attribute of the instance the wrapper also
        serves DDP and FSDP, which look `training_step` up inside their forward.
        """
        attributes = vars(pl_module)
        before = {k: v for k, v in attributes.items() if k == "training_step"}  # by torch.compile

        def unwrap():
            attributes.pop("training_step")
            attributes.update(before)

        attributes["training_step"] = _TrainingStep(self, pl_module, pl_module.training_step)
        self._undo.callback(unwrap)

    def _add_penalty(self, output):
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, torch.Tensor):
            return output  # None: the step is skipped; Lightning refuses everything else
        penalty = self.regularizer.loss()
        if self.regularizer.measured:
            self._penalty = penalty.detach()
        loss = loss + penalty
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        every = trainer.log_every_n_steps
        if not every or trainer.global_step % every:
            return
        entropies = self.regularizer.flat_entropies("ses/H/")
        if entropies:
            pl_module.log_dict({"ses/loss": self._penalty, **entropies})

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._undo.close()

    def teardown(self, trainer, pl_module, stage) -> None:
        self._undo.close()

    def state_dict(self) -> dict:
        return self.regularizer.state_dict() if self.regularizer else self._state

    def load_state_dict(self, state_dict) -> None:
        self._state = dict(state_dict)
        if self.regularizer:
            self.regularizer.load_state_dict(state_dict)


class _TrainingStep:
    """``training_step`` with the penalty; in a copy of the module, the copy's own."""

    def __init__(self, callback: SESCallback, pl_module, training_step) -> None:
        self._callback, self._module, self._step = callback, pl_module, training_step
        functools.update_wrapper(self, inspect.unwrap(training_step))  # Lightning reads the names

    def __call__(self, *args, **kwargs):
        self._callback.regularizer.begin()  # a step that returned None left its features
        return self._callback._add_penalty(self._step(*args, **kwargs))

    def __reduce__(self):
        return getattr, (self._module, "training_step")
