"""Text: the bundled docstrings, GLUE's archives, BERT on both, its padding left out of SES."""

import math
import zipfile

import pytest
import torch

from ses_kernels import effective_rank
from ses_lab import build, data, measure, optim, training
from ses_lab.config import ConfigError, RunConfig, merge
from ses_lab.data.text import PACKAGES
from ses_lab.folder import RunFolder

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32}  # fmt: skip
TINY = {"dataset": {"name": "docstrings", "samples": 64, "length": 12, "vocabulary": 300},
        "model": {"name": "transformers:BertForSequenceClassification", **SMALL},
        "optimizer": {"name": "adamw", "lr": 1e-3}, "schedule": "linear",
        "epochs": 1, "batch_size": 32}  # fmt: skip


# ---- data ----


@pytest.fixture(scope="module")
def docstrings():
    return data.load("docstrings", length=16, vocabulary=500)


def test_docstrings_are_labelled_and_the_same_again(docstrings):
    train, test = docstrings.train, docstrings.test
    assert docstrings.classes == PACKAGES
    assert len(train.labels) > 800
    assert (train.labels.bincount(minlength=8) > 10).all()
    assert len(test.labels) / (len(train.labels) + len(test.labels)) == pytest.approx(
        0.25, abs=0.01
    )
    for split in (train, test):
        ids, segments = split.images.unbind(1)
        assert ids.shape[1] == 16
        assert (ids[:, 0] == 2).all()  # [CLS]
        assert ((ids == 3).sum(1) == 1).all()  # [SEP], and padding behind it
        ends = (ids == 3).int().argmax(1, keepdim=True)
        assert ((torch.arange(16) > ends) == (ids == 0)).all()
        assert ids.max() < docstrings.vocabulary == 500
        assert not segments.any()
    again = data.load("docstrings", length=16, vocabulary=500)
    assert torch.equal(again.train.images, train.images)
    assert torch.equal(again.test.labels, test.labels)


def test_frequent_words_have_the_small_ids(docstrings):
    ids = docstrings.train.images[:, 0]
    counts = ids[ids > 3].bincount(minlength=500)
    assert counts[4:14].min() > 5 * counts[490:].max()
    assert 0 < (ids == 1).float().mean() < 0.5  # unknown words


def test_docstrings_of_nothing():
    with pytest.raises(ValueError, match="need length >= 3 and vocabulary > 4, got 2 and 300"):
        data.load("docstrings", length=2, vocabulary=300)


