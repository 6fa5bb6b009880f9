"""Spectral Entropy Shaping in the Trainer of Hugging Face transformers."""

import torch
from transformers import Trainer

from ses_kernels.regularizer import SESRegularizer


class SESTrainerMixin:
    """Adds the penalty of a :class:`SESRegularizer` in ``compute_loss``, in training only:

        class MyTrainer(SESTrainerMixin, Trainer): ...

        trainer = MyTrainer(model, args, ..., ses_kwargs={"beta": 0.7, "lambda_ses": 0.01})

    Args:
        ses_kwargs: options of :class:`SESRegularizer`; the others are those of the Trainer. Layers
            have the names that they have in ``model.named_modules()``.

    Raises:
        RuntimeError: from ``train``, under nn.DataParallel, which a Trainer chooses where it sees
            several GPUs and one process; and where a ``compute_loss`` of a subclass does not call
            ``super().compute_loss()``, so that there is no penalty.

    ``regularizer`` is the :class:`SESRegularizer` of the last ``train``, closed when it ends or
    fails. The penalty is the mean over the micro-batches of gradient accumulation and, by DDP or
    FSDP, over the ranks, whichever way the Trainer scales the task's loss. At logging steps alone
    the penalty (``ses/loss``) and the entropies in nats (``ses/H/<layer>``) of the last measured
    micro-batch are read and logged, those of the first rank; the Trainer's ``loss`` has the penalty
    in it, ``eval_loss`` has not. A checkpoint holds the step that ``every_k`` counts.
    """

    def __init__(self, *args, ses_kwargs: dict | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.ses_kwargs = dict(ses_kwargs or {})
        self.regularizer: SESRegularizer | None = None

    def train(self, *args, **kwargs):
        self.regularizer = None
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.regularizer is not None:
                self.regularizer.close()

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        if self.regularizer is None:
            raise RuntimeError(
                f"{type(self).__name__}.compute_loss never calls that of SESTrainer, and there is "
                "no penalty: begin it with super().compute_loss(...), or make a SESRegularizer and "
                "add its loss() there"
            )
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        training = self.is_in_train and model.training
        if training and self.regularizer is None:
            self._attach()
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not training:
            return result
        penalty = self.regularizer.loss()
        if self.regularizer.measured:
            self._penalty = penalty.detach()
        # Saved in trainer_state.json and there again after a resume, whatever the callbacks are.
        self.state.stateful_callbacks["SESRegularizer"] = {
            "args": {},
            "attributes": self.regularizer.state_dict(),
        }
        if self._is_scaled(num_items_in_batch):
            penalty = penalty / self.current_gradient_accumulation_steps
        return (result[0] + penalty, result[1]) if return_outputs else result + penalty

    def log(self, logs, *args, **kwargs):
        # "loss" marks what the training loop logs, at logging steps.
        if self.regularizer is not None and "loss" in logs:
            entropies = self.regularizer.flat_entropies("ses/H/")
            if entropies:
                logs.update({"ses/loss": self._penalty.item(), **entropies})
        super().log(logs, *args, **kwargs)

    def _attach(self) -> None:
        """At the first step: `model_init` and the checkpoint have done their part by then."""
        if self.args.n_gpu > 1:
            raise RuntimeError(
                f"{type(self).__name__} does not run under nn.DataParallel (args.n_gpu is "
                f"{self.args.n_gpu}): start one process per GPU with torchrun, or show it one GPU "
                "with CUDA_VISIBLE_DEVICES"
            )
        self.regularizer = SESRegularizer(self.model, **self.ses_kwargs)
        self._penalty = torch.zeros(())  # of the last measured step
        saved = self.state.stateful_callbacks.get("SESRegularizer")
        if saved is not None:
            self.regularizer.load_state_dict(saved["attributes"])

    def _is_scaled(self, num_items_in_batch) -> bool:
        """Whether training_step takes the loss as it is, or divides it by the micro-batches."""
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return declared
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None


class SESTrainer(SESTrainerMixin, Trainer):
    """The Trainer of transformers with the penalty: see :class:`SESTrainerMixin`."""
