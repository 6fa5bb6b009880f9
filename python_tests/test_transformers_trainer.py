"""SESTrainer on a ViT and a BERT of transformers, tiny and from random weights, on the CPU."""

import contextlib
import copy
import gc
import json
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import transformers as hf

from ses_kernels import SESRegularizer
from ses_kernels.integrations.transformers import SESTrainer, SESTrainerMixin

BETA, LAMBDA, WIDTH, BATCH = 0.7, 0.5, 16, 32
SES = {"beta": BETA, "lambda_ses": LAMBDA}


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """Every train() collects garbage; without the imported modules that takes no time."""
    gc.freeze()
    yield
    gc.unfreeze()


SIZES = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3,
    "intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def vit():
    torch.manual_seed(0)
    config = hf.ViTConfig(image_size=8, patch_size=4, num_channels=1, **SIZES)
    return hf.ViTForImageClassification(config)


def bert():
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=50, max_position_embeddings=12, **SIZES)
    return hf.BertForSequenceClassification(config)


def data(model, batches=4):
    g = torch.Generator().manual_seed(1)
    n = batches * BATCH
    labels = torch.randint(3, (n,), generator=g)
    if isinstance(model, hf.ViTForImageClassification):
        inputs = {"pixel_values": torch.randn(n, 1, 8, 8, generator=g)}
    else:
        inputs = {"input_ids": torch.randint(50, (n, 12), generator=g)}
    return [{k: v[i] for k, v in {**inputs, "labels": labels}.items()} for i in range(n)]


class Recorded:
    """A Trainer that remembers what it optimises, beside features seen by hooks of the test."""

    processes = 1

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses, self.features, self.inputs, self.gradients = [], [], [], []
        backward = self.accelerator.backward

        def recorded(loss, **options):
            self.losses.append(loss.item())
            backward(loss, **options)

        self.accelerator.backward = recorded
        hook(self.model, self.features)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.inputs.append(dict(inputs))
        with mock.patch.object(type(self.accelerator), "num_processes", self.processes):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _clip_grad_norm(self, model):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})

    def penalties(self, beta=None):
        steps = range(0, len(self.features), 2)
        return [penalty(self.features[i : i + 2], beta or BETA).item() for i in steps]


class Plain(Recorded, hf.Trainer):
    pass


class Shaped(Recorded, SESTrainerMixin, hf.Trainer):
    pass


# Both blocks: what SESRegularizer chooses for these models.
LAYERS = {"vit.layers.0", "vit.layers.1", "bert.encoder.layer.0", "bert.encoder.layer.1"}


def hook(model, features):
    """Appends the outputs of those layers in training."""

    def capture(layer, inputs, output):
        if layer.training:
            features.append(output[0] if isinstance(output, tuple) else output)

    return [m.register_forward_hook(capture) for n, m in model.named_modules() if n in LAYERS]


def entropy(tokens):
    """nats, by svdvals in float64, of features averaged over tokens."""
    x = tokens.double().mean(1)
    s = torch.linalg.svdvals(x - x.mean(0))
    p = s[s > 1e-9 * s[0]] ** 2 / (s**2).sum()
    return -(p * p.log()).sum()


def penalty(features, beta=BETA):
    return LAMBDA * sum((entropy(f) - beta * math.log(WIDTH)) ** 2 for f in features)


def trainer(tmp_path, model, kind=Shaped, *, ses=SES, model_init=None, func=None, **options):
    options = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", **options}
    args = hf.TrainingArguments(
        tmp_path, per_device_train_batch_size=BATCH, use_cpu=True, report_to=[], optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", disable_tqdm=True, **options,
    )  # fmt: skip
    examples = data(model or model_init())
    return kind(
        model, args, train_dataset=examples, eval_dataset=examples[:BATCH], model_init=model_init,
        compute_loss_func=func, **({"ses_kwargs": ses} if kind is not Plain else {}),
    )  # fmt: skip


