"""Scores against their definitions, written out in plain loops, and torchmetrics where installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastunet import distributed
from fastunet.metrics import ConfusionMatrix, dice_coeff, miou, multiclass_dice_coeff, soft_miou

# The interpreter is numpy, which warns of values that the kernels compute and then mask.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def masks(classes: int = 4) -> tuple[Tensor, Tensor]:
    """Predicted and true classes; the last class occurs in neither, the one before in the truth only."""
    prediction = torch.randint(0, classes - 2, (3, 8, 7))
    return prediction, torch.randint(0, classes - 1, (3, 8, 7))


def counted(prediction: Tensor, labels: Tensor, classes: int, ignore_index: int | None = None) -> list[list[int]]:
    table = [[0] * classes for _ in range(classes)]
    for guess, true in zip(prediction.flatten().tolist(), labels.flatten().tolist(), strict=True):
        if true != ignore_index:
            table[true][guess] += 1
    return table


@pytest.mark.parametrize("ignore_index", [None, 1, 255])
def test_matrix_counts_truth_by_row(ignore_index: int | None) -> None:
    prediction, labels = masks()
    if ignore_index == 255:
        labels[:, 2] = 255
    matrix = ConfusionMatrix(4, ignore_index)
    matrix.update(prediction, labels.to(torch.uint8))
    assert matrix.matrix.tolist() == counted(prediction, labels, 4, ignore_index)


def test_logits_count_by_their_largest_class() -> None:
    logits, labels = torch.randn(2, 4, 5, 6), torch.randint(0, 4, (2, 5, 6))
    from_logits, from_mask = ConfusionMatrix(4), ConfusionMatrix(4)
    from_logits.update(logits.to(memory_format=torch.channels_last), labels)
    from_mask.update(logits.argmax(1), labels)
    assert torch.equal(from_logits.matrix, from_mask.matrix)


def test_one_sigmoid_channel_counts_as_two_classes() -> None:
    logits, labels = torch.randn(2, 1, 5, 6), torch.rand(2, 5, 6) < 0.5
    matrix = ConfusionMatrix(2)
    matrix.update(logits, labels)
    assert matrix.matrix.tolist() == counted((logits[:, 0].sigmoid() > 0.5).long(), labels.long(), 2)


def test_probabilities_are_compared_with_the_threshold() -> None:
    logits, labels = torch.randn(2, 1, 5, 6), torch.rand(2, 5, 6) < 0.5
    from_logits, from_probabilities = ConfusionMatrix(2), ConfusionMatrix(2, threshold=0.5)
    from_logits.update(logits, labels)
    from_probabilities.update(logits.sigmoid(), labels)
    assert torch.equal(from_logits.matrix, from_probabilities.matrix)
    assert from_logits.matrix[:, 0].sum() > 0


def test_ignored_pixels_of_logits_do_not_count(backend: str, device: str) -> None:
    logits, labels = torch.randn(2, 4, 5, 6), torch.randint(0, 4, (2, 5, 6))
    labels[:, 1] = 255
    matrix = ConfusionMatrix(4, ignore_index=255, backend=backend).to(device)
    matrix.update(logits.to(device), labels.to(device))
    assert matrix.matrix.tolist() == counted(logits.argmax(1), labels, 4, 255)


def test_batches_add_up_and_reset_forgets() -> None:
    prediction, labels = masks()
    whole, parts = ConfusionMatrix(4), ConfusionMatrix(4)
    whole.update(prediction, labels)
    for p, y in zip(prediction, labels, strict=True):
        parts.update(p[None], y[None])
    assert torch.equal(whole.matrix, parts.matrix)
    parts.reset()
    assert parts.matrix.count_nonzero() == 0
    assert parts.accuracy.isnan()


def test_a_matrix_made_in_inference_mode_counts_outside_it() -> None:
    logits, labels = torch.randn(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    with torch.inference_mode():
        matrix = ConfusionMatrix(2)
        matrix.update(logits, labels)
    matrix.update(logits, labels)
    assert matrix.all_reduce().matrix.sum() == 32
    matrix.reset()
    assert matrix.matrix.sum() == 0


def test_scores_follow_their_definitions() -> None:
    matrix = ConfusionMatrix(4)
    #   truth 0: 3 right, 1 taken for 1; truth 1: 2 right; truth 2: both taken for 0; 3 occurs nowhere
    matrix.update(torch.tensor([[[0, 0, 0, 1, 1, 1, 0, 0]]]), torch.tensor([[[0, 0, 0, 0, 1, 1, 2, 2]]]))
    nan = float("nan")
    expected = {
        "iou": [3 / 6, 2 / 3, 0.0, nan],
        "dice": [6 / 9, 4 / 5, 0.0, nan],
        "precision": [3 / 5, 2 / 3, nan, nan],
        "recall": [3 / 4, 1.0, 0.0, nan],
        "miou": (3 / 6 + 2 / 3 + 0) / 3,
        "accuracy": 5 / 8,
    }
    for name, value in expected.items():
        score = getattr(matrix, name)
        torch.testing.assert_close(score, torch.tensor(value, dtype=torch.float64), equal_nan=True)


@pytest.mark.parametrize("kind", ["mask", "logits"])
def test_an_ignored_class_has_no_score_and_lowers_no_mean(kind: str) -> None:
    prediction = torch.tensor([[[0, 0, 1, 1, 2, 0]]])
    labels = torch.tensor([[[0, 0, 1, 0, 0, 2]]])  # 0 taken for 1 and, a stray pixel, for the ignored 2
    matrix = ConfusionMatrix(3, ignore_index=2)
    matrix.update(prediction if kind == "mask" else one_hot_logits(prediction, 3), labels)
    nan = float("nan")
    # torchmetrics 1.9, ignore_index=2: jaccard 0.5, 0.5 and macro 0.5; precision 1.0, 0.5; recall 0.5, 1.0
    expected = {
        "iou": [2 / 4, 1 / 2, nan],
        "dice": [4 / 6, 2 / 3, nan],
        "precision": [2 / 2, 1 / 2, nan],
        "recall": [2 / 4, 1.0, nan],
        "miou": 1 / 2,
        "accuracy": 3 / 5,
    }
    for name, value in expected.items():
        score = getattr(matrix, name)
        torch.testing.assert_close(score, torch.tensor(value, dtype=torch.float64), equal_nan=True)


def one_hot_logits(labels: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(labels, classes).permute(0, 3, 1, 2).float()


def test_scores_agree_with_torchmetrics() -> None:
    theirs = pytest.importorskip(
        "torchmetrics.functional.classification", reason="torchmetrics is an optional oracle: pip install torchmetrics"
    )
    prediction, labels = torch.randint(0, 4, (3, 8, 7)), torch.randint(0, 4, (3, 8, 7))
    labels[0] = 255
    matrix = ConfusionMatrix(4, ignore_index=255)
    matrix.update(prediction, labels)
    options = {"num_classes": 4, "ignore_index": 255}
    assert torch.equal(matrix.matrix, theirs.multiclass_confusion_matrix(prediction, labels, **options))
    expected = {
        "iou": theirs.multiclass_jaccard_index(prediction, labels, average="none", **options),
        "miou": theirs.multiclass_jaccard_index(prediction, labels, average="macro", **options),
        "precision": theirs.multiclass_precision(prediction, labels, average="none", **options),
        "recall": theirs.multiclass_recall(prediction, labels, average="none", **options),
        "dice": theirs.multiclass_f1_score(prediction, labels, average="none", **options),
        "accuracy": theirs.multiclass_accuracy(prediction, labels, average="micro", **options),
    }
    for name, value in expected.items():  # theirs are float32
        torch.testing.assert_close(getattr(matrix, name).float(), value)


def _count_rank(rank: int, store: str, result: str) -> None:
    with distributed.group("gloo", init_method=f"file://{store}", rank=rank, world_size=2):
        matrix = ConfusionMatrix(2)
        matrix.update(torch.full((1, 1, 3), rank), torch.zeros(1, 1, 3, dtype=torch.int64))
        total = matrix.all_reduce()
        assert matrix.all_reduce().matrix.tolist() == total.matrix.tolist()  # asking twice does not count twice
        if rank == 0:
            torch.save(total.matrix, result)


@pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")
def test_counts_of_all_processes_add_up(tmp_path: Path) -> None:
    result = tmp_path / "matrix.pt"
    torch.multiprocessing.spawn(_count_rank, (str(tmp_path / "store"), str(result)), nprocs=2)
    assert torch.load(result).tolist() == [[3, 3], [0, 0]]


def test_all_reduce_alone_is_a_copy() -> None:
    matrix = ConfusionMatrix(2)
    total = matrix.all_reduce()
    total.update(torch.zeros(1, 1, 3, dtype=torch.int64), torch.zeros(1, 1, 3, dtype=torch.int64))
    assert matrix.matrix.sum() == 0


def soft_counts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Soft intersection and union per class over the batch, in float64."""
    p = logits.double().softmax(1)
    y = (labels.unsqueeze(1) == torch.arange(logits.shape[1]).view(1, -1, 1, 1)).double()
    return (p * y).sum((0, 2, 3)), (p + y - p * y).sum((0, 2, 3))


