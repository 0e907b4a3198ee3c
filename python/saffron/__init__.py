"""Saffron search: decoding that a multifurcation reward model steers."""
