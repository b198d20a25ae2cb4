"""Faults planted in the kernels, the torch backend, the networks and the losses: do the ordinary tests notice?

    make faults                          every fault, one after the other
    make faults ARGS="conv ignored"      those whose name or file holds one of these words

Each is a text that occurs once in a file of the package, what takes its place, and tests that must then fail. The
checkout is copied to a temporary folder, the fault is planted there, and only those tests run. The exit status is not 0
if a fault goes unnoticed, or a text occurs no more: ``tests/test_faults.py`` looks at the texts in every run.

The faults under "found from outside" once were there: each is a line of CHANGELOG.md's "Fixed" or of a refusal's test.
(Faults in compiled kernels, a missing barrier or fence, are planted by ``make ptx ARGS="--faults 100"``; what the
compile gate is to see, by ``tests/planted_kernels.py``.)
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
COPIED = ("fastunet", "kernels", "benchmarks", "tests", "pyproject.toml", "README.md", "LICENSE", "Makefile")


@dataclass(frozen=True)
class Fault:
    """One change of one file. ``tests`` are arguments of pytest; a name without a dot is one of a file's tests."""

    name: str
    file: str
    old: str
    new: str
    tests: str


def _drawn(call: str) -> str:
    """The property test of a call."""
    return f"tests/test_properties.py::test_any_call[{call}]"


def _one_pass(operator: str) -> str:
    return f"tests/test_one_pass.py::test_values_and_gradients[triton-{operator}]"


