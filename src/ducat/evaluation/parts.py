"""The finished chunks of an evaluation: kept on disk, so that it can go on, and shared by several processes.

A chunk of another evaluation must not be taken for one's own: a number would be told of a network that its attacks
never saw. So each chunk is kept with everything that decides what attacks leave of it, its `Key`.
"""

import functools
import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ducat import checkpoint
from ducat.attacks.suites import Attack
from ducat.data import spooled
from ducat.evaluation.result import ROW, AttackResult, named, read_rows
from ducat.evaluation.subject import PROBED, Measured, differs
from ducat.seeding import generator
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
        answers: logits of each network on some images: they tell functions apart, and modules that differ in what is no
            parameter. They may differ by rounding.
    """

    settings: Sequence[str]
    answers: Sequence[Tensor]

    @classmethod
    def of(
        cls, settings: Sequence[str], networks: Sequence[Measured], x: Tensor, threat: ThreatModel, random: bool
    ) -> "Key":
        """Return the key of networks, the first of which is the one that is attacked.

        Of a network that is random in a way that no seed repeats, an evaluation takes up nothing of another one.
        """
        from accelerate import PartialState

        settings = [*settings, *(digest(*_tensors(network)) for network in networks)]
        first = _answers(networks, x, threat)
        if random and any(_differ(first, _answers(networks, x, threat))):
            # Processes that share the chunks of one evaluation cannot agree on a number of their own.
            return cls([*settings, *([uuid.uuid4().hex] if PartialState().num_processes == 1 else [])], [])
        return cls(settings, first)

    def fits(self, settings: Sequence[str], answers: Sequence[Tensor]) -> bool:
        """Tell whether a kept chunk, with these, is of the same evaluation."""
        return list(self.settings) == list(settings) and not any(_differ(self.answers, answers))


def _tensors(network: nn.Module) -> list[Tensor]:
    return [value for value in network.state_dict().values() if isinstance(value, Tensor)]


@torch.no_grad()
def _answers(networks: Sequence[Measured], x: Tensor, threat: ThreatModel) -> list[Tensor]:
    x = x[:PROBED]
    probe = torch.cat([x, threat.random_start(x, generator(0, "parts"))])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [network(probe.to(network.device)).cpu() for network in networks]


def _differ(first: Sequence[Tensor], second: Sequence[Tensor]) -> Iterator[bool]:
    if [one.shape for one in first] != [other.shape for other in second]:
        yield True
        return
    for one, other in zip(first, second, strict=True):
        yield bool(differs(one, other).any())


PLAIN = (int, float, complex, str, bytes, bool, type(None))
DEPTH = 8  # of functions that hold functions


def code_of(function: Any, depth: int = DEPTH) -> str:
    """Return what tells a function from others, the same in every process: name, code, and the values that it holds."""
    if isinstance(function, functools.partial):
        return f"{code_of(function.func, depth)} {_held([*function.args, *sorted(function.keywords.items())], depth)}"
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return _held(function, depth)
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    text = repr((code.co_names, [const for const in code.co_consts if isinstance(const, PLAIN)]))
    made = hashlib.blake2b(code.co_code + text.encode(), digest_size=8).hexdigest()
    return f"{function.__module__}.{function.__qualname__} {made} {_held(held, depth - 1)}"


def _held(value: Any, depth: int) -> str:
    if isinstance(value, PLAIN):
        return repr(value)
    if depth <= 0:
        return type(value).__qualname__
    if isinstance(value, list | tuple):
        return f"[{', '.join(_held(each, depth - 1) for each in value)}]"
    if isinstance(value, Tensor):
        return digest(value)
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__} {digest(*_tensors(value))}"
    if hasattr(value, "__code__") or hasattr(value, "__func__") or isinstance(value, functools.partial):
        return code_of(value, depth)
    if isinstance(value, type):
        return value.__qualname__
    fields = [getattr(value, name, None) for name in getattr(value, "__dataclass_fields__", ())]
    return f"{type(value).__qualname__} {_held(fields, depth - 1)}"


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
