"""Everything that needs a GPU, in one command: `bench/gpu.sh`.

A stage is a module with `measure(run)`, which adds rows to `run.notes`, or a command of
`commands.py`. Each ends in one JSON file; `report.py` makes one of them all, and what is published.
Nothing here asks for a GPU when it is imported: asv imports all of it.
"""
