"""The experiment behind docs/results-real.md: a real language model and real text. `python -m reproduce.real_text`."""
