"""Attacks on a defended policy, what they achieve and what the defence costs: `saffron eval`, `saffron report`."""
