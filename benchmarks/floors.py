"""What the ops of a decode step cannot be faster than on an H200: bytes and operations counted, nothing measured.

python benchmarks/floors.py          prints the table that stands in docs/kernels.md
"""

from __future__ import annotations

from report import markdown

COPY = 4.3e12  # bytes read and written a second by a device-to-device copy on an H200
PRODUCTS = 989e12  # bf16 operations a second by its data sheet

BEAMS, VOCAB, HIDDEN, NUCLEUS = 32, 128_256, 2048, 32  # 1B reward model; nuclei of 32 tokens
HEADS, KV_HEADS = 32, 8


def attention(tokens: int, head_dim: int = 128, stored: int = 2) -> tuple[int, int]:
    """K and V once, Q and the result, the plan; every beam sees every token, at most."""
    kv = 2 * tokens * KV_HEADS * head_dim * stored
    return kv + 2 * BEAMS * HEADS * head_dim * 2 + 12 * tokens, 4 * BEAMS * tokens * HEADS * head_dim


def append() -> tuple[int, int]:
    """K and V in bf16 read and written; cos and sin; slots."""
    return BEAMS * (4 * KV_HEADS * 128 * 2 + 2 * 128 * 2 + 4), 0


def gather(length: int) -> tuple[int, int]:
    """K and V written for every beam, read once."""
    return (BEAMS + 1) * length * 2 * KV_HEADS * 128 * 2 + 4 * BEAMS * length, 0


def pages(requests: int, shared: int, own: int, block_size: int = 16) -> tuple[int, int]:
    """The block table read, the plan written: blocks that all requests share, and those of each."""
    return 4 * requests * (shared + own) + 12 * block_size * (shared + requests * own), 0


def named_rows() -> int:
    """Rows of the head that the candidates name, were they all different."""
    return BEAMS * NUCLEUS * HIDDEN * 2


def table() -> str:
    logits, scored = BEAMS * VOCAB * 2, 2 * BEAMS * NUCLEUS * HIDDEN
    merged = 3 * BEAMS * HEADS * (128 * 2 + 4)
    floors = {
        "`tree_attention`, 1,200 tokens, head size 128": attention(1200),
        "`tree_attention`, 1,200 tokens, head size 64": attention(1200, 64),
        "`tree_attention`, 4,096 tokens": attention(4096),
        "`tree_attention`, 32,768 tokens": attention(32768),
        "`tree_attention`, 32,768 tokens, fp8 caches": attention(32768, stored=1),
        "`append_kv` with RoPE": append(),
        "`advance_tree`, 4,096 tokens": (24 * 4096, 0),
        "`block_plan`, 4,096 tokens shared by 32 requests": pages(32, 256, 16),
        "`block_plan`, 8,000 blocks shared by 1,024 requests": pages(1024, 8000, 192),
        "`nucleus`": (logits + 8 * BEAMS * NUCLEUS, 0),
        "`multifurcation_head`": (named_rows() + BEAMS * HIDDEN * 2, scored),
        "`select_beam`": (8 * BEAMS * NUCLEUS + 12 * BEAMS, 0),
        "`multifurcate`": (logits + named_rows() + BEAMS * HIDDEN * 2, scored),
        "`merge_attention`": (merged, 0),
        "`gather_kv`, 4,096 tokens per beam": gather(4096),
    }
    lines = [["op", "MB", "memory, us", "products, us"]]
    for name, (moved, operations) in floors.items():
        took = operations / PRODUCTS * 1e6
        products = f"{took:.2f}" if took >= 0.005 else ""
        lines.append([name, f"{moved / 1e6:.2f}", f"{moved / COPY * 1e6:.2f}", products])
    return markdown(lines)


if __name__ == "__main__":
    print(table(), end="")
