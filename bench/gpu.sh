#!/usr/bin/env bash
# Everything that needs a GPU, in one command and in under nine minutes: builds for the GPU that is
# here, checks, measures, and writes build/gpu/gpu.md. Nothing is installed and nothing is fetched.
# Called again, it goes on where it stopped. bench/gpu.sh --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python=${PYTHON:-}
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --python)
      if [ $# -lt 2 ]; then
        echo "bench/gpu.sh: --python needs an interpreter" >&2
        exit 2
      fi
      python=$2
      shift 2
      ;;
    --python=*)
      python=${1#--python=}
      shift
      ;;
    *)
      arguments+=("$1")
      shift
      ;;
  esac
done

if [ -z "$python" ]; then
  python=python3
  if [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
  fi
fi
if ! "$python" -c 'import importlib.util as u; assert u.find_spec("torch")' 2> /dev/null; then
  echo "bench/gpu.sh: $python is no Python that has torch; --python names one that has" >&2
  exit 2
fi
# Whatever is called bench in the directory this is called from is not meant.
export PYTHONSAFEPATH=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m bench.gpu ${arguments[@]+"${arguments[@]}"}
