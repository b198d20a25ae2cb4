"""A training step's forward and backward in a CUDA graph: issued by one call, in place of hundreds from Python.

Where a GPU computes faster than the host issues, as it does small pictures, small batches and deep networks of few
channels, a step takes as long as the host does. A graph is captured once, for batches of one shape, and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastunet.errors import UserError

WARM_UP = 3  # steps before the capture, as PyTorch advises: libraries choose their algorithms in the first ones


class GraphError(UserError):
    """The step cannot be captured; the message is one sentence."""


def key_of(batch: Sequence[Tensor]) -> tuple[object, ...]:
    """What batches that one graph serves have in common: shapes, dtypes and memory layouts."""
    return tuple((x.shape, x.dtype, x.stride()) for x in batch)


class CapturedStep:
    """``backward(*batch)``, which computes a loss, adds its gradients to ``module``'s parameters and returns it, as a
    CUDA graph for batches like ``batch``.

    ``module``'s buffers are as before afterwards: the steps of the warm-up count for nothing. The gradients of its
    parameters are those of the replay, and live where the next one writes.

    Raises:
        GraphError: ``backward`` does what no graph can hold, as waiting for the GPU.
    """

    def __init__(self, backward: Callable[..., Tensor], module: nn.Module, batch: Sequence[Tensor]) -> None:
        self.key = key_of(batch)
        self._batch = [x.detach().clone() for x in batch]
        everything = [*module.parameters()]
        self._parameters = [p for p in everything if p.requires_grad]
        self._found = [(p, p.requires_grad, p.data_ptr()) for p in everything]
        self._graph = torch.cuda.CUDAGraph()
        buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what goes wrong here would without a graph
            for _ in range(WARM_UP):
                self._forget()
                backward(*self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        self._forget()
        try:
            # Other threads may allocate meanwhile, as one that pins batches does.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._loss = backward(*self._batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            raise GraphError(
                f"expected a step that a CUDA graph can hold, got one that it cannot ({why}); train without a graph"
            ) from error
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
        self._gradients = [p.grad for p in self._parameters]

    @property
    def holds(self) -> bool:
        """Whether the same parameters want gradients as when it was captured, and lie where they lay."""
        return all(p.requires_grad == wanted and p.data_ptr() == place for p, wanted, place in self._found)

    def __call__(self, *batch: Tensor) -> Tensor:
        """The loss of ``batch``, whose gradients the parameters then have, in place of those they had."""
        for mine, given in zip(self._batch, batch, strict=True):
            mine.copy_(given, non_blocking=True)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss.clone()

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
