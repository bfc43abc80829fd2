#!/usr/bin/env bash
# Builds, checks and measures everything that needs a GPU, in one command and without a network.
# docs/gpu.md, "The first ten minutes", says what it takes and gives.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
  cat << 'EOF'
usage: bench/gpu.sh [--out FOLDER] [--images STORE] [--limit SECONDS] [--again] [--dry-run] [STAGE...]
       bench/gpu.sh [--out FOLDER] --publish

Called again it goes on where it stopped. Stages, in their order; all of them if none is named:
build, krr, step, steps, selftest, tests, parts, sanitizer. docs/gpu.md says what each gives.

  --out FOLDER      the results: gpu.json and gpu.md, rewritten after each stage; default: build/gpu
  --images STORE    for the stage steps: a folder made by krrst prepare; default: scikit-learn's digits
  --work FOLDER     what is built and compiled, kept for the next call; default: build/gpu
  --limit SECONDS   for everything together; default: 540
  --python PYTHON   an interpreter that has torch; default: that of .venv, or python3
  --dry-run         everything, tiny, on the CPU, as a test
  --again           measure the named stages anew
  --publish         write docs/results/, krrst_fast/backends/tuned.json and the README's table
EOF
}

refuse() {
  echo "bench/gpu.sh: $1" >&2
  exit 2
}

out='' work='' images='' limit=540 python=${PYTHON:-} dry=() again=() publish='' stages=()
PART='' group=''
while [ $# -gt 0 ]; do
  case $1 in
    --out | --work | --images | --limit | --python)
      [ $# -ge 2 ] || refuse "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --dry-run) dry=(--dry-run) ;;
    --again) again=(--again) ;;
    --publish) publish=1 ;;
    --help) usage && exit 0 ;;
    -*) refuse "no option $1; --help lists them" ;;
    *) stages+=("$1") ;;
  esac
  shift
