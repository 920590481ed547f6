"""The one engine of gradient ascent in a ball, from FGSM in training to a step-halving attack in evaluation."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ducat.attacks.objectives import Goal, find
from ducat.threat import ThreatModel

Batch = Float[Tensor, "batch channels height width"]
Labels = Int[Tensor, " batch"]
KEEP = ("best", "first", "last")
OVERSHOOT = 1e-6  # of [0, 1]: what interpolation in float32 leaves

MOMENTUM = 0.75  # these three: Croce & Hein 2020, section 3 (arXiv 2003.01690)
PROGRESS = 0.75
FIRST_CHECKPOINT, SHRINK, SHORTEST = 0.22, 0.03, 0.06


@contextmanager
def attackable(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode without parameter gradients, and undo both at the end.

    Each module gets back the mode that it had, also where a part of the model was in another mode than the rest. Inside
    of `torch.inference_mode()` nothing would pass a gradient, so it is left meanwhile.

    Raises:
        ValueError: if the model was made inside of `torch.inference_mode()`.
    """
    if any(tensor.is_inference() for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise ValueError(
            "the network was made or moved inside of torch.inference_mode(), so that no gradient can pass it: make it "
            "outside"
        )
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    recording = torch.is_grad_enabled()  # leaving inference mode switches it on
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.set_grad_enabled(recording):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


def check_kinds(x: Tensor, y: Tensor) -> None:
    """Raise ValueError if images or labels have not the type that an attack works with. It looks at no number."""
    if len(x) != len(y):
        raise ValueError(f"{len(x)} images but {len(y)} labels")
    if not x.is_floating_point():
        raise ValueError(f"the images are {x.dtype}: give floating point numbers in [0, 1], as x.float() / 255 does")
    if y.dtype != torch.long:
        raise ValueError(f"the labels are {y.dtype}: give class numbers as torch.int64, as y.long() does")


def check_ranges(x: Tensor, y: Tensor) -> None:
    """Raise ValueError if images are outside [0, 1] or labels below 0; it waits for the device."""
    if not len(x):
        return
    low, high, least = torch.stack([x.amin().double(), x.amax().double(), y.amin().double()]).tolist()
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
        raise ValueError(f"the images run from {low:g} to {high:g}: they must be in [0, 1]; normalise inside the model")
    if least < 0:
        raise ValueError(f"the labels begin at {least:g}: they must be class numbers, from 0 on")


def recordable(tensor: Tensor) -> Tensor:
    """Return a tensor that gradients may be computed with: a copy of one that was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def pgd(
    model: nn.Module,
    x: Batch,
    y: Labels,
    threat: ThreatModel,
    objective: str | Goal = "cross-entropy",
    restarts: int = 1,
    generator: torch.Generator | None = None,
    *,
    start: Batch | None = None,
    keep: str = "best",
    adaptive_steps: bool = False,
    step_sizes: Sequence[float] | None = None,
    judge: nn.Module | None = None,
) -> Batch:
    """Projected gradient ascent (Madry et al. 2018, arXiv 1706.06083).

    Each image moves `threat.steps` times by `threat.step_size` in the steepest direction of the norm
    (`ThreatModel.ascend`), and is projected back into the ball and into [0, 1]. Only the gradient of the input is
    computed. The model is attacked in evaluation mode; the mode of each of its modules is restored.

    Args:
        model: maps images in [0, 1], shape (B, channels, H, W), to logits, shape (B, K).
        x: benign images.
        y: labels, shape (B,); for an objective that knows recovery they are of the C = K / 2 real classes.
        threat: ball, step size (in the units of eps, on images in [0, 1]) and number of steps.
        objective: a name in `objectives.OBJECTIVES`, or a `Goal`. It also says whether a sample counts as fooled by
            its raw or by its recovered prediction.
        restarts: independent starts, at least 1; later ones attack only the samples that survived the earlier ones.
        generator: source of the random starts; PyTorch's global one by default.
        start: where the first start begins, inside the ball, instead of at random in it.
        keep: which iterate to return for a sample. "best": one that fools the model if any does, and the one with the
            highest objective among equals; the first and the last iterate count too. "first": stop a sample at the
            first iterate that fools the model, which is faster, and otherwise as "best". "last": the last one,
            whatever it does, without the extra pass that looks at it; what adversarial training uses.
        adaptive_steps: begin with steps of 2 eps, add momentum, and halve a sample's step, going back to its best
            iterate, when its progress stalls, as Auto-PGD does (Croce & Hein 2020, arXiv 2003.01690);
            `threat.step_size` is then not used.
        judge: another model of as many classes whose prediction decides what counts as fooled, while `model` leads; it
            is asked at every step, in evaluation mode too.
        step_sizes: length of each step, in the units of eps, instead of `threat.steps` steps of `threat.step_size`;
            with keep="last" only.

    Returns:
        Images inside the ball and inside [0, 1], of x's shape and dtype.

    Raises:
        ValueError: if an argument is out of its range, or labels and images differ in number, or are of another kind
            than this says. The range of the images is looked at unless keep="last".
    """
    if restarts < 1:
        raise ValueError(f"restarts={restarts} must be at least 1")
    if keep not in KEEP:
        raise ValueError(f"keep={keep!r} is unknown: choose from {', '.join(KEEP)}")
    if keep == "last" and (restarts > 1 or adaptive_steps):
        raise ValueError("keep='last' looks at no iterate: it takes neither restarts nor adaptive_steps")
    if keep != "last" and step_sizes is not None:
        raise ValueError(f"step_sizes are for keep='last', not for keep={keep!r}")
    check_kinds(x, y)
    if keep != "last":  # training does not wait for the device
        check_ranges(x, y)
    goal = find(objective)
    with attackable(model if judge is None else nn.ModuleList([model, judge])):
        x, y, start = recordable(x), recordable(y), None if start is None else recordable(start)
        reference = None
        if goal.reference is not None:
            with torch.no_grad():
                reference = recordable(goal.reference(_read(model(x), x.dtype), y))
        if keep == "last":
            start = threat.random_start(x, generator) if start is None else start
            step_sizes = [threat.step_size] * threat.steps if step_sizes is None else step_sizes
            return _last_iterate(model, x, y, threat, goal, reference, start, step_sizes)
        best = x.clone()
        best_value = x.new_full((len(x),), -torch.inf)
        alive = torch.arange(len(x), device=x.device)
        for restart in range(restarts):
            if not len(alive):
                break
            begin = threat.random_start(x[alive], generator) if start is None or restart else start[alive]
            chosen = reference[alive] if reference is not None else None
            found, value, fooled = _best_iterate(
                model,
                x[alive],
                y[alive],
                threat,
                goal,
                chosen,
                begin,
                stop=keep == "first",
                adaptive=adaptive_steps,
                judge=judge,
            )
            better = fooled | (value > best_value[alive])
            best[alive[better]] = found[better]
            best_value[alive[better]] = value[better]
            alive = alive[~fooled]
    return best


def _read(outputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return logits in the precision of the images, with a very low number for minus infinity.

    A class at minus infinity never fires, and is none of the attack's business; but 0 times it, and its difference with
    itself, are no numbers.
    """
    logits = outputs.to(dtype)
    return torch.where(logits.isneginf(), torch.finfo(dtype).min / 2, logits)


def _gradient(
    model: nn.Module, adversarial: Tensor, y: Tensor, goal: Goal, reference: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, objective and gradient of the input; of a network that ends in float16, each image's direction."""
    with torch.enable_grad():
        adversarial = adversarial.detach().requires_grad_()
        outputs, dtype = model(adversarial), adversarial.dtype
        if outputs.dtype == torch.float16 and outputs.requires_grad:
            outputs, dtype = outputs.float(), torch.float32
            outputs.register_hook(_enlarged)
        logits = _read(outputs, dtype)
        value = goal.value(logits, y, reference)
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), adversarial, allow_unused=True)
    if gradient is None:  # the model passes none
        gradient = torch.zeros_like(adversarial)
    return logits.detach().to(adversarial.dtype), value.detach().to(adversarial.dtype), gradient.nan_to_num()


