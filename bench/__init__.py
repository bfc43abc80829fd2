"""Benchmarks for asv; `python -m bench.ratios` makes the README's table.

    asv machine --yes
    asv check -E existing
    asv run -E existing --quick --dry-run --bench Gram
    asv run -E existing --set-commit-hash $(git rev-parse HEAD)
    asv continuous main HEAD --bench track_ratio
    python -m bench.ratios --readme README.md

With more runnable threads than cores, threads that spin at a barrier slow down all others. Set
`OMP_WAIT_POLICY=passive` then, and state it beside the figures.

On shared processors compare ratios between days, not times: `track_ratio_to_reference` is the time
of krrst_fast divided by that of the reference, interleaved in one process.
"""
