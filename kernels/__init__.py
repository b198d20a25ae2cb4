"""Triton kernels of fastunet, one operation per file. Import as ``fastunet.kernels``.

They import each other relatively, and of fastunet only :mod:`fastunet.layout` and :mod:`fastunet.architecture`, by
name: whoever takes the folder elsewhere sees at once what must come along.

Every launcher has the name, the arguments and the results of its twin in :mod:`fastunet.aten`;
:mod:`fastunet.ops` registers both behind one operator.
"""

if __name__ != "fastunet.kernels":
    raise ImportError(
        f"these kernels must be imported as 'fastunet.kernels', not as '{__name__}': install fastunet with "
        "'pip install -e .' and import it by that name"
    )

from .add import add_act, add_act_backward
from .affine import affine_act, affine_act_backward, bn_affine, bn_affine_backward, bn_affine_running
from .confusion import confusion_matrix, confusion_matrix_of_masks
from .conv import conv2d, conv2d_act, conv_transpose2d
from .conv_backward import conv2d_backward, conv_transpose2d_backward
from .group_affine import group_affine, group_affine_backward
from .head import head_predict, head_stats, head_stats_backward
from .pool import max_pool2x2, max_pool2x2_backward
from .prelu import affine_prelu, affine_prelu_backward
from .resample import avg_pool2x2, avg_pool2x2_backward, pad_replicate, pad_replicate_backward
from .softmax_stats import softmax_stats, softmax_stats_backward
from .upsample import upsample_concat, upsample_concat_backward

__all__ = [
    "add_act",
    "add_act_backward",
    "affine_act",
    "affine_act_backward",
    "affine_prelu",
    "affine_prelu_backward",
    "avg_pool2x2",
    "avg_pool2x2_backward",
    "bn_affine",
    "bn_affine_backward",
    "bn_affine_running",
    "confusion_matrix",
    "confusion_matrix_of_masks",
    "conv2d",
    "conv2d_act",
    "conv2d_backward",
    "conv_transpose2d",
    "conv_transpose2d_backward",
    "group_affine",
    "group_affine_backward",
    "head_predict",
    "head_stats",
    "head_stats_backward",
    "max_pool2x2",
    "max_pool2x2_backward",
    "pad_replicate",
    "pad_replicate_backward",
    "softmax_stats",
    "softmax_stats_backward",
    "upsample_concat",
    "upsample_concat_backward",
]
