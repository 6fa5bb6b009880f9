"""Run by torchrun from test_training.py: one run over two ranks, and again over the same folder."""

import os
import sys

import torch

from ses_lab import training
from ses_lab.config import RunConfig, read_yaml

if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    for file, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        config = RunConfig.parse(read_yaml(file))
        first = training.run(config, folder)
        assert training.run(config, folder) == first  # finished: every rank is told so
    print(f"rank {os.environ['RANK']} done", flush=True)
    # Not by the interpreter: one exit in forty, a thread of gloo aborts it (pytorch issue 190489).
    os._exit(0)
