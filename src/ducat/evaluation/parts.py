"""The finished chunks of an evaluation: kept on disk, so that it can go on, and shared by several processes.

A chunk of another evaluation must not be taken for one's own: a number would be told of a network that its attacks
never saw. So each chunk is kept with everything that decides what attacks leave of it, its `Key`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import ducat
from ducat import checkpoint
from ducat.attacks.suites import Attack
from ducat.data import spooled
from ducat.evaluation.result import ROW, AttackResult, named, read_rows
from ducat.evaluation.subject import PROBED, Measured, differs
from ducat.seeding import generator, seeded
from ducat.threat import ThreatModel


class Stage(str):
    """What an evaluation begins to do, as text.

    Attributes:
        done: images that all attacks are through with.
        samples: images in all.
        standing: how many of those looked at so far, this chunk's included, have withstood every attack.
        seen: how many those are.
    """

    done: int
    samples: int
    standing: int
    seen: int

    @classmethod
    def of(cls, text: str, done: int, samples: int, standing: int, seen: int) -> "Stage":
        """Return such a text."""
        stage = cls(text)
        stage.done, stage.samples, stage.standing, stage.seen = done, samples, standing, seen
        return stage


@dataclass(frozen=True)
class Part:
    """What the attacks left of one chunk, on the CPU.

    Attributes:
        clean: how often each benign image is classified correctly.
        adversarial: for each sample the image that is kept.
        attacks: a result per attack.
        accepted: for each signal the images that it accepts highest with a wrong class; none unless that is watched.
    """

    clean: Tensor
    adversarial: Tensor
    attacks: Sequence[AttackResult]
    accepted: Tensor

    @property
    def standing(self) -> int:
        """How many samples withstood every attack."""
        return int(torch.stack([self.clean > 0.5, *(attack.correct for attack in self.attacks)]).all(0).sum())


@dataclass(frozen=True)
class Key:
    """What decides what attacks leave of a chunk.

    Attributes:
        settings: everything that is the same to the letter.
        answers: logits of each network on some images, which may differ by rounding: the last net under `settings`,
            which do not know what a network reads from elsewhere.
        coarse: whether a network works in half precision.
    """

    settings: Sequence[str]
    answers: Sequence[Tensor]
    coarse: bool = False

    @classmethod
    def of(
        cls, settings: Sequence[str], networks: Sequence[Measured], x: Tensor, threat: ThreatModel, random: bool
    ) -> "Key":
        """Return the key of networks, the first of which is the one that is attacked; the same in every process.

        Of a network that is random in a way that no seed repeats, an evaluation takes up nothing of another one.
        """
        answers = _answers(networks, x, threat)
        settings = [ducat.__version__, *settings, *(described(network.model) for network in networks)]
        coarse = any(network.coarse for network in networks)
        if random and any(_differ(answers, _answers(networks, x, threat), coarse)):
            settings, answers = [*settings, uuid.uuid4().hex], []
        return agreed(cls(settings, answers, coarse))

    def fits(self, settings: Sequence[str], answers: Sequence[Tensor]) -> bool:
        """Tell whether a kept chunk, with these, is of the same evaluation."""
        return list(self.settings) == list(settings) and not any(_differ(self.answers, answers, self.coarse))


Value = TypeVar("Value")


def agreed(value: Value) -> Value:
    """Return the value of the first of the processes that share an evaluation: what each finds may be chance."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    held = [value]
    if PartialState().num_processes > 1:
        broadcast_object_list(held)
    return held[0]


@torch.no_grad()
def _answers(networks: Sequence[Measured], x: Tensor, threat: ThreatModel) -> list[Tensor]:
    x = x[:PROBED]
    corners = [threat.project(x + sign * threat.eps * threat.direction(x - 0.5), x) for sign in (1, -1)]
    probe = torch.cat([x, threat.random_start(x, generator(0, "parts")), *corners])
    with seeded(0, "parts", "answers", device=networks[0].device):
        return [network(probe.to(network.device)).cpu() for network in networks]


def _differ(first: Sequence[Tensor], second: Sequence[Tensor], coarse: bool) -> Iterator[bool]:
    if [one.shape for one in first] != [other.shape for other in second]:
        yield True
        return
    for one, other in zip(first, second, strict=True):
        yield bool(differs(one, other, coarse).any())


PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
LIBRARIES = ("torch", "ducat", "numpy", "builtins")  # whose code is told by its version
DEPTH = 12  # of objects that hold objects
TENSORS = ("_parameters", "_buffers", "_modules")  # attributes of a module


def described(value: Any) -> str:
    """Return a digest of a function, a module or an object: its code, and the values that it holds, as far as seen.

    It is the same in every process. Not seen is what lies in files and deeper than `DEPTH`, and code of libraries.
    """
    made = hashlib.blake2b(digest_size=16)
    for text in _told(value, DEPTH, {}):
        made.update(text.encode())
        made.update(b"\0")
    return made.hexdigest()


def _told(value: Any, depth: int, seen: dict[int, Any]) -> Iterator[str]:
    """Yield what a value is, part by part; `seen` holds what was, by its id, and keeps it alive."""
    if isinstance(value, PLAIN):
        yield repr(value)
        return
    if isinstance(value, Tensor):
        yield digest(value) if value.layout is torch.strided and not value.is_meta else str(value.shape)
        return
    yield type(value).__qualname__
    if isinstance(value, tuple):  # whether equal ones are one object is up to the compiler
        for each in value if depth > 0 else ():
            yield from _told(each, depth - 1, seen)
        return
    if depth <= 0 or id(value) in seen:
        return
    seen[id(value)] = value
    for each in _parts(value):
        yield from _told(each, depth - 1, seen)


