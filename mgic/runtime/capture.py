"""From a network to its op list: run it once, in eval mode, on one image, and write down what PyTorch was asked to do.

Recording happens at PyTorch's dispatcher, below modules and Python control flow, where there are few operations and every
shape is known. So it does not matter how a network is written. What the engine does not know stays an operation of PyTorch
inside the list, by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..errors import UserError
from .ops import (
    SWAPPED,
    Activation,
    Affine,
    Combine,
    Compute,
    Concat,
    Convolution,
    Copy,
    Flatten,
    Mean,
    Op,
    Pool,
    Program,
    Resize,
    Shape,
    Shuffle,
    Slice,
    Step,
    Subsample,
    TorchCall,
    simplify,
)


class EngineUnavailable(UserError):  # noqa: N818  (a reason to report, as a rule)
    """The engine cannot run here, or cannot run this network; the text says why."""


def capture(model: nn.Module, example: Tensor) -> Program:
    """Record ``model``, in eval mode, as a `Program`.

    Args:
        model: Any network that takes one image tensor. Its modes and weights stay as they are; the program holds copies.
        example: ``(N, C, H, W)``, float32, ``N >= 1``; the program is for images of this size. Only the first is run.

    Raises:
        EngineUnavailable: The input is of another kind, or the network writes into a tensor in a way that cannot be followed.
    """
    if example.dim() != 4 or len(example) == 0 or example.dtype != torch.float32:
        raise EngineUnavailable(
            f"the engine needs float32 images (N, C, H, W) with N >= 1, got {example.dtype} {tuple(example.shape)}"
        )
    recorder = _Recorder(example[:1].detach().cpu().contiguous().clone())
    with eval_mode(model), torch.no_grad(), recorder:
        returned = model(recorder.image)
    return recorder.program(returned)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode for a while, then each as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation. Tensors that depend on the image have a value; all others are constants."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.image = image
        self.ops: list[Op] = []
        self.shapes: list[tuple[int, ...]] = []
        self.values: dict[int, int] = {}  # id of a tensor -> its value
        self.orders: dict[int, tuple[int, Tensor]] = {}  # id of a reshaped tensor -> (value, its channels' places)
        self.lost: dict[int, str] = {}  # id of a tensor that depends on the image but has no value -> why
        self.constants: set[int] = set()  # ids of tensors made from shapes alone
        self.kept: list[Any] = []  # ids stay unique while the tensors live
        self.storages: dict[int, list[int]] = {}
        self.input = self._new(image, canonical(image.shape))

    def _new(self, tensor: Tensor, shape: tuple[int, ...]) -> int:
        self.shapes.append(shape)
        self._bind(tensor, len(self.shapes) - 1)
        return len(self.shapes) - 1

    def _bind(self, tensor: Tensor, value: int) -> None:
        self.kept.append(tensor)
        self.values[id(tensor)] = value
        self.orders.pop(id(tensor), None)
        self.lost.pop(id(tensor), None)
        self.storages.setdefault(tensor.untyped_storage()._cdata, []).append(id(tensor))

    def depends(self, tensor: Tensor) -> bool:
        """Whether the tensor depends on the image."""
        return id(tensor) in self.values or id(tensor) in self.orders or id(tensor) in self.lost

    def shape(self, value: int) -> Shape:
        """``(C, H, W)`` of a value the engine can read."""
        channels, height, width = self.shapes[value]
        return channels, height, width

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = {a.name: a.default_value for a in func._schema.arguments}
        arguments.update(zip(arguments, args, strict=False))
        arguments.update(kwargs)
        out = func(*args, **kwargs)
        read = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if any(self.depends(t) for t in read):
            self._record(func, arguments, read, args, kwargs, out)
        return out

    def _record(
        self, func: Any, arguments: dict[str, Any], read: list[Tensor], args: Any, kwargs: Any, out: Any
    ) -> None:
        name = func._schema.name.removeprefix("aten::")
        for tensor in read:
            if id(tensor) in self.lost:
                raise EngineUnavailable(f"{name} reads {self.lost[id(tensor)]}")
        if func._schema.is_mutable:
            name = name.rstrip("_")
            self._check_mutation(name, func, arguments)
        known = _HANDLERS.get(name)
        outputs = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
        if known is None or known(self, arguments, outputs) is NotImplemented:
            self._torch_call(func, name, args, kwargs, outputs)
        for tensor in outputs:
            if not self.depends(tensor) and id(tensor) not in self.constants:
                self.kept.append(tensor)
                self.lost[id(tensor)] = f"a second result of {name}, which the engine does not compute"

    def _check_mutation(self, name: str, func: Any, arguments: dict[str, Any]) -> None:
        """An operation in place makes a new value; other views of the memory are then out of date."""
        written = [
            arguments[a.name] for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write
        ]
        for tensor in written:
            if not self.depends(tensor):
                raise EngineUnavailable(f"{name} writes what depends on the image into a constant")
            for other in self.storages.get(tensor.untyped_storage()._cdata, []):
                if other != id(tensor) and other in self.values:
                    del self.values[other]
                    self.lost[other] = f"memory that {name} has changed through another view"

    def _torch_call(self, func: Any, name: str, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        leaves, spec = tree_flatten((args, kwargs))
        if any(id(t) in self.orders for t in leaves if isinstance(t, Tensor)):
            raise EngineUnavailable(f"{name} on reshaped channels")
        inputs = [t for t in leaves if isinstance(t, Tensor) and self.depends(t)]
        places = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and self.depends(t)]
        constants = [t.detach().clone() if isinstance(t, Tensor) else t for t in leaves]
        for place in places:
            constants[place] = None

        def function(*tensors: Tensor) -> list[Tensor]:
            filled = list(constants)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor.clone() if func._schema.is_mutable else tensor
            got = tree_unflatten(filled, spec)
            result = func(*got[0], **got[1])
            return [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]

        for tensor in (*inputs, *outputs):
            if tensor.dim() == 0 or len(tensor) != 1:
                raise EngineUnavailable(f"{name} mixes the images of a batch, or its result has no batch dimension")
        values = tuple(self.values[id(t)] for t in inputs)
        shapes = tuple(tuple(t.shape) for t in inputs)
        made = tuple(self._new(t, canonical(t.shape)) for t in outputs)
        self.ops.append(Op(TorchCall(name, function, shapes), values, made))

    def emit(self, compute: Compute, inputs: Sequence[int], output: Tensor, *steps: Step) -> None:
        """Append an op whose result is the tensor ``output``."""
        value = self._new(output, canonical(output.shape))
        self.ops.append(Op(compute, tuple(inputs), (value,), steps))

    def program(self, returned: Any) -> Program:
        """What was recorded, simplified."""
        leaves, spec = tree_flatten(returned)
        results = [t for t in leaves if isinstance(t, Tensor)]
        for tensor in results:
            if id(tensor) not in self.values:
                why = self.lost.get(id(tensor), "a constant or reshaped channels")
                raise EngineUnavailable(f"the network returns {why}")

        def pack(tensors: list[Tensor]) -> Any:
            rest = iter(tensors)
            return tree_unflatten([next(rest) if isinstance(t, Tensor) else t for t in places], spec)

        places = tree_map_only(Tensor, lambda t: torch.empty(0), leaves)
        outputs = tuple(self.values[id(t)] for t in results)
        output_shapes = [tuple(t.shape[1:]) for t in results]
        self.kept.clear()
        return simplify(Program(self.shapes, self.ops, (self.input,), outputs, output_shapes, pack))


def canonical(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape behind the batch dimension: ``(C, H, W)``, vectors as maps of one pixel, anything else as it is."""
    rest = tuple(shape[1:])
    return (*rest, 1, 1) if len(rest) == 1 else rest


