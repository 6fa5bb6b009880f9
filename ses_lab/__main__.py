"""The command ``ses-lab``, and ``python -m ses_lab``, which torchrun takes as ``-m ses_lab``."""


def main() -> None:
    try:
        from ses_lab import cli
    except ImportError as error:
        raise SystemExit(f"ses-lab: {error}; pip install 'ses_kernels[lab]'") from None
    cli.main()


if __name__ == "__main__":
    main()
