"""Does `ducat.evaluate` tell the truth about defences, and does it leave honest networks alone?

    python -m benchmarks.defences [--only NAME ...] [--suite standard] [--samples 100] [--reference FILE.json]
        [--out results/defences.json] [--truths results/defences-truth.json] [--markdown results/defences.md]
    python -m benchmarks.defences --truths-only

Truths are found first, by attacks of the zoo's own, and kept with --truths; each row's evaluation is kept with --out. A
row that is there already is not made again, so that an interrupted run goes on where it stopped; one that is made finds
its truth anew where the one that is there is of other weights or images. With --reference, the --out of an earlier
version, honest networks are compared with what they were given then, and with how long that took.
"""

import argparse
import json
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

import ducat
from benchmarks.defences.attacks import Judge, Truth, find_truth
from benchmarks.defences.networks import DIGITS, THREATS, Bases
from benchmarks.defences.zoo import ROWS, Row
from ducat import checkpoint, seeding

HEAD = """# Does the evaluator tell the truth about defences?

Made by `python -m benchmarks.defences --markdown results/defences.md`, from [defences.json](defences.json) and
[defences-truth.json](defences-truth.json). {made} of the zoo's {all} rows were made.

"Reported" is what `ducat.evaluate` says of a network without being told what is in it. "True" is what is left by
attacks of the zoo's own, written for each defence with knowledge of it, by the images that `ducat.evaluate` found,
and by those that fool the network inside. It is an upper bound too. A row is "ok" if the two are within {close:.0f}
points, or if the evaluator says "at most" and why; an honest network must get a measurement, and no warning but a
true sink gap. {samples} test images of digits at L-inf {eps} unless the row says otherwise, seed {seed}, float32;
recovery is known to the attacker wherever the network has dummy classes. The suite differs, and stands in its
column: `light` has no AutoAttack. Seconds are wall time on busy machines.

"""
SAMPLES, SEED = 100, 0  # what the first rows, which do not say, were measured with
CLOSE = 0.02  # reported minus true that passes
CHANGE = 0.005  # of an honest network's number that passes
SLOWER = 1.15


def read(path: Path | None) -> dict[str, Any]:
    """Return the rows of a file, none where there is no file."""
    rows: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    return rows


def add(path: Path, name: str, value: dict[str, Any], lock: Path) -> dict[str, Any]:
    """Put a row into a file, which is replaced at once and keeps the order of the table; return all rows."""
    with FileLock(lock):
        content = {**read(path), name: value}
        ordered = {name: content[name] for name in dict.fromkeys([*ROWS, *content]) if name in content}
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(path, json.dumps(ordered, indent=1) + "\n")
    return ordered


def _save_images(path: Path, images: Tensor) -> None:
    checkpoint.write_atomically(path, lambda temporary: save_file({"images": images.contiguous()}, temporary))