@pytest.mark.parametrize("classes", [2, 22])
def test_soft_miou_is_seed002s(classes: int, backend: str, device: str) -> None:
    logits, labels = torch.randn(2, classes, 7, 9), torch.randint(0, classes - 1, (2, 7, 9))
    inter, union = soft_counts(logits, labels)
    value = soft_miou(logits.to(device), labels.to(device), backend=backend)
    # A ratio of float32 sums of a hundred terms.
    torch.testing.assert_close(value.cpu().double(), ((inter + 1e-5) / (union + 1e-5)).mean(), rtol=2e-6, atol=1e-7)


def test_miou_is_soft_miou_with_its_smoothing() -> None:
    logits, labels = torch.randn(2, 3, 7, 9).double(), torch.randint(0, 3, (2, 7, 9))
    inter, union = soft_counts(logits, labels)
    torch.testing.assert_close(miou(logits, labels, 0.5), ((inter + 0.5) / (union + 0.5)).mean())


def plane_dice(p: Tensor, y: Tensor, eps: float = 1e-6) -> float:
    """One coefficient of everything in p and y, by Python floats."""
    pairs = list(zip(p.flatten().tolist(), y.flatten().tolist(), strict=True))
    return (2 * sum(a * b for a, b in pairs) + eps) / (sum(a for a, _ in pairs) + sum(b for _, b in pairs) + eps)


