"""Multifurcation reward models of one's own: rewards for a corpus (`annotate`), training, evaluation."""