class Zoo:
    """The rows, their trained networks, and the images that are known to fool them.

    Args:
        cache: where weights and images are kept.
        root: the cache folder of prepared data; None for the user's.
        samples: test images.
    """

    def __init__(self, cache: Path, root: Path | None, samples: int) -> None:
        self.cache, self.root, self.samples = cache, root, samples
        self.bases = Bases(cache, root)

    def test(self, row: Row) -> tuple[Tensor, Tensor]:
        x, y = ducat.data.load_test(row.data, row.samples or self.samples, self.root)
        return x, row.labels(y)

    def judge(self, row: Row) -> Judge:
        return Judge(lambda: row.build(self.bases), row.judged, *self.test(row), row.classes)

    def _path(self, kind: str, name: str, row: Row) -> Path:
        count = len(self.test(row)[0])
        return self.cache / f"{kind}-{name}-{count}-{row.threat.eps:.4g}.safetensors"

    def subject(self, row: Row) -> str:
        """Return a digest of what a row's numbers are of: the weights of all its networks, and the test images."""
        networks = [row.build(self.bases), *row.proxies(self.bases)]
        tensors = {
            f"{number}.{name}": value.contiguous()
            for number, network in enumerate(networks)
            for name, value in network.state_dict().items()
        }
        x, y = self.test(row)
        return checkpoint.digest({**tensors, "images": x, "labels": y})

    def inside(self, name: str, row: Row) -> Tensor:
        """Return adversarial images for a trained network, or the ones that came closest."""
        path = self._path("inside", self.bases.key(name), row)
        if not path.is_file():
            judge = Judge(lambda: self.bases(name), "plain", *self.test(row), row.classes)
            noise = seeding.generator(1, "inside", name)
            images = ducat.attacks.adaptive(self.bases(name), *self.test(row), row.threat, generator=noise)
            truth = find_truth(judge, row.threat, [self.bases(name)], seed=1, known=[images])
            images = torch.where((truth.rates > 0)[:, None, None, None], truth.near, truth.images)
            _save_images(path, images)
        return load_file(path)["images"]

    def truth(self, name: str) -> Truth:
        """Find a row's truth anew; images that were found before are tried first."""
        row, path = ROWS[name], self._path("found", name, ROWS[name])
        earlier = [load_file(path)["images"]] if path.is_file() else []
        inside = [self.inside(base, row) for base in row.inside]
        guesses = row.guesses(self.bases, *self.test(row), row.threat.eps)
        images = [*guesses, *earlier, *inside]
        truth = find_truth(self.judge(row), row.threat, row.proxies(self.bases), known=images)
        _save_images(path, truth.images)
        return truth

    def lower(self, name: str, images: Tensor) -> Truth:
        """Return a row's truth from the images that are known, and others."""
        row, path = ROWS[name], self._path("found", name, ROWS[name])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            truth = Truth.begin(self.judge(row), row.threat)
            earlier = [load_file(path)["images"]] if path.is_file() else []  # the cache may be new
            for each in (*earlier, images):
                truth.offer(each)
            truth.settle()
        _save_images(path, truth.images)
        return truth

    def evaluate(self, name: str, suite: str, seed: int) -> tuple[dict[str, Any], Tensor | None]:
        """Return what `ducat.evaluate` reports of a row, and the images that it found."""
        row = ROWS[name]
        x, y = self.test(row)
        asked = {"suite": suite, "samples": len(y), "seed": seed}
        model = row.build(self.bases).eval()
        began, used = time.perf_counter(), time.process_time()
        try:
            result = ducat.evaluate(model, x, y, row.threat, suite, num_classes=row.classes, seed=seed, data=row.data)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            return {**asked, "refused" if isinstance(error, ValueError) else "crashed": said}, None
        seconds, used = time.perf_counter() - began, time.process_time() - used
        content = result.to_dict()
        measured = {
            **asked,
            "clean": content["clean"]["accuracy"],
            "reported": content["robust"],
            "at_most": bool(content.get("at_most", False)),
            "warnings": content["warnings"],
            "seconds": round(seconds, 1),
            "cpu_seconds": round(used, 1),
        }
        return measured, result.adversarial.to(x)


def verdict(row: Row, measured: dict[str, Any], true: float | None, reference: dict[str, Any]) -> str:
    """Return "ok", or what is wrong with a row."""
    if "crashed" in measured:
        return "crashed"
    if "refused" in measured:
        return "refused" if row.honest else "ok: refused"
    faults = []
    difference = 0.0 if true is None else round(measured["reported"] - true, 6)
    if difference > CLOSE and (row.honest or not measured["at_most"]):
        faults.append("overstated")
    if difference < -CLOSE:
        faults.append("understated")
    if measured["at_most"] and not measured["warnings"]:
        faults.append("at most, without a cause")
    if row.honest:
        # Dummy classes do hide blind attacks: that warning is true.
        false = [warning for warning in measured["warnings"] if not warning.startswith("sink gap")]
        faults += ["false warning"] if false else []
        faults += ["at most"] if measured["at_most"] else []
        if reference.get("reported") is not None:
            faults += ["changed"] if abs(measured["reported"] - reference["reported"]) > CHANGE else []
            faults += ["slower"] if measured["cpu_seconds"] > SLOWER * reference["cpu_seconds"] else []
    return ", ".join(faults) or "ok"