KERNELS = [
    Fault(
        "padding is act(shift), not 0",
        "kernels/gemm.py",
        "z = (bits & tl.expand_dims(kept, AXIS).to(bits.dtype)).to(ACC, bitcast=True)",
        "z = bits.to(ACC, bitcast=True)",
        "tests/test_conv.py::test_forward_and_backward -k 'triton and float32 and padded-on-all-sides'",
    ),
    Fault(
        "a 3×3 tile at the border is taken for one inside",
        "kernels/conv3x3.py",
        "(over.h + TILE.rows < inside.h_high)",
        "(over.h + TILE.rows <= inside.h_high)",
        "tests/test_conv.py::test_every_chip -k tile-inside",
    ),
    Fault(
        "wgrad's rows are off by one",
        "kernels/conv3x3_wgrad.py",
        "at.h + frame.top + (i - 1)",
        "at.h + frame.top + i",
        "tests/test_conv.py::test_forward_and_backward -k 'triton and float32 and padded-on-all-sides'",
    ),
    Fault(
        "a picture's neighbours are one column on",
        "kernels/conv_image.py",
        "((s - 1) * C + t % C)",
        "(s * C + t % C)",
        "tests/test_conv.py::test_forward_and_backward -k 'triton and float32 and image'",
    ),
    Fault(
        "a transposed convolution's taps are shifted",
        "kernels/conv_up.py",
        "+ b + 1 - 2 * right",
        "+ b + 1 - right",
        "tests/test_conv.py::test_forward_and_backward -k 'triton and float32 and transposed-3x3'",
    ),
    Fault(
        "a strided convolution reads the pixel below",
        "kernels/conv_down.py",
        "pixel = Pixel(at.n, STRIDE * at.h + r - PAD, at.w)",
        "pixel = Pixel(at.n, STRIDE * at.h + r, at.w)",
        "tests/test_conv.py::test_forward_and_backward -k 'triton and float32 and stride-2'",
    ),
    Fault(
        "a strided tile at the border is taken for one inside",
        "kernels/conv_down.py",
        "(at.w >= WIDE - 1)",
        "(at.w >= 0)",
        "tests/test_conv.py::test_every_chip -k stride-2-a-tile-inside",
    ),
    Fault(
        "a weight is read from the other source's channels",
        "kernels/gemm.py",
        "    c = filters.first + c\n",
        "    c = 0 * filters.first + c\n",
        "tests/test_conv.py::test_forward_and_backward -k 'triton and float32 and padded-on-all-sides'",
    ),
    Fault(
        "a sum of squares is not centred",
        "kernels/statistics.py",
        "pivot = tl.sum(tl.where(mask, y.to(ACC), 0.0), 0) / some",
        "pivot = tl.zeros([BLOCK_K], ACC)",
        "tests/test_conv_algorithms.py::test_statistics_are_centred",
    ),
    Fault(
        "a tile's variance is of one pass",
        "kernels/statistics.py",
        "    m2 = tl.sum(squares, 0)\n",
        "    for i in tl.static_range(ROWS):\n        whole = tl.where((rows > i)[:, None], ys[i].to(ACC), 0.0)\n"
        "        squares = whole * whole if i == 0 else squares + whole * whole\n"
        "    m2 = tl.sum(squares, 0) - n * mean * mean\n",
        "tests/test_conv.py::test_statistics_are_centred",
    ),
    Fault(
        "means of tiles are merged without their sizes",
        "kernels/statistics.py",
        "tl.sum(m2 + apart * apart * n[:, None], 0)",
        "tl.sum(m2 + apart * apart, 0)",
        "tests/test_conv.py::test_statistics_of_many_tiles",
    ),
    Fault(
        "dY has half the variance's gradient",
        "kernels/conv_backward.py",
        "slope = tl.load(dvar_ptr + k, mask=k < K, other=0.0) * (2.0 / count)",
        "slope = tl.load(dvar_ptr + k, mask=k < K, other=0.0) * (1.0 / count)",
        "tests/test_conv.py::test_gradient_of_one_output_alone",
    ),
    Fault(
        "a bias' gradient counts pixels that are not there",
        "kernels/conv_backward.py",
        "total += tl.sum(tl.where(mask, d, 0.0), 0)",
        "total += tl.sum(d, 0)",
        "tests/test_conv.py::test_forward_and_backward -k 'triton and float32 and stride-2-odd'",
    ),
    Fault(
        "dx lacks the scale",
        "kernels/affine.py",
        "dx = g * affine.scale[None, :]",
        "dx = g",
        _drawn("triton-affine_act"),
    ),
    Fault(
        "the scale's gradient is not centred",
        "kernels/affine.py",
        "gx = g * (x.to(ACC) - affine.centre[None, :])",
        "gx = g * x.to(ACC)",
        _drawn("triton-affine_act"),
    ),
    Fault(
        "running variances are biased",
        "kernels/affine.py",
        "MOMENTUM * (unbiased - running.to(ACC))",
        "MOMENTUM * (var - running.to(ACC))",
        _drawn("triton-bn_affine_running"),
    ),
    Fault(
        "a NaN does not pass a ReLU",
        "kernels/common.py",
        "        value = tl.maximum(z, 0.0, propagate_nan=PROPAGATE_ALL)\n",
        "        value = tl.where(z > 0.0, z, 0.0)\n",
        "tests/test_affine.py::test_nan_and_infinity_propagate",
    ),
    Fault(
        "a sum reads a row too many",
        "kernels/common.py",
        "mask = (row < slabs)[:, None]",
        "mask = (row <= slabs)[:, None]",
        "tests/test_affine.py::test_a_sum_reads_its_own_rows_only",
    ),
    Fault(
        "pooling writes a window too many",
        "kernels/pool.py",
        "inside = (w < W // 2)[:, None] & (c < C)[None, :]",
        "inside = (w <= W // 2)[:, None] & (c < C)[None, :]",
        _drawn("triton-max_pool2x2"),
    ),
    Fault(
        "pooling's rows are as long as an even picture's",
        "kernels/pool.py",
        "p_index = (q.to(tl.int64) * (W // 2) + w)",
        "p_index = (q.to(tl.int64) * ((W + 1) // 2) + w)",
        _drawn("triton-max_pool2x2"),
    ),
    Fault(
        "of equals the last one wins",
        "kernels/pool.py",
        "better = ((x > best)",
        "better = ((x >= best)",
        "tests/test_pool.py::test_forward_and_backward -k triton",
    ),
    Fault(
        "a negative scale takes the largest",
        "kernels/pool.py",
        "return (scale < 0)[None, :], (scale == 0)[None, :]",
        "return (scale < -9)[None, :], (scale == 0)[None, :]",
        _drawn("triton-max_pool2x2"),
    ),
    Fault(
        "bilinear weights are swapped",
        "kernels/upsample.py",
        "tl.where(even, 0.75, 0.25)",
        "tl.where(even, 0.25, 0.75)",
        "tests/test_upsample.py::test_forward_and_backward -k triton",
    ),
    Fault(
        "upsampling's gradient includes the padding",
        "kernels/upsample.py",
        "first_h, end_h = tl.maximum(top, 0), tl.minimum(top + 2 * H, YH)",
        "first_h, end_h = tl.maximum(top, 0), YH",
        "tests/test_upsample.py::test_forward_and_backward -k triton",
    ),
    Fault(
        "a softmax's gradient lacks its mean",
        "kernels/softmax_stats.py",
        "dx = q - p * tl.sum(q, axis=1)[:, None]",
        "dx = q",
        _drawn("triton-softmax_stats"),
    ),
    Fault(
        "weights of pixels are lost",
        "kernels/softmax_stats.py",
        "ce = tl.where(counted, ce * truth.weight, 0.0)",
        "ce = tl.where(counted, ce, 0.0)",
        _drawn("triton-softmax_stats"),
    ),
    Fault(
        "a label that is no class is smoothed",
        "kernels/softmax_stats.py",
        "known = valid & (label >= 0)[:, None]",
        "known = valid",
        "tests/test_softmax_stats.py::test_a_label_out_of_range_is_no_class",
    ),
    Fault(
        "ignored pixels are counted",
        "kernels/confusion.py",
        "        counted = row & (label != ignore_index)\n        known",
        "        counted = row\n        known",
        _drawn("triton-confusion_matrix_of_masks"),
    ),
    Fault(
        "a head's bias is lost",
        "kernels/head.py",
        "    if layer.bias is not None:\n        acc += ",
        "    if False:\n        acc += ",
        _drawn("triton-head_stats"),
    ),
    Fault(
        "every sample has the first one's affine",
        "kernels/common.py",
        "return affine_ptr + n.to(tl.int64) * (3 * C)",
        "return affine_ptr + 0 * n.to(tl.int64)",
        "tests/test_samples.py::test_values_and_gradients -k triton",
    ),
    Fault(
        "sums of samples change places with those of tiles",
        "kernels/common.py",
        "Slab((number % tiles).to(tl.int64) * N + n, number % tiles)",
        "Slab(number.to(tl.int64), number % tiles)",
        "tests/test_samples.py::test_values_and_gradients -k 'triton and conv2d_picture or triton and conv2d_3_1_5'",
    ),
    Fault(
        "a weight gradient keeps the affine of its first sample",
        "kernels/conv3x3_wgrad.py",
        "        if SAMPLES:\n",
        "        if SAMPLES and number == walk.start:\n",
        "tests/test_samples.py::test_values_and_gradients -k 'triton and conv2d_3_1_5'",
    ),
    Fault(
        "a tile of several samples reads the first one's affine",
        "kernels/samples.py",
        "return tile.images > 1 and any(source.samples for source in sources)",
        "return False",
        "tests/test_samples.py::test_values_and_gradients -k 'triton and conv_transpose2d'",
    ),
    Fault(
        "a doubled pixel has the gradients of two of its four",
        "kernels/conv3x3.py",
        "(g + below).reshape(",
        "g.reshape(",
        "tests/test_conv_algorithms.py::test_doubled_in_tiles_of_two_rows -k alone",
    ),
    Fault(
        "a tile adds up the gradients of doubled pixels that begin in another",
        "kernels/doubled.py",
        "(tile.rows, tile.columns, source.top, source.left)",
        "(tile.rows, tile.columns)",
        "tests/test_conv_algorithms.py::test_doubled_in_tiles_of_two_rows -k odd-places",
    ),
    Fault(
        "the act of a sum is that of one side",
        "kernels/add.py",
        "g = before_act(g, s, SUM_SLOPE)",
        "g = before_act(g, x.to(ACC), SUM_SLOPE)",
        _one_pass("add_act"),
    ),
    Fault(
        "samples leave their shares of a sum's gradient in one place",
        "kernels/add.py",
        "share = slab * tl.num_programs(2) + n",
        "share = slab",
        _one_pass("add_act"),
    ),
    Fault(
        "an odd end has a gradient of its average",
        "kernels/resample.py",
        "within = tl.where(h < H // 2 * 2, W // 2 * 2, 0)",
        "within = tl.where(h < H // 2 * 2, W, 0)",
        _one_pass("avg_pool2x2"),
    ),
    Fault(
        "the corner of a repeated row and column counts twice",
        "kernels/resample.py",
        "mask=(right & under)[:, None]",
        "mask=right[:, None]",
        _one_pass("pad_replicate"),
    ),
    Fault(
        "a learnt slope's gradient takes all pixels",
        "kernels/prelu.py",
        "sum_below += tl.where(s > 0, 0.0, dz * s)",
        "sum_below += dz * s",
        _one_pass("affine_prelu"),
    ),
]