@pytest.mark.parametrize("reduce_batch_first", [False, True])
def test_dice_coeff_averages_planes_or_pools_the_batch(reduce_batch_first: bool) -> None:
    p, y = torch.rand(3, 4, 5).double(), (torch.rand(3, 4, 5) < 0.3).double()
    y[1], p[2], y[2] = 0, 0, 0  # an absent object, and nothing at all
    planes = [plane_dice(a, b) for a, b in zip(p, y, strict=True)]
    expected = plane_dice(p, y) if reduce_batch_first else sum(planes) / 3
    assert dice_coeff(p, y, reduce_batch_first).item() == pytest.approx(expected, rel=1e-12)
    assert planes[2] == 1


@pytest.mark.parametrize("reduce_batch_first", [False, True])
def test_multiclass_dice_coeff_takes_every_class_for_a_plane(reduce_batch_first: bool) -> None:
    p, y = torch.rand(2, 3, 4, 5).double(), (torch.rand(2, 3, 4, 5) < 0.3).double()
    planes = [plane_dice(p[n, c], y[n, c]) for n in range(2) for c in range(3)]
    expected = plane_dice(p, y) if reduce_batch_first else sum(planes) / 6
    assert multiclass_dice_coeff(p, y, reduce_batch_first).item() == pytest.approx(expected, rel=1e-12)


def test_epsilon_is_the_score_of_nothing() -> None:
    p, y = torch.full((2, 4, 5), 0.5), torch.zeros(2, 4, 5)
    assert dice_coeff(p, y, epsilon=10.0).item() == pytest.approx(10 / (10 + 10))
    assert multiclass_dice_coeff(p[None], y[None], epsilon=10.0).item() == pytest.approx(0.5)


def test_dice_coeff_of_one_image() -> None:
    p, y = torch.rand(4, 5).double(), (torch.rand(4, 5) < 0.5).double()
    assert dice_coeff(p, y).item() == pytest.approx(plane_dice(p, y), rel=1e-12)


def test_dice_coeff_in_float16_does_not_overflow() -> None:
    ones = torch.ones(1, 300, 300, dtype=torch.float16)  # sums to 90000; float16 ends at 65504
    assert dice_coeff(ones, ones).item() == 1


def test_dice_coeff_of_masks_with_a_channel() -> None:
    p, y = torch.rand(2, 1, 4, 5).double(), (torch.rand(2, 1, 4, 5) < 0.5).double()
    assert dice_coeff(p, y) == dice_coeff(p[:, 0], y[:, 0])


