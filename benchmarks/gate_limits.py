"""What the compile gate holds kernels to beyond its rules, by patterns in entries' names.

A bound that a kernel has reached belongs here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """What the main loop of some entries may cost."""

    pattern: str
    issue_slots: float = float("inf")  # per tensor clock
    shared_stores: float = float("inf")  # instructions; 0: no round trip through shared memory


# The convolutions on the tiles of all layers but the first and the last. Of the forward's two loops the one that masks
# is counted, which only tiles at the border run.
LIMITS = (
    Limit(r"^_conv3x3_fwd_kernel bf16 .* BLOCK_C=64 BLOCK_K=(64|128) .* sm_90$", issue_slots=1.3),
    Limit(r"^_conv3x3_dgrad_kernel bf16 .* BLOCK_C=(64|128) BLOCK_K=64 .* sm_90$", issue_slots=0.7, shared_stores=0),
    Limit(r"^_conv3x3_wgrad_kernel bf16 .* BLOCK_C=(64|128) BLOCK_K=64 .* sm_90$", issue_slots=1.9, shared_stores=0),
    # A strided forward onto 64 channels has too few filters to multiply with what it normalises.
    Limit(r"^_conv_(down|up)_fwd_kernel bf16 KSIZE=[23] .* BLOCK_K=(128|256) .* sm_90$", issue_slots=1.3),
    Limit(r"^_conv_(down|up)_dgrad_kernel bf16 KSIZE=[23] .* sm_90$", issue_slots=0.7, shared_stores=0),
    Limit(r"^_conv_strided_wgrad_kernel bf16 KSIZE=[23] .* sm_90$", issue_slots=1.9),
)
