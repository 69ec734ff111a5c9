"""A GPU that a process only pretends to have: whole runs find the tensors that a real one would not let meet.

Tensors stay in the memory of the host and are computed there, so that runs have real numbers. Each storage is marked as
the GPU's or the host's, and its tensors say so: ``device``, ``is_cuda``, ``to``, ``numpy``. Two modes of torch do that:

- one sees functions and methods, before autograd: it answers for devices, and copies from one to the other;
- one sees operators, also those of backward passes: it marks their results, and refuses operands that CUDA refuses.

``torch.cuda`` says what it would of one GPU. Collectives refuse tensors of the host, but for those of groups that were
asked to be gloo's. Operators of CUDA alone are computed by those of a CPU, and Triton's kernels do not run.

Threads have no modes: there all tensors are the host's. ``FakeTensorMode`` has no backward passes on a device that is
not there, and no values, by which experts get their tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.device_mesh
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moefoundry.ops.fp8 import backend as kernel_backend
from tests.flash import FlashInPyTorch

aten = torch.ops.aten
GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
KINDS = ("cuda", "cpu", "meta")
COPIES = (aten.copy_.default, aten._foreach_copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""Operators of a GPU's tensor whose indices may be the host's."""
HALF_GIB = 2**29


class DevicesDifferError(RuntimeError):
    """CUDA or NCCL would refuse these tensors."""


def is_on_gpu(tensor: Tensor) -> bool:
    own = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return bool(getattr(own.untyped_storage(), "on_gpu", False))


def pretend_a_gpu() -> None:
    """Give this process a GPU, for good: call it in a forked rank."""
    for name, answer in CUDA.items():
        setattr(torch.cuda, name, answer)
    torch.accelerator.current_stream = lambda device=None: _Stream()
    torch.accelerator.is_available = lambda: False  # loaders would ask the driver for its memory
    _name_groups_nccl()
    _leave_devices_out()
    operators = _Operators()
    functions = _Functions(operators)
    backward = partial(_run_backward, torch.autograd.graph._engine_run_backward, operators, functions)
    torch.autograd._engine_run_backward = torch.autograd.graph._engine_run_backward = backward
    operators.__enter__()
    functions.__enter__()


class _Operators(TorchDispatchMode):
    """Marks the results of operators, and refuses operands of different devices.

    Attributes:
        places: Of functions under way, whether they make new tensors on the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places = [False]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes again with what it is made of
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            operands = _with_values((args, kwargs))
            check_devices(func, args, kwargs, operands)
            on_gpu = any(map(is_on_gpu, operands)) if operands else self.places[-1]
            storages = {operand.untyped_storage()._cdata for operand in operands}
            results = OF_CUDA.get(func, func)(*args, **kwargs)
            for result in _with_values(results):
                if result.untyped_storage()._cdata not in storages:
                    result.untyped_storage().on_gpu = on_gpu
            return results


def check_devices(func: Any, args: Any, kwargs: Any, operands: list[Tensor]) -> None:
    """Check the operands of an operator as CUDA and NCCL do.

    Raises:
        DevicesDifferError: They are not on the device where they must be.
    """
    if (backend := _backend(func, args)) is not None:
        wanted = GPU if backend == "nccl" else HOST
        if any(is_on_gpu(each) != (wanted == GPU) for each in operands):
            raise DevicesDifferError(f"{func}: its group takes tensors of {wanted.type} alone")
    of_host = [operand for operand in operands if not is_on_gpu(operand)]
    if len(of_host) == len(operands) or func in COPIES:
        return
    if any(isinstance(each, torch.Generator) for each in tree_leaves((args, kwargs))):
        raise DevicesDifferError(f"{func}: a generator of the host draws for a GPU")
    free: set[int] = set()
    if func in INDEXED and is_on_gpu(args[0]):
        free = {id(index) for index in args[1]}
    if torch.Tag.pointwise in func.tags or func in (*INDEXED, aten.fill_.Tensor):
        free |= {id(operand) for operand in of_host if not operand.dim()} - _must_match(func, args, kwargs)
    if refused := [list(operand.shape) for operand in of_host if id(operand) not in free]:
        raise DevicesDifferError(f"{func}: expected all tensors to be on one device; of the host are {refused}")


def _must_match(func: Any, args: Any, kwargs: Any) -> set[int]:
    """Give the operands, by ``id``, that may not be the host's even without dims: what is written, and conditions."""
    schema = func._schema.arguments
    given = {**dict(zip((argument.name for argument in schema), args, strict=False)), **kwargs}
    written = [given.get(each.name) for each in schema if each.alias_info is not None and each.alias_info.is_write]
    return {id(each) for each in tree_leaves([written, given.get("condition")])}


