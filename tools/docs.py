"""What mkdocs.yml adds to mkdocs: files from outside docs/, and references in docstrings."""

from __future__ import annotations

import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Address in the site -> file of the repository, where a reader of the code looks for it.
ELSEWHERE = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "measured.png": "bench/results/amd-epyc.png",
    "measured-large.png": "bench/results/amd-epyc-large.png",
    "mnist/beta_sweep.png": "examples/results/beta_sweep.png",
    "mnist/dynamics.png": "examples/results/dynamics.png",
    "mnist/pareto.png": "examples/results/pareto.png",
}


def on_files(files, config):
    for uri, path in ELSEWHERE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


class Roles(griffe.Extension):
    """Sphinx's roles, as the docstrings have them, to links of mkdocs-autorefs."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r":(\w+):`([\w.]+)`", self._link, obj.docstring.value)

    def _link(self, role: re.Match) -> str:
        kind, name = role.groups()
        if kind not in ("func", "class", "meth", "mod", "attr"):
            raise ValueError(f"role :{kind}: of `{name}` is not one that tools/docs.py knows")
        if name.startswith(("torch", "fnmatch")):  # other projects: no link without a network
            return f"`{name}`"
        return f"[`{name}`][{name}]"  # looked up from where it stands: scoped_crossrefs
