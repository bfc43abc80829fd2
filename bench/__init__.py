"""Benchmarks, run by asv; the rows with a floor also by `python -m bench.ratios`.

    asv machine --yes
    asv check -E existing
    asv run -E existing --quick --dry-run --bench Gram
    asv run -E existing --set-commit-hash $(git rev-parse HEAD) && python -m bench.report
    asv continuous main HEAD --bench track_ratio

With more runnable threads than cores, whoever waits for a thread at a barrier burns the time it
needs: `OMP_WAIT_POLICY=passive` in front lets both sides sleep there. Say so beside the figures.

On shared processors only a ratio to the reference, taken in one process with the calls of both in
turn, is worth comparing between days: `track_ratio_to_reference`, our time by the reference's.
"""
