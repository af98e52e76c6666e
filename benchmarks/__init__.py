"""What the cluster costs and reaches, measured; `python -m benchmarks.run` is `make bench`."""
