"""Guides: networks with a telling gradient that lead an attack on one whose own gradient is missing or misleads.

Backward pass differentiable approximation (Athalye et al. 2018, arXiv 1802.00420), without a word from the defender:
steps that pass no gradient are found as they are computed, and classifiers inside a network by trying its parts. A
guide only leads; the network itself decides which image fools it (`judge` of `attacks.pgd.pgd`).
"""

from __future__ import annotations

import collections
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ducat.attacks.pgd import attackable
from ducat.models.outputs import logits_of

__all__ = [
    "Inside",
    "Mixture",
    "Replaced",
    "Rescaled",
    "Softened",
    "classifiers_inside",
    "has_hard_steps",
    "mixtures",
    "modules_within",
    "narrowed",
]

SPREAD = 10.0  # logits between the best and the worst class, after rescaling
LEAK = 0.1  # gradient of a unit that is off, when smoothed
DEPTH = 6
MIXED = 4  # parts that are mixed at the most


class Rescaled(nn.Module):
    """The same decisions, with logits of a spread at which float32 softmax still has a gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        logits = logits - logits.mean(1, keepdim=True)
        spread = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach().clamp_min(1e-30)
        return SPREAD * logits / spread


class Mixture(nn.Module):
    """Several classifiers as one: their probabilities, sharpened first, mixed by weights.

    Args:
        models: classifiers of the same number of outputs.
        weights: one a classifier; they sum to 1.
        sharpen: what the logits are multiplied by.
    """

    def __init__(self, models: Sequence[nn.Module], weights: Sequence[float], sharpen: float = 1.0) -> None:
        super().__init__()
        self.models, self.sharpen = nn.ModuleList(models), sharpen
        self.logs = [float(torch.tensor(weight).clamp_min(1e-12).log()) for weight in weights]

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            F.log_softmax(self.sharpen * model(x), dim=1) + log
            for model, log in zip(self.models, self.logs, strict=True)
        ]
        return torch.stack(parts).logsumexp(0)


class Replaced(nn.Module):
    """A network in which chosen modules pass another module's gradient; what it computes stays the same.

    Args:
        model: the network.
        replacements: by a module's name in it, a differentiable function of the same input, which gives the gradient.

    Raises:
        ValueError: if there is no module of that name.
    """

    def __init__(self, model: nn.Module, replacements: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.model, self.replacements = model, dict(replacements)
        known = dict(model.named_modules())
        for name in replacements:
            if name not in known:
                raise ValueError(
                    f"replacements={name!r}: the model has no such module; it has {', '.join(known)[:300]}"
                )

    def forward(self, x: Tensor) -> Tensor:
        def swap(smooth: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                approximation = smooth(inputs[0])
                return approximation + (output - approximation).detach()

            return hook

        handles = [
            self.model.get_submodule(name).register_forward_hook(swap(smooth))
            for name, smooth in self.replacements.items()
        ]
        try:
            return self.model(x)
        finally:
            for handle in handles:
                handle.remove()


class Inside(nn.Module):
    """What a module inside a network answers when the network is asked.

    Args:
        model: the network.
        module: a part of it.
        columns: of the module's output; all by default.
    """

    def __init__(self, model: nn.Module, module: nn.Module, columns: slice = slice(None)) -> None:
        super().__init__()
        self.model, self._module, self.columns = model, [module], columns

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = self._module[0].register_forward_hook(lambda module, inputs, output: seen.append(logits_of(output)))
        try:
            self.model(x)
        finally:
            handle.remove()
        if not seen or len(seen[-1]) != len(x):
            raise RuntimeError("the module is not asked for every image")
        return seen[-1][:, self.columns].float()


def modules_within(thing: Any) -> list[tuple[str, nn.Module]]:
    """Return every module in a network by name, also those in lists, plain objects and closures of its own."""
    found: dict[int, tuple[str, nn.Module]] = {}
    seen: set[int] = set()

    def look(name: str, thing: Any, depth: int) -> None:
        if id(thing) in seen or not depth:
            return
        seen.add(id(thing))
        inside: list[tuple[str, Any]] = []
        if isinstance(thing, nn.Module):
            found[id(thing)] = name, thing
            inside = [*thing._modules.items(), *((k, v) for k, v in vars(thing).items() if not k.startswith("_"))]
        elif isinstance(thing, dict):
            inside = [(str(key), value) for key, value in list(thing.items())[:100]]
        elif isinstance(thing, list | tuple | collections.deque):
            inside = [(str(number), value) for number, value in enumerate(itertools.islice(thing, 100))]
        elif isinstance(thing, MethodType):
            inside = [("self", thing.__self__), ("function", thing.__func__)]
        elif isinstance(thing, FunctionType):
            for variable, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
                try:
                    inside.append((variable, cell.cell_contents))
                except ValueError:  # a variable that has no value yet
                    continue
            inside += [(variable, thing.__globals__.get(variable)) for variable in thing.__code__.co_names]
            inside = [(variable, value) for variable, value in inside if isinstance(value, _LOOKED_INTO)]
        elif hasattr(thing, "__dict__") and type(thing).__module__.partition(".")[0] not in ("torch", "numpy"):
            inside = [(k, v) for k, v in vars(thing).items() if isinstance(v, _LOOKED_INTO)]
        for key, value in inside:
            if value is not None:
                look(f"{name}.{key}".strip("."), value, depth - (not isinstance(value, nn.Module)))

    look("", thing, DEPTH)
    return list(found.values())


_LOOKED_INTO = (nn.Module, list, tuple, dict, FunctionType, MethodType)


def classifiers_inside(
    network: nn.Module, model: nn.Module, x: Tensor, num_classes: int
) -> list[tuple[str, nn.Module]]:
    """Find classifiers inside a network, each as a module from images to C or 2C logits.

    A part whose output has C or 2C columns is listened to while the network is asked; any other that takes images by
    itself is asked directly, whether the network asks it or not. Parts that answer as the network or as another part
    does are left out.

    Args:
        network: images to logits, in evaluation mode.
        model: the module in it whose parts are tried.
        x: a few images that it takes.
        num_classes: C.

    Returns:
        Names and classifiers, in the order of the parts.
    """
    found: list[tuple[str, nn.Module]] = []
    outputs: list[Tensor] = []
    parts = [(name, part) for name, part in modules_within(model) if part is not model and name]
    heard: dict[int, list[Any]] = {id(part): [] for _, part in parts}

    def listen(module: nn.Module, inputs: Any, output: Any) -> None:
        heard[id(module)].append(output)

    with attackable(network), torch.no_grad():
        # A scripted part cannot be listened to.
        open_parts = [part for _, part in parts if not isinstance(part, torch.jit.RecursiveScriptModule)]
        handles = [part.register_forward_hook(listen) for part in open_parts]
        try:
            outputs.append(network(x))
        finally:
            for handle in handles:
                handle.remove()
        blocked = _blocked(network, x)
        for name, part in parts:
            asked, answers = heard[id(part)], list[tuple[nn.Module, Callable[[], Any]]]()
            if asked:
                answers.append((Inside(network, part), partial(operator.getitem, asked, -1)))
            # What is asked once, for the whole answer, is no other network when it is asked directly.
            if len(asked) != 1 or blocked:
                answers.append((direct := _Cast(part), partial(direct, x)))
            for candidate, answer in answers:
                try:
                    logits = logits_of(answer())
                except Exception:  # a part that is not asked, or does not take images, fails in any way there is
                    continue
                if len(logits) != len(x) or logits.shape[1] not in (num_classes, 2 * num_classes):
                    continue
                if not logits.is_floating_point() or not logits.isfinite().all():
                    continue
                logits = logits.float()
                if not any(logits.shape == other.shape and torch.allclose(logits, other) for other in outputs):
                    outputs.append(logits)
                    found.append((name, candidate))
                    if logits.shape[1] == 2 * num_classes and outputs[0].shape[1] == num_classes:
                        found += [(f"{name}, half {half + 1}", _Half(candidate, half)) for half in range(2)]
    return found


def _blocked(network: nn.Module, x: Tensor) -> bool:
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        logits = network(x)
        return not logits.requires_grad or not bool(torch.autograd.grad(logits.abs().sum(), x)[0].any())


def mixtures(parts: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Return smoother and sharper mixtures of classifiers: one that is sharp hides its gradients (Gated networks)."""
    if len(parts) < 2:
        return []
    parts = parts[:MIXED]
    even = [1 / len(parts)] * len(parts)
    found: list[tuple[str, nn.Module]] = [
        (f"mixture sharpened by {sharpen:g}", Mixture(parts, even, sharpen)) for sharpen in (1.0, 0.2, 4.0)
    ]
    for heavy in range(len(parts)):
        weights = [0.15 / (len(parts) - 1)] * len(parts)
        weights[heavy] = 0.85
        found.append((f"mixture, part {heavy + 1} heavy", Mixture(parts, weights)))
    return found


