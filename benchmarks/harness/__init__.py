"""Benchmarks: what is measured, how, and what is made of the numbers.

A `Job` is one piece of work (an op's case in one direction, a model's forward, ...) with its peers: ours on each
backend, the eager reference, the reference under ``torch.compile``, upstream, and others. It checks that the peers
agree, lets them take turns, and gives one row for each. Rows are written with the environment to one JSON file per
benchmark.
``python -m benchmarks.harness`` and ``pytest benchmarks/`` run the same jobs.
"""