done
[[ $limit =~ ^[0-9]+$ ]] || refuse "--limit takes seconds, got $limit"
[ -z "$images" ] || [ -e "$images/index.json" ] || refuse "--images $images: not a store of krrst prepare"
if [ -z "$python" ]; then
  python=python3
  [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
fi
"$python" -c 'import importlib.util as u; assert u.find_spec("torch")' 2> /dev/null \
  || refuse "$python is no Python that has torch; --python names one that has"
work=$(realpath -m "${work:-$root/build/gpu${dry:+-dry}}")
out=$(realpath -m "${out:-$work}")
[ -z "$images" ] || images=$(realpath "$images")
site=$work/site device=cuda
[ -z "${dry:-}" ] || device=cpu
mkdir -p "$work" "$out" 2> /dev/null || refuse "--out $out: it cannot be made"

# Stages import the package that was built, and never what is called bench or tests elsewhere.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONPATH=$site:$root${PYTHONPATH:+:$PYTHONPATH}
export TRITON_CACHE_DIR=$work/triton-cache TORCHINDUCTOR_CACHE_DIR=$work/inductor-cache OMP_WAIT_POLICY=PASSIVE
unset TRITON_INTERPRET
cd "$root" || exit
cores=$(env -u OMP_NUM_THREADS nproc)
cores=$((cores < 32 ? cores : 32))
where=(--out "$out" --work "$work")

if [ -n "$publish" ]; then
  exec "$python" -m bench.gpu.report --out "$out" --publish
fi
todo=$("$python" -m bench.gpu.machine --out "$out" --kept "$work" "${dry[@]}" "${again[@]}" \
  -- "${stages[@]}") || exit
target=$(sed -n 2p <<< "$todo")
read -ra todo <<< "$(sed -n 1p <<< "$todo")"

# What runs is ended with this script, and all that it started with it.
trap 'kill $(jobs -p) 2> /dev/null; exit 143' INT TERM

todo() { [[ " ${todo[*]} " == *" $1 "* ]]; }

# stage NAME SECONDS COMMAND...: a command with a time limit, its words in a log, what came of it in
# both files. With PART the log and what is made of it are those of a part of the stage.
stage() {
  local name=$1 seconds=$2 begin=$SECONDS code
  shift 2
  rm -f "$work/${PART:-$name}.log"
  [ "$seconds" -le $((limit - SECONDS)) ] || seconds=$((limit - SECONDS))
  if [ "$seconds" -lt 10 ]; then
    echo "$name: not begun, the $limit seconds are over; call again to go on"
    record "$name" 75 0
    return
  fi
  # shellcheck disable=SC2086
  timeout $group --kill-after=5 "$seconds" "$@" > "$work/${PART:-$name}.log" 2>&1 < /dev/null &
  wait $!
  code=$?
  record "$name" "$code" $((SECONDS - begin))
}

record() {
  "$python" -m bench.gpu.record "$@" "${where[@]}" ${PART:+--part "$PART"}
  [ "$out" -ef "$work" ] || cp "$out/gpu.json" "$work/" # for the next call, whose --out may be empty
}

measure() {
  local seconds=$2
  [ "$seconds" -le $((limit - SECONDS - 15)) ] || seconds=$((limit - SECONDS - 15))
  # It ends by itself, so that no row is cut; the second limit is for what does not. It stays in
  # this script's process group: killed with it, it writes no more.
  group=--foreground stage "$1" $((seconds + 15)) "$python" -m bench.gpu.measure "$1" --out "$out" --seconds "$seconds" \
    "${@:3}"
}

build() {
  local begin=$SECONDS code
  # Into a folder of its own, where krrst_fast.kernels is found, as it is not in a checkout.
  rm -rf "$site/krrst_fast"
  if ! KRRST_FAST_BUILD=0 timeout 60 "$python" setup.py -q build_py --build-lib "$site" \
    > "$work/build.log" 2>&1; then
    record build 1 $((SECONDS - begin))
    return
  fi
  KRRST_FAST_EXTENSION=0 timeout --kill-after=5 120 "$python" -m bench.gpu.compile_ahead \
    ${dry:+--toy --most 1} --jobs "$cores" > "$work/kernels.log" 2>&1 < /dev/null &
  local kernels=$!
  if [ -n "${dry:-}" ]; then
    cp "$root"/krrst_fast/*.so "$site/krrst_fast/" 2> /dev/null
    code=0
  else
    KRRST_FAST_BUILD=1 KRRST_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST=$target MAX_JOBS=${MAX_JOBS:-$cores} \
      timeout --kill-after=5 150 "$python" setup.py build_ext --build-lib "$site" \
      --build-temp "$work/objects" >> "$work/build.log" 2>&1 < /dev/null &
    wait $!
    code=$?
  fi
  wait "$kernels"
  PART=kernels record build $? 0
  record build "$code" $((SECONDS - begin))
}

run_tests() {
  local files parallel=()
  # No others are collected: some import packages that only development needs.
  mapfile -t files < <(grep -lE 'mark\.gpu|kernels: Callable|gpu_calls' "$root"/tests/test_*.py)
  [ -z "${dry:-}" ] || files=("$root/tests/test_gpu_krr.py") # all are skipped
  if "$python" -c 'import xdist' 2> /dev/null; then
    parallel=(-n $((cores < 12 ? cores : 12)) --dist worksteal)
  fi
  # A process each for the processors: not as many threads in each again.
  stage tests 150 env OMP_NUM_THREADS=1 "$python" -m pytest -m gpu "${parallel[@]}" -v --tb=short --color=no \
    -p no:cacheprovider -p no:benchmark --continue-on-collection-errors --rootdir "$root" -c "$root/pyproject.toml" \
    "${files[@]}"
}

sanitize() {
  local tool calls options
  tool=${COMPUTE_SANITIZER:-}
  if [ -z "$tool" ] && [ "$device" = cuda ]; then
    tool=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  fi
  for PART in racecheck memcheck; do
    calls=("$python" -m bench.gpu.sanitized "$device" cholesky)
    # torch asks the driver for what it may lack, which would be told as an error each time.
    [ "$PART" = racecheck ] || calls=("${calls[@]/cholesky/all}") options=(--report-api-errors no)
    if [ -n "$tool" ]; then
      calls=("$tool" --tool "$PART" ${options[@]+"${options[@]}"} --error-exitcode 99 "${calls[@]}")
    else # a call that fails is seen to fail
      calls=(sh -c '"$@" && echo "refused: there is no compute-sanitizer here"' sh "${calls[@]}")
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage sanitizer 120 "${calls[@]}"
  done
  PART=''
}

if todo build; then build; fi
if [ ${#todo[@]} -gt 0 ]; then
  compgen -G "$site/krrst_fast/*.so" > /dev/null || export KRRST_FAST_EXTENSION=0 # or all would warn
fi
if todo krr; then measure krr 140; fi
if todo step; then measure step 120; fi
if todo steps; then measure steps 90 ${images:+--images "$images"}; fi
if todo selftest; then
  rm -f "$work/selftest.json"
  stage selftest 60 env ${dry:+KRRST_FAST_EXTENSION=0} "$python" -m krrst_fast.selftest \
    --device "$device" --json "$work/selftest.json"
fi
if todo tests; then run_tests; fi
if todo parts; then measure parts 140; fi
if todo sanitizer; then sanitize; fi
echo
exec "$python" -m bench.gpu.report --out "$out"
