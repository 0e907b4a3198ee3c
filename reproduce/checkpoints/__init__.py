"""Scripts that make the bundled models from seeds: `python -m reproduce.checkpoints.train --out DIR`."""
