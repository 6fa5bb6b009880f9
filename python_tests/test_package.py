"""The package as a whole: layers, imports without its optional parts."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

import ses_kernels

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ses_kernels"

# Each file may import those before it; reference.py, another route, imports none of them.
LAYERS = ["reference", "checks", "context", "kernels.gram", "_C", "rational_coefficients",
          "rational_solver", "crossover", "torch_rows", "ops", "packed", "lowrank", "distributed",
          "entropy", "solvers", "autograd", "linalg", "functional", "metrics", "schedules",
          "blocks", "evidence", "layout", "layers", "pooling", "options", "capture", "regularizer",
          "integrations.lightning", "integrations.transformers", "__init__",
          "__main__"]  # fmt: skip


def imports_of(path):
    """Modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ses_kernels"):
            module = node.module.removeprefix("ses_kernels").lstrip(".")
            for alias in node.names:
                name = f"{module}.{alias.name}".lstrip(".")
                found.add(name if name in LAYERS else module)
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("ses_kernels"):
                    found.add(alias.name.removeprefix("ses_kernels").lstrip(".") or "__init__")
    return found


def test_imports_go_down_the_layers():
    files = {
        str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path
        for path in PACKAGE.rglob("*.py")
    }
    del files["kernels.__init__"], files["integrations.__init__"]
    assert set(files) == set(LAYERS) - {"_C"}
    for name, path in files.items():
        below = LAYERS[: LAYERS.index(name)]
        assert imports_of(path) <= set(below), name
    assert not imports_of(files["reference"])


def test_only_ops_names_a_device():
    """autograd.py and what it builds on run on any device: no file but ops.py asks which."""
    for name in ("regularizer", "capture", "options", "layers", "blocks", "evidence", "layout",
                 "pooling", "schedules", "metrics", "functional", "autograd", "solvers", "entropy",
                 "distributed", "lowrank", "packed", "reference"):  # fmt: skip
        text = (PACKAGE / f"{name}.py").read_text()
        code = re.sub(r'""".*?"""|#.*', "", text, flags=re.S)
        assert "cuda" not in code.lower(), name
        assert "triton" not in code.lower(), name


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("missing", ["triton", "ses_kernels._C"])
def test_works_without_optional_parts(missing):
    done = run(
        f"""
import sys
sys.modules[{missing!r}] = None  # makes its import raise
import torch, ses_kernels
x = torch.randn(3, 8, 20, requires_grad=True)
ses_kernels.spectral_entropy(x).sum().backward()
torch.testing.assert_close(
    ses_kernels.spectral_entropy(x), ses_kernels.reference.spectral_entropy(x).float())
from ses_kernels.__main__ import main
main()
"""
    )
    assert done.returncode == 0, done.stderr
    assert "missing" in done.stdout


def test_import_touches_no_device_and_no_triton():
    done = run(
        """
import sys, torch
torch.cuda._lazy_init = torch.cuda.init = lambda: (_ for _ in ()).throw(AssertionError("CUDA"))
import ses_kernels
assert sys.modules.get("triton") is None, "triton was imported"
assert not torch.cuda.is_initialized()
"""
    )
    assert done.returncode == 0, done.stderr


def test_main_prints_every_part():
    done = subprocess.run(
        [sys.executable, "-m", "ses_kernels"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for word in (
        ses_kernels.__version__,
        "torch",
        "triton",
        "extension",
        "float64",
        "eigh",
        "Gram",
    ):
        assert word in done.stdout


def test_no_environment_variable_changes_behaviour():
    for path in PACKAGE.rglob("*.py"):
        assert "environ" not in path.read_text(), path


def test_versions_are_those_of_the_package():
    """Where a version has to be typed again: the citation, the hooks, the changelog."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ses_kernels.__version__
    released = rf"^## \[{re.escape(ses_kernels.__version__)}\] - (.*)$"
    (date,) = re.findall(released, (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert citation["date-released"] == date
    pinned = re.findall(r"(?:ruff|clang-format)==[\d.]+", (ROOT / "pyproject.toml").read_text())
    hooks = re.findall(r"\[(\S+==[\d.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(hooks) == set(pinned)


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/workflows/*.yml")), ids=lambda p: p.name)
def test_workflows_call_targets_of_the_makefile(path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    jobs = yaml.safe_load(path.read_text())["jobs"]
    for name, job in jobs.items():
        commands = [step["run"] for step in job["steps"] if "run" in step]
        made = [
            command.removeprefix("make ") for command in commands if command.startswith("make ")
        ]
        assert made, name
        assert set(made) <= set(targets), (name, made)
        for command in commands:  # nothing else but what installs a system's packages
            assert command.startswith(("make ", "sudo apt-get ")), (name, command)
