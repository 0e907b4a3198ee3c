"""Scripts that make the bundled models from seeds: `python -m training.train --out DIR`."""
