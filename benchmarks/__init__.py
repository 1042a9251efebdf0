"""Scripts that measure; each prints its figures. Run them as modules: `python -m benchmarks.<name>`."""
