"""Where the plans of all steps lie on a device, so that CUDA graphs find each of them where they found the first."""

from __future__ import annotations

import torch
from torch import Tensor

from saffron_kernels import block_plan


class PlanBuffers:
    """Buffers of a fixed size, and how many tokens of them a plan has: nothing waits for the device to know.

    A block of the cache stands in a plan once for all that share it. vLLM keeps what two requests compute at the same
    time twice, and a third one may continue either, so a plan can be longer than the cache: there is room for twice as
    much, and `fill` looks where even that might not do.
    """

    def __init__(
        self, block_size: int, blocks: int, requests: int, length: int, queries: int, device: torch.device
    ) -> None:
        """For a cache of `blocks`, and at most `requests` of `length` tokens with `queries` in a step."""
        self.block_size = block_size
        self.size = min(2 * blocks, requests * -(-length // block_size)) * block_size
        self.order = torch.arange(queries, dtype=torch.int32, device=device)
        self.slot, self.begin, self.end = torch.zeros(3, self.size, dtype=torch.int32, device=device).unbind()
        self.count = torch.zeros(1, dtype=torch.int32, device=device)

    def fill(
        self, block_table: Tensor, seq_lens: Tensor, query_start: Tensor, queries: int, most: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Plans a step, as `block_plan` does.

        Args:
            most: on the CPU, of each request how many tokens it has at most; None: as many as the table has room for.

        Raises:
            RuntimeError: the plan is longer than the buffers.
        """
        held = self.order[:queries], self.slot, self.begin, self.end, self.count
        plan = block_plan(block_table, seq_lens, query_start, self.block_size, queries, self.size)
        for buffer, made in zip(held, plan, strict=True):
            buffer.copy_(made)
        if self.size < (block_table.numel() * self.block_size if most is None else int(most.sum())):
            self._look()
        return held

    def _look(self) -> None:
        """Waits for the device. A plan without room is empty."""
        if int(self.count) == 0:
            raise RuntimeError(
                f"the plan of a step has more than {self.size} tokens, twice what the KV cache holds: "
                "fewer requests at once (max_num_seqs) have shorter plans"
            )
