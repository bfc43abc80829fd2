"""Benchmarks, run by asv; the rows of the KRR loss also by `python -m bench.ratios`.

    asv machine --yes
    asv check -E existing
    asv run --quick --dry-run --bench Gram
    asv run --set-commit-hash $(git rev-parse HEAD) && asv publish && asv preview

With more runnable threads than cores, whoever waits for a thread at a barrier burns the time it
needs: `OMP_WAIT_POLICY=passive` in front lets both sides sleep there. Say so beside the figures.

On shared processors only a ratio to the reference, taken in one process with the calls of both in
turn, is worth comparing between days: `track_ratio_to_reference`. Higher is better.
"""
