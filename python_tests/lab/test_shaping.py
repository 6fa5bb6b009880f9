"""Terms and schedules of SES out of a file, in the steps of the run, also after a resumption."""

import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from ses_kernels import Term, schedules
from ses_lab import build, run_probes, training
from ses_lab.config import ConfigError, RunConfig, merge
from ses_lab.folder import RunFolder
from ses_lab.shaping import Length, options
from ses_lab.values import parse_yaml

TINY = {"dataset": {"name": "shapes", "preset": "trivial", "samples": 64, "size": 8},
        "model": {"name": "vit_tiny", "embed_dim": 12, "depth": 2, "heads": 2, "patch": 2,
                  "attention_weights": True},
        "epochs": 3, "batch_size": 32}  # fmt: skip


def parse(**ses):
    return RunConfig.parse(merge(TINY, {"regularizer.ses": ses}))


def test_epochs_become_steps():
    found = options(
        {
            "beta": {"a": {"schedule": "linear", "start": 0.9, "end": 0.3, "epochs": 2}, "*": 0.5},
            "alpha": {"schedule": "step", "values": [1, 2, 0], "epochs": [0.5, 20]},
            "lambda_ses": {"schedule": "cosine", "start": 0, "end": 0.1},
            "every_k": 3,
        },
        Length(epochs=50, steps=10),
        layers="blocks",
    )
    assert found == {
        "layers": "blocks",
        "beta": {"a": schedules.linear(0.9, 0.3, 20), "*": 0.5},
        "alpha": schedules.step([1, 2, 0], [5, 200]),
        "lambda_ses": schedules.cosine(0, 0.1, 500),
        "every_k": 3,
    }


def test_terms_are_mappings():
    beta = {"schedule": "linear", "start": 0.9, "end": 0.3, "epochs": 1}
    terms = [{"last": 2, "beta": beta}, {"layers": "heads", "alpha": 0.5, "pool": "tokens"}]
    found = options({"terms": terms, "beta": 0.4}, Length(2, 10), layers=("x",))
    assert found == {
        "beta": 0.4,
        "terms": [
            Term(("x",), 2, beta=schedules.linear(0.9, 0.3, 10)),
            Term("heads", alpha=0.5, pool="tokens"),
        ],
    }


def test_the_terms_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "lab.md").read_text()
    block = re.search(r"\n( {6}regularizer:\n(?: {8}.*\n)+)", text).group(1)
    document = parse_yaml(textwrap.dedent(block))
    config = RunConfig.parse(merge(TINY, document))
    model = build.model(config, build.dataset(config)[0])
    with build.regularizer(config, model, steps=10) as ses:
        assert ses.beta == {
            "blocks.0": schedules.linear(0.9, 0.3, 500),
            "blocks.1": schedules.linear(0.9, 0.3, 500),
            "blocks.0.attn:heads": 0.6,
            "blocks.1.attn:heads": 0.5,
            "blocks.0.attn:similarity": 0.95,
            "blocks.1.attn:similarity": 0.95,
            "blocks.0.attn:weights": 0.2,
            "blocks.1.attn:weights": 0.2,
        }


LINEAR = {"schedule": "linear", "start": 0.9, "end": 0.3}