TORCH = [
    Fault(
        "a frame's rows and columns are swapped",
        "fastunet/layout.py",
        "pad = [left, size[1] - width - left, top, size[0] - height - top]",
        "pad = [top, size[1] - width - top, left, size[0] - height - left]",
        _drawn("torch-conv2d"),
    ),
    Fault(
        "dY has half the variance's gradient",
        "fastunet/aten.py",
        "dvar * (2.0 / count)",
        "dvar * (1.0 / count)",
        _drawn("torch-conv2d"),
    ),
    Fault(
        "dY lacks the mean's gradient",
        "fastunet/aten.py",
        "dmean / count",
        "dmean / count * 0",
        "tests/test_conv.py::test_gradient_of_one_output_alone -k torch",
    ),
    Fault(
        "the second source gets the first one's gradient",
        "fastunet/aten.py",
        "        start = stop\n    if x1 is None:",
        "        start = 0\n    if x1 is None:",
        _drawn("torch-conv2d"),
    ),
    Fault(
        "the centre's gradient lacks the scale",
        "fastunet/aten.py",
        "torch.stack([dscale, dshift, -scale * dshift])",
        "torch.stack([dscale, dshift, -dshift])",
        _drawn("torch-affine_act"),
    ),
    Fault(
        "running means stay",
        "fastunet/aten.py",
        "running_mean.lerp_(mean.to(running_mean.dtype), momentum)",
        "running_mean.lerp_(running_mean, momentum)",
        _drawn("torch-bn_affine_running"),
    ),
    Fault(
        "weights of pixels are lost in the gradient",
        "fastunet/softmax_stats.py",
        "at_label -= cost if w is None else cost.mul_(w)",
        "at_label -= cost",
        "tests/test_softmax_stats.py::test_equals_float64_truth -k torch",
    ),
    Fault(
        "a gradient is written into what came in",
        "fastunet/aten.py",
        "        dx = dx + aten.max_pool2d",
        "        dx += aten.max_pool2d",
        f"{_drawn('torch-pool_fork')} tests/test_pool.py",
    ),
    Fault(
        "large pictures' gradients are not centred",
        "fastunet/aten.py",
        "level = scale * dbias / -count - rise * mean",
        "level = scale * dbias / -count",
        "tests/test_eager.py::test_a_layer_over_many_pixels_is_as_exact_as_pytorchs",
    ),
    Fault(
        "a folded bias is lost",
        "fastunet/folding.py",
        "centre = mean if bias is None else mean - bias",
        "centre = mean",
        "tests/test_eager.py::test_folded_weights",
    ),
    Fault(
        "weights that were kept are not compared",
        "fastunet/folding.py",
        "if before is not now and not (before.dtype is now.dtype and torch.equal(before, now)):",
        "if before is not now and before is None:",
        "tests/test_eager.py::test_weights_that_change_are_noticed",
    ),
    Fault(
        "a list of operations outlives a parameter",
        "fastunet/plan.py",
        "and all(map(operator.is_, _holding(filled), self.held))",
        "and True",
        "tests/test_eager.py::test_a_network_that_is_another_is_not_taken_for_what_it_was",
    ),
    Fault(
        "a list of operations outlives a setting",
        "fastunet/plan.py",
        "and attributes == self._values",
        "and len(attributes) == len(self._values)",
        "tests/test_eager.py::test_a_network_that_is_another_is_not_taken_for_what_it_was",
    ),
    Fault(
        "a list of operations outlives the order of modules",
        "fastunet/plan.py",
        "filled = [*map(attributes.__getitem__, self._places)]",
        "filled = [*map(self._values.__getitem__, self._places)]",
        "tests/test_eager.py::test_a_network_that_is_another_is_not_taken_for_what_it_was",
    ),
    Fault(
        "a list of operations outlives what an attribute cannot be compared with",
        "fastunet/plan.py",
        "except Exception:",
        "except (RuntimeError, TypeError, ValueError):",
        "tests/test_eager.py::test_who_listens_or_replaces_is_heard",
    ),
    Fault(
        "a list of operations outlives the names of tensors",
        "fastunet/plan.py",
        "and [*chain.from_iterable(filled)] == self._names",
        "and True",
        "tests/test_eager.py::test_a_network_that_is_another_is_not_taken_for_what_it_was",
    ),
    Fault(
        "a batch norm of many pixels has running statistics of another size",
        "fastunet/eager.py",
        "(t.dtype, t.shape) == of_y",
        "t.dtype == y.dtype",
        "tests/test_eager.py::test_what_does_not_fit_is_refused_by_the_modules_name",
    ),
    Fault(
        "oneDNN takes a bias as if its numbers were adjacent",
        "fastunet/folding.py",
        "_folded(_Layer._make([*copies, layer.eps]), 0)",
        "_folded(layer, 0)",
        "tests/test_eager.py::test_weights_that_change_are_noticed",
    ),
    Fault(
        "a list of operations outlives a hook",
        "fastunet/plan.py",
        "and not any(self._empty)",
        "and len(self._empty) >= 0",
        "tests/test_eager.py::test_a_network_that_is_another_is_not_taken_for_what_it_was",
    ),
    Fault(
        "a list of operations writes to the input",
        "fastunet/plan.py",
        "self.sound &= not _written(func._schema.arguments[i])",
        "self.sound &= True",
        "tests/test_eager.py::test_a_network_that_is_another_is_not_taken_for_what_it_was",
    ),
    Fault(
        "a list of operations forgets what is made of kept weights",
        "fastunet/plan.py",
        "return same and all(",
        "return same or all(",
        "tests/test_eager.py::test_a_network_that_is_another_is_not_taken_for_what_it_was",
    ),
    Fault(
        "a tensor is freed before its last reader",
        "fastunet/plan.py",
        "[*last - needed]",
        "[*last]",
        "tests/test_eager.py::test_the_third_inference_is_a_list_of_operations",
    ),
    Fault(
        "batches are not counted",
        "fastunet/eager.py",
        "            batches.add_(1)\n            if momentum is None:  # the mean",
        "            if momentum is None:  # the mean",
        "tests/test_eager.py::test_a_large_picture_trains_as_the_reference",
    ),
    Fault(
        "group norms of many pixels are added up one by one",
        "fastunet/eager.py",
        "elif context.precise and type(norm) is nn.GroupNorm and _loses_digits(y):",
        "elif False:",
        "tests/test_eager.py::test_a_group_norm_over_many_pixels_is_as_exact_as_pytorchs",
    ),
    Fault(
        "cumulative batch norms of many pixels are ATen's",
        "fastunet/eager.py",
        "return _loses_digits(y) and all(",
        "return norm.momentum is not None and _loses_digits(y) and all(",
        "tests/test_eager.py::test_unusual_batch_norms_over_many_pixels",
    ),
    Fault(
        "checkpointing moves statistics twice",
        "fastunet/blocks.py",
        "            with _frozen_running_stats(module):\n                return function(*acts)\n",
        "            return function(*acts)\n",
        "tests/test_models.py::test_checkpointing_gives_the_same_gradients_and_updates_statistics_once",
    ),
    Fault(
        "a hooked module is not called",
        "fastunet/blocks.py",
        '        own["_forward_hooks"]\n        or own',
        "        own",
        "tests/test_models.py::test_a_forward_hook_on_any_one_module tests/test_random_networks.py",
    ),
    Fault(
        "a class' weight is lost",
        "fastunet/losses.py",
        "ce, total = ce * weight, total * weight",
        "total = total * weight",
        "tests/test_losses.py::test_cross_entropy_is_pytorchs",
    ),
]

