"""What the JSON files of a run folder hold. They are checked once, as they are read; the error names file and key.

A file may hold more than is said here. What earlier versions did not write is `NotRequired`.
"""

import json
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

Interval = tuple[float, float]


class Extra(TypedDict):
    file: str
    images: int
    fingerprint: str


class TrainedOn(TypedDict):
    name: str
    title: str
    fingerprint: str
    train: int
    validation: int
    test: int
    extra: NotRequired[Extra]


class Git(TypedDict):
    commit: str
    changed: bool


class Manifest(TypedDict):
    """manifest.json, as far as it is read."""

    status: Literal["running", "finished", "interrupted", "failed"]
    data: TrainedOn
    ducat: str
    command: list[str]
    git: NotRequired[Git | None]
    initial: NotRequired[dict[str, Any]]
    resumed: NotRequired[list[dict[str, Any]]]
    platform: NotRequired[str]
    device: NotRequired[str]
    threads: NotRequired[int]
    processes: NotRequired[int]


class Epoch(TypedDict):
    """A line of metrics.jsonl."""

    epoch: int
    loss: float
    learning_rate: NotRequired[float]
    seconds: NotRequired[float]
    images_per_s: NotRequired[float | None]
    dummy_classes: NotRequired[str]
    clean: NotRequired[float]
    blind: NotRequired[float]
    robust: NotRequired[float]
    fgsm: NotRequired[float]
    pgd: NotRequired[float]


VALIDATION = ("clean", "blind", "robust")  # keys of an epoch that are there together or not at all


class Ball(TypedDict):
    norm: Literal["linf", "l2", "l1"]
    eps: float
    step_size: NotRequired[float]
    steps: NotRequired[int]


class Accuracy(TypedDict):
    accuracy: float
    ci95: Interval


class Attack(TypedDict):
    name: str
    strategy: NotRequired[str]
    knows_recovery: bool
    accuracy: float
    ci95: Interval
    seconds: float
    black_box: NotRequired[bool]
    same_as: NotRequired[str | None]
    outside: NotRequired[int]


class Share(TypedDict):
    share: float
    ci95: Interval


class Denial(Share):
    eps: float


class Refusing(TypedDict):
    reject: float
    threshold: float
    clean_refused: Share
    clean_right: Share
    clean_wrong: Share
    right_refused: Share | None  # None where no image is classified correctly
    robust: Share
    served: Share
    denial: list[Denial]


class Point(TypedDict):
    right_refused: float
    robust: float
    served: float


class SignalRows(TypedDict):
    signal: str
    rows: list[Refusing]
    curve: list[Point]


class Rejection(TypedDict):
    calibrated: int
    held_out: bool
    at_most: NotRequired[bool]
    robust_at_half_eps: Share
    signals: list[SignalRows]
    warnings: NotRequired[list[str]]


class Audit(TypedDict):
    samples: int
    vanishing: dict[str, int]
    standing_after_steps: dict[str, int]
    standing: int
    standing_at_double_eps: int
    standing_far: int
    only_black_box: int
    only_guided: NotRequired[int]


class Opinion(TypedDict):
    samples: int
    broken: int


class SecondRound(TypedDict):
    samples: int
    broken: dict[str, int]
    seconds: float
    through: str | None
    stopped: bool


class Scrutiny(TypedDict):
    nature: list[str]
    draws: int
    repeats: int
    whole_batches: NotRequired[int | None]
    folded: bool
    hard_steps: NotRequired[bool]
    not_finite: int
    opinion: Opinion | None
    second_round: SecondRound | None


class Origin(TypedDict):
    """What tells evaluations apart that are of one suite, ball, number of images and seed."""

    weights: NotRequired[str | None]
    measured: NotRequired[str]
    ducat: NotRequired[str]
    reject: NotRequired[list[float]]
    surrogates: NotRequired[list[str]]
    second_round_seconds: NotRequired[float | None]
    source: NotRequired[dict[str, Any] | None]


class Evaluation(TypedDict):
    """evaluation.json."""

    schema: Literal[1]
    data: str
    samples: int
    seed: int
    suite: str
    batch_size: NotRequired[int]
    threat: Ball
    clean: Accuracy
    attacks: list[Attack]
    blind: float
    blind_ci95: Interval
    robust: float
    robust_ci95: Interval
    sink_gap: float
    warnings: list[str]
    unrepeatable: NotRequired[int]
    audit: NotRequired[Audit | None]
    fingerprint: NotRequired[str]
    checkpoint: NotRequired[str | None]
    at_most: NotRequired[bool]
    causes: NotRequired[list[str]]
    dummy_classes: NotRequired[bool]
    scrutiny: NotRequired[Scrutiny]
    rejection: NotRequired[Rejection | None]
    origin: NotRequired[Origin | None]