def _parts(value: Any) -> Iterator[Any]:
    """Yield what a value is made of."""
    if isinstance(value, np.ndarray | np.generic):
        yield f"{value.dtype} {value.shape} {hashlib.blake2b(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    elif isinstance(value, list):
        yield from value
    elif isinstance(value, set | frozenset):
        yield from sorted(repr(each) for each in value if isinstance(each, PLAIN))
    elif isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, ModuleType):
        yield value.__name__
    elif isinstance(value, type):
        yield value.__qualname__
        yield from _methods(value)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, FunctionType):
        yield from _of_function(value)
    elif isinstance(value, CodeType):
        yield from (value.co_code, value.co_names, value.co_consts)
    elif isinstance(value, nn.Module):
        yield from _of_module(value)
    elif dataclasses.is_dataclass(value) or not _is_library(type(value)):
        yield from _methods(type(value))
        yield getattr(value, "__dict__", None)


def _of_function(function: FunctionType) -> Iterator[Any]:
    yield from (function.__module__, function.__qualname__, function.__code__)
    yield from (function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not assigned yet
            yield cell.cell_contents
    if not _is_library(function):
        for name in sorted(_names(function.__code__) & function.__globals__.keys()):
            yield function.__globals__[name]


def _of_module(module: nn.Module) -> Iterator[Any]:
    for name, one in module.named_modules():
        yield (name, type(one).__qualname__, *_methods(type(one)))
        for attribute, held in vars(one).items():
            if attribute not in TENSORS:
                # Hooks are numbered in the order in which a process made them.
                yield attribute, list(held.values()) if attribute.endswith("hooks") and held else held
    yield from module.named_parameters()
    yield from module.named_buffers()


def _methods(kind: type) -> list[Any]:
    return [] if _is_library(kind) else [each for _, each in sorted(vars(kind).items()) if callable(each)]


def _is_library(value: Any) -> bool:
    return (value.__module__ or "").partition(".")[0] in LIBRARIES


def _names(code: CodeType) -> set[str]:
    inner = (_names(const) for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*inner)


def shared(
    attack: Callable[[int, Tensor, Tensor, Callable[[Attack, int], None]], Part],
    x: Tensor,
    chunks: Sequence[tuple[Tensor, Tensor]],
    progress: Callable[[str], None],
    folder: Path | None,
    key: Key | None,
) -> Iterator[Part]:
    """Attack every chunk, or this process's share of them, and yield what all processes made.

    Args:
        attack: `(number, images, labels, progress)` to what is left of a chunk.
        x: all images.
        chunks: images and labels.
        progress: told of each attack and chunk as it starts, see `Stage`.
        folder: where finished chunks are kept; None keeps none.
        key: of this evaluation; not None if there is a folder.
    """
    samples = sum(len(y) for _, y in chunks)
    before: list[tuple[int, int]] = []  # samples of each chunk that this process attacked, and those standing

    def attacked(number: int) -> Part:
        first = sum(len(y) for _, y in chunks[:number])
        images, y = chunks[number]
        place = f", samples {first + 1} to {first + len(y)}" if len(chunks) > 1 else ""
        done, stood = sum(seen for seen, _ in before), sum(standing for _, standing in before)
        part = attack(
            number,
            images,
            y,
            lambda row, standing: progress(Stage.of(row.name + place, first, samples, stood + standing, done + len(y))),
        )
        before.append((len(part.clean), part.standing))
        return part

    if folder is None:
        for number in range(len(chunks)):
            yield attacked(number)
            spooled.release(x)
        return
    from accelerate import PartialState

    assert key is not None
    processes = PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:05d}.safetensors" for number in range(len(chunks))]
    # A second evaluation of the same kind would do the work again, and its end would take the chunks away.
    taken = f"{folder} is in use by another evaluation: wait for it, or stop it"
    with checkpoint.locked(folder / "lock", taken) if processes.is_main_process else contextlib.nullcontext():
        for number in range(processes.process_index, len(chunks), processes.num_processes):
            if _read(files[number], key) is None:
                _write(files[number], key, attacked(number))
            spooled.release(x)
        processes.wait_for_everyone()
        for file in files:
            part = _read(file, key)
            if part is None:
                raise RuntimeError(f"{file} is gone: do two evaluations use {folder}?")
            yield part


def _write(file: Path, key: Key, part: Part) -> None:
    rows = [{name: getattr(attack, name) for name in ROW} for attack in part.attacks]
    tensors = {"clean": part.clean, "adversarial": part.adversarial, "accepted": part.accepted, **named(part.attacks)}
    tensors |= {f"answers.{number}": logits for number, logits in enumerate(key.answers)}
    checkpoint.save(file, tensors, {"settings": list(key.settings), "attacks": rows})


def _read(file: Path, key: Key) -> Part | None:
    """Return the finished chunk, or None if there is none of this evaluation."""
    if not file.is_file():
        return None
    tensors, state = checkpoint.read(file)
    answers = [tensors[name] for name in sorted(tensors, key=_number) if name.startswith("answers.")]
    if not key.fits(state.get("settings", []), answers):
        return None
    # Copies: a tensor of a file keeps all of the file mapped.
    kept = {name: tensor if name == "adversarial" else tensor.clone() for name, tensor in tensors.items()}
    return Part(kept["clean"], kept["adversarial"], read_rows(state["attacks"], kept), kept["accepted"])


def _number(name: str) -> int:
    last = name.rpartition(".")[2]
    return int(last) if last.isdigit() else -1


def digest(*tensors: Tensor) -> str:
    """Return a short digest of the values of tensors."""
    made = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        made.update(str((tensor.shape, tensor.dtype)).encode())
        for part in spooled.slices(tensor.detach().cpu().contiguous()):
            made.update(part.view(torch.uint8).numpy().data)
    return made.hexdigest()