# What issues and trials from outside found, planted again.
FOUND = [
    Fault(
        "statistics of a CPU are added up one by one",
        "fastunet/aten.py",
        "    if adds_one_by_one(wide):\n        return _pixel_stats(wide)\n",
        "",
        "tests/test_eager.py::test_statistics_over_many_pixels",
    ),
    Fault(
        "an affine's gradients of a CPU are added up one by one",
        "fastunet/aten.py",
        "        dscale, dshift = _pixel_dots(_blocks(x, _LONG), _blocks(dz, _LONG), centre)\n",
        "        _, dscale, dshift = aten.native_batch_norm_backward(\n"
        "            dz, x, scale, centre, one, centre, one, False, 0.0, [False, True, True]\n"
        "        )\n",
        "tests/test_properties.py::test_many_pixels",
    ),
    Fault(
        "a single filter's stride is believed",
        "fastunet/aten.py",
        "return weight.contiguous() if weight.shape[0] == 1 else weight",
        "return weight",
        "tests/test_conv.py::test_a_single_filter_in_any_memory",
    ),
    Fault(
        "a single picture's stride is believed",
        "fastunet/aten.py",
        "        dz = dz.contiguous(memory_format=memory_format(x))",
        "        dz = dz  # dz.contiguous(memory_format=memory_format(x))",
        "tests/test_affine.py::test_any_layout",
    ),
    Fault(
        "an ignored class lowers the mean",
        "fastunet/metrics.py",
        "            score[self.ignore_index] = torch.nan\n",
        "            pass\n",
        "tests/test_metrics.py::test_an_ignored_class_has_no_score_and_lowers_no_mean",
    ),
    Fault(
        "a softmax of one channel learns nothing",
        "fastunet/losses.py",
        'if classes == 1 and mode == "softmax":',
        "if False:",
        "tests/test_losses.py::test_a_softmax_of_one_channel_is_refused",
    ),
    Fault(
        "weight of one channel does nothing",
        "fastunet/losses.py",
        'if classes == 1 and self.weight is not None and self._wanted()["entropy"]:',
        "if False:",
        "tests/test_wrong_calls.py::test_a_wrong_call_is_refused_in_a_sentence",
    ),
    Fault(
        "pos_weight is no weight of the mean",
        "fastunet/losses.py",
        "return torch.where(plane == 1, weight * self.pos_weight, weight), weight.flatten(1).sum(1)",
        "return torch.where(plane == 1, weight * self.pos_weight, weight), None",
        "tests/test_losses.py::test_pos_weight_is_pytorchs",
    ),
    Fault(
        "a program exported without gradients cannot be called with them",
        "fastunet/dispatch.py",
        "_FUNCTIONS[operator] = _underivable(operator)",
        "return operator",
        "tests/test_models.py::test_a_program_exported_without_gradients_is_called_with_them",
    ),
    Fault(
        "pos_weight multiplies infinite weights of ignored pixels",
        "fastunet/losses.py",
        "weight = pixel_weight.to(weight.dtype).masked_fill(~kept, 0)",
        "weight = pixel_weight.to(weight.dtype) * kept",
        "tests/test_losses.py::test_a_large_pos_weight_costs_no_digits_of_the_mean",
    ),
    Fault(
        "class weights in float64 are rounded",
        "fastunet/losses.py",
        "weight = weight if weight.is_floating_point() else weight.to(torch.get_default_dtype())",
        "weight = weight.to(torch.get_default_dtype())",
        "tests/test_losses.py::test_class_weights_in_float64_stay_so",
    ),
    Fault(
        "versions 2 and 3 of Pytorch-UNet are version 4",
        "fastunet/metrics.py",
        "if reduce_batch_first and version < 4:",
        "if False:",
        "tests/test_metrics.py::test_multiclass_dice_coeff_knows_the_versions_of_pytorch_unet",
    ),
    Fault(
        "probabilities are taken for logits",
        "fastunet/losses.py",
        "        _warn_of_probabilities(logits)\n    ignored",
        "        pass\n    ignored",
        "tests/test_losses.py::test_probabilities_in_place_of_logits_are_warned_of_once",
    ),
    Fault(
        "operators mix devices",
        "fastunet/dispatch.py",
        "        if isinstance(x, Tensor) and x.device != device:\n            raise",
        "        if False:\n            raise",
        "tests/test_devices.py::test_operators_refuse_tensors_of_two_devices",
    ),
    Fault(
        "networks on a CPU mix devices",
        "fastunet/eager.py",
        "    _check_devices(parts[0], conv, norm)\n",
        "",
        "tests/test_eager.py::test_what_does_not_fit_is_refused_by_the_modules_name",
    ),
    Fault(
        "the size is checked against the constructor's levels",
        "fastunet/models.py",
        "            self._check_size(x)\n",
        '            raise ValueError("expected height and width of at least 16")\n',
        "tests/test_surgery.py::test_a_removed_level",
    ),
    Fault(
        "channels are the constructor's",
        "fastunet/models.py",
        "return self._channels if conv is None else conv.in_channels",
        "return self._channels",
        "tests/test_surgery.py::test_a_replaced_first_convolution tests/test_surgery.py::test_an_adapter_in_front",
    ),
    Fault(
        "predict and loss do not call an own forward",
        "fastunet/models.py",
        "        return (\n            kind.forward in _FORWARDS and",
        "        return True or (\n            kind.forward in _FORWARDS and",
        "tests/test_surgery.py::test_predict_and_loss_call_what_is_called",
    ),
    Fault(
        "a patched _conv_forward is ignored",
        "fastunet/blocks.py",
        '        or "_conv_forward" in own  # patched for seamless tiles\n',
        "",
        "tests/test_surgery.py::test_a_replaced_part_of_a_convolution",
    ),
    Fault(
        "DDP overwrites counts",
        "fastunet/metrics.py",
        "        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)\n",
        '        self.register_buffer("matrix", torch.zeros(num_classes, num_classes, dtype=torch.int64))\n',
        "tests/test_metrics.py::test_counts_inside_a_ddp_module_are_those_of_their_process",
    ),
    Fault(
        "counts are not saved",
        "fastunet/metrics.py",
        '        destination[f"{prefix}matrix"] = self.matrix\n',
        "",
        "tests/test_metrics.py::test_its_state_and_its_options_are_told",
    ),
    Fault(
        "losses do not show their options",
        "fastunet/losses.py",
        'return ", ".join(f"{name}={value!r}" for name, value in options.items())',
        'return ""',
        "tests/test_losses.py::test_options_are_told",
    ),
    Fault(
        "forward-mode derivatives are zero",
        "fastunet/dispatch.py",
        "        _refuse_tangents(args)\n        return implementation(*args)",
        "        return implementation(*args)",
        "tests/test_norms.py::test_forward_mode_derivatives_are_refused",
    ),
    Fault(
        "second derivatives are constant",
        "fastunet/dispatch.py",
        "    if torch.is_grad_enabled():\n        raise RuntimeError(",
        "    if False:\n        raise RuntimeError(",
        "tests/test_models.py::test_second_derivatives_are_refused_not_wrong",
    ),
    Fault(
        "a running mean alone is not moved",
        "fastunet/functional.py",
        "if (running_mean is None) != (running_var is None):",
        "if False:",
        "tests/test_wrong_calls.py::test_a_wrong_call_is_refused_in_a_sentence",
    ),
    Fault(
        "a prediction in a thread ends another one's eval mode",
        "fastunet/models.py",
        "changed = [module for module in model.modules() if module.training or module in _evaluated]",
        "changed = [module for module in model.modules() if module.training]",
        "tests/test_surgery.py::test_predictions_in_threads_leave_a_training_model_alone "
        "tests/test_surgery.py::test_a_prediction_that_outlasts_another",
    ),
    Fault(
        "compiled losses take labels out of range",
        "fastunet/losses.py",
        "            check_in_graph(labels, outcomes, ignore_index)\n",
        "            pass\n",
        "tests/test_losses.py::test_compiled_losses_refuse_labels_out_of_range",
    ),
    Fault(
        "labels are looked at while somebody traces",
        "fastunet/losses.py",
        "elif has_values(labels):",
        "else:",
        "tests/test_losses.py::test_labels_are_not_looked_at_while_somebody_traces",
    ),
    Fault(
        "cells' numbers have 32 bits",
        "fastunet/weight_map.py",
        "cells.to(torch.int64)",
        "cells.to(torch.int32)",
        "tests/test_weight_map.py::test_numbers_of_cells_keep_their_64_bits",
    ),
    Fault(
        "an install hides behind a folder of its name",
        "pyproject.toml",
        'mode = "strict"',
        'mode = "lenient"',
        "tests/test_packaging.py::test_an_editable_install_works_beside_a_folder_of_its_name",
    ),
    Fault(
        "a batch norm without a count breaks",
        "fastunet/activation.py",
        "    if batches is not None:\n        batches.add_(1)",
        "    if True:\n        batches.add_(1)",
        "tests/test_norms.py::test_states_of_a_batch_norm",
    ),
    Fault(
        "an empty batch is not counted",
        "fastunet/activation.py",
        "    if batches is not None:\n        batches.add_(1)",
        "    if batches is not None and count:\n        batches.add_(1)",
        "tests/test_norms.py::test_an_empty_batch_is_counted",
    ),
    Fault(
        "a cumulative norm counts a batch too many",
        "fastunet/activation.py",
        "momentum = batches.to(stats[0].dtype).reciprocal()",
        "momentum = (batches + 1).to(stats[0].dtype).reciprocal()",
        "tests/test_models.py::test_surgery -k bn-cumulative",
    ),
    Fault(
        "unsigned labels are not looked at",
        "fastunet/checks.py",
        "seen = labels.to(torch.int64) if labels.dtype in _FEW_OPERATIONS else labels",
        "seen = labels",
        "tests/test_losses.py::test_unsigned_labels_are_checked tests/test_metrics.py::test_unsigned_labels",
    ),
    Fault(
        "a mismatch names no module",
        "fastunet/models.py",
        'return type(error)(f"{error} ({name})")',
        "return type(error)(str(error))",
        "tests/test_surgery.py::test_a_mismatch_names_its_module",
    ),
    Fault(
        "labels with a channel get no hint",
        "fastunet/losses.py",
        'hint = "drop the channel with labels.squeeze(1)"',
        'hint = "pass those of the same pictures"',
        "tests/test_wrong_calls.py::test_a_wrong_call_is_refused_in_a_sentence",
    ),
    Fault(
        "a network takes no channels",
        "fastunet/models.py",
        "            check_integer(name, size)\n",
        "            pass\n",
        "tests/test_wrong_calls.py::test_a_wrong_call_is_refused_in_a_sentence",
    ),
    Fault(
        "jit.trace asserts inside",
        "fastunet/dispatch.py",
        '    """Say that torch.jit.trace is not served."""\n',
        '    """Say that torch.jit.trace is not served."""\n    return\n',
        "tests/test_surgery.py::test_tracers_and_transforms_are_refused_in_a_sentence",
    ),
    Fault(
        "infinite class weights are taken",
        "fastunet/losses.py",
        "bool(((weight >= 0) & weight.isfinite()).all())",
        "bool((weight >= 0).all())",
        "tests/test_wrong_calls.py::test_a_wrong_call_is_refused_in_a_sentence",
    ),
    Fault(
        "gamma may be NaN",
        "fastunet/checks.py",
        "if not math.isfinite(value):",
        "if False:",
        "tests/test_wrong_calls.py::test_a_wrong_call_is_refused_in_a_sentence",
    ),
    Fault(
        "ignore_index may be 1.5",
        "fastunet/checks.py",
        "if isinstance(ignore_index, bool) or not isinstance(ignore_index, numbers.Integral):",
        "if False:",
        "tests/test_wrong_calls.py::test_a_wrong_call_is_refused_in_a_sentence",
    ),
    Fault(
        "a lossy mask of an innocent name is taken",
        "fastunet/coding.py",
        "if mask.lossy and len(counts) > 2:",
        "if False:",
        "tests/test_dataset.py::test_lossy_masks_are_judged_by_their_content",
    ),
    Fault(
        "masks of 0 and 1 and of 0 and 255 have three classes",
        "fastunet/coding.py",
        'twins = kind != "colours" and {1, 255} <= seen',
        'twins = kind == "colours" and {1, 255} <= seen',
        "tests/test_dataset.py::test_one_class_is_one_class",
    ),
    Fault(
        "transparent pixels keep their hidden colour",
        "fastunet/coding.py",
        "            codes[~self.mask.opaque[rows]] = self.hidden\n",
        "            pass\n",
        "tests/test_dataset.py::test_one_class_is_one_class",
    ),
    Fault(
        "of a palette no colour can be ignored",
        "fastunet/coding.py",
        "meant |= {index for colours in palettes for index, shown in colours.items() if shown == colour}",
        "pass",
        "tests/test_dataset.py::test_what_is_ignored_goes_by_any_of_its_names",
    ),
    Fault(
        "16 bits a colour lose their low byte",
        "fastunet/decode.py",
        'if kind == "PNG" and (bits := _png_depth(path)) == 16 and',
        'if kind == "PNG" and (bits := _png_depth(path)) == 99 and',
        "tests/test_dataset.py::test_without_the_extra_it_is_refused_by_name",
    ),
    Fault(
        "packed numbers in the other order of bytes are turned twice",
        "fastunet/decode.py",
        'if compression != 1 and kinds[0] != 1 and tags.prefix == b"MM":',
        "if False:",
        "tests/test_dataset.py::test_packed_numbers_are_what_they_were",
    ),
    Fault(
        "overviews count as pictures",
        "fastunet/decode.py",
        "page for page, tags in enumerate(directories) if not _tag(tags, 254, 0)[0] & 5 and",
        "page for page, tags in enumerate(directories) if",
        "tests/test_dataset.py::test_previews_are_no_pictures",
    ),
    Fault(
        "a mask as stored is not turned along",
        "fastunet/data.py",
        "other = other.turned(tagged.orientation) if along else other",
        "other = other",
        "tests/test_dataset.py::test_a_turned_picture_and_its_mask_fit",
    ),
    Fault(
        "a compressed checkpoint is unpacked",
        "fastunet/checkpoint.py",
        "if unpacked > os.path.getsize(path):",
        "if False:",
        "tests/test_checkpoint.py::test_what_is_no_checkpoint_is_refused_in_a_sentence",
    ),
    Fault(
        "half a file takes the name",
        "fastunet/files.py",
        'temporary = path.with_name(f".{path.stem}-{secrets.token_hex(8)}{path.suffix}")',
        "temporary = path.unlink(missing_ok=True) or path",
        "tests/test_checkpoint.py::test_what_cannot_be_saved_leaves_what_was_there",
    ),
]

