"""The evaluations of a run: each under a name made of how it was measured, and which of them speaks for the run.

They lie in `evaluations/` of the run folder. `evaluation.json` and `evaluation.safetensors` above them are the one that
speaks for the run, see `strongest`.
"""

import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ducat import checkpoint, records
from ducat.attacks.suites import SUITES
from ducat.runs import RunFolder, Which
from ducat.threat import ThreatModel

Content = Mapping[str, Any]  # of an evaluation.json

# From the weakest on; any other suite is as hard as itself alone.
HARDNESS = {name: rank for rank, name in enumerate(("quick", "single-step", "demo", "light", "standard", "full"))}
assert HARDNESS.keys() == SUITES.keys()


def name_of(content: Content) -> str:
    """Return an evaluation's name: suite, ball, an unusual step, test images, seed, checkpoint, and whatever was asked.

    Two evaluations of one name measured the same network in the same way.
    """
    threat, origin = content["threat"], content.get("origin") or {}
    parts = [
        content["suite"],
        threat["norm"],
        f"{threat['eps']:.6g}",
        *_step(threat),
        f"{content['samples']}",
        f"s{content['seed']}",
        *([content["checkpoint"]] if content.get("checkpoint") else []),
        *([(origin.get("measured") or origin["weights"])[:8]] if origin.get("weights") else []),
        *(["reject", *(f"{share:g}" for share in origin["reject"])] if origin.get("reject") else []),
        *(["surrogates", *origin["surrogates"]] if origin.get("surrogates") else []),
        *([f"{origin['second_round_seconds']:g}s"] if origin.get("second_round_seconds") is not None else []),
    ]
    return _plain("-".join(parts))


def _step(threat: Mapping[str, Any]) -> list[str]:
    usual = ThreatModel(threat["norm"], threat["eps"]).step_size
    step = threat.get("step_size", usual)
    return [] if math.isclose(step, usual) else [f"step{step:.6g}"]


def place(folder: Path, name: str) -> Path:
    """Return the file of that name in a folder, without letters that file names had better not have."""
    return folder / _plain(name)


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def path_for(
    folder: Path,
    suite: str,
    threat: ThreatModel,
    samples: int,
    seed: int,
    which: Which | None,
    origin: Mapping[str, Any],
    prefix: str = "",
) -> Path:
    """Return the .json file in `folder` for an evaluation that is still to be made; see `name_of`."""
    ball = {"norm": threat.norm, "eps": threat.eps, "step_size": threat.step_size}
    settings = {"suite": suite, "threat": ball, "samples": samples, "seed": seed, "checkpoint": which}
    return place(folder, f"{prefix}{name_of({**settings, 'origin': origin})}.json")


def weights_of(folder: RunFolder, which: Which) -> str | None:
    """Return the digest of a checkpoint, which tells whether it still is what was evaluated; None if it has none."""
    try:
        return checkpoint.digest_of(folder.checkpoint_path(which))
    except (FileNotFoundError, ValueError):
        return None


def read(path: Path, remedy: str = "run `ducat evaluate` again") -> dict[str, Any]:
    """Read the content of an evaluation's .json file; `remedy` says what to do if it is damaged.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or no evaluation.
    """
    content: dict[str, Any] = records.read(path, records.Evaluation, remedy)
    return content


def evaluations(folder: RunFolder) -> dict[Path, dict[str, Any]]:
    """Return the contents of a run's evaluations by the path of their .json, in the order of names.

    What cannot be read is left out.
    """
    found = {}
    for path in sorted(folder.evaluations_path.glob("*.json")):
        try:
            found[path] = read(path)
        except ValueError:
            continue
    return found


def is_current(folder: RunFolder, content: Content) -> bool:
    """Tell whether a run's checkpoint still is the one that was evaluated; of old evaluations it is not known."""
    weights = (content.get("origin") or {}).get("weights")
    which = content.get("checkpoint")
    return weights is None or which is None or weights == weights_of(folder, which)


def strongest(contents: Sequence[Content], ball: tuple[str, float]) -> int:
    """Return which of a run's evaluations speaks for it, by its position. The rule never looks for the higher number.

    1. Those in the ball that the run was trained in; if there are none, those of its norm at the largest eps, and
       without these those at the largest eps of all.
    2. Of these, those that no other of the same weights and code refutes: on at least as many test images, by a 95 %
       interval of robust accuracy that lies wholly below.
    3. Of these, those that no other outdoes: by a suite at least as hard, on at least as many test images, and by more
       in one of the two. A suite of one's own is as hard as itself alone.
    4. Of what is left, the one that claims least: an upper bound before a measurement, then the one with the lowest
       upper end of the interval. Of equal ones, the one that measured refusing too.

    Args:
        contents: contents of evaluation.json, at least one.
        ball: norm and eps of the run's training.
    """
    norm, eps = ball

    def near(content: Content) -> tuple[bool, bool, float]:
        threat = content["threat"]
        same = threat["norm"] == norm
        return same and abs(threat["eps"] - eps) < 1e-9, same, threat["eps"]

    nearest = max(map(near, contents))
    left = [place for place, content in enumerate(contents) if near(content) == nearest]
    for better in (_refutes, _outdoes):
        left = [place for place in left if not any(better(contents[other], contents[place]) for other in left)]
    return min(
        left,
        key=lambda place: (
            not contents[place].get("at_most"),
            contents[place]["robust_ci95"][1],
            contents[place]["robust"],
            not contents[place].get("rejection"),
            place,
        ),
    )


