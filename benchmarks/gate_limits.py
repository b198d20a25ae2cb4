"""What the compile gate holds kernels to beyond its rules, by patterns in entries' names.

A bound that a kernel has reached belongs here. Of a forward's two loops the one that masks counts, which only tiles at
the border run, unless ``least_slots`` says otherwise.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """What the main loop of some entries may cost."""

    pattern: str
    issue_slots: float = float("inf")  # per tensor clock
    least_slots: float = float("inf")  # of the cheaper loop
    shared_stores: float = float("inf")  # instructions; 0: no round trip through shared memory


@dataclass(frozen=True)
class Spill:
    """Bytes that a thread of some entries spills, of shapes that nobody hurries for."""

    pattern: str
    most: int


SPILLS = (
    # Odd channels: in float32 two sources under a head, every statistic of a head at once, exact products of stride 2;
    # in 16 bits statistics and gradients.
    Spill(r"^_conv3x3_dgrad_kernel fp16 .* outputs=16 reduction=16 .* stages=3 sm_80$", 16),
    Spill(r"^_conv3x3_fwd_kernel fp32 HEAD=16 images=1 rows=1 columns=64 .* precision=tf32 .* sm_90$", 24),
    Spill(r"^_conv3x3_fwd_kernel fp32 HEAD=16 images=1 rows=1 columns=64 .* precision=tf32 .* sm_80$", 56),
    Spill(r"^_head_stats_backward_kernel fp32 .*C=17 K=3 .* PRECISION=tf32 .* sm_90$", 16),
    Spill(r"^_batch_stats_kernel fp16 BLOCK_P=32 BLOCK_K=32 .* sm_90$", 16),
    Spill(r"^_conv_down_fwd_kernel fp32 KSIZE=3 STRIDE=2 images=1 rows=1 columns=32 .* precision=ieee .* sm_80$", 8),
    # Blackwell: odd channels, and float32 heads.
    Spill(r"^_conv3x3_fwd_kernel fp16 HEAD=16 .* outputs=32 reduction=32 .* stages=3 sm_100$", 40),
    Spill(r"^_head_stats_backward_kernel fp32 .*C=17 K=3 .* sm_100$", 24),
    Spill(r"^_upsample_bwd_kernel fp16 .* BLOCK_W=8 BLOCK_C=32 .* sm_100$", 8),
)


# The bounds of the convolutions: 1.3 slots with a prologue, 0.7 without, 1.9 for wgrad.
LIMITS = (
    # On Hopper not of a source that is cropped: TMA cannot bring it, and a tile of its own loads it by pointers.
    Limit(
        r"^_conv3x3_fwd_kernel bf16 HEAD=0 (?!.* reduction=32 .* stages=3 sm_90).* outputs=(64|128) .* sm_(80|90)$",
        issue_slots=1.3,
        shared_stores=0,
    ),
    # Under a head nothing is normalised, unless the layers before it are not the usual ones: then 0.92.
    Limit(r"^_conv3x3_fwd_kernel bf16 HEAD=(16|32) .* sm_(80|90)$", issue_slots=0.95, shared_stores=0),
    Limit(r"^_conv3x3_dgrad_kernel bf16 .* outputs=(64|128) reduction=(32|64) .* sm_(80|90)$", 0.7, shared_stores=0),
    Limit(r"^_conv3x3_wgrad_kernel bf16 .* outputs=(32|64|128) .* sm_(80|90)$", issue_slots=1.9, shared_stores=0),
    # Two programs of 64 pixels and 4 warps a processor took 0.8 of the time of one of 1.17 slots on an H200.
    Limit(r"^_conv_up_fwd_kernel bf16 .* sm_(80|90)$", issue_slots=1.5, shared_stores=0),
    Limit(r"^_conv_down_fwd_kernel bf16 KSIZE=3 .* outputs=(128|256) .* sm_(80|90)$", issue_slots=1.3, shared_stores=0),
    # Nothing that it normalises meets two taps; of 64 filters only tiles inside the picture keep to 1.3, or nearly.
    Limit(r"^_conv_down_fwd_kernel bf16 KSIZE=3 .* outputs=64 .* sm_(80|90)$", 1.65, least_slots=1.32, shared_stores=0),
    Limit(r"^_conv_(up|down)_dgrad_kernel bf16 KSIZE=[23] .* sm_(80|90)$", issue_slots=0.7, shared_stores=0),
    Limit(r"^_conv_strided_wgrad_kernel bf16 KSIZE=[23] .* sm_(80|90)$", issue_slots=1.9, shared_stores=0),
)
