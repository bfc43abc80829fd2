#!/usr/bin/env bash
# The table of docs/results.md, "A target with headroom": CIFAR-100 distilled with an encoder as the
# target, three times, against rivals of the same size, on CIFAR-10. About 20 minutes on two cores.
#
#   examples/recipe.sh CIFAR-100 CIFAR-10 OUT
#
# The first two are what krrst prepare reads: the folders of CIFAR's pickles, of images, tars, ...
# What was finished is kept, and a run that was stopped goes on where it was. DISTILL and EVALUATE
# are further flags for all distillations and for the evaluation; KRRST is the command.
set -euo pipefail
if [ $# -ne 3 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
cifar100=$1 cifar10=$2 out=$3
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
krrst() {
    ${KRRST:-command krrst} "$@"
}
# The images learnt with their targets (run), or the targets of real images alone (learnt_y). In a job
# of its own, which becomes the command: a signal to the job is one to it.
distill() {
    local name=$1 seed=$2
    shift 2
    exec ${KRRST:-krrst} distill --run cifar100-encoder --store "$out/c100" --target "$out/target" \
        --out "$out/$name$seed" --seed "$seed" --resume --quiet "$@" ${DISTILL:-}
}

mkdir -p "$out"
[ -e "$out/c100" ] || krrst prepare --run cifar100-encoder "$cifar100" "$out/c100" --quiet
[ -e "$out/c10" ] || krrst prepare "$cifar10" "$out/c10" --size 32 --quiet
krrst target --run cifar100-encoder --store "$out/c100" --out "$out/target" --resume --quiet

# The first one fills the table of the encoder's outputs, which all distillations look up; then two
# run side by side. What is still running when this ends, by Ctrl-C too, saves its state.
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
distill run 0 &
until [ -s "$out/run0/metrics.jsonl" ] || ! kill -0 $! 2>/dev/null; do
    sleep 1
done
running=1
for job in "run 1" "run 2" "learnt_y 0" "learnt_y 1" "learnt_y 2"; do
    if [ $running = 2 ]; then
        wait -n
        running=1
    fi
    [[ $job == run* ]] || job+=" --lr 0 --lr_targets 1e-2"
    # shellcheck disable=SC2086  # words
    OMP_NUM_THREADS=1 distill $job &
    running=2
done
wait -n
wait -n

krrst evaluate "$out/run0" "$out/run1" "$out/run2" --suite recipe --stores "$out/c10" \
    --rivals "learnt_y=$out/learnt_y0,learnt_y=$out/learnt_y1,learnt_y=$out/learnt_y2" \
    --workers 2 --quiet ${EVALUATE:-}
