"""What the compile gate holds kernels to beyond its rules, and what it lets pass, by patterns in entries' names.

A bound that a kernel has reached belongs here; a tolerated spill leaves when its tile does.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """What the main loop of some entries may cost."""

    pattern: str
    issue_slots: float = float("inf")  # per tensor clock
    shared_stores: float = float("inf")  # instructions; 0: no round trip through shared memory


# Tiles of 128 pixels by 64 channels, which are those of all layers but the first and the last.
LIMITS = (
    Limit(r"^_conv_fwd_kernel bf16 KSIZE=3 .*BLOCK_C=32 BLOCK_K=64 .* sm_90$", issue_slots=3.9),
    Limit(r"^_conv_dgrad_kernel bf16 KSIZE=3 STRIDE=1 .*BLOCK_K=32 BLOCK_C=64 .* sm_90$", 1.2, shared_stores=0),
    Limit(r"^_conv_wgrad_kernel bf16 KSIZE=3 .*BLOCK_A=64 BLOCK_B=64 .* sm_90$", issue_slots=3.9),
)

# Bytes a thread. But for the TF32 dgrad they are stored and loaded outside the main loop.
TOLERATED_SPILLS = {
    r"^_conv_fwd_kernel bf16 .*BLOCK_C=32 BLOCK_K=64 .* sm_(80|86|89|100|120)$": 24,
    r"^_conv_fwd_kernel fp32 .*BLOCK_C=16 .* sm_(80|86|89|90|120)$": 24,
    r"^_conv_dgrad_kernel bf16 .* sm_(86|89|120)$": 8,
    r"^_conv_dgrad_kernel fp32 .*PRECISION=tf32 .* sm_(80|100)$": 88,
    r"^_conv_wgrad_kernel bf16 .*BLOCK_A=32 BLOCK_B=16 .* sm_(90|100)$": 8,
    r"^_conv_wgrad_kernel fp32 .*PRECISION=ieee .* sm_(86|89)$": 16,
    r"^_upsample_bwd_kernel bf16 .* sm_(86|89)$": 8,
}
