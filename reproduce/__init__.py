"""This repository's own documents, made again: docs/results.md (`saffron reproduce`) and the bundled models.

Not installed: run from a clone. `reproduce.checkpoints` trains the models of MODELS.md.
"""
