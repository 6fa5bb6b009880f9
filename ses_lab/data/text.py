"""Text as token ids: docstrings of the standard library, and the published archives of GLUE.

A sample is (2, T) int64: ids, and the segment of each, 0 or 1 of a pair; 0 is padding.
"""

from __future__ import annotations

import ast
import csv
import functools
import io
import re
import sysconfig
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from ses_lab.data.dataset import Dataset, Split

# Packages that every Python has, of many docstrings each, about things of their own.
PACKAGES = ("asyncio", "concurrent", "email", "http", "importlib", "logging", "unittest", "xml")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def docstrings(*, length: int = 32, vocabulary: int = 2000) -> Dataset:
    """Docstrings of eight packages of the standard library, by package; a quarter of them to test.

    Those of four words or more, each once, read from their sources without importing anything. The
    same Python gives the same data, another one others.

    Args:
        length: tokens of a sample, the first and the special ones; the rest is padding.
        vocabulary: ids, of the special tokens and of the words and signs of the training set that
            are most frequent, in lower case.

    Cost: a second or two to parse the packages, once a process.
    """
    if length < 3 or vocabulary <= len(_SPECIAL):
        raise ValueError(f"need length >= 3 and vocabulary > 4, got {length} and {vocabulary}")
    texts, labels = _labelled()
    train, test, train_labels, test_labels = train_test_split(
        texts, labels, test_size=0.25, random_state=0, stratify=labels
    )
    counts = Counter(word for text in train for word in _words(text))
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    ids = {word: i for i, word in enumerate((*_SPECIAL, *frequent[: vocabulary - len(_SPECIAL)]))}

    def split(texts: Sequence[str], labels: Sequence[int]) -> Split:
        samples = torch.zeros(len(texts), 2, length, dtype=torch.int64)
        for sample, text in zip(samples, texts, strict=True):
            words = [ids.get(word, ids["[UNK]"]) for word in _words(text)[: length - 2]]
            row = [ids["[CLS]"], *words, ids["[SEP]"]]
            sample[0, : len(row)] = torch.tensor(row)
        return Split(samples, torch.tensor(labels))

    made = split(train, train_labels), split(test, test_labels)
    return Dataset("docstrings", *made, PACKAGES, vocabulary=len(ids))


@functools.cache
def _labelled() -> tuple[list[str], list[int]]:
    root = Path(sysconfig.get_path("stdlib"))
    labelled: dict[str, int] = {}
    for label, package in enumerate(PACKAGES):
        for text in _docstrings(root / package):
            labelled.setdefault(text, label)
    return [*labelled], [*labelled.values()]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _docstrings(package: Path) -> Iterator[str]:
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for file in sorted(package.rglob("*.py")):
        if "test" in file.relative_to(package).parts:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in their strings
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and len(text.split()) >= 4:
                yield text


# ---- GLUE ---------------------------------------------------------------------------------------


def _glue(
    folder: str,
    columns: tuple[str, ...],
    label: str,
    classes: tuple[str, ...],
    name: str,
    root: Path,
    download: bool,
    *,
    tokenizer: str,
    length: int = 128,
) -> Dataset:
    """A task of GLUE from ``root``: its folder or its ZIP, with ``train.tsv`` and ``dev.tsv``.

    The development set is the test set, since that of GLUE has no labels.

    Args:
        tokenizer: a folder of transformers' files, below ``root`` or anywhere.
        length: tokens of a sample at most.

    Wang et al., "GLUE" (ICLR 2019).
    """
    from transformers import AutoTokenizer

    if download:
        raise ValueError(f"{name} is not fetched: put {folder}/ or {folder}.zip into {root}")
    place = root / tokenizer if (root / tokenizer).is_dir() else Path(tokenizer)
    if not place.is_dir():
        raise FileNotFoundError(f"tokenizer: there is no folder {place}, nor one in {root}")
    tokenize = AutoTokenizer.from_pretrained(place, local_files_only=True)
    if tokenize.pad_token_id != 0:
        raise ValueError(f"{place}: padding is id 0 here, and {tokenize.pad_token_id} there")

    def split(file: str) -> Split:
        rows = _table(root, folder, file, (*columns, label))
        texts = [[row[column] for row in rows] for column in columns]
        found = tokenize(
            *texts, padding="max_length", truncation=True, max_length=length,
            return_tensors="pt", return_token_type_ids=True,
        )  # fmt: skip
        samples = torch.stack([found["input_ids"], found["token_type_ids"]], 1)
        return Split(_trimmed(samples), torch.tensor([int(row[label]) for row in rows]))

    made = split("train.tsv"), split("dev.tsv")
    return Dataset(name, *made, classes, vocabulary=len(tokenize))


def _table(root: Path, folder: str, file: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
    place = root / folder / file
    if place.is_file():
        text = place.read_text("utf-8-sig")
    elif (archive := root / f"{folder}.zip").is_file():
        with zipfile.ZipFile(archive) as opened:
            text = opened.read(f"{folder}/{file}").decode("utf-8-sig")
    else:
        raise FileNotFoundError(f"there is neither {place} nor {archive}")
    rows = [*csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)]
    if missing := [column for column in columns if not rows or rows[0].get(column) is None]:
        raise ValueError(f"{folder}/{file} has no column {missing[0]!r}; GLUE's files have")
    return rows


def _trimmed(samples: Tensor) -> Tensor:  # without what is padding in every sample
    used = (samples[:, 0] != 0).any(0).nonzero().max() + 1
    return samples[:, :, :used].contiguous()


GLUE: dict[str, Callable[..., Dataset]] = {  # (name, root, download, **params) -> Dataset
    "sst2": functools.partial(_glue, "SST-2", ("sentence",), "label", ("negative", "positive")),
    "mrpc": functools.partial(
        _glue, "MRPC", ("#1 String", "#2 String"), "Quality", ("different", "paraphrase")
    ),
}
