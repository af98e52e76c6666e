"""Faults made to happen in a whole cluster under load, and every token checked.

`make chaos` plays everything and writes benchmarks/results/chaos.md; `make test` a fast choice.
"""
