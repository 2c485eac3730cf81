#!/bin/sh
# What only a GPU can show, in at most 20 minutes: tests, speed, memory, number formats, resume (benchmarks/gpu_check.py).
#
#   sh scripts/gpu_check.sh OUT [--small]          with the packages that are there; leaves gpu_check.json and .md in OUT
#   sh scripts/gpu_check.sh --wheels DIR           here: collect what a machine without a network lacks, in DIR
#   sh scripts/gpu_check.sh OUT --wheels DIR       there: install it from DIR beside its own packages, then check
#
# The machine needs Python 3.11 to 3.13, torch, torchvision, timm and accelerate. PYTHON names another python3.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out="" wheels="" small=""
usage() { sed -n '4,6s/^#   //p' scripts/gpu_check.sh >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
    --wheels) [ $# -ge 2 ] || usage; wheels=$2; shift ;;
    --small) small=--small ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out=$1 ;;
    esac
    shift
done
[ -n "$out$wheels" ] || usage

# Those of the project and of its tests that such a machine does not have. faiss is left out: kNN searches with torch.
rest() {
    "$python" - <<'PYTHON'
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
there = {"torch", "torchvision", "timm", "accelerate", "faiss-gpu"}
tests = {"pytest", "pytest-timeout", "pytest-xdist", "pytest-cov", "hypothesis", "pycocotools"}
for each in project["dependencies"] + project["optional-dependencies"]["dev"]:
    name = re.match(r"[\w-]+", each)[0]
    if name not in there and (each in project["dependencies"] or name in tests):
        print(each.split(";")[0].strip())
PYTHON
}

if [ -z "$out" ]; then
    mkdir -p "$wheels"
    rest >"$wheels/requirements.txt"
    for version in 3.11 3.12 3.13; do
        "$python" -m pip download --dest "$wheels" --requirement "$wheels/requirements.txt" \
            --only-binary=:all: --python-version "$version" \
            --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any
    done
    exit 0
fi

mkdir -p "$out"
out=$(cd "$out" && pwd)
if [ -n "$wheels" ]; then
    "$python" -m venv --system-site-packages "$out/venv"
    python=$out/venv/bin/python
    "$python" -m pip install --no-index --find-links "$wheels" --requirement "$wheels/requirements.txt"
fi
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m benchmarks.gpu_check "$out" $small
