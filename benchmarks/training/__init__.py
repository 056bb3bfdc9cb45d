"""The contestants of `benchmarks.train`, each in a process of its own: `python -m benchmarks.training`."""