def _backend(func: Any, args: Any) -> str | None:
    """Name the backend of a collective that takes tensors; None for all else."""
    if func.namespace == "c10d" and func is not torch.ops.c10d.barrier.default:
        (group,) = (each for each in args if isinstance(each, torch.ScriptObject) and "Group" in str(each._type()))
        return str(dist.get_backend(dist.ProcessGroup.unbox(group)))
    if func.namespace == "_c10d_functional" and isinstance(args[-1], str):
        return str(dist.get_backend(dist.distributed_c10d._resolve_process_group(args[-1])))
    return None


class _Functions(TorchFunctionMode):
    """Answers for the devices of tensors, and tells operators which device a function was given."""

    def __init__(self, operators: _Operators) -> None:
        super().__init__()
        self.operators = operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ANSWERS:
            return ANSWERS[func](*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload) or func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)  # of another mode, with the device that C++ knows
        if func == Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            args = (args[0], _device(args[1]), args[1].dtype, *args[2:])
        given = next((torch.device(each) for each in (*args, *kwargs.values()) if _is_device(each)), None)
        on_gpu = any(map(is_on_gpu, _tensors((args, kwargs)))) if given is None else given.type == "cuda"
        if given is not None and given.type == "cuda":
            args = tuple(HOST if _is_device(each) else each for each in args)
            kwargs = {name: HOST if _is_device(each) else each for name, each in kwargs.items()}
        if given is not None and given.type != "meta" and func == Tensor.to:
            args = (_moved(args[0], on_gpu), *args[1:])
        kwargs = {name: each for name, each in kwargs.items() if name != "pin_memory"}
        self.operators.places.append(on_gpu)
        try:
            results = func(*args, **kwargs)
        finally:
            self.operators.places.pop()
        for result in _with_values(results):
            storage = result.untyped_storage()
            if (given is not None and func != Tensor.to) or not hasattr(storage, "on_gpu"):  # without an operator
                storage.on_gpu = on_gpu
        return results


def _run_backward(run: Callable[..., Any], operators: _Operators, functions: _Functions, *args: Any, **kw: Any) -> Any:
    """Run a backward pass with the mode of functions, which torch has switched off inside ``backward``."""
    operators.places.append(any(map(is_on_gpu, _with_values(args))))
    try:
        with functions:
            return run(*args, **kw)
    finally:
        operators.places.pop()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _with_values(tree: Any) -> list[Tensor]:
    """List the tensors that have values of their own."""
    return [each for each in _tensors(tree) if type(each) in (Tensor, nn.Parameter) and not each.is_meta]


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in KINDS)


