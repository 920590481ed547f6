"""Joint against separate batch-norm statistics: TRADES and MART, each both ways, with and without dummy classes.

    python -m benchmarks.batch_norm --work /tmp/batch-norm --only digits
    python -m benchmarks.batch_norm --work /tmp/batch-norm --only cifar10 --archive cifar-10-python.tar.gz
    python -m benchmarks.batch_norm --work /tmp/batch-norm --table results

A row that is in --work is not made again. Seconds are of processor time in training on one thread, without evaluation.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch

import ducat
from ducat import data, training
from ducat.checkpoint import write_text
from ducat.config import Config, DataConfig, DummyConfig, MethodConfig, ModelConfig, TrainConfig
from ducat.methods import METHODS, Kind
from ducat.runs import RunFolder

METHODS_APART = [name for name, method in METHODS.items() if method.forwards_apart]
How = Literal["joint", "separate"]
KINDS: tuple[Kind, ...] = get_args(Kind)
HOW: tuple[How, ...] = get_args(How)
SEEDS = (0, 1, 2)
SAMPLES, SUITE = 200, "quick"
MEASURES = ("clean", "blind", "robust", "seconds")
WIDTH = 120  # characters of a line of the page


def _settings(epochs: int, learning_rate: float) -> TrainConfig:
    return TrainConfig(
        epochs=epochs, learning_rate=learning_rate, schedule="one-cycle", validate_every=epochs, tracker="none"
    )


TABLES = {
    "digits": Config(
        data=DataConfig("digits"), dummy=DummyConfig(start_epoch=0.6), train=_settings(8, 0.3), model=ModelConfig()
    ),
    "cifar10": Config(
        data=DataConfig("cifar10", samples=1000),
        model=ModelConfig("resnet8", width=8),
        method=MethodConfig(attack="pgd-cosine"),
        dummy=DummyConfig(start_epoch=0.6),
        train=_settings(4, 0.2),
    ),
}


def make(name: str, method: str, kind: Kind, how: How, seed: int, work: Path) -> None:
    """Train and evaluate a row, unless that has been done, and note what was measured."""
    noted = work / "rows" / f"{name}-{method}-{kind}-{how}-s{seed}.json"
    if noted.is_file():
        return
    base = TABLES[name]
    config = replace(
        base,
        name=noted.stem,
        data=replace(base.data, root=work / "data"),
        method=replace(base.method, name=method),
        dummy=replace(base.dummy, kind=kind),
        train=replace(base.train, batch_norm=how, seed=seed),
    )
    shutil.rmtree(work / "runs" / noted.stem, ignore_errors=True)  # of a row that was interrupted
    began = time.process_time()
    folder = training.train(config, work / "runs", validate=_nothing)
    seconds = time.process_time() - began
    x, y = data.load_test(name, SAMPLES, work / "data")
    model, threat = RunFolder(folder.path).load("last"), folder.config.threat.build(None)
    evaluation = ducat.evaluate(model, x, y, threat, SUITE, num_classes=10).to_dict()
    row = {
        "data": folder.manifest["data"],
        "method": method,
        "dummy_classes": kind,
        "batch_norm": how,
        "seed": seed,
        "config": folder.config_path.read_text(),
        "clean": evaluation["clean"]["accuracy"],
        "blind": evaluation["blind"],
        "robust": evaluation["robust"],
        "seconds": round(seconds, 1),
        "environment": {
            key: folder.manifest.get(key) for key in ("packages", "platform", "threads", "precision", "git")
        },
    }
    noted.parent.mkdir(parents=True, exist_ok=True)
    write_text(noted, json.dumps(row, indent=1) + "\n")
    print(noted.stem, *(f"{measure} {row[measure]:.3f}" for measure in MEASURES), flush=True)


def _nothing(model: object, images: object) -> dict[str, float]:
    """Stand in for the validation, which is no part of the time."""
    return dict.fromkeys(MEASURES[:3], 0.0)


def warm_up(name: str, work: Path) -> None:
    """Train for an epoch on few images, so that no row pays for what the first training of a process has to do."""
    base = TABLES[name]
    config = replace(
        base,
        name="warm-up",
        data=replace(base.data, root=work / "data", samples=256),
        train=replace(base.train, epochs=1, validate_every=1),
    )
    with tempfile.TemporaryDirectory() as folder:
        training.train(config, Path(folder), validate=_nothing)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of one data set as a table: mean and spread over seeds, and the difference seed by seed."""
    first = rows[0]
    about = (
        f"{first['data']['train']:,} training images, {SAMPLES} test images, suite `{SUITE}`, trained in "
        f"{first['environment']['precision']}; mean ± standard deviation over seeds, in %; seconds of processor time."
    )
    text = [
        f"## {first['data']['title']}",
        "",
        _wrapped(about),
        "",
        "| method | dummy classes | batch norm | seeds | clean | blind | robust | seconds |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, kind in product(METHODS_APART, KINDS):
        found = {how: _of(rows, method, kind, how) for how in HOW}
        if not all(found.values()):
            continue
        for how, measured in found.items():
            shares = [_spread([100 * row[measure] for row in measured.values()]) for measure in MEASURES[:3]]
            seconds = statistics.mean(row["seconds"] for row in measured.values())
            cells = [METHODS[method].title, kind, how, str(len(measured)), *shares, f"{seconds:.0f}"]
            text.append(f"| {' | '.join(cells)} |")
        both = sorted(found["joint"].keys() & found["separate"].keys())
        pairs = [(found["separate"][seed], found["joint"][seed]) for seed in both]
        gains = [_spread([100 * (new[measure] - old[measure]) for new, old in pairs], "+") for measure in MEASURES[:3]]
        ratio = statistics.mean(new["seconds"] / old["seconds"] for new, old in pairs)
        text.append(f"| | | *separate − joint* | {len(both)} | {' | '.join(gains)} | ×{ratio:.2f} |")
    return "\n".join(text) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def _of(rows: Sequence[Mapping[str, Any]], method: str, kind: str, how: str) -> dict[int, Mapping[str, Any]]:
    wanted = method, kind, how
    return {row["seed"]: row for row in rows if (row["method"], row["dummy_classes"], row["batch_norm"]) == wanted}


def _spread(values: Sequence[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{spread}"


def write(work: Path, out: Path) -> None:
    """Write batch-norm.md and batch-norm.json from the rows that there are."""
    rows = [json.loads(path.read_text()) for path in sorted((work / "rows").glob("*.json"))]
    about = (
        "Made by `python -m benchmarks.batch_norm`; each row's settings are in `batch-norm.json`. *Joint*: "
        "benign and adversarial images are one batch. *Separate*: the regulariser's are forwarded apart, as in the "
        "papers of TRADES and MART; with dummy classes in use the two-hot loss has a joint pass of its own, as in the "
        "released code. `--train.batch_norm` chooses."
    )
    parts = [f"# Joint against separate batch-norm statistics\n\n{_wrapped(about)}\n"]
    titles = dict.fromkeys(row["data"]["title"] for row in rows)
    parts += [markdown([row for row in rows if row["data"]["title"] == title]) for title in titles]
    write_text(out / "batch-norm.json", json.dumps(rows, indent=1) + "\n")
    write_text(out / "batch-norm.md", "\n".join(parts))
    print(f"written: {out / 'batch-norm.md'}, {out / 'batch-norm.json'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the prepared data and the rows")
    parser.add_argument("--only", choices=TABLES, default="digits", help="the data set whose rows are made")
    parser.add_argument("--archive", type=Path, help="its archive, where it has to be prepared first")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--table", type=Path, metavar="DIR", help="write what there is; make no rows")
    arguments = parser.parse_args()
    if arguments.table is not None:
        write(arguments.work, arguments.table)
        return
    torch.set_num_threads(1)
    if arguments.archive is not None:
        data.prepare(arguments.only, arguments.archive, root=arguments.work / "data")
    warm_up(arguments.only, arguments.work)
    for seed, kind, method, how in product(arguments.seeds, arguments.kinds, METHODS_APART, HOW):
        make(arguments.only, method, kind, how, seed, arguments.work)


if __name__ == "__main__":
    main()