def test_its_state_and_its_options_are_told() -> None:
    matrix = ConfusionMatrix(2, ignore_index=255, threshold=0.5, backend="torch")
    assert repr(matrix) == "ConfusionMatrix(num_classes=2, ignore_index=255, threshold=0.5, backend='torch')"
    matrix.update(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 1, 0]]]))
    holder = torch.nn.ModuleDict({"score": matrix})
    assert {name: value.tolist() for name, value in holder.state_dict().items()} == {"score.matrix": [[1, 1], [0, 1]]}
    other = torch.nn.ModuleDict({"score": ConfusionMatrix(2)})
    other.load_state_dict(holder.state_dict())
    assert torch.equal(other["score"].matrix, matrix.matrix)
    other["score"].reset()
    assert matrix.matrix.sum() == 3  # a copy
    other.load_state_dict({})  # of a checkpoint that was written without counts
    with pytest.raises(ValueError, match=r"expected counts of shape \(3, 3\), got \(2, 2\)"):
        ConfusionMatrix(3).load_state_dict(matrix.state_dict())
    assert matrix.half().matrix.dtype == torch.int64
    assert matrix.to("meta").matrix.device.type == "meta"


class _Scored(torch.nn.Module):
    """A module with a score inside, as Lightning's are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.score = ConfusionMatrix(2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def _score_in_ddp(rank: int) -> Tensor:
    model = torch.nn.parallel.DistributedDataParallel(_Scored())
    score = model.module.score
    for _ in range(3):
        model(torch.ones(1, 1))
        score.update(torch.full((1, 1, 4), rank), torch.zeros(1, 1, 4, dtype=torch.int64))
    return score.all_reduce().matrix


def _scores(rank: int, store: str, result: str) -> None:
    with distributed.group("gloo", init_method=f"file://{store}", rank=rank, world_size=2):
        matrix = _score_in_ddp(rank)
    threads = [Path(f"/proc/self/task/{thread}/comm").read_text() for thread in os.listdir("/proc/self/task")]
    assert not any("gloo" in name for name in threads)  # one may abort a process that is ending
    if rank == 0:
        torch.save(matrix, result)


@pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")
def test_counts_inside_a_ddp_module_are_those_of_their_process(tmp_path: Path) -> None:
    result = tmp_path / "matrix.pt"
    torch.multiprocessing.spawn(_scores, (str(tmp_path / "store"), str(result)), nprocs=2)
    assert torch.load(result).tolist() == [[12, 12], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_labels(dtype: torch.dtype) -> None:
    mask, labels = torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 1, 0]]]).to(dtype)
    matrix = ConfusionMatrix(2)
    matrix.update(mask, labels)
    assert matrix.matrix.tolist() == [[1, 1], [0, 1]]
    with pytest.raises(ValueError, match="expected labels from 0 to 1 or ignore_index=None, got 7"):
        matrix.update(mask, (labels.long() + 7).to(dtype))
    with pytest.raises(ValueError, match="expected classes from 0 to 1 in the mask, got 7"):
        matrix.update((mask + 7).to(dtype), labels)


def test_a_compiled_update_counts_and_refuses_labels_out_of_range() -> None:
    matrix, prediction = ConfusionMatrix(3, backend="torch"), torch.randn(2, 3, 4, 5)
    labels = torch.randint(0, 3, (2, 4, 5))
    update = torch.compile(matrix.update, fullgraph=True, backend="aot_eager")
    update(prediction, labels)
    assert matrix.matrix.sum() == 40
    with pytest.raises(RuntimeError, match="expected classes in range"):
        update(prediction, labels + 3)


def test_multiclass_dice_coeff_knows_the_versions_of_pytorch_unet() -> None:
    p, y = torch.rand(2, 3, 4, 5), (torch.rand(2, 3, 4, 5) < 0.5).float()
    planes = multiclass_dice_coeff(p, y)
    torch.testing.assert_close(multiclass_dice_coeff(p, y, version=3), planes)
    classes = torch.stack([dice_coeff(p[:, k], y[:, k], True) for k in range(3)]).mean()
    for version in (2, 3):
        torch.testing.assert_close(multiclass_dice_coeff(p, y, True, version=version), classes)
    torch.testing.assert_close(multiclass_dice_coeff(p, y, True), dice_coeff(p.flatten(0, 1), y.flatten(0, 1), True))
    with pytest.raises(ValueError, match="version 2, 3 or 4"):
        multiclass_dice_coeff(p, y, version=1)