class _Copy(Function):
    """A copy on the other device, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to_gpu: bool) -> Tensor:
        copy = tensor.clone()
        copy.untyped_storage().on_gpu = to_gpu
        ctx.to_gpu = to_gpu
        return copy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _moved(grad, not ctx.to_gpu), None


def _moved(tensor: Tensor, to_gpu: bool) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor
    if tensor.is_meta:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    return tensor if is_on_gpu(tensor) == to_gpu else _Copy.apply(tensor, to_gpu)


def _device(tensor: Tensor) -> torch.device:
    own = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if own.is_meta:
        return torch.device("meta")
    return GPU if is_on_gpu(own) else HOST


def _as_array(function: Callable[..., Any], tensor: Tensor, *args: Any, **options: Any) -> Any:
    if is_on_gpu(tensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return function(tensor, *args, **options)


ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: _device,
    Tensor.is_cuda.__get__: lambda tensor: _device(tensor) == GPU,
    Tensor.is_cpu.__get__: lambda tensor: _device(tensor) == HOST,
    Tensor.get_device: lambda tensor: 0 if is_on_gpu(tensor) else -1,
    Tensor.cpu: lambda tensor, *_, **__: _moved(tensor, False),
    Tensor.cuda: lambda tensor, *_, **__: _moved(tensor, True),
    Tensor.pin_memory: lambda tensor, *_: tensor,
    Tensor.numpy: partial(_as_array, Tensor.numpy),
    Tensor.__array__: partial(_as_array, Tensor.__array__),
}
"""What tensors say and do otherwise."""


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return aten.mm.default(a.float(), b.float()).to(dtype)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, _: bool, dropout: float = 0.0, is_causal: bool = False, **scale: Any
) -> tuple[Tensor, ...]:
    found = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, is_causal, attn_mask=bias, **scale)
    return *found, torch.zeros(2), torch.zeros(2)


def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Any,
    out: Tensor,
    logs: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout: float,
    wanted: list[bool],
    is_causal: bool = False,
    **scale: Any,
) -> tuple[Any, ...]:
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return *backward(grad, q, k, v, out, logs, dropout, is_causal, attn_mask=bias, **scale), None


OF_CUDA: dict[Any, Callable[..., Any]] = {
    aten.mm.dtype: _product,
    aten._scaled_dot_product_efficient_attention.default: _attention,
    aten._scaled_dot_product_efficient_attention_backward.default: _attention_backward,
    aten._flash_attention_forward.default: FlashInPyTorch()._flash_attention_forward,
    aten._flash_attention_backward.default: FlashInPyTorch()._flash_attention_backward,
}
"""Operators of CUDA alone, by those that a CPU has."""


class _Stream:
    """A stream or an event, whose work is always done."""

    device, priority = GPU, 0

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def _do_nothing(self, *args: Any) -> None: ...

    record = synchronize = wait = wait_stream = wait_event = _do_nothing

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def is_capturing(self) -> bool:
        return False

    def query(self) -> bool:
        return True


PROPERTIES = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132)
CUDA: dict[str, Any] = {
    **dict.fromkeys(("is_available", "is_initialized"), lambda: True),
    **dict.fromkeys(("_lazy_init", "synchronize", "empty_cache", "set_device"), lambda *_: None),
    **dict.fromkeys(("manual_seed", "manual_seed_all", "set_rng_state"), lambda *_: None),
    **dict.fromkeys(("max_memory_allocated", "memory_allocated", "memory_reserved"), lambda *_: HALF_GIB),
    **dict.fromkeys(("utilization", "temperature", "power_draw"), lambda *_: 50),
    **dict.fromkeys(("Stream", "Event", "current_stream", "default_stream"), _Stream),
    **dict.fromkeys(("device", "stream"), lambda *_: nullcontext()),
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *_: PROPERTIES.name,
    "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_properties": lambda *_: PROPERTIES,
    "mem_get_info": lambda *_: (70 * 2**30, 80 * 2**30),
    "memory_stats": lambda *_: {"num_alloc_retries": 0},
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
}
"""What ``torch.cuda`` says and does."""


def _name_groups_nccl() -> None:
    """Let groups be NCCL's by name, but for those that are asked to be gloo's; one rank is a group, too."""
    init, new, of_host = dist.init_process_group, dist.new_group, []

    def new_group(*args: Any, backend: Any = None, **options: Any) -> Any:
        group = new(*args, backend="gloo", **options)
        if backend == "gloo":
            of_host.append(group)
        return group

    found = {
        "get_backend": lambda group=None: "gloo" if any(group is each for each in of_host) else "nccl",
        "new_group": new_group,
        "init_process_group": lambda backend=None, **options: init("gloo", **options),
    }
    for module in (dist, dist.distributed_c10d, dist.device_mesh):
        for name, function in found.items():
            setattr(module, name, function)
    dist.distributed_c10d._get_object_coll_device = lambda group=None: str(GPU)
    if not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)


def _leave_devices_out() -> None:
    """Keep torch's C++ from devices that are not there, and Triton from kernels."""
    kernel_backend._obstacle = lambda *args, **options: "there is no GPU"
    wrapper = Tensor._make_wrapper_subclass
    Tensor._make_wrapper_subclass = staticmethod(lambda *args, **options: wrapper(*args, **{**options, "device": HOST}))
    Tensor.record_stream = lambda self, stream: None
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    checks["default"] = lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype}