class Calibration(TypedDict):
    """rejection.json."""

    schema: Literal[1]
    signal: str
    threshold: float
    reject: float
    checkpoint: str
    weights: NotRequired[str]
    images: int


class Bin(TypedDict):
    count: int
    signal: float
    adversarial: float


class Reliability(TypedDict):
    bins: list[Bin]
    error: float
    auroc: float


class Points(TypedDict):
    real: list[Interval]
    dummy: list[Interval]


class Seen(TypedDict):
    benign: Points
    adversarial: Points


class Features(TypedDict):
    explained: Interval
    points: Seen


Mass = TypedDict(
    "Mass", {"real": float, "other real": float, "dummy": NotRequired[float], "other dummy": NotRequired[float]}
)


class Masses(TypedDict):
    benign: Mass
    adversarial: Mass


class Pictures(TypedDict):
    benign: str
    perturbation: str
    adversarial: str


class Predictions(TypedDict):
    real: tuple[str, float]
    dummy: NotRequired[tuple[str, float]]
    recovered: NotRequired[tuple[str, float]]


class Example(TypedDict):
    label: str
    withstood: bool
    magnified: float
    images: Pictures
    benign: Predictions
    adversarial: Predictions


class Behaviour(TypedDict):
    """behaviour.json."""

    schema: Literal[1]
    evaluation: str
    attacked: int
    mass: Masses | None
    signal: Reliability | None
    features: Features | None
    examples: list[Example]


def read(path: Path, record: Any, remedy: str = "") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        record: one of the classes above.
        remedy: what to do if it is damaged, for the message.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON, or a key is missing or of another type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist{remedy and ': '}{remedy}")
    try:
        return conform(json.loads(path.read_text(encoding="utf-8")), record)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}){remedy and ': '}{remedy}") from error


def epoch(line: str | bytes) -> dict[str, Any]:
    """Read a line of metrics.jsonl.

    Raises:
        ValueError: if it is not JSON, a key is missing or of another type, or a validation is there in part.
    """
    row: dict[str, Any] = conform(json.loads(line), Epoch)
    missing = [name for name in VALIDATION if name not in row]
    if 0 < len(missing) < len(VALIDATION):
        raise ValueError(f"{missing[0]} is missing")
    return row


def conform(value: Any, expected: Any, key: str = "") -> Any:
    """Return a value that JSON holds if it is of the type expected, which may be one of the classes above.

    Raises:
        ValueError: if it is not; the message names the key.
    """
    origin, inner = get_origin(expected), get_args(expected)
    if is_typeddict(expected):
        if not isinstance(value, dict):
            raise _other(key, "an object", value)
        if "schema" in value and "schema" in expected.__annotations__:
            conform(value["schema"], get_type_hints(expected)["schema"], _below(key, "schema"))
        missing = sorted(expected.__required_keys__ - value.keys())
        if missing:
            raise ValueError(f"{_below(key, missing[0])} is missing")
        hints = get_type_hints(expected)
        for name in hints.keys() & value.keys():
            conform(value[name], hints[name], _below(key, name))
    elif origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return value
        conform(value, next(each for each in inner if each is not type(None)), key)
    elif origin is Literal:
        if value not in inner or type(value) is not type(inner[0]):
            raise _other(key, " or ".join(map(json.dumps, inner)), value)
    elif origin is dict:
        _every(value, dict, "an object", key)
        for name, each in value.items():
            conform(each, inner[1], _below(key, name))
    elif origin in (list, tuple):
        _every(value, list, "a list", key)
        if origin is tuple and len(value) != len(inner):
            raise ValueError(f"{key} has {len(value)} entries, not {len(inner)}")
        each_expected: Iterable[Any] = inner if origin is tuple else inner * len(value)
        for place, (each, hint) in enumerate(zip(value, each_expected, strict=True)):
            conform(each, hint, _below(key, str(place)))
    elif expected is float:
        if type(value) not in (int, float):
            raise _other(key, "a number", value)
    elif expected is not Any and type(value) is not expected:
        raise _other(key, {int: "a whole number", str: "a text", bool: "true or false"}[expected], value)
    return value


def _every(value: Any, kind: type, said: str, key: str) -> None:
    if not isinstance(value, kind):
        raise _other(key, said, value)


def _other(key: str, expected: str, value: Any) -> ValueError:
    found = json.dumps(value)
    return ValueError(f"{key or 'the file'} is {found if len(found) < 30 else found[:27] + '...'}, not {expected}")


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
