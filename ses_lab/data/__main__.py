"""``python -m ses_lab.data NAME ROOT`` fetches a dataset's files into ROOT and reads them once."""

from __future__ import annotations

import argparse

from ses_lab.data import ARCHIVES, load

UNPUBLISHED = ("medmnist", "image_folder")  # the user's own files

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m ses_lab.data", description=__doc__)
    parser.add_argument("name", choices=[n for n in ARCHIVES if n not in UNPUBLISHED])
    parser.add_argument("root")
    options = parser.parse_args()
    dataset = load(options.name, root=options.root, download=True)
    train, test = (tuple(split.images.shape) for split in (dataset.train, dataset.test))
    print(f"{dataset.name}: {train} to train on, {test} to test, {len(dataset.classes)} classes")