def _enlarged(slopes: Tensor) -> Tensor:
    """Divide each row by its largest entry: those of an image that the network is sure of would be 0 in float16."""
    return slopes / slopes.abs().amax(1, keepdim=True).clamp_min(torch.finfo(slopes.dtype).tiny)


def _last_iterate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    goal: Goal,
    reference: Tensor | None,
    start: Tensor,
    step_sizes: Sequence[float],
) -> Tensor:
    adversarial = start
    for step_size in step_sizes:
        _, _, gradient = _gradient(model, adversarial, y, goal, reference)
        adversarial = threat.project(threat.ascend(adversarial, gradient, step_size), x)
    return adversarial


@dataclass
class _Ascent:
    """The state of an ascent: a row per sample that is still attacked."""

    row: Tensor  # its place in the batch
    x: Tensor
    y: Tensor
    reference: Tensor | None
    now: Tensor
    before: Tensor
    step_size: Tensor
    best: Tensor
    best_value: Tensor
    best_gradient: Tensor
    fooled: Tensor  # whether `best` fools the model
    value: Tensor  # of `now`
    rises: Tensor  # steps since the last checkpoint that raised the value
    checkpoint_value: Tensor  # `best_value` at the last checkpoint
    halved: Tensor  # whether the last checkpoint halved the step

    def select(self, mask: Tensor) -> "_Ascent":
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen: dict[str, Any] = {name: None if tensor is None else tensor[mask] for name, tensor in state.items()}
        return _Ascent(**chosen)