class _Cast(nn.Module):
    """A part that is asked directly, in its own precision."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.dtype = next((p.dtype for p in part.parameters() if p.is_floating_point()), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.part(x.to(self.dtype).clone())).float()


class _Half(nn.Module):
    def __init__(self, model: nn.Module, index: int) -> None:
        super().__init__()
        self.model, self.index = model, index

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).chunk(2, dim=1)[self.index]


def narrowed(model: nn.Module, outputs: int) -> nn.Module:
    """Return a classifier of C or 2C logits as one of `outputs`: doubled, or recovered by their sum."""
    return _Fitted(model, outputs)


class _Fitted(nn.Module):
    def __init__(self, model: nn.Module, outputs: int) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        if logits.shape[1] == 2 * self.outputs:
            return torch.logaddexp(*logits.chunk(2, dim=1))
        if 2 * logits.shape[1] == self.outputs:
            return torch.cat([logits, logits], dim=1)
        return logits


class Softened(nn.Module):
    """A network whose steps without a gradient pass one: rounding, comparisons, argmax, detaching, custom functions.

    What it computes stays the same.

    Args:
        model: the network.
        smooth: also let units that are saturated or off pass some gradient.
    """

    def __init__(self, model: nn.Module, smooth: bool = False) -> None:
        super().__init__()
        self.model, self.smooth = model, smooth

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.model(x)
        with _Softening(self.smooth):
            logits = self.model(x)
        assert isinstance(logits, Tensor)
        _let_pass(logits)
        return logits


def has_hard_steps(model: nn.Module, x: Tensor) -> bool:
    """Tell whether a network compares, rounds or picks what depends on its images, or may do so out of sight.

    Where it answers otherwise beyond such a step, its gradient does not say so, however well it looks.
    """
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):  # it computes out of sight
        return True
    with torch.enable_grad(), _Watching(smooth=False) as mode:
        model(x.detach().clone().requires_grad_())
    return mode.met


class _Through(torch.autograd.Function):
    """The value of the first with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.to(soft.dtype).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


