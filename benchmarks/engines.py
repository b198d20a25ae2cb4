"""Peers that are not PyTorch: ONNX Runtime and TensorRT for a frozen network, cuDNN's fusion graphs for a convolution.

Each is timed where its package can be imported; none is needed. A network reaches the first two as ONNX, with its batch
norms folded and in the dtype that is timed, so that the file and not the engine decides the precision. Both work on a
stream of their own, before which and after which PyTorch's stream waits, and on PyTorch's memory.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Step

PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnxscript"),
    "tensorrt": ("tensorrt", "onnxscript"),
    "cudnn-graph": ("cudnn",),  # of nvidia-cudnn-frontend
}
EXECUTION = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
OPSET = 22  # the first whose convolutions may be bfloat16


def unavailable(name: str, device: torch.device) -> str | None:
    """Why the engine ``name`` cannot run on ``device``, in a few words; None if it can."""
    missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        return f"{' and '.join(missing)} cannot be imported"
    if name == "onnxruntime":
        import onnxruntime

        wanted = EXECUTION[device.type]
        if wanted not in onnxruntime.get_available_providers():
            return f"the onnxruntime that is installed has no {wanted}"
    elif device.type != "cuda":
        return f"{name} needs a CUDA GPU"
    return None


def frozen(name: str, model: nn.Module, x: Tensor, tf32: bool) -> Step:
    """``model`` (in eval mode) of the contiguous pictures ``x``, both in one dtype, by "onnxruntime" or "tensorrt".

    Raises:
        RuntimeError: the engine does not take the model.
    """
    with torch.no_grad():
        y = torch.empty_like(model(x), memory_format=torch.contiguous_format)
    build = {"onnxruntime": _onnxruntime, "tensorrt": _tensorrt}[name]
    stream = torch.cuda.Stream() if x.is_cuda else None
    run = build(_onnx(model.cpu(), x.cpu()), x, y, tf32, stream)
    if stream is None:

        def step() -> list[Tensor]:
            run()
            return [y]

        return step

    def step_beside() -> list[Tensor]:
        stream.wait_stream(torch.cuda.current_stream())
        run()
        torch.cuda.current_stream().wait_stream(stream)
        return [y]

    return step_beside


def _onnx(model: nn.Module, x: Tensor) -> bytes:
    """The ONNX file of ``model``: from "x" to "y", both of fixed size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of PyTorch's own functions
        program = torch.onnx.export(
            model, (x,), dynamo=True, verbose=False, opset_version=OPSET, input_names=["x"], output_names=["y"]
        )
    assert program is not None
    return program.model_proto.SerializeToString()  # type: ignore[no-any-return]


def _onnxruntime(file: bytes, x: Tensor, y: Tensor, tf32: bool, stream: torch.cuda.Stream | None) -> Callable[[], Any]:
    import onnxruntime

    execution, settings = EXECUTION[x.device.type], {}
    if stream is not None:
        settings = {
            "device_id": str(x.device.index or 0),
            "user_compute_stream": str(stream.cuda_stream),
            "arena_extend_strategy": "kSameAsRequested",
            "prefer_nhwc": "1",  # what the tensor cores prefer
            "use_tf32": str(int(tf32)),
        }
    about = onnxruntime.SessionOptions()
    about.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, about, providers=[(execution, settings)])
    if session.get_providers()[0] != execution:
        raise RuntimeError(f"onnxruntime could not load its {execution} and would compute on the CPU")
    binding, once = session.io_binding(), onnxruntime.RunOptions()
    for bind, name, tensor in ((binding.bind_input, "x", x), (binding.bind_output, "y", y)):
        dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype.type
        bind(name, tensor.device.type, tensor.device.index or 0, dtype, tuple(tensor.shape), tensor.data_ptr())
    if stream is not None:  # the events wait for the stream; the host need not
        once.add_run_config_entry("disable_synchronize_execution_providers", "1")
    kept = x, y  # the binding has only their addresses

    def run() -> Any:
        return session.run_with_iobinding(binding, once), kept

    return run


def _tensorrt(file: bytes, x: Tensor, y: Tensor, tf32: bool, stream: torch.cuda.Stream | None) -> Callable[[], Any]:
    import tensorrt

    assert stream is not None
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    # The types of the file; TensorRT 11 knows no others and ignores the flag.
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(file):
        raise RuntimeError(f"TensorRT cannot read the network: {parser.get_error(0)}")
    config = builder.create_builder_config()
    (config.set_flag if tf32 else config.clear_flag)(tensorrt.BuilderFlag.TF32)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT built no engine")
    runtime = tensorrt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    for name, tensor in (("x", x), ("y", y)):
        context.set_tensor_address(name, tensor.data_ptr())
    kept = x, y, runtime, engine  # the context has only addresses

    def run() -> Any:
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("TensorRT did not run its engine")
        return kept

    return run


@functools.cache
def _cudnn_handle(index: int) -> Any:
    import cudnn

    with torch.cuda.device(index):
        return cudnn.create_handle()


def cudnn_graph(x: Tensor, affine: Tensor, weight: Tensor, stride: int) -> Step:
    """conv2d(ReLU(affine(x)), weight), padded by half the kernel, with the sums of its result and of its squares.

    One graph: scale, bias and ReLU in front of the convolution, statistics behind it. All tensors are channels_last in
    one 16-bit dtype, scale and bias too; the sums (1, K, 1, 1) are float32.

    Raises:
        cudnn.cudnnGraphNotSupportedError: cuDNN has no engine for it on this GPU.
    """
    import cudnn

    scale, shift, centre = affine
    batch, channels, height, width = x.shape
    filters, _, kernel, _ = weight.shape
    values = {"x": x, "weight": weight.contiguous(memory_format=torch.channels_last)}
    values |= {"scale": scale.to(x.dtype), "bias": (shift - scale * centre).to(x.dtype)}
    handle = _cudnn_handle(x.device.index or 0)
    dtype = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}[x.dtype]
    single = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=dtype, intermediate_data_type=dtype, compute_data_type=single, handle=handle)
    names = {}
    for name, value in values.items():
        n, c, h, w = value.shape if value.dim() == 4 else (1, channels, 1, 1)
        names[name] = graph.tensor(name=name, dim=[n, c, h, w], stride=[c * h * w, 1, c * w, c], data_type=dtype)
    z = graph.relu(input=graph.bias(input=graph.scale(input=names["x"], scale=names["scale"]), bias=names["bias"]))
    padding = [kernel // 2] * 2
    y = graph.conv_fprop(image=z, weight=names["weight"], padding=padding, stride=[stride] * 2, dilation=[1, 1])
    y.set_output(True).set_data_type(dtype)
    sums = graph.genstats(input=y)
    for one in sums:
        one.set_output(True).set_data_type(single)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    size = (batch, filters, -(-height // stride), -(-width // stride))
    results = [x.new_empty(size).to(memory_format=torch.channels_last)]
    results += [x.new_empty((1, filters, 1, 1), dtype=torch.float32) for _ in sums]
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=x.device)
    tensors = {names[name]: value for name, value in values.items()} | dict(zip((y, *sums), results, strict=True))

    def step() -> list[Tensor]:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(tensors, workspace, handle=handle)
        return results

    return step