RUNS = [
    Fault(
        "the weights of what is resumed are a new network's",
        "fastunet/train.py",
        "trained.model.load_state_dict(read_checkpoint(args.output / LAST).state)",
        "pass",
        "tests/test_train.py::test_what_is_killed_goes_on_to_the_same_bits",
    ),
    Fault(
        "a Dice of several processes is the mean of theirs",
        "fastunet/losses.py",
        "self.local.from_stats(gathered(stats).flatten(0, 1))",
        "self.local.from_stats(stats)",
        "tests/test_train.py::test_two_processes_are_one_with_twice_the_batch",
    ),
    Fault(
        "lazily normalised blocks know their own process's statistics only",
        "fastunet/activation.py",
        "if type(bn) is SyncBatchNorm:",
        "if False:",
        "tests/test_train.py::test_statistics_losses_and_counts_are_those_of_all_processes",
    ),
    Fault(
        "the score that the schedule sees is a mean IoU",
        "fastunet/recipes.py",
        'score="dice",',
        'score="miou",',
        "tests/test_train.py::test_a_recipe_trains_as_its_source -k milesial",
    ),
    Fault(
        "of several processes' losses the first one's are written",
        "fastunet/train.py",
        "distributed.mean(torch.stack(losses))",
        "torch.stack(losses)",
        "tests/test_train.py::test_two_processes_are_one_with_twice_the_batch",
    ),
    Fault(
        "a share of the weights is saved for all of them",
        "fastunet/distributed.py",
        "return state.full_tensor() if _in_shards(state) else state",
        "return state.to_local() if _in_shards(state) else state",
        "tests/test_train.py::test_weights_in_shards_train_as_whole_ones",
    ),
    Fault(
        "crops may hold nothing that counts",
        "fastunet/train.py",
        "        if len(counted):\n",
        "        if False:\n",
        "tests/test_train.py::test_crops_hold_something_that_counts",
    ),
    Fault(
        "all of a large TIFF that was read is kept",
        "fastunet/large_tiff.py",
        "self._kept.items() if place[1] in down}",
        "self._kept.items()}",
        "tests/test_predict.py::test_memory_is_that_of_a_window",
    ),
    Fault(
        "a picture that is resized in parts lacks what the filter reaches",
        "fastunet/preparation.py",
        "reach = math.ceil(2 * factor) + 1",
        "reach = 0",
        "tests/test_predict.py::test_parts_are_resized_as_the_whole",
    ),
    Fault(
        "a short last band of tiles is not blended",
        "fastunet/tiling.py",
        "band[:, : kept.shape[1]] += kept",
        "band[:, :0] += kept[:, :0]",
        "tests/test_predict.py::test_tiles_change_nothing",
    ),
]

