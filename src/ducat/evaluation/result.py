"""What an evaluation found, per sample, and how it is written down; and two evaluations side by side."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ducat import checkpoint
from ducat.attacks.suites import attack_name
from ducat.evaluation.rejection import Rejection
from ducat.evaluation.statistics import mcnemar, wilson
from ducat.runs import RunFolder
from ducat.threat import ThreatModel

Samples = Float[Tensor, "samples channels height width"]
Labels = Int[Tensor, " samples"]
Flags = Bool[Tensor, " samples"]
Shares = Float[Tensor, " samples"]

SCHEMA = 1


@dataclass(frozen=True)
class AttackResult:
    """What one attack left standing.

    Attributes:
        strategy: what was run.
        knows_recovery: whether its attacker knew that predictions are recovered.
        correct: whether the recovered prediction still was right, shape (samples,); of a random network, whether it was
            right more often than not.
        seconds: how long it took.
        black_box: whether it searched without gradients too.
        same_as: name of the attack whose result this is as well: on a network without dummy classes an attack that
            knows recovery is the blind one, and is not run again.
        shares: of a random network, how often the prediction was right; None for any other.
        outside: images that it returned outside of the ball or of [0, 1] by more than rounding, which break nothing.
    """

    strategy: str
    knows_recovery: bool
    correct: Flags
    seconds: float
    black_box: bool = False
    same_as: str | None = None
    shares: Shares | None = None
    outside: int = 0

    @property
    def name(self) -> str:
        return attack_name(self.strategy, self.knows_recovery)


@dataclass(frozen=True)
class Audit:
    """Signs of masked gradients, measured on a few correctly classified samples; numbers are of samples.

    Attributes:
        samples: how many there were.
        vanishing: by objective, those whose gradient of the input is zero, all but zero, or not a number.
        standing_after_steps: by steps of plain PGD, whose last image counts, those that withstood it.
        standing: those that withstood PGD-20 at eps, as often as not with a wrong image on the way.
        standing_at_double_eps: those that withstood it at 2 eps.
        standing_far: those that withstood the ensemble in a ball in which every image can become one flat grey.
        only_black_box: those that Square broke with 500 queries, and no attack of the suite that uses gradients.
        only_guided: those that PGD broke with the gradient of a softened network, of a mixture, or of a classifier
            inside the network, and no attack of the suite.
    """

    samples: int
    vanishing: dict[str, int]
    standing_after_steps: dict[int, int]
    standing: int
    standing_at_double_eps: int
    standing_far: int
    only_black_box: int
    only_guided: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as values for JSON, whose keys are strings."""
        steps = {str(steps): count for steps, count in self.standing_after_steps.items()}
        return {**asdict(self), "standing_after_steps": steps}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Audit":
        """Undo `to_dict`."""
        steps = {int(steps): count for steps, count in values["standing_after_steps"].items()}
        return cls(**{**values, "standing_after_steps": steps})


@dataclass(frozen=True)
class Opinion:
    """What a plain PGD that shares no code with the attacks made of some samples that they had left standing.

    Attributes:
        samples: how many it tried.
        broken: how many of them it broke.
    """

    samples: int
    broken: int


@dataclass(frozen=True)
class SecondRound:
    """The attacks that followed because something might hide the gradients.

    Attributes:
        samples: how many were still standing.
        broken: by guide or search, how many of them it broke.
        seconds: how long it took.
        through: name of an equivalent network without the signs, through which the number was measured after all; None
            if there is none.
        stopped: whether the time that was allowed ran out before the end.
    """

    samples: int
    broken: dict[str, int]
    seconds: float
    through: str | None = None
    stopped: bool = False


