"""Benchmarks, run by asv; the rows of the KRR loss also by `python -m bench.ratios`.

    asv check -E existing
    asv run --quick --dry-run --bench Gram
    asv run --set-commit-hash $(git rev-parse HEAD) && asv publish && asv preview

On shared processors only a ratio to the reference, taken in one process with the calls of both in
turn, is worth comparing between days: `track_ratio_to_reference`. Higher is better.
"""
