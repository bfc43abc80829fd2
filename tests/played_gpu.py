"""A GPU that is not there: tensors with values that are on "cuda:0", and refuse what CUDA refuses.

`with played_gpu() as gpu:` tensors made with device="cuda" compute on the CPU, but they meet no CPU
tensor, divide by a number as CUDA does, and raise what CUDA raises under deterministic algorithms.
`gpu.waits` has the name of each operator for which the host would have waited.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from krrst_fast import operators, reference
from krrst_fast.backends import triton

DEVICE = torch.device("cuda:0")
aten = torch.ops.aten

# What the host reads, or whose size it has to know.
_READS = {
    *(aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2),
    *(aten._linalg_check_errors, aten.is_nonzero),
}
# They take tensors of two devices.
_ACROSS = {aten.copy_, aten._to_copy, aten.index, aten.index_put_, aten.index_put}
# From the documentation of torch.use_deterministic_algorithms, as far as these have one name.
_NOT_DETERMINISTIC = {
    *(aten.median, aten.nanmedian, aten.kthvalue, aten.histc, aten.put_, aten.bincount),
    *(aten.scatter_reduce, aten.scatter_reduce_, aten.reflection_pad2d_backward),
    *(aten.replication_pad2d_backward, aten._adaptive_avg_pool2d_backward),
    *(aten.upsample_bicubic2d_backward, aten.grid_sampler_2d_backward),
}
_DIVIDES = {aten.div, aten.div_}


class Played(Tensor):
    """A tensor that says it is on the played GPU; its numbers are in a CPU tensor."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "Played":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device="cpu",  # to autograd, which has no way to a device that is not there
        )

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_cpu = property(lambda self: False)
    is_cuda = property(lambda self: True)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        raise RuntimeError(f"{func}: the played GPU is off")


class Generator(torch.Generator):
    """A generator of random numbers that knows which device it was asked for."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls)
        made.device_of_it = torch.device(device)
        if made.device_of_it.type == "cuda":
            # An operator is given another object of the same generator.
            _GENERATORS[made._cdata] = made
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    device = property(lambda self: self.device_of_it)


_GENERATORS: "WeakValueDictionary[int, Generator]" = WeakValueDictionary()
"""Those of the played GPU."""


class Gpu(TorchDispatchMode):
    """The played GPU while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        mine = [x for x in tensors if isinstance(x, Played)]
        # Autograd takes the device of a played tensor for the CPU: only `_Move` goes there.
        on_gpu = bool(mine) or torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if func._overloadpacket is torch.ops.aten._pin_memory:
            return args[0].clone()
        if not on_gpu:
            return func(*args, **kwargs)
        if func.namespace == "krrst_fast":
            with self:  # as on every device for which it has no kernel
                return _fallback(func._opname)(*args, **kwargs)
        if _has_parts(func):
            with self:
                return func.decompose(*args, **kwargs)
        self._check(func, args, tensors)
        drawn = kwargs.get("generator")
        if drawn is not None and drawn._cdata not in _GENERATORS:
            raise RuntimeError(f"{func}: expected a 'cuda' generator but found 'cpu'")
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        given, named = tree_map(_numbers, (args, kwargs))
        if func.overloadpacket in _DIVIDES and _by_a_number(args):
            given = (given[0], _reciprocal(given[0], given[1]), *given[2:])
            func = aten.mul_.Tensor if func.overloadpacket is aten.div_ else aten.mul.Tensor
        value = func(*given, **named)
        if func.overloadpacket is aten.copy_ and not isinstance(args[0], Played):
            return args[0]
        written = [x for x, a in zip(args, func._schema.arguments) if _is_written(a)]
        written += [kwargs[a.name] for a in func._schema.arguments if _is_written(a, kwargs)]
        if not func._schema.returns:
            return None  # those that write to lists of tensors
        if written:
            return written[0] if len(written) == 1 else tuple(written)
        return tree_map(_wrapped, value)

    def _check(self, func: Any, args: tuple, tensors: list[Tensor]) -> None:
        """Raise what CUDA raises; note a wait."""
        packet, name = func.overloadpacket, func.overloadpacket.__name__
        others = [x for x in tensors if not isinstance(x, Played)]
        played = len(others) < len(tensors)
        if packet in _READS or (packet in _ACROSS and others):
            self.waits.append(name)
        elif packet is aten.index and any(_is_mask(x) for x in args[1]):
            self.waits.append("index by a mask")
        if packet in (aten.index, aten.index_put, aten.index_put_):
            if not isinstance(args[0], Played):
                raise RuntimeError(f"{name}: indices should be on the device of the tensor: cpu")
        elif played and packet not in _ACROSS and any(x.ndim for x in others):
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found at least two "
                "devices, cuda:0 and cpu"
            )
        refused = packet in _NOT_DETERMINISTIC and torch.are_deterministic_algorithms_enabled()
        # A median of all numbers has no indices.
        if refused and not (packet in (aten.median, aten.nanmedian) and len(args) == 1):
            raise RuntimeError(f"{name} CUDA does not have a deterministic implementation")