Handler = Callable[[_Recorder, dict[str, Any], list[Tensor]], Any]
_HANDLERS: dict[str, Handler] = {}


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def keep(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return keep


def _value(recorder: _Recorder, tensor: Any) -> int | None:
    """The value of a tensor if it is one the engine can read."""
    value = recorder.values.get(id(tensor)) if isinstance(tensor, Tensor) else None
    return value if value is not None and len(recorder.shapes[value]) == 3 else None


def _pair(numbers: Sequence[int], default: Sequence[int] = ()) -> tuple[int, int]:
    numbers = list(numbers) or list(default)
    return (numbers[0], numbers[-1])


@_handles("convolution")
def _convolution(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    x = _value(recorder, a["input"])
    weight, bias = a["weight"], a["bias"]
    changing = recorder.depends(weight) or (bias is not None and recorder.depends(bias))
    if x is None or a["transposed"] or changing or weight.dim() != 4:
        return NotImplemented
    bias = torch.zeros(len(weight)) if bias is None else bias.detach().clone()
    conv = Convolution(
        weight.detach().clone(), bias, _pair(a["stride"]), _pair(a["padding"]), _pair(a["dilation"]), a["groups"]
    )
    return recorder.emit(conv, (x,), outputs[0])


@_handles("addmm")
def _addmm(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    if a["alpha"] != 1 or a["beta"] != 1:
        return NotImplemented
    return _linear(recorder, a["mat1"], a["mat2"].t(), a["self"], outputs[0])


@_handles("mm")
def _mm(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    return _linear(recorder, a["self"], a["mat2"].t(), None, outputs[0])


def _linear(recorder: _Recorder, tensor: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> Any:
    """A linear layer is a convolution of a map of one pixel. Its weight may be a view: it depends on what it views."""
    x = _value(recorder, tensor)
    weight_source = weight if weight._base is None else weight._base
    changing = any(recorder.depends(t) for t in (weight, weight_source, bias) if t is not None)
    if x is None or changing or (bias is not None and bias.dim() != 1):
        return NotImplemented
    bias = torch.zeros(len(weight)) if bias is None else bias.detach().expand(len(weight)).clone()
    return recorder.emit(Convolution(weight.detach().clone()[:, :, None, None], bias), (x,), output)


@_handles("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm")
def _batch_norm(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    x = _value(recorder, a["input"])
    mean, var = a["running_mean"], a["running_var"]
    if x is None or a.get("training") or mean is None or var is None:
        return NotImplemented
    scale = (var.double() + a.get("eps", a.get("epsilon"))).rsqrt()
    scale = scale if a["weight"] is None else scale * a["weight"].double()
    shift = -mean.double() * scale
    shift = shift if a["bias"] is None else shift + a["bias"].double()
    return recorder.emit(Copy(), (x,), outputs[0], Affine(scale.float().detach(), shift.float().detach()))


def _activation(*names: str, activation: Callable[[dict[str, Any]], Activation | None]) -> None:
    @_handles(*names)
    def handle(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
        x, step = _value(recorder, a["self"]), activation(a)
        return NotImplemented if x is None or step is None else recorder.emit(Copy(), (x,), outputs[0], step)


def _clamp(a: dict[str, Any]) -> Activation | None:
    low, high = a.get("min", a.get("min_val")), a.get("max", a.get("max_val"))
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return None
    low, high = -float("inf") if low is None else float(low), float("inf") if high is None else float(high)
    return Activation("clamp", low, high)


def _elu(a: dict[str, Any]) -> Activation | None:
    return Activation("elu", float(a["alpha"])) if a["scale"] == 1 and a["input_scale"] == 1 else None


_activation("relu", activation=lambda a: Activation("relu"))
_activation("hardswish", activation=lambda a: Activation("hard_swish"))
_activation("hardsigmoid", activation=lambda a: Activation("hard_sigmoid"))
_activation("sigmoid", activation=lambda a: Activation("sigmoid"))
_activation("silu", activation=lambda a: Activation("silu"))
_activation("tanh", activation=lambda a: Activation("tanh"))
_activation("gelu", activation=lambda a: Activation("gelu" if a["approximate"] == "none" else "gelu_tanh"))
_activation("leaky_relu", activation=lambda a: Activation("leaky_relu", float(a["negative_slope"])))
_activation("elu", activation=_elu)
_activation("hardtanh", "clamp", "clamp_min", "clamp_max", activation=_clamp)


def _make_arithmetic(name: str) -> None:
    @_handles(name)
    def handle(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
        left, right, alpha = a["self"], a.get("other", -1.0), float(a.get("alpha", 1))
        x, u = _value(recorder, left), _value(recorder, right)
        if a.get("rounding_mode") is not None or outputs[0].dtype != torch.float32:
            return NotImplemented
        if x is not None and u is not None:
            return _combine(recorder, name, x, u, alpha, outputs[0])
        if any(isinstance(t, Tensor) and recorder.depends(t) and _value(recorder, t) is None for t in (left, right)):
            return NotImplemented
        if x is None:
            x, left, right = u, right, left
            name_here = {"sub": "rsub", "rsub": "sub", "div": "rdiv"}.get(name, name)
            alpha_on_x = True
        else:
            name_here, alpha_on_x = name, False
        if x is None:
            return NotImplemented
        constant = _per_channel(recorder.shape(x)[0], right, outputs[0], left)
        if constant is None or (alpha != 1 and alpha_on_x):
            return NotImplemented
        one, zero = torch.ones_like(constant), torch.zeros_like(constant)
        steps = {
            "add": lambda: Affine(one, alpha * constant),
            "sub": lambda: Affine(one, -alpha * constant),
            "rsub": lambda: Affine(-alpha * one, constant),
            "mul": lambda: Affine(constant, zero),
            "neg": lambda: Affine(-one, zero),
            "div": lambda: Affine(1 / constant, zero),
        }
        if name_here not in steps:
            return NotImplemented
        return recorder.emit(Copy(), (x,), outputs[0], steps[name_here]())


for _name in ("add", "sub", "rsub", "mul", "div", "neg"):
    _make_arithmetic(_name)


def _combine(recorder: _Recorder, name: str, x: int, u: int, alpha: float, output: Tensor) -> Any:
    names = {"add": "add", "sub": "subtract", "rsub": "subtract_from", "mul": "multiply"}
    if name not in names or alpha != 1:
        return NotImplemented
    kind, channels = names[name], recorder.shape(x)[0]
    if recorder.shape(u) == (channels, 1, 1) or recorder.shape(u) == recorder.shape(x):
        return recorder.emit(Copy(), (x,), output, Combine(kind, u))
    if recorder.shape(x) == (recorder.shape(u)[0], 1, 1):
        return recorder.emit(Copy(), (u,), output, Combine(SWAPPED[kind], x))
    return NotImplemented


def _per_channel(channels: int, constant: Any, output: Tensor, other: Tensor) -> Tensor | None:
    """A constant that does not vary over the pixels, as ``(C,)``; None if it does, or if it enlarges the map."""
    if not isinstance(constant, Tensor):
        return torch.full((channels,), float(constant))
    if output.shape != other.shape:
        return None
    full = constant.detach().to(torch.float32)
    full = full.reshape((1,) * (output.dim() - full.dim()) + tuple(full.shape))
    if full.dim() == 2:
        full = full[:, :, None, None]
    first = full[:, :, :1, :1]
    if full.dim() != 4 or len(full) != 1 or not torch.equal(full, first.expand_as(full)):
        return None
    return first.reshape(-1).expand(channels).clone()


@_handles("mean")
def _mean(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    x = _value(recorder, a["self"])
    if x is None or a["self"].dim() != 4 or sorted(d % 4 for d in a.get("dim") or ()) != [2, 3]:
        return NotImplemented
    return recorder.emit(Mean(), (x,), outputs[0])


@_handles("_adaptive_avg_pool2d", "adaptive_avg_pool2d")
def _adaptive(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    x = _value(recorder, a["self"])
    if x is None:
        return NotImplemented
    (_, height, width), (rows, columns) = recorder.shape(x), _pair(a["output_size"])
    if height % rows or width % columns:
        return NotImplemented
    kernel = (height // rows, width // columns)
    pool: Compute = Mean() if (rows, columns) == (1, 1) else Pool(False, kernel, kernel)
    return recorder.emit(pool, (x,), outputs[0])


@_handles("max_pool2d_with_indices", "max_pool2d")
def _max_pool(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    x = _value(recorder, a["self"])
    if x is None:
        return NotImplemented
    kernel = _pair(a["kernel_size"])
    stride, padding = _pair(a["stride"] or kernel), _pair(a["padding"])
    return recorder.emit(Pool(True, kernel, stride, padding, _pair(a["dilation"]), a["ceil_mode"]), (x,), outputs[0])


@_handles("avg_pool2d")
def _avg_pool(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    x = _value(recorder, a["self"])
    if x is None or a["divisor_override"] is not None:
        return NotImplemented
    kernel = _pair(a["kernel_size"])
    stride, padding = _pair(a["stride"] or kernel), _pair(a["padding"])
    pool = Pool(False, kernel, stride, padding, (1, 1), a["ceil_mode"], a["count_include_pad"])
    return recorder.emit(pool, (x,), outputs[0])


@_handles("alias", "detach", "clone", "_to_copy", "contiguous", "lift_fresh", "dropout", "native_dropout")
def _identity(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    tensor = a.get("self", a.get("input"))
    if outputs[0].dtype != torch.float32 or tensor is None or a.get("train"):
        return NotImplemented
    return _rename(recorder, tensor, outputs[0])


def _rename(recorder: _Recorder, tensor: Tensor, output: Tensor) -> Any:
    if id(tensor) in recorder.orders:
        recorder.kept.append(output)
        recorder.orders[id(output)] = recorder.orders[id(tensor)]
    elif id(output) != id(tensor):
        recorder._bind(output, recorder.values[id(tensor)])
    return None


@_handles("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
def _constant(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    """Only the shape of the argument matters, so the result is a constant."""
    recorder.constants.update(map(id, outputs))
    recorder.kept.extend(outputs)


@_handles("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "flatten", "expand")
def _view(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    """New shapes of the same numbers. A split of the channels is followed, for shuffles of channels."""
    tensor, output = a["self"], outputs[0]
    shape = canonical(output.shape)
    if id(tensor) in recorder.orders:
        value, order = recorder.orders[id(tensor)]
        channels, height, width = recorder.shape(value)
        if shape == (channels, height, width):
            return recorder.emit(Shuffle(tuple(order.flatten().tolist())), (value,), output)
        return _split_channels(recorder, value, order, output)
    x = _value(recorder, tensor)
    if x is None or output.numel() != tensor.numel() or len(output) != 1:
        return NotImplemented
    if shape == recorder.shape(x):
        return _rename(recorder, tensor, output)
    if shape == (tensor.numel(), 1, 1):
        return recorder.emit(Flatten(), (x,), output)
    return _split_channels(recorder, x, torch.arange(recorder.shape(x)[0]), output)


def _split_channels(recorder: _Recorder, value: int, order: Tensor, output: Tensor) -> Any:
    _, height, width = recorder.shape(value)
    if output.dim() < 4 or len(output) != 1 or tuple(output.shape[-2:]) != (height, width):
        return NotImplemented
    recorder.kept.append(output)
    recorder.orders[id(output)] = value, order.reshape(output.shape[1:-2])
    return None


@_handles("transpose", "permute")
def _transpose(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    tensor = a["self"]
    if id(tensor) not in recorder.orders:
        return NotImplemented
    n = tensor.dim()
    axes = [d % n for d in a["dims"]] if "dims" in a else list(range(n))
    if "dims" not in a:
        i, j = a["dim0"] % n, a["dim1"] % n
        axes[i], axes[j] = axes[j], axes[i]
    if axes[0] != 0 or axes[-2:] != [n - 2, n - 1]:
        return NotImplemented
    value, order = recorder.orders[id(tensor)]
    recorder.kept.append(outputs[0])
    recorder.orders[id(outputs[0])] = value, order.permute([d - 1 for d in axes[1:-2]])
    return None


@_handles("cat")
def _cat(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    values = [_value(recorder, tensor) for tensor in a["tensors"]]
    if a["dim"] % outputs[0].dim() != 1 or any(value is None for value in values):
        return NotImplemented
    return recorder.emit(Concat(), [v for v in values if v is not None], outputs[0])


@_handles("constant_pad_nd")
def _pad(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    x, pad = _value(recorder, a["self"]), a["pad"]
    channels_only = len(pad) == 6 and not any(pad[:4]) and min(pad[4:]) >= 0
    if x is None or a["value"] != 0 or a["self"].dim() != 4 or not channels_only:
        return NotImplemented
    return recorder.emit(Concat(pad[4], pad[5]), (x,), outputs[0])


@_handles("split_with_sizes", "split", "chunk")
def _split(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    x = _value(recorder, a["self"])
    if x is None or a["dim"] % a["self"].dim() != 1:
        return NotImplemented
    starts = itertools.accumulate((t.shape[1] for t in outputs), initial=0)
    for start, output in zip(starts, outputs, strict=False):
        recorder.emit(Slice(start, start + output.shape[1]), (x,), output)
    return None


@_handles("slice")
def _slice(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    tensor, dim = a["self"], a["dim"] % a["self"].dim()
    x = _value(recorder, tensor)
    if x is None:
        return NotImplemented
    start, stop, step = slice(a["start"], a["end"], a["step"]).indices(tensor.shape[dim])
    if outputs[0].shape == tensor.shape:
        return _rename(recorder, tensor, outputs[0])
    if dim == 1 and step == 1:
        return recorder.emit(Slice(start, stop), (x,), outputs[0])
    if dim in (2, 3) and start == 0 and stop == tensor.shape[dim]:
        return recorder.emit(Subsample((step, 1) if dim == 2 else (1, step)), (x,), outputs[0])
    return NotImplemented


@_handles("upsample_nearest2d", "upsample_bilinear2d")
def _upsample(recorder: _Recorder, a: dict[str, Any], outputs: list[Tensor]) -> Any:
    x = _value(recorder, a.get("self", a.get("input")))
    if x is None:
        return NotImplemented
    _, height, width = recorder.shape(x)
    factors = a.get("scale_factors") or (a.get("scales_h"), a.get("scales_w"))
    sizes = zip((height, width), outputs[0].shape[-2:], factors, strict=True)
    if "align_corners" in a:
        (rows, row_share), (columns, column_share) = [_linear_places(*s, a["align_corners"]) for s in sizes]
    else:
        (rows, row_share), (columns, column_share) = [_nearest_places(*s) for s in sizes]
    return recorder.emit(Resize(rows, row_share, columns, column_share), (x,), outputs[0])


def _linear_places(size: int, new: int, factor: float | None, align: bool) -> tuple[Tensor, Tensor]:
    """The two neighbours of each output coordinate and the share of the second, in PyTorch's own convention."""
    at = torch.arange(new, dtype=torch.float32)
    if align:
        places = at * ((size - 1) / (new - 1) if new > 1 else 0.0)
    else:
        places = ((at + 0.5) * (1 / factor if factor else size / new) - 0.5).clamp(min=0)
    first = places.long().clamp(max=size - 1)
    return torch.stack([first, (first + 1).clamp(max=size - 1)], 1), places - first


def _nearest_places(size: int, new: int, factor: float | None) -> tuple[Tensor, Tensor]:
    scale = torch.tensor(1 / factor if factor else size / new, dtype=torch.float32)
    first = (torch.arange(new, dtype=torch.float32) * scale).floor().long().clamp(max=size - 1)
    return torch.stack([first, first], 1), torch.zeros(new)
