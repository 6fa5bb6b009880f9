"""Each file of ses_lab imports only those above it in this list, and ses_kernels none of them."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
LAYERS = ["names", "values", "options", "networks", "models", "data.dataset",
          "data.subset", "data.download", "data.bundled", "data.archives", "data.text", "data",
          "data.__main__", "losses", "metrics", "randaugment", "augment", "optim", "distill",
          "twoviews", "probes.common", "probes.attacks", "probes.corruption", "probes.geometry",
          "probes.representation", "probes", "weights", "spectra", "sinks", "rank", "shaping",
          "config", "folder", "regimes", "build", "engine", "curves", "training", "run_probes",
          "measure", "experiments", "catalogue", "results", "predictions", "figures", "document",
          "report", "launch", "cli", "__main__"]  # fmt: skip


def imports_of(path):
    tree = ast.parse(path.read_text())
    typing = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and getattr(test.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    found = set()
    for node in ast.walk(tree):
        module = getattr(node, "module", None) or ""
        if (
            isinstance(node, ast.ImportFrom)
            and module.startswith("ses_lab")
            and id(node) not in typing
        ):
            module = module.removeprefix("ses_lab").lstrip(".")
            for alias in node.names:
                name = f"{module}.{alias.name}".lstrip(".")
                found.add(name if name in LAYERS else module)
    return found


def test_imports_go_up_the_list():
    package = ROOT / "ses_lab"
    files = {
        ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
    }
    del files["__init__"]
    assert set(files) == set(LAYERS)
    for name, path in files.items():
        assert imports_of(path) <= set(LAYERS[: LAYERS.index(name)]), name


def test_the_library_does_not_know_the_lab():
    for folder in ("ses_kernels", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu"):
                assert "ses_lab" not in path.read_text(), path


def test_without_its_extra_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from ses_lab.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "pip install 'ses_kernels[lab]'" in done.stderr