def _of_one_network(first: Content, second: Content) -> bool:
    origins = [one.get("origin") or {} for one in (first, second)]
    same = all(origins[0].get(name) == origins[1].get(name) for name in ("weights", "code"))
    return same and first.get("checkpoint") == second.get("checkpoint")


def _refutes(first: Content, second: Content) -> bool:
    lower = first["robust_ci95"][1] < second["robust_ci95"][0]
    return lower and first["samples"] >= second["samples"] and _of_one_network(first, second)


def bounds(first: Content, second: Content) -> bool:
    """Tell whether an evaluation shows that the robust accuracy of another of the same weights is an upper bound only.

    It does in the same ball or a smaller one: by a 95 % interval that lies wholly below on at least as many test
    images, or by a harder suite to which the number is an upper bound.
    """
    same = bool((first.get("origin") or {}).get("weights")) and _of_one_network(first, second)
    balls = [one["threat"] for one in (first, second)]
    within = balls[0]["norm"] == balls[1]["norm"] and balls[0]["eps"] <= balls[1]["eps"] + 1e-9
    if not same or not within or not second["robust"]:
        return False
    harder = all(one["suite"] in HARDNESS for one in (first, second))
    harder = harder and HARDNESS[first["suite"]] > HARDNESS[second["suite"]]
    return _refutes(first, second) or (harder and bool(first.get("at_most")))


def _outdoes(first: Content, second: Content) -> bool:
    suites = first["suite"], second["suite"]
    if suites[0] == suites[1]:
        harder = 0
    elif all(suite in HARDNESS for suite in suites):
        harder = HARDNESS[suites[0]] - HARDNESS[suites[1]]
    else:
        return False
    more = first["samples"] - second["samples"]
    return harder >= 0 and more >= 0 and (harder > 0 or more > 0)


def adopt(folder: RunFolder) -> Path | None:
    """Give an evaluation.json of earlier versions its name among the evaluations; return where it is, None if nothing.

    Without this the next evaluation would take its place.
    """
    old = folder.evaluation_path
    if not old.is_file():
        return None
    path = folder.evaluations_path / f"{name_of(read(old))}.json"
    if path.exists():
        return None
    path.parent.mkdir(exist_ok=True)
    if old.with_suffix(".safetensors").is_file():
        _put(old.with_suffix(".safetensors"), path.with_suffix(".safetensors"))
    _put(old, path)
    return path


def check(folder: RunFolder) -> None:
    """Refuse a run of which something cannot be read that its page shows, before hours go into an evaluation.

    That is its metrics, and the images of its strongest evaluation.

    Raises:
        ValueError: if it cannot be read.
    """
    _ = folder.metrics
    path = _strongest(folder)
    if path is None or not path.with_suffix(".safetensors").is_file():
        return
    try:
        checkpoint.read(path.with_suffix(".safetensors"))
    except ValueError as error:
        raise ValueError(f"{error}: delete it and the .json beside it") from error


def _strongest(folder: RunFolder, code: str | None = None) -> Path | None:
    found = evaluations(folder)
    current = {path: content for path, content in found.items() if is_current(folder, content)} or found
    current = {path: one for path, one in current.items() if (one.get("origin") or {}).get("code") == code} or current
    threat = folder.config.threat
    ball = (threat.norm, threat.ball.eps)
    return list(current)[strongest(list(current.values()), ball)] if current else None


def promote(folder: RunFolder, code: str | None = None) -> Path:
    """Let the strongest evaluation of a run's present checkpoints be evaluation.json; return where it lies itself.

    Evaluations of checkpoints that have been trained on since, or of other code of the network than `code`, are kept,
    and speak for the run only if all are of such.
    """
    path = _strongest(folder, code)
    assert path is not None, "called after an evaluation"
    for suffix in (".safetensors", ".json"):
        if path.with_suffix(suffix).is_file():
            _put(path.with_suffix(suffix), folder.evaluation_path.with_suffix(suffix))
        else:  # flags and images beside the numbers must not be another evaluation's
            folder.evaluation_path.with_suffix(suffix).unlink(missing_ok=True)
    return path


def curves(contents: Iterable[Content]) -> list[list[Content]]:
    """Return the evaluations with the usual step that differ in eps alone: for each two or more a list in its order."""
    groups: dict[tuple[str, str | None], dict[float, Content]] = {}
    for content in contents:
        if _step(content["threat"]):
            continue
        alike = {**content, "threat": {"norm": content["threat"]["norm"], "eps": 0.0}}
        version = (content.get("origin") or {}).get("ducat")  # whose attacks may be others
        groups.setdefault((name_of(alike), version), {})[content["threat"]["eps"]] = content
    return [[group[eps] for eps in sorted(group)] for group in groups.values() if len(group) > 1]


def _put(source: Path, target: Path) -> None:
    """Let a file be at a second place as well, without a second copy where the file system allows it."""
    if target.exists() and target.samefile(source):
        return

    def write(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    checkpoint.write_atomically(target, write)