@pytest.fixture
def glue(tmp_path):
    """MRPC as a folder, SST-2 as a ZIP, a tokenizer, and a model to start from."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", '"', "a"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "bert" / "vocab.txt")).save_pretrained(
        tmp_path / "bert"
    )
    (tmp_path / "MRPC").mkdir()
    head = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    for name in ("train", "dev"):
        (tmp_path / "MRPC" / f"{name}.tsv").write_text(
            "\ufeff" + head + '1\t7\t8\tgood "film\tbad\n0\t7\t9\ta\tfilm film film\n' * 4
        )
    with zipfile.ZipFile(tmp_path / "SST-2.zip", "w") as archive:
        for name in ("train", "dev"):
            archive.writestr(f"SST-2/{name}.tsv", "sentence\tlabel\ngood film\t1\nbad film a\t0\n")
    return tmp_path


def test_glue_from_a_folder_and_from_a_zip(glue):
    pairs = data.load("mrpc", root=glue, tokenizer="bert")
    assert pairs.train.images[0].tolist() == [[2, 5, 8, 7, 3, 6, 3], [0, 0, 0, 0, 0, 1, 1]]
    assert pairs.train.images[1].tolist() == [[2, 9, 3, 7, 7, 7, 3], [0, 0, 0, 1, 1, 1, 1]]
    assert pairs.test.labels.tolist() == [1, 0] * 4
    single = data.load("sst2", root=glue, tokenizer=str(glue / "bert"), length=4)
    assert single.train.images[:, 0].tolist() == [[2, 5, 7, 3], [2, 6, 7, 3]]
    assert (single.classes, single.vocabulary) == (("negative", "positive"), 10)


def test_glue_says_what_is_missing(glue):
    with pytest.raises(FileNotFoundError, match="tokenizer: there is no folder nowhere"):
        data.load("mrpc", root=glue, tokenizer="nowhere")
    with pytest.raises(ValueError, match=r"sst2 is not fetched: put SST-2/ or SST-2\.zip"):
        data.load("sst2", root=glue, tokenizer="bert", download=True)
    (glue / "MRPC" / "dev.tsv").write_text("Quality\t#1 String\n1\ta\n")
    with pytest.raises(ValueError, match=r"MRPC/dev\.tsv has no column '#2 String'"):
        data.load("mrpc", root=glue, tokenizer="bert")
    (glue / "MRPC" / "dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither .*dev\.tsv nor .*MRPC\.zip"):
        data.load("mrpc", root=glue, tokenizer="bert")


# ---- models and runs ----


@pytest.mark.filterwarnings("ignore:SESRegularizer")
def test_padding_counts_in_nothing(tmp_path):
    """Neither in the logits nor in the entropies: longer padding gives the same."""
    config = RunConfig.parse(merge(TINY, {"regularizer.ses": {"beta": 0.5}}))
    dataset, _ = build.dataset(config)
    model = build.model(config, dataset)
    short = dataset.train.images[:24]
    long = torch.nn.functional.pad(short, (0, 9))
    torch.testing.assert_close(model.eval()(long), model(short), rtol=1e-4, atol=1e-5)
    found = []
    for module in model.modules():
        module.training = not isinstance(module, torch.nn.Dropout)
    with build.regularizer(config, model, steps=1) as ses:
        for x in (short, long):
            model(x)
            ses.loss()
            found.append(ses.entropies)
    assert found[0].keys() == {"bert.encoder.layer.0", "bert.encoder.layer.1"}
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    hidden = model.model.bert(
        input_ids=short[:, 0], attention_mask=(short[:, 0] != 0).long()
    ).last_hidden_state
    mask = (short[:, 0] != 0)[..., None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    expected = math.log(effective_rank(pooled).item())
    assert found[0]["bert.encoder.layer.1"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.filterwarnings("ignore:SESRegularizer")
def test_a_run_on_text(tmp_path):
    changes = {"regularizer.ses": {"beta": 0.5}, "rank_samples": 32, "precision": "bf16"}
    row = training.run(RunConfig.parse(merge(TINY, changes)), tmp_path)
    assert row["rank"].keys() == row["entropy"].keys() == {
        "bert.encoder.layer.0", "bert.encoder.layer.1"
    }  # fmt: skip
    assert row["test_per_class"].keys() == set(PACKAGES)
    assert measure.evaluate(tmp_path)["test_loss"] == pytest.approx(row["test_loss"])


def test_a_run_from_a_folder_of_weights(glue, tmp_path):
    words = transformers.BertConfig(vocab_size=10, **SMALL)
    start = transformers.BertForSequenceClassification(words)
    start.save_pretrained(glue / "bert")
    document = {
        **TINY,
        "dataset": {"name": "mrpc", "root": str(glue), "tokenizer": "bert"},
        "model": {"name": TINY["model"]["name"], "pretrained": str(glue / "bert")},
        "optimizer": {"name": "adamw", "lr": 1e-9},
        "batch_size": 8,
    }
    training.run(RunConfig.parse(document), tmp_path / "run")
    theirs, ours = start.state_dict(), build.trained(tmp_path / "run").model.state_dict()
    for name, value in theirs.items():
        if name.startswith("bert."):
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)
    assert RunFolder(tmp_path / "run").finished()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augmentation": ["mixup"]}, "augmentation: there is none for text"),
        ({"regime": "adversarial"}, "regime: adversarial is for images, and this is text"),
        ({"model": {"name": "vit_tiny"}}, "text needs a model of transformers"),
        ({"model.pretrained": "nowhere"}, "pretrained: there is no folder nowhere"),
    ],
)
def test_what_text_cannot_have(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        training.run(RunConfig.parse(merge(TINY, changes)), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_linear_decay():
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = optim.schedule("linear", sgd, 6, warmup=2, least=0.2)
    rates = []
    for _ in range(7):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    assert rates == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2])