@dataclass(frozen=True)
class Scrutiny:
    """How the network behaved while it was measured.

    Attributes:
        nature: "random", "batch-dependent", "stateful" and "mode-dependent", those that apply.
        draws: passes that each gradient was averaged over.
        repeats: passes that judged each image in the end.
        whole_batches: the only size of batch that the network takes; None for any.
        folded: whether the attacks used a copy with folded batch norm, which agreed with the network on all images.
        hard_steps: whether the network compares, rounds or picks what depends on its images.
        not_finite: adversarial images for which the network's outputs are not finite; they count as wrong.
        opinion: the second opinion; None if the suite asks for none.
        second_round: the second round; None if nothing asked for one.
    """

    nature: Sequence[str] = ()
    draws: int = 1
    repeats: int = 1
    whole_batches: int | None = None
    folded: bool = False
    hard_steps: bool = False
    not_finite: int = 0
    opinion: Opinion | None = None
    second_round: SecondRound | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as values for JSON."""
        return {**asdict(self), "nature": list(self.nature)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Scrutiny":
        """Undo `to_dict`."""
        opinion, second = values["opinion"], values["second_round"]
        return cls(
            **{
                **values,
                "opinion": Opinion(**opinion) if opinion else None,
                "second_round": SecondRound(**second) if second else None,
            }
        )


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured, per sample. All tensors are on the CPU.

    Attributes:
        data: name of the data.
        threat: the ball.
        seed: seed of the attacks.
        suite: name of the suite.
        batch_size: samples that were attacked at a time; with the seed it decides the random starts.
        fingerprint: digest of the images and labels; two evaluations with the same one can be compared per sample.
        labels: the labels, shape (samples,).
        clean: whether the benign image is classified correctly; of a random network, more often than not.
        robust: whether the sample survives every attack, and its saved image one more look.
        attacks: a result per attack.
        adversarial: for each sample the image that first broke it, or the one that came closest, float32, shape
            (samples, channels, H, W).
        unrepeatable: samples that an attack broke and whose saved image did not when it was looked at once more. They
            count as broken.
        dummy_classes: whether the network has dummy classes, so that an attacker can be blind to recovery.
        clean_shares: of a random network, how often each benign image is classified correctly; None for any other.
        robust_shares: of a random network, how often each saved image is; None for any other.
        audit: signs of masked gradients, where the suite asks for them.
        scrutiny: how the network behaved.
        warnings: what a reader must know before quoting a number; a failure of ours comes first.
        causes: why `robust` is an upper bound only; empty where it is a measurement.
        rejection: what the classifier achieves that may refuse; None if it was not asked for.
        checkpoint: which checkpoint of a run was measured, "best" or "last"; None for a network from elsewhere.
        origin: what else tells this evaluation from others: digest of the weights, what was asked besides, and for a
            network from elsewhere its file and how it was read.
    """

    data: str
    threat: ThreatModel
    seed: int
    suite: str
    batch_size: int
    fingerprint: str
    labels: Labels = field(repr=False)
    clean: Flags = field(repr=False)
    robust: Flags = field(repr=False)
    attacks: Sequence[AttackResult] = field(repr=False)
    adversarial: Samples = field(repr=False)
    unrepeatable: int = 0
    dummy_classes: bool = True
    clean_shares: Shares | None = field(default=None, repr=False)
    robust_shares: Shares | None = field(default=None, repr=False)
    audit: Audit | None = None
    scrutiny: Scrutiny = Scrutiny()
    warnings: Sequence[str] = ()
    causes: Sequence[str] = ()
    rejection: Rejection | None = None
    checkpoint: str | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def blind(self) -> Flags:
        """Whether a sample survives every attack that does not know recovery; without dummy classes, every attack."""
        if not self.dummy_classes:
            return self.robust
        blind = [attack.correct for attack in self.attacks if not attack.knows_recovery]
        return torch.stack([self.clean, *blind]).all(0)

    @property
    def at_most(self) -> bool:
        """Whether robust accuracy is an upper bound only: something may hide the gradients, attacks may have failed."""
        return bool(self.causes)

    @property
    def sink_gap(self) -> float:
        """Blind accuracy - robust accuracy."""
        accuracies = self.accuracies()
        return accuracies["blind"] - accuracies["robust"]

    def accuracies(self) -> dict[str, float]:
        """Return "clean", "blind" and "robust" accuracy; of a random network the expected ones."""
        clean = _mean(self.clean, self.clean_shares)
        blind = min(
            [clean, *(_mean(one.correct, one.shares) for one in self.attacks if not one.knows_recovery)]
            if self.robust_shares is not None
            else [_mean(self.blind, None)]
        )
        robust = _mean(self.robust, self.robust_shares)
        if self.robust_shares is not None:
            robust = min([robust, blind, *(_mean(one.correct, one.shares) for one in self.attacks)])
            blind = blind if self.dummy_classes else robust
        return {"clean": clean, "blind": blind, "robust": robust}

    def to_dict(self) -> dict[str, Any]:
        """Return the content of evaluation.json."""
        threat, accuracies, samples = self.threat, self.accuracies(), len(self.clean)
        return {
            "schema": SCHEMA,
            "data": self.data,
            "checkpoint": self.checkpoint,
            "samples": samples,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "suite": self.suite,
            "batch_size": self.batch_size,
            "threat": {"norm": threat.norm, "eps": threat.eps, "step_size": threat.step_size, "steps": threat.steps},
            "clean": _share(accuracies["clean"], samples),
            "attacks": [
                {
                    "name": attack.name,
                    "strategy": attack.strategy,
                    "knows_recovery": attack.knows_recovery,
                    "black_box": attack.black_box,
                    "same_as": attack.same_as,
                    "outside": attack.outside,
                    **_share(_mean(attack.correct, attack.shares), samples),
                    "seconds": round(attack.seconds, 2),
                }
                for attack in self.attacks
            ],
            "blind": _share(accuracies["blind"], samples)["accuracy"],
            "blind_ci95": _share(accuracies["blind"], samples)["ci95"],
            "robust": _share(accuracies["robust"], samples)["accuracy"],
            "robust_ci95": _share(accuracies["robust"], samples)["ci95"],
            "at_most": self.at_most,
            "causes": list(self.causes),
            "sink_gap": round(self.sink_gap, 6),
            "unrepeatable": self.unrepeatable,
            "dummy_classes": self.dummy_classes,
            "audit": self.audit.to_dict() if self.audit else None,
            "scrutiny": self.scrutiny.to_dict(),
            "rejection": self.rejection.to_dict() if self.rejection else None,
            "warnings": list(self.warnings),
            "origin": dict(self.origin),
        }

    def save(self, path: Path | str, *, replace: bool = False) -> None:
        """Write the numbers to `path`, a .json file, and flags, labels and images to the .safetensors file beside it.

        Args:
            path: the .json file.
            replace: whether files that are there may be replaced.

        Raises:
            FileExistsError: if one of the two files is there; nothing is written then.
            ValueError: if the name of `path` does not end in .json.
        """
        path = Path(path)
        if path.suffix != ".json":
            raise ValueError(
                f"{path} must be the name of a .json file: flags and images go to a .safetensors beside it"
            )
        if not replace:
            check_free(path)
        tensors = {name: getattr(self, name) for name in TENSORS}
        shares = {name: getattr(self, name) for name in SHARES if getattr(self, name) is not None}
        content = self.to_dict()
        tensors |= {**shares, **named(self.attacks), **(self.rejection.tensors if self.rejection else {})}
        checkpoint.save(path.with_suffix(".safetensors"), tensors, {"evaluation": content})
        checkpoint.write_text(path, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "Evaluation":
        """Read back what `save` wrote, from a run folder or from the .json file's path.

        Raises:
            FileNotFoundError: if there is no such evaluation.
            ValueError: if its file is damaged.
        """
        path = Path(path)
        file = (RunFolder(path).evaluation_path if path.is_dir() else path).with_suffix(".safetensors")
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: run `ducat evaluate {RunFolder(path).quoted}` first")
        tensors, state = checkpoint.read(file, holds=("evaluation",))
        content = state["evaluation"]
        measured = content["audit"]
        scalars = {name: content[name] for name in SCALARS}
        flags = {name: tensors[name] for name in TENSORS}
        shares = {name: tensors[name] for name in SHARES if name in tensors}
        rows = read_rows(content["attacks"], tensors)
        # Evaluations of earlier versions do not say what comes with `get`.
        dummies = any(row.knows_recovery and row.same_as is None for row in rows)
        threat, refused = ThreatModel(**content["threat"]), content.get("rejection")
        return cls(
            **{**scalars, **flags, **shares},
            threat=threat,
            rejection=Rejection.restored(refused, tensors, threat, flags["labels"]) if refused else None,
            attacks=rows,
            audit=Audit.from_dict(measured) if measured else None,
            scrutiny=Scrutiny.from_dict(content["scrutiny"]) if "scrutiny" in content else Scrutiny(),
            dummy_classes=content.get("dummy_classes", dummies),
            causes=content.get("causes", ()),
            checkpoint=content.get("checkpoint"),
            origin=content.get("origin", {}),
        )


def check_free(path: Path) -> None:
    """Refuse to write an evaluation where one of its two files is there.

    Raises:
        FileExistsError: if one is.
    """
    for file in (path, path.with_suffix(".safetensors")):
        if file.exists():
            raise FileExistsError(f"{file} exists, and nothing is overwritten: choose another name than {path.name}")


SCALARS = ("data", "seed", "suite", "batch_size", "fingerprint", "unrepeatable", "warnings")
TENSORS = ("labels", "clean", "robust", "adversarial")
SHARES = ("clean_shares", "robust_shares")
ROW = ("strategy", "knows_recovery", "black_box", "same_as", "seconds", "outside")


def named(attacks: Sequence[AttackResult]) -> dict[str, Tensor]:
    """Return the tensors of attacks' results by the names under which they are kept."""
    tensors = {f"correct.{attack.name}": attack.correct for attack in attacks}
    return tensors | {f"shares.{attack.name}": attack.shares for attack in attacks if attack.shares is not None}


def read_rows(rows: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> list[AttackResult]:
    """Return attacks' results from their rows and what `named` made."""
    names = [attack_name(row["strategy"], row["knows_recovery"]) for row in rows]
    return [
        AttackResult(
            correct=tensors[f"correct.{name}"],
            shares=tensors.get(f"shares.{name}"),
            **{key: row[key] for key in ROW if key in row},
        )
        for name, row in zip(names, rows, strict=True)
    ]


def _mean(flags: Tensor, shares: Tensor | None) -> float:
    return float((flags if shares is None else shares).double().mean())


def _share(accuracy: float, samples: int) -> dict[str, Any]:
    return {
        "accuracy": round(accuracy, 6),
        "ci95": [round(end, 6) for end in wilson(round(accuracy * samples), samples)],
    }


@dataclass(frozen=True)
class Difference:
    """Two evaluations on the same samples.

    Attributes:
        samples: how many.
        first_only: samples that only the first gets right.
        second_only: samples that only the second gets right.
    """

    samples: int
    first_only: int
    second_only: int

    @property
    def difference(self) -> float:
        """Accuracy of the second - accuracy of the first."""
        return (self.second_only - self.first_only) / self.samples

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test, two-sided."""
        return mcnemar(self.first_only, self.second_only)


def compare(first: Evaluation, second: Evaluation) -> dict[str, Difference]:
    """Compare two evaluations sample by sample: under "clean", "blind" and "robust".

    Raises:
        ValueError: if they are not of the same samples and the same ball by the same suite.
    """
    if first.fingerprint != second.fingerprint:
        raise ValueError(
            f"the evaluations are not of the same samples ({first.data or 'data'}, {len(first.clean)}, and "
            f"{second.data or 'data'}, {len(second.clean)}): evaluate both with the same data and --samples"
        )
    balls = [(one.threat.norm, one.threat.eps) for one in (first, second)]
    if balls[0] != balls[1]:
        raise ValueError(f"the evaluations are of different threat models, {balls[0]} and {balls[1]}")
    if first.suite != second.suite:
        raise ValueError(f"the evaluations are by different suites, {first.suite} and {second.suite}")
    return {
        name: Difference(len(a), int((a & ~b).sum()), int((b & ~a).sum()))
        for name, a, b in ((name, getattr(first, name), getattr(second, name)) for name in ("clean", "blind", "robust"))
    }