def table(rows: dict[str, Any], truths: dict[str, Any], reference: dict[str, Any]) -> str:
    """Return the two tables in Markdown."""
    made = sum(name in ROWS for name in rows)
    head = {"made": made, "all": len(ROWS), "close": 100 * CLOSE, "eps": THREATS[DIGITS].eps}
    head |= {"samples": SAMPLES, "seed": SEED}
    lines = [HEAD.format(**head).rstrip("\n"), ""]
    for honest in (True, False):
        then = " reported before | time against before |" if honest and reference else ""
        lines += [
            f"## {'Honest networks' if honest else 'Defences'}\n",
            f"| row | what it is | clean | reported | true | difference |{then} suite | warnings | s | verdict |",
            f"| --- | --- | ---: | ---: | ---: | ---: |{' ---: | ---: |' if then else ''} --- | --- | ---: | --- |",
        ]
        for name, row in ROWS.items():
            if row.honest != honest or name not in rows:
                continue
            measured, true = rows[name], _true(rows[name], truths.get(name, {}))
            before = reference.get(name, {})
            said = measured.get("crashed") or measured.get("refused")
            cells = [f"`{name}`", row.about + _otherwise(row, measured)]
            if said:
                cells += ["", "none", _percent(true), ""]
            else:
                limit = "at most " if measured["at_most"] else ""
                difference = "" if true is None else f"{100 * (measured['reported'] - true):+.1f}"
                cells += [
                    _percent(measured["clean"]),
                    limit + _percent(measured["reported"]),
                    _percent(true),
                    difference,
                ]
            if then:
                known = before.get("reported") is not None and not said
                ratio = f"{measured['cpu_seconds'] / before['cpu_seconds']:.2f}" if known else ""
                cells += [_percent(before.get("reported")), ratio]
            causes = said or "; ".join(warning.split(":")[0] for warning in measured["warnings"])
            cells += [
                measured.get("suite", ""),
                causes.replace("|", "/"),
                f"{measured.get('seconds', 0):.0f}",
                verdict(row, measured, true, before),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    missing = [f"`{name}`" for name in ROWS if name not in rows]
    if missing:
        lines += ["## Not made\n", ", ".join(missing), ""]
    return "\n".join(lines)


def _true(measured: dict[str, Any], truth: dict[str, Any]) -> float | None:
    """Return a row's truth, if it is of the networks and images that were measured; of the first rows none says."""
    same = measured.get("subject") == truth.get("subject")
    return truth.get("true") if same else None


def _otherwise(row: Row, measured: dict[str, Any]) -> str:
    """Say where a row's data, images, ball or seed are not those of the table's head."""
    samples, seed = measured.get("samples", row.samples or SAMPLES), measured.get("seed", SEED)
    found = [f"{samples} images"] if (samples, row.data) != (SAMPLES, DIGITS) else []
    found += [f"of {row.data}"] if row.data != DIGITS else []
    found += [f"at L-inf {row.threat.eps:.3g}"] if row.threat.eps != THREATS[DIGITS].eps else []
    found += [f"seed {seed}"] if seed != SEED else []
    return f" ({' '.join(found)})" if found else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def summary(truth: Truth, seconds: float, subject: str) -> dict[str, Any]:
    return {
        "subject": subject,
        "true": round(float(truth.rates.mean()), 6),
        "rates": [round(rate, 3) for rate in truth.rates.tolist()],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=ROWS, default=list(ROWS), help="rows; all by default"
    )
    parser.add_argument("--kind", choices=("honest", "defence"), help="only rows of this kind")
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="test images of digits, at most 500 (100)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the evaluator's attacks")
    parser.add_argument("--out", type=Path, default=Path("results/defences.json"))
    parser.add_argument("--truths", type=Path, default=Path("results/defences-truth.json"))
    parser.add_argument("--truths-only", action="store_true", help="find the truths, and evaluate nothing")
    parser.add_argument("--again", action="store_true", help="make rows again that are there")
    parser.add_argument("--markdown", type=Path, help="write the table of all rows that are there")
    parser.add_argument("--reference", type=Path, help="an earlier --out to compare honest networks with")
    parser.add_argument(
        "--cache", type=Path, default=Path("build/defences"), help="weights and images (build/defences)"
    )
    parser.add_argument("--data", type=Path, help="cache folder of prepared data sets")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    zoo = Zoo(arguments.cache, arguments.data, arguments.samples)
    reference, lock = read(arguments.reference), arguments.cache / "lock"
    arguments.cache.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        row = ROWS[name]
        if arguments.kind and row.honest != (arguments.kind == "honest"):
            continue
        try:
            zoo.test(row)
        except FileNotFoundError as error:
            print(f"{name}: left out: {error}", flush=True)
            continue
        truths, there = read(arguments.truths), None if arguments.again else read(arguments.out).get(name)
        if there is not None:
            made = there.get("samples", row.samples or SAMPLES), there.get("seed", SEED)
            if made != (row.samples or arguments.samples, arguments.seed):
                parser.error(
                    f"{name} in {arguments.out} was measured on {made[0]} images with seed {made[1]}: give another "
                    "--out and --truths, or --again"
                )
            if name in truths:
                continue
        subject = zoo.subject(row)
        if truths.get(name, {}).get("subject") != subject or (arguments.again and arguments.truths_only):
            began = time.process_time()
            found = zoo.truth(name)
            truths = add(arguments.truths, name, summary(found, time.process_time() - began, subject), lock)
            print(f"{name}: true {100 * truths[name]['true']:.1f} ({truths[name]['seconds']} s)", flush=True)
        if arguments.truths_only or there is not None:
            continue
        measured, images = zoo.evaluate(name, arguments.suite, arguments.seed)
        if images is not None:
            lowered = summary(zoo.lower(name, images), truths[name]["seconds"], subject)
            if lowered["true"] < truths[name]["true"]:
                truths = add(arguments.truths, name, lowered, lock)
        measured["subject"] = subject
        add(arguments.out, name, measured, lock)
        said = verdict(row, measured, truths[name]["true"], reference.get(name, {}))
        print(f"{name}: {measured}; true {truths[name]['true']}: {said}", flush=True)
    if arguments.markdown:
        checkpoint.write_text(arguments.markdown, table(read(arguments.out), read(arguments.truths), reference))


if __name__ == "__main__":
    main()