def _checkpoints(steps: int) -> set[int]:
    """Return the steps after which Auto-PGD looks whether to halve (Croce & Hein 2020, section 3.2)."""
    places, gap, place = set(), FIRST_CHECKPOINT, FIRST_CHECKPOINT
    while place < 1:
        places.add(max(1, round(place * steps)))
        gap = max(gap - SHRINK, SHORTEST)
        place += gap
    return places


def _columns(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _best_iterate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    goal: Goal,
    reference: Tensor | None,
    start: Tensor,
    *,
    stop: bool,
    adaptive: bool,
    judge: nn.Module | None,
) -> tuple[Tensor, Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Return the best iterate of each sample, its objective, and whether it fools the model."""
    size = len(x)
    unset = x.new_full((size,), -torch.inf)
    no = torch.zeros(size, dtype=torch.bool, device=x.device)
    search = _Ascent(
        row=torch.arange(size, device=x.device),
        x=x,
        y=y,
        reference=reference,
        now=start,
        before=start,
        step_size=x.new_full((size,), 2 * threat.eps if adaptive else threat.step_size),
        best=start.clone(),
        best_value=unset.clone(),
        best_gradient=torch.zeros_like(x),
        fooled=no.clone(),
        value=unset.clone(),
        rises=torch.zeros(size, device=x.device),
        checkpoint_value=unset.clone(),
        halved=no.clone(),
    )
    best, best_value, fooled = start.clone(), unset.clone(), no.clone()
    checkpoints = _checkpoints(threat.steps) if adaptive else set()
    last_checkpoint = 0
    for step in range(threat.steps + 1):
        if step < threat.steps:
            logits, value, gradient = _gradient(model, search.now, search.y, goal, search.reference)
        else:
            with torch.no_grad():
                logits = _read(model(search.now), x.dtype)
                value, gradient = goal.value(logits, search.y, search.reference), search.best_gradient
        if judge is not None:
            with torch.no_grad():
                logits = _read(judge(search.now), x.dtype)
        hit = goal.fooled(logits, search.y)
        better = (hit & ~search.fooled) | ((hit == search.fooled) & (value > search.best_value))
        search.rises += value > search.value
        search.value = value
        search.fooled |= hit
        search.best_value = torch.where(better, value, search.best_value)
        columns = _columns(better, x)
        search.best = torch.where(columns, search.now, search.best)
        search.best_gradient = torch.where(columns, gradient, search.best_gradient)
        if step == threat.steps or stop:
            best[search.row], best_value[search.row] = search.best, search.best_value
            fooled[search.row] = search.fooled
        if step == threat.steps:
            break
        if step in checkpoints:
            stalled = search.rises < PROGRESS * (step - last_checkpoint)
            stalled |= ~search.halved & (search.best_value <= search.checkpoint_value)
            search.step_size = torch.where(stalled, search.step_size / 2, search.step_size)
            columns = _columns(stalled, x)
            search.now = torch.where(columns, search.best, search.now)
            gradient = torch.where(columns, search.best_gradient, gradient)
            search.checkpoint_value, search.halved = search.best_value.clone(), stalled
            search.rises, last_checkpoint = torch.zeros_like(search.rises), step
        ahead = threat.project(threat.ascend(search.now, gradient, _columns(search.step_size, x)), search.x)
        if adaptive and step:
            drift = search.now - search.before
            ahead = search.now + MOMENTUM * (ahead - search.now) + (1 - MOMENTUM) * drift
            ahead = threat.project(ahead, search.x)
        search.before, search.now = search.now, ahead
        if stop and bool(search.fooled.any()):
            search = search.select(~search.fooled)
            if not len(search.row):
                break
    return best, best_value, fooled