def plain_and_shaped(tmp_path, make, **options):
    """The same steps without and with the penalty."""
    return [trainer(tmp_path, make(), kind, **options) for kind in (Plain, Shaped)]


def mean_over_all(outputs, labels, num_items_in_batch=None):
    total = F.cross_entropy(outputs["logits"], labels, reduction="sum")
    return total / (num_items_in_batch or len(labels))


# Each with what it sets on the Trainer.
SCALINGS = {
    "by default": ({}, {}),
    "normalised by the model": ({}, {"model_accepts_loss_kwargs": True}),
    "over two ranks": (
        {"average_tokens_across_devices": True},
        {"model_accepts_loss_kwargs": True, "processes": 2},
    ),
    "normalised by a function": ({"func": mean_over_all}, {"model_accepts_loss_kwargs": False}),
    "label smoothing": ({"label_smoothing_factor": 0.1}, {}),
    "declared scaled": ({}, {"loss_is_scaled_for_ga": True}),
    "declared a mean": ({}, {"model_accepts_loss_kwargs": True, "loss_is_scaled_for_ga": False}),
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_penalty_is_the_mean_however_the_task_is_scaled(tmp_path, scaling):
    options, attributes = SCALINGS[scaling]
    both = plain_and_shaped(tmp_path, vit, gradient_accumulation_steps=2, **options)
    for each in both:
        for name, value in attributes.items():
            setattr(each, name, value)
        each.train()
    plain, shaped = both
    expected = [t + p / 2 for t, p in zip(plain.losses, plain.penalties(), strict=True)]
    assert len(expected) == 2
    assert shaped.losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", [vit, bert])
def test_gradient_is_that_of_task_plus_penalty(tmp_path, make):
    plain, shaped = plain_and_shaped(tmp_path, make, gradient_accumulation_steps=2)
    model = copy.deepcopy(plain.model).double().train()
    plain.train()
    shaped.train()
    features = []
    hook(model, features)
    for inputs in plain.inputs:
        features.clear()
        model(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
        (penalty(features) / 2).backward()
    wrong, size = 0.0, 0.0
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        added = shaped.gradients[0][name] - plain.gradients[0][name]
        wrong += (added - expected).norm().item() ** 2
        size += expected.norm().item() ** 2
    assert wrong < 1e-8 * size  # 1e-4 in norm, after a difference of two float32 gradients


def test_bfloat16_and_compiled(tmp_path):
    plain, half = plain_and_shaped(tmp_path, bert, bf16=True)
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    compiled = trainer(tmp_path, bert(), bf16=True, **options)
    for each in (plain, half, compiled):
        each.train()
    expected = [plain.losses[0] + plain.penalties()[0]]
    assert half.losses == pytest.approx(expected, rel=1e-5)
    assert compiled.losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("make", [vit, bert])
def test_entropies_move_to_the_target(tmp_path, make):
    beta = 0.4  # far from where blocks begin
    ses = {**SES, "beta": beta}
    plain, shaped = plain_and_shaped(tmp_path, make, max_steps=24, ses=ses)
    plain.train()
    shaped.train()
    start, without, with_ses = (*plain.penalties(beta)[::23], shaped.penalties(beta)[-1])
    assert with_ses < 0.5 * min(start, without)


def test_a_subclass_that_asks_for_outputs(tmp_path):
    class WithOutputs(SESTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            task = F.cross_entropy(outputs["logits"], inputs["labels"])
            assert (loss - task).item() == pytest.approx(penalty(features).item(), rel=1e-4)
            return (loss, outputs) if return_outputs else loss

    model, features = vit(), []
    hook(model, features)
    trainer(tmp_path, model, WithOutputs).train()


def test_evaluation_has_no_penalty_and_counts_no_step(tmp_path):
    options = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(tmp_path, vit(), SESTrainer, max_steps=3, **options)
    run.train()
    assert run.regularizer.step == 3
    batch = hf.default_data_collator(run.eval_dataset)
    with torch.no_grad():
        task = F.cross_entropy(run.model(batch["pixel_values"]).logits, batch["labels"])
    rows = [row for row in run.state.log_history if "eval_loss" in row]
    assert len(rows) == 4
    assert rows[-1]["eval_loss"] == pytest.approx(task.item(), rel=1e-5)
    assert not any(key.startswith("ses/") for row in rows for key in row)


@pytest.mark.parametrize("restore", [False, True])
def test_resumes_bitwise_with_the_step(tmp_path, restore):
    options = {
        "ses": {**SES, "every_k": 3}, "max_steps": 4, "gradient_accumulation_steps": 2,
        "save_strategy": "steps", "save_steps": 2,
        "restore_callback_states_from_checkpoint": restore,
    }  # fmt: skip
    whole, resumed = (trainer(tmp_path, bert(), **options) for _ in range(2))
    whole.train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["SESRegularizer"]["attributes"]["step"] == 4
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.regularizer.step == 8
    assert resumed.losses == whole.losses[4:]
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    resumed.args.max_steps = 1
    resumed.train()  # a new run starts at 0
    assert resumed.regularizer.step == 2


def is_hooked(model):
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_gone_after_training(tmp_path, fails):
    class Stop(hf.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            assert is_hooked(model)
            if fails:
                raise ZeroDivisionError

    run = trainer(tmp_path, None, SESTrainer, model_init=vit)
    run.add_callback(Stop)
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        run.train()
    assert not is_hooked(run.model)
    assert len(run.regularizer.entropies) == 2  # still to be read


def test_logs_at_logging_steps_only(tmp_path, monkeypatch):
    read = []
    measure = SESRegularizer.entropies.fget
    monkeypatch.setattr(
        SESRegularizer, "entropies", property(lambda self: read.append(1) or measure(self))
    )
    run = trainer(tmp_path, vit(), max_steps=8, logging_steps=3)
    run.train()
    assert len(read) == 2  # steps 3 and 6
    rows = [row for row in run.state.log_history if "ses/loss" in row]
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        step = row["step"]
        assert row["ses/loss"] == pytest.approx(run.penalties()[step - 1], rel=1e-4)
        expected = {
            f"ses/H/{name}": pytest.approx(entropy(x).item(), rel=1e-4)
            for name, x in zip(
                run.regularizer.layers, run.features[2 * step - 2 : 2 * step], strict=True
            )
        }
        assert {k: v for k, v in row.items() if k.startswith("ses/H/")} == expected


def test_a_compute_loss_that_forgets_the_penalty_is_an_error(tmp_path):
    class Forgets(SESTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    with pytest.raises(RuntimeError, match=r"Forgets.compute_loss never calls.*super\(\)"):
        trainer(tmp_path, vit(), Forgets).train()


def test_padding_is_not_pooled(tmp_path):
    """The attention mask of the batch reaches the penalty."""
    run = trainer(tmp_path, bert(), SESTrainer)
    for i, example in enumerate(run.train_dataset):
        example["attention_mask"] = (torch.arange(12) <= i % 12).long()
    kept = []
    layer = run.model.bert.encoder.layer[1]
    layer.register_forward_hook(lambda m, args, output: kept.append(output))
    run.train()
    mask = torch.stack([run.train_dataset[i]["attention_mask"] for i in range(BATCH)])
    assert "attention_mask" in run.regularizer.summary()
    output = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    lengths = sorted(mask.sum(1).tolist())
    assert output.shape[1] == 12
    assert lengths[0] == 1
    unmasked = entropy(output.detach()).item()
    assert abs(run.regularizer.entropies["bert.encoder.layer.1"] - unmasked) > 1e-3


def test_refuses_data_parallel(tmp_path):
    run = trainer(tmp_path, vit(), SESTrainer)
    run.args._n_gpu = 2
    with pytest.raises(RuntimeError, match=r"nn.DataParallel.*torchrun"):
        run.train()
