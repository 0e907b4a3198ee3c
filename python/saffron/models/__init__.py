"""Language models over the trie: the policy that is defended and the reward models that score it."""
