"""Scripts that make the shipped models from seeds: `python -m training.train --out DIR`."""