_through: Callable[[Tensor, Tensor], Tensor] = _Through.apply


def _names(*names: str) -> set[Any]:
    found = set()
    for name in names:
        for owner in (torch, Tensor, F):
            if hasattr(owner, name):
                found.add(getattr(owner, name))
    return found


_ROUNDED = _names(
    "round", "floor", "ceil", "trunc", "sign", "sgn", "fix", "round_", "floor_", "ceil_", "trunc_", "sign_"
)
_DETACHED = _names("detach", "detach_") | {Tensor.data.__get__}  # type: ignore[attr-defined]
_TAKEN_OUT = _names("numpy", "__array__", "tolist", "item", "__bool__", "__float__", "__int__")
_ABOVE = _names("gt", "ge", "greater", "greater_equal", "__gt__", "__ge__")
_BELOW = _names("lt", "le", "less", "less_equal", "__lt__", "__le__")
_CAST = _names(
    "to", "type", "float", "double", "half", "bfloat16", "int", "long", "short", "byte", "bool", "type_as", "char"
)
_ARGMAX = _names("argmax")
_ONE_HOT = _names("one_hot")
_TAKEN = _names("__getitem__") | _names("embedding", "index_select")
_SCATTERED = _names("scatter", "scatter_")
_CHOSEN = _names("where")
_FILLED = _names("masked_fill", "masked_fill_")
_CUT = _names(
    "clamp", "clip", "hardtanh", "relu6", "clamp_", "clip_", "clamp_min", "clamp_max", "fake_quantize_per_tensor_affine"
)
_OFF = _names("relu", "relu_", "threshold")
_SATURATED = _names("sigmoid", "tanh", "softmax", "erf", "softsign", "hardsigmoid", "sigmoid_", "tanh_")
_SHIFTED_RIGHT = _names("__rshift__", "bitwise_right_shift")
_SHIFTED_LEFT = _names("__lshift__", "bitwise_left_shift")
_GRADIENTS = {torch._C._set_grad_enabled}
_DIVIDED = _names("floor_divide", "__floordiv__", "remainder", "fmod", "__mod__")