@pytest.mark.parametrize(
    ("ses", "message"),
    [
        ({"beta": {**LINEAR, "schedule": "liner"}}, "'liner'; did you mean 'linear'"),
        ({"beta": {**LINEAR, "stop": 1}}, "regularizer.ses.beta: unknown parameter 'stop'"),
        ({"beta": {"schedule": "linear", "start": 0.9}}, "ses.beta: .*'end'"),
        ({"beta": {**LINEAR, "end": 1.2}}, "ses.beta: beta must be between 0 and 1, got 1.2"),
        ({"beta": {**LINEAR, "start": "x"}}, "ses.beta: .*'x'"),
        ({"beta": {**LINEAR, "epochs": 0}}, "ses.beta: epochs .* above 0, got 0"),
        ({"beta": {"a*": {**LINEAR, "epochs": "all"}}}, r"ses.beta.a\*: epochs .* got 'all'"),
        (
            {"beta": {"schedule": "step", "values": [0.3, 0.7], "epochs": []}},
            "ses.beta: step needs one value more",
        ),
        (
            {"beta": {"schedule": "step", "values": [0.3, 0.7, 1], "epochs": [1, 2]}},
            "ses.beta: beta must be between 0 and 1, got 1",
        ),
        ({"lambda_ses": {**LINEAR, "start": 1, "end": -1}}, "ses.lambda_ses: .*at least 0, got -1"),
        ({"lambda_ses": {"*": 0.1}}, "ses.lambda_ses: expected a number or a schedule, got"),
        ({"terms": "blocks"}, "ses.terms: expected a list of mappings, got 'blocks'"),
        ({"terms": [{"layer": "blocks"}]}, r"terms.0: .*'layer'; did you mean 'layers'"),
        ({"terms": [{"beta": {**LINEAR, "end": 2}}]}, "terms.0.beta: beta must be between"),
    ],
)
def test_refused_in_one_line(ses, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse(**ses)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ses", "message"),
    [
        ({"terms": [{"layers": "layer9*"}]}, "regularizer.ses: .*'layer9.*'"),
        ({"terms": [{}, {"layers": "blocks.1"}]}, "regularizer.ses: terms must be about different"),
        ({"terms": [{}], "hook_last_n": 2}, "regularizer.ses: terms= has layers and last"),
        ({"terms": []}, "regularizer.ses: terms must be one or more"),
        ({"terms": [{"last": 0}]}, "regularizer.ses: "),
        ({"beta": {"layer9": LINEAR}}, "regularizer.ses: beta: nothing matches 'layer9'"),
    ],
)
def test_what_the_model_refuses_leaves_no_folder(ses, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        training.run(parse(**ses), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_schedule_replaces_another_and_is_changed_by_key():
    ses = {"regularizer": {"ses": {"beta": LINEAR}}}
    merged = merge(ses, {"regularizer.ses.beta.epochs": 3})
    assert merged["regularizer"]["ses"]["beta"] == {**LINEAR, "epochs": 3}
    other = {"schedule": "step", "values": [0.3, 0.7], "epochs": [1]}
    assert merge(merged, {"regularizer.ses.beta": other})["regularizer"]["ses"]["beta"] == other
    # elsewhere a schedule is a key like any other
    document = {"base": {"schedule": "cosine", "epochs": 3}}
    assert merge(document, {"base.schedule": "onecycle"})["base"] == {
        "schedule": "onecycle", "epochs": 3
    }  # fmt: skip


class Stop(Exception):  # noqa: N818
    pass


class Sink:
    def start(self, *args):
        pass

    def advance(self, samples):
        pass

    def log(self, row):
        if row["epoch"] == 1:
            raise Stop

    def close(self, finished):
        pass


# 32 samples cannot have the rank that some of these layers should have.
@pytest.mark.filterwarnings("ignore:SESRegularizer")
def test_terms_and_schedules_train_and_go_on(tmp_path):
    """Blocks, heads and weights in one run, stopped after an epoch: the same to the last bit."""
    beta = {"schedule": "linear", "start": 0.9, "end": 0.3, "epochs": 2}
    terms = [{"layers": "blocks", "last": 1, "beta": beta}, {"layers": "heads", "last": 1},
             {"layers": "attention_weights", "beta": {"*": 0.2}, "alpha": 0.5}]  # fmt: skip
    config = parse(terms=terms, lambda_ses={"schedule": "step", "values": [1, 0], "epochs": [2]})
    training.run(config, tmp_path / "straight")
    with pytest.raises(Stop):
        training.run(config, tmp_path / "broken", [Sink()])
    training.run(config, tmp_path / "broken")
    rows, broken = (RunFolder(tmp_path / name).rows() for name in ("straight", "broken"))
    for row in (*rows, *broken):
        del row["seconds"]
    assert rows == broken
    weights, others = (build.trained(tmp_path / n).state_dict() for n in ("straight", "broken"))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    # The targets of the last of an epoch's two steps: 1, 3 and 5 of a line over four.
    unit = torch.tensor(12.0).log().item()
    found = [row["target"]["blocks.1"] / unit for row in rows]
    assert found == pytest.approx([0.75, 0.45, 0.3])
    assert rows[0]["entropy"].keys() == {
        "blocks.1", "blocks.1.attn:heads/0", "blocks.1.attn:heads/1",
        "blocks.0.attn:weights", "blocks.1.attn:weights",
    }  # fmt: skip
    probed = run_probes.entropy_targets(tmp_path / "straight")
    distances = [abs(h - rows[-1]["target"][name.partition("/")[0]])
                 for name, h in rows[-1]["entropy"].items()]  # fmt: skip
    assert probed["distance"] == pytest.approx(np.mean(distances))
    assert [row["train_penalty"] > 0 for row in rows] == [True, True, False]


def test_layers_of_the_lab_are_those_of_a_term_that_names_none():
    changes = {"model": {"name": "mlp", "depth": 2}, "regularizer.ses": {"terms": [{"last": 1}]}}
    config = RunConfig.parse(merge(TINY, changes))
    model = build.model(config, build.dataset(config)[0])
    with build.regularizer(config, model, steps=1) as ses:
        assert ses.layers == ("hidden.1",)
