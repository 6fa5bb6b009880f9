"""``python -m ses_lab``, and so ``torchrun --nproc-per-node=2 -m ses_lab train run.yaml``."""

from ses_lab.cli import main

main()
