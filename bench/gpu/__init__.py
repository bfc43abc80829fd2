"""The stages of `bench/gpu.sh`, and the report of their results.

machine      which GPU, which versions; what is still to do
measure      the rows of a stage, in processes that may fail: krr, step, steps, parts
record       the stages that are commands: build, selftest, tests, sanitizer
results      the one file that all of them write
report       the page, the short table, what is published
"""
