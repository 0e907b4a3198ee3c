"""What KVTrie is handed by mistake: refused by name; nothing is rounded, parsed or cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kv_model import new_trie


@pytest.mark.parametrize(
    "tokens",
    [
        [1.5, 2.0], [True, False], [1, True], ["1", "2"], "12", b"12", [None], [[1, 2]], [1j], {1: 2},
        np.array([1.0, 2.5]), np.array([True]), np.array(["2020-01-01"], dtype="datetime64[D]"), torch.tensor([1.5]),
    ],
)  # fmt: skip
def test_what_is_no_token_id_is_refused_and_never_rounded(tokens: object) -> None:
    trie = new_trie(capacity=8)
    with pytest.raises(TypeError, match=r"sequences\[1\]: got an? .*expected"):
        trie.insert([[5, 6], tokens])  # type: ignore[list-item]
    assert trie.num_nodes == 0
    with pytest.raises(TypeError, match="sequences: got a"):
        trie.insert("12")  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [[10**30], np.array([2**63 + 5], dtype=np.uint64), [1 << 31], np.ones((1, 2), int)])
def test_token_ids_out_of_range_are_named(tokens: object) -> None:
    with pytest.raises(ValueError, match=r"sequences\[0\]: got (tokens from \d+ to \d+|2 dimensions), expected"):
        new_trie(capacity=8).insert([tokens])  # type: ignore[list-item]


@pytest.mark.parametrize("given", [1.5, True, "2", None])
def test_numbers_that_are_not_whole(given: object) -> None:
    trie = new_trie(capacity=8)
    for name, call in {
        "outputs": lambda: trie.insert([[5]], outputs=given),  # type: ignore[arg-type]
        "slots": lambda: trie.reserve(given),  # type: ignore[arg-type]
        "capacity": lambda: new_trie(capacity=given),  # type: ignore[arg-type]
    }.items():
        with pytest.raises(TypeError, match=f"{name}: got {given!r}, expected a whole number"):
            call()
    assert trie.num_nodes == trie.reserved == 0
    with pytest.raises(ValueError, match="slots: got -1, expected at least 0"):
        trie.reserve(-1)