@functools.cache
def _has_parts(func: Any) -> bool:
    """Whether an operator is a name for others, which comes whole where no gradient is taken."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _fallback(name: str) -> Callable[..., Any]:
    """What computes an operator of ours where there is no kernel for it."""
    ours = {"matmul": torch.matmul, "ridge_factor": operators._ridge_factor}
    ours["factored_solve"] = operators._factored_solve
    return ours.get(name) or getattr(reference, name)


def _is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)


def _is_written(argument: Any, given: dict | None = None) -> bool:
    """Whether an operator writes to an argument, and the argument is given by name."""
    written = argument.alias_info is not None and argument.alias_info.is_write
    return written and (argument.kwarg_only if given is None else argument.name in given) ^ (
        given is None
    )


def _numbers(x: Any) -> Any:
    return x.numbers if isinstance(x, Played) else x


def _wrapped(x: Any) -> Any:
    return Played(x) if isinstance(x, Tensor) else x


def _by_a_number(args: tuple) -> bool:
    """Whether a floating tensor is divided by a number, or by a CPU tensor of one number."""
    return isinstance(args[0], Played) and not isinstance(args[1], Played)


def _reciprocal(x: Tensor, divisor: Any) -> Any:
    """What CUDA multiplies x by in place of a division by a number: it may lose one bit."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (1.0 / torch.as_tensor(divisor, dtype=wide)).item()


class Event:
    """A moment: what is played has been done as soon as it was asked for."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) * 1e3


def _moved(on: Gpu, to: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Tensor.to, which is to know where a played tensor is."""

    def moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.pop("device", None)
        rest = list(args)
        if rest and isinstance(rest[0], Tensor):
            other = rest.pop(0)
            device, kwargs["dtype"] = other.device, other.dtype
        elif rest and (rest[0] is None or isinstance(rest[0], str | int | torch.device)):
            device = rest.pop(0)
        # As modules call it: a dtype that may be None, and whether the copy may be asynchronous.
        rest = [value for value in rest if value is not None and not isinstance(value, bool)]
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        device = x.device if device is None else torch.device(device)
        if isinstance(x, Played) == (device.type == "cuda"):
            kept = {k: v for k, v in kwargs.items() if k != "non_blocking"}
            return to(x, *rest, **kept) if rest or kept else x
        on.waits.append(f"a copy to {device.type}")
        return _Move.apply(to(x, *rest, **kwargs) if rest or kwargs else x)

    return moved


class _Move(torch.autograd.Function):
    """A copy to the other device, and back with the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.numbers.clone() if isinstance(x, Played) else Played(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Move.apply(grad)


@contextmanager
def played_gpu() -> Iterator[Gpu]:
    """Turn the GPU on: an old one, for which there are no Triton kernels."""
    on = Gpu()
    if torch.cuda.is_available():
        torch.cuda.init()  # or torch would think that it is
    moved = _moved(on, torch.Tensor.to)

    def new(x: Tensor, data: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": x.dtype, "device": x.device, **kwargs})

    def from_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
            if isinstance(data, Tensor):
                device = data.device if device is None else device
            return moved(make(data, **kwargs), "cpu" if device is None else device)

        return made

    cuda = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda *_: "played GPU",
        "get_device_capability": lambda *_: (7, 0),
        "synchronize": lambda *_: None,
        "reset_peak_memory_stats": lambda *_: None,
        "max_memory_allocated": lambda *_: 0,
        "Event": Event,
    }
    with ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        tensor = {
            "to": moved,
            "cpu": lambda x: moved(x, "cpu"),
            "cuda": lambda x: moved(x, "cuda"),
            "new_tensor": new,
        }
        for make in (torch.tensor, torch.as_tensor):
            stack.enter_context(mock.patch.object(torch, make.__name__, from_host(make)))
        for name, method in tensor.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, method))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        # A torch with CUDA and without a driver would look there for a stream that is captured.
        stack.enter_context(
            mock.patch.object(torch.accelerator, "current_accelerator", lambda *_, **__: None)
        )
        stack.enter_context(mock.patch.object(triton, "capability", lambda _: (7, 0)))
        # Or a module that is moved would keep its parameters and take their numbers alone.
        overwrite = torch.__future__.set_overwrite_module_params_on_conversion
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        overwrite(True)
        stack.callback(overwrite, before)
        stack.enter_context(on)
        yield on
