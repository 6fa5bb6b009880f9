"""The pages run as they stand, quote what the sources print, and show what was measured."""

from __future__ import annotations

import ast
import contextlib
import csv
import doctest
import inspect
import io
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

import ses_kernels
from bench import report
from ses_kernels import functional, linalg, metrics, regularizer, schedules

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [  # every page with Python in it; what it needs beside torch
    ("README.md", None),
    ("docs/index.md", None),
    ("docs/shaping.md", None),
    ("docs/migration.md", None),
    ("docs/extending/order.md", None),
    ("docs/extending/pooling.md", None),
    ("docs/extending/schedule.md", None),
    ("docs/howto/bert.md", "transformers"),
    ("docs/howto/distributed.md", None),
    ("docs/howto/lightning.md", "lightning"),
    ("docs/howto/measuring.md", None),
    ("docs/howto/own_model.md", None),
    ("docs/howto/resnet.md", "torchvision"),
    ("docs/howto/summary.md", None),
    ("docs/howto/vit.md", "transformers"),
]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def test_no_page_with_python_is_left_out() -> None:
    pages = ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
    python = {page for page in pages if blocks(page, "python")}
    # Their Python goes into files of the lab, or is a listing of a source.
    python -= {"docs/extending/lab.md", "docs/internals/kernels.md"}
    assert python == {page for page, _ in PAGES}


@pytest.mark.parametrize(("page", "needs"), PAGES, ids=[page for page, _ in PAGES])
def test_page_runs(
    page: str, needs: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks one after the other; text that it shows as their output is their output."""
    if needs:
        pytest.importorskip(needs)
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))  # as torchrun does
    monkeypatch.setenv("MASTER_PORT", "0")
    torch.manual_seed(0)
    namespace: dict = {"__name__": "__main__"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks(page, "python"):
            exec(compile(block, page, "exec"), namespace)
    for block in blocks(page, "console"):
        assert block in printed.getvalue()


MODULES = (functional, linalg, metrics, regularizer, schedules)


@pytest.mark.parametrize("module", MODULES, ids=[module.__name__ for module in MODULES])
def test_docstring_examples(module) -> None:
    """After ``import torch, ses_kernels``; every public function and class has one."""
    public = {
        f"{module.__name__}.{name}"
        for name, thing in vars(module).items()
        if inspect.isfunction(thing) or name in ses_kernels.__all__
        if thing.__module__ == module.__name__ and not name.startswith("_")
    }
    runner = doctest.DocTestRunner()
    finder = doctest.DocTestFinder()
    for test in finder.find(module, globs={"torch": torch, "ses_kernels": ses_kernels}):
        runner.run(test)
        public -= {test.name} if test.examples else set()
    assert runner.summarize(verbose=False).failed == 0
    assert not public


@pytest.mark.parametrize(
    "page", [*(ROOT / "docs" / "extending").glob("*.md")], ids=lambda p: p.stem
)
def test_edits_of_a_page_apply(page: Path) -> None:
    for edit in blocks(str(page.relative_to(ROOT)), "diff"):
        command = ["git", "apply", "--check", "-"]
        done = subprocess.run(command, input=edit, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def texts_of_sources() -> set[str]:
    """Every literal text of the package, and every literal part of an f-string."""
    found = set()
    for path in (ROOT / "ses_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_quoted_messages_are_in_the_sources() -> None:
    sources = texts_of_sources()
    messages = blocks("docs/faq.md", "text")
    assert len(messages) > 10
    for message in messages:
        for part in message.split("…"):
            assert any(part.strip() in text for text in sources), part


def test_readme_is_short() -> None:
    """All of it: code, tables and addresses too."""
    assert len(README.split()) <= 900


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Those within docs/ are checked by make docs."""
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = ROOT / (path or page)
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(), flags=re.M)
            slugs = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            assert anchor in slugs, link


RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_tables_are_made_from_the_rows(path: Path) -> None:
    """``python -m bench.report FILE`` makes them anew."""
    assert path.with_suffix(".md").read_text() == report.text(json.loads(path.read_text())["rows"])


def test_readme_has_the_measured_figures() -> None:
    results = ROOT / "bench" / "results"
    sections = (results / "amd-epyc-isa.md").read_text().split("## ")
    tables = dict(section.split("\n\n")[:2] for section in sections[1:])
    lines = tables["gram, closed form / ours, by instruction set"].splitlines()
    chosen = lines[:2] + [line for line in lines[2:] if line in README]
    assert len(chosen) >= 6
    assert "\n".join(chosen) in README
    paper = tables["paper / ours, by instruction set"]
    low, high = re.search(r"256 x 2048 \| \S+ \(([\d.]+)-([\d.]+)\)", paper).groups()
    assert f"takes {low} to {high} times as long as ours at 256 x 2048" in " ".join(README.split())
    rows = json.loads((results / "amd-epyc-training.json").read_text())["rows"]
    shares = [row["over plain step"][1] for row in rows if row["provider"] == report.BY_ITSELF]
    low, high = (f"{100 * share:.2f}" for share in (min(shares), max(shares)))
    assert f"{low} to {high} % of the training steps" in " ".join(README.split())


def test_readme_has_the_figures_of_the_networks() -> None:
    with (ROOT / "examples" / "results" / "little_data.csv").open() as file:
        rows = {(r["experiment"], r["variant"], r["measure"]): r for r in csv.DictReader(file)}
    for title, measure, digits in [
        ("accuracy, %", "accuracy", 1),
        ("under corruption, %", "corruption.mean", 1),
        ("effective rank / d^beta", "rank.ratio", 2),
    ]:
        variants = ("vit", "vit-drop_path-smoothing", "ses=default+vit", "ses+vit")
        found = [rows["little_data", variant, measure] for variant in variants]
        assert {row["seeds"] for row in found} == {"5"}
        cells = [f"{float(r['mean']):.{digits}f} ± {float(r['std']):.{digits}f}" for r in found]
        assert f"| {title} | {' | '.join(cells)} |" in README

    rows = json.loads((ROOT / "examples" / "results" / "results.json").read_text())["rows"]
    cells, times = [], []
    for name in ("every 1", "without"):
        chosen = [row for row in rows if row["condition"] == name]
        values = torch.tensor([row["condition_number"] for row in chosen]).double()
        cells.append(f"{values.mean():.1f} ± {values.std():.1f}")
        times.append(sum(row["relative_time"] for row in chosen) / len(chosen))
    said = f"{cells[0]} after {cells[1]}, for {100 * (times[0] - 1):.1f} % more time"
    assert said in " ".join(README.split())