ACCELERATED = [
    Fault(
        "of a network that was traced, attributes may change",
        "fastunet/tracing.py",
        "if type(module) is not kind or len(own) != count or getter(own) != values:",
        "if type(module) is not kind or len(own) != count:",
        "tests/test_accelerate.py -k counts",
    ),
]

FAULTS = [*KERNELS, *TORCH, *FOUND, *RUNS, *ACCELERATED]


def rotten(fault: Fault) -> str | None:
    """What is wrong with the record, if anything."""
    count = (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old)
    if count != 1:
        return f"{fault.file} holds {count} times, and should once: {fault.old!r}"
    return None


def planted(fault: Fault, folder: Path) -> None:
    """A copy of the checkout with the fault."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, target)
    file = folder / fault.file
    file.write_text(file.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")


def verdict(fault: Fault) -> str:
    """ "noticed", or what is wrong."""
    if (wrong := rotten(fault)) is not None:
        return wrong
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted(fault, folder)
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(fault.tests)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900
        )
    if done.returncode == 1:  # tests failed: any other status says that they did not run
        return "noticed"
    return "NOT NOTICED" if done.returncode == 0 else f"NOT RUN\n{done.stdout}{done.stderr}"


def main(words: Sequence[str]) -> int:
    chosen = [fault for fault in FAULTS if not words or any(word in f"{fault.name} {fault.file}" for word in words)]
    missed = 0
    for fault in (bar := tqdm(chosen, unit="fault")):
        bar.set_postfix_str(fault.name)
        said = verdict(fault)
        missed += said != "noticed"
        bar.write(f"{said:<12} {fault.file:<28} {fault.name}")
    print(f"{len(chosen) - missed} of {len(chosen)} faults are noticed")
    return 1 if missed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