_WHOLE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_BEST = _names("max")
_PLACED = _names("bucketize", "searchsorted")
_LOGIC: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys(_names("__and__", "bitwise_and", "logical_and"), lambda a, b: a * b),
    **dict.fromkeys(_names("__or__", "bitwise_or", "logical_or"), lambda a, b: a + b - a * b),
    **dict.fromkeys(_names("__invert__", "bitwise_not", "logical_not"), lambda a: 1 - a),
    **dict.fromkeys(_names("any"), lambda a, *rest: a.amax(*rest)),
    **dict.fromkeys(_names("all"), lambda a, *rest: a.amin(*rest)),
}


def _flat(arguments: Sequence[Any]) -> list[Any]:
    return [part for one in arguments for part in (one if isinstance(one, list | tuple) else [one])]


class _Softening(TorchFunctionMode):
    """Replaces the gradient of each step that has none, as it is computed."""

    def __init__(self, smooth: bool) -> None:
        super().__init__()
        self.smooth = smooth
        self.soft: dict[int, tuple[Tensor, Tensor]] = {}  # of tensors that can have no gradient: what they stand for
        self.chosen: dict[int, tuple[Tensor, Tensor, int | None]] = {}  # of indices: the scores they are the best of

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        if function in _GRADIENTS:
            return None
        first = arguments[0] if arguments else None
        if function in _DETACHED:
            return first
        if function in _TAKEN_OUT and isinstance(first, Tensor):
            return function(first.detach(), *arguments[1:], **keywords)
        if not isinstance(first, Tensor):
            return self._other(function, arguments, keywords)
        if function in _ROUNDED and first.requires_grad:
            in_place = getattr(function, "__name__", "").endswith("_")
            hard = function(first.detach().clone(), *arguments[1:], **keywords)
            return first.add_((hard - first).detach()) if in_place else _through(hard, first)
        if function in _ABOVE | _BELOW:
            return self._compared(function, first, arguments, keywords)
        if function in _CAST:
            return self._cast(function, first, arguments, keywords)
        if function in _ARGMAX:
            index = function(*arguments, **keywords)
            dim = keywords.get("dim", arguments[1] if len(arguments) > 1 else None)
            self.chosen[id(index)] = index, first, dim
            return index
        if function in _ONE_HOT | _TAKEN | _SCATTERED and self._choice(arguments, keywords) is not None:
            return self._picked(function, first, arguments, keywords)
        if function in _CHOSEN and id(first) in self.soft and len(arguments) == 3:
            return _through(
                function(*arguments), self._known(first) * arguments[1] + (1 - self._known(first)) * arguments[2]
            )
        if function in _FILLED and len(arguments) == 3 and id(arguments[1]) in self.soft:
            share = self._known(arguments[1])
            hard = first.detach().clone().masked_fill(arguments[1], arguments[2])
            return _through(
                hard, (1 - share) * first + share * torch.nan_to_num(torch.as_tensor(arguments[2]), 0, 1e3, -1e3)
            )
        if function in _SHIFTED_RIGHT | _SHIFTED_LEFT and id(first) in self.soft:
            result = function(*arguments, **keywords)
            bits = arguments[1] if isinstance(arguments[1], int) else 0
            return self._stands(result, self.soft[id(first)][1] * 2.0 ** (bits if function in _SHIFTED_LEFT else -bits))
        if function in _BEST and isinstance(result := function(*arguments, **keywords), tuple):
            self.chosen[id(result[1])] = result[1], first, None
            return result
        if function in _PLACED and (first.requires_grad or id(first) in self.soft):
            return self._stands(function(*arguments, **keywords), first)
        if function in _DIVIDED and (first.requires_grad or id(first) in self.soft):
            real = self._known(first)
            hard = function(first.detach(), *arguments[1:], **keywords)
            soft = real / arguments[1] if "floor" in getattr(function, "__name__", "") else real
            return _through(hard, soft) if hard.is_floating_point() else self._stands(hard, soft)
        if self.smooth and first.requires_grad and function in _CUT | _OFF | _SATURATED:
            return self._smoothed(function, first, arguments, keywords)
        return self._other(function, arguments, keywords)

    def _other(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Do anything else: what can have no gradient goes on standing for something, the rest gets a gradient."""
        if not any(isinstance(one, Tensor) and id(one) in self.soft for one in _flat(arguments)):
            return function(*arguments, **keywords)
        result = function(*arguments, **keywords)
        if not isinstance(result, Tensor):
            return result
        try:
            if result.is_floating_point():
                return function(*self._hardened(arguments), **keywords)
            parts = [self.soft[id(one)][1] if id(one) in self.soft else one for one in arguments]
            soft = _LOGIC[function](*parts) if function in _LOGIC else function(*parts, **keywords)
        except (RuntimeError, TypeError):  # no arithmetic of real numbers
            return result
        return self._stands(result, soft) if isinstance(soft, Tensor) and soft.shape == result.shape else result

    def _stands(self, hard: Tensor, soft: Tensor) -> Tensor:
        self.soft[id(hard)] = hard, soft
        return hard

    def _known(self, value: Tensor) -> Tensor:
        """Return a tensor as one with a gradient, where it stands for something."""
        if id(value) not in self.soft:
            return value
        return _through(value, self.soft[id(value)][1])

    def _hardened(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Return arguments of arithmetic, those that stand for something with their gradients."""
        if not self.soft:
            return tuple(arguments)
        return tuple(
            self._known(one)
            if isinstance(one, Tensor)
            else [self._known(part) if isinstance(part, Tensor) else part for part in one]
            if isinstance(one, list)
            else one
            for one in arguments
        )

    def _compared(self, function: Any, first: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        hard = function(*arguments, **keywords)
        other = arguments[1] if len(arguments) > 1 else keywords.get("other", 0)
        differentiable = first.requires_grad or (isinstance(other, Tensor) and other.requires_grad)
        if not differentiable or id(first) in self.soft:
            return hard
        lead = first - other if function in _ABOVE else other - first
        width = lead.detach().abs().mean().clamp_min(1e-6) / 2
        return self._stands(hard, torch.sigmoid(lead / width))

    def _cast(self, function: Any, first: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        result = function(*arguments, **keywords)
        known = self.soft.get(id(first))
        if not isinstance(result, Tensor) or result is first or not (known or first.requires_grad):
            return result
        soft = known[1] if known else first
        if result.is_floating_point():
            return _through(result, soft.to(result.dtype)) if known else result
        return self._stands(result, soft)

    def _choice(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor | None:
        """Return the scores that an index among the arguments is the best of."""
        tensors = [one for one in (*_flat(arguments), *keywords.values()) if isinstance(one, Tensor)]
        return next((self.chosen[id(one)][1] for one in tensors if id(one) in self.chosen), None)

    def _picked(self, function: Any, first: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Follow the index of the best score: into a one-hot row, a row of a table, or a place that is set."""
        result = function(*arguments, **keywords)
        scores = self._choice(arguments, keywords)
        if scores is None or not isinstance(result, Tensor):
            return result
        if scores.ndim != 2 or not scores.requires_grad:
            return result
        spread = (scores.amax(1, keepdim=True) - scores.amin(1, keepdim=True)).detach().clamp_min(1e-12)
        share = torch.softmax(SPREAD * scores / spread, dim=1)
        if function in _ONE_HOT or function in _SCATTERED:
            if result.shape != share.shape:
                return result
            soft = share * float(result.detach().amax())
        else:
            table = arguments[1] if function is F.embedding else first
            if table.ndim != 2 or len(table) != share.shape[1]:
                return result
            soft = share @ table.to(share.dtype)
        return _through(result, soft) if result.is_floating_point() else self._stands(result, soft)

    def _smoothed(self, function: Any, first: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        hard = function(first.clone(), *arguments[1:], **keywords)
        if function in _CUT:
            return _through(hard, first)
        if function in _OFF:
            return _through(hard, (1 - LEAK) * hard + LEAK * first)
        width = first.detach().abs().mean().clamp_min(1.0)
        return _through(hard, width * function(first / width, *arguments[1:], **keywords))


_UNHARMFUL = _names("isnan", "isinf", "isfinite", "isposinf", "isneginf", "equal", "is_same_size", "max_unpool2d")
_JUMPS = (
    _ROUNDED
    | _DIVIDED
    | _TAKEN_OUT
    | _names("heaviside", "frac", "hardshrink", "bernoulli", "quantize_per_tensor")
    | _names("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine")
)


class _Watching(_Softening):
    """Softens, so that nothing is cut off, and notes each step that has whole numbers or jumps for its result."""

    def __init__(self, smooth: bool) -> None:
        super().__init__(smooth)
        self.met = False
        self.places: dict[int, Tensor] = {}  # of what was largest: a step once they are used

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        given = [one for one in (*_flat(arguments), *(keywords or {}).values()) if isinstance(one, Tensor)]
        depends = any(one.requires_grad for one in given)
        result = super().__torch_function__(function, types, arguments, keywords)
        if function in _UNHARMFUL:
            return result
        jumps = function in _JUMPS or bool((keywords or {}).get("rounding_mode"))
        self.met |= any(id(one) in self.places for one in given) or (depends and jumps)
        whole = [one for one in _flat((result,)) if isinstance(one, Tensor) and one.dtype in _WHOLE]
        if depends and (function in _ARGMAX or isinstance(result, tuple)):
            self.places |= {id(one): one for one in whole}
        elif depends:
            self.met |= bool(whole)
        return result


def _let_pass(logits: Tensor) -> None:
    """Let every custom autograd function pass its output's gradient to its first input, where the shapes agree."""
    seen: set[Any] = set()
    waiting = [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        if isinstance(node, BackwardCFunction) and not isinstance(node, _Through._backward_cls):
            node.register_hook(_passed)


def _passed(inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
    first, given = inputs[0], outputs[0]
    if first is None or given is None or first.shape != given.shape:
        return None
    return (given, *inputs[1:])
