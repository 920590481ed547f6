"""One network from each module of timm: does it take dummy classes with unchanged predictions, and can it be evaluated?

Each network is made by the same door as `--model.name timm/NAME`, with new weights and 10 classes, on images of 32 x 32
(resized inside of the model where it only takes another size). It is given dummy classes, its recovered predictions are
compared with those before, image by image, and the suite `quick` is run on it. Each runs in a process of its own.

    python -m benchmarks.timm_networks --out results/timm.md

`benchmarks/timm_networks.txt` says which network is taken: of each module the one with the fewest parameters.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

PICKED = Path(__file__).with_suffix(".txt")
SIZE, CLASSES, COMPARED, ATTACKED = 32, 10, 8, 2


def declare_operators() -> None:
    """Let timm import a torchvision that is built for GPUs with a PyTorch that is not; no network here calls these."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def measure(name: str) -> dict[str, Any]:
    """Return what became of one network, as a row of the table."""
    import ducat
    from ducat.dummy import dummy_heads
    from ducat.models.architecture import Architecture, describe_foreign

    torch.manual_seed(0)
    torch.set_num_threads(1)
    row: dict[str, Any] = {"network": name}
    asked = Architecture(f"timm/{name}", CLASSES, False, 3, (0.5,) * 3, (0.5,) * 3, image_size=SIZE)
    try:
        described = describe_foreign(asked, normalize=True)
        model = described.build().eval()
        row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        row["size"] = described.fit_size or SIZE
        for module in model.modules():  # heads of zeros would make all predictions alike
            if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.02)
        x = torch.rand(COMPARED, 3, SIZE, SIZE)
        with torch.no_grad():
            before = model(x)
            ducat.add_dummy_classes(model, images=x[:2])
            after = ducat.recover(model(x))
        row["heads"] = len(dummy_heads(model))
        row["unchanged"] = int((after.argmax(1) == before.argmax(1)).sum())
    except ValueError as error:
        return {**row, "refused": str(error)}
    began = time.perf_counter()
    y = before.argmax(1)[:ATTACKED]
    try:
        measured = ducat.evaluate(model, x[:ATTACKED], y, ducat.ThreatModel(), "quick", num_classes=CLASSES)
        row["robust"] = float(measured.robust.float().mean())
    except ValueError as error:
        row["refused"] = str(error)
    return {**row, "seconds": round(time.perf_counter() - began, 1)}


def run(name: str, limit: float) -> dict[str, Any]:
    """Measure a network in a process of its own, so that none can stop the others."""
    command = [sys.executable, "-m", "benchmarks.timm_networks", "--measure", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"network": name, "failed": f"not done in {limit:.0f} s"}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"network": name, "failed": last}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown, with the counts above it."""
    adapted = [row for row in rows if row.get("unchanged") == COMPARED]
    evaluated = [row for row in adapted if "robust" in row]
    refused = [row for row in rows if "refused" in row]
    others = [row for row in rows if row not in evaluated and row not in refused]
    lines = [
        "# Networks of timm",
        "",
        f"One network from each of {len(rows)} modules of timm, by `python -m benchmarks.timm_networks`: {len(adapted)} "
        f"adapted with {COMPARED} of {COMPARED} recovered predictions unchanged, {len(evaluated)} of them evaluated "
        f"(`quick`, {ATTACKED} images), {len(refused)} refused in one line, {len(others)} neither.",
        "",
        "| module | network | parameters | pixels a side | heads | predictions unchanged | evaluated | else |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        same = f"{row['unchanged']} of {COMPARED}" if "unchanged" in row else ""
        seconds = f"{row['seconds']} s" if "robust" in row else ""
        said = row.get("refused", row.get("failed", "")).replace("|", "\\|")
        parameters = f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else ""
        cells = [
            row["module"],
            row["network"],
            parameters,
            row.get("size", ""),
            row.get("heads", ""),
            same,
            seconds,
            said,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def pick() -> str:
    """Return the network with the fewest parameters of each module, a line each."""
    import timm

    lines = []
    for module in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=module):
            try:
                with torch.device("meta"):
                    made = timm.create_model(name, num_classes=CLASSES)
                sizes[name] = sum(parameter.numel() for parameter in made.parameters())
            except Exception:  # networks that need another package, or cannot be made without memory
                sizes[name] = sys.maxsize
        if sizes:
            lines.append(f"{module} {min(sizes, key=lambda name: sizes[name])}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a network")
    parser.add_argument("--measure", metavar="NAME", help="measure one network, and print it as JSON")
    parser.add_argument("--pick", action="store_true", help="print which network of each module is the smallest")
    given = parser.parse_args()
    declare_operators()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    if given.pick:
        print(pick(), end="")
        return
    rows = []
    for line in PICKED.read_text().splitlines():
        module, name = line.split()
        rows.append({"module": module, **run(name, given.limit)})
        print(json.dumps(rows[-1]), flush=True)
        if given.out is not None:
            given.out.write_text(table(rows))


if __name__ == "__main__":
    main()
