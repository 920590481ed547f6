"""One network from each module of timm: does it take dummy classes with the same predictions, and can it be evaluated?

Each network is made by the same door as `--model.name timm/NAME`, with new weights and 10 classes, on images of 64 x
64, or of the next of `SIZES` that it takes, or resized inside of the model where it only takes its own size. It is
given dummy classes, its recovered predictions are compared with those before, image by image, and the suite `quick` is
run on one image. Each has a process of its own.

    python -m benchmarks.timm_networks --out results/timm.md

`benchmarks/timm_networks.txt` says which network is taken: of each module the smallest, or one of the smallest.
"""

import argparse
import contextlib
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

PICKED = Path(__file__).with_suffix(".txt")
SIZES = (64, 84, 96)  # pixels a side: patches of 8 and 16, of 14 by threes, and of 16 by threes
CLASSES, COMPARED, ATTACKED = 10, 8, 1
MEMORY = 2**34  # bytes of addresses


def declare_operators() -> None:
    """Let timm import a torchvision that is built for GPUs with a PyTorch that is not; no network here calls these."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def described(name: str) -> Any:
    """Return the description of a network for the smallest of `SIZES` that it takes, or for its own size."""
    from ducat.architecture import Architecture, describe_foreign

    own, refusal = None, None
    for size in SIZES:
        asked = Architecture(f"timm/{name}", CLASSES, False, 3, (0.5,) * 3, (0.5,) * 3, image_size=size)
        for options in ({"img_size": size}, {}):  # convolutional networks have no such option
            try:
                found = describe_foreign(replace(asked, options=options), normalize=True)
            except ValueError as error:
                refusal = error
                continue
            if found.fit_size is None:
                return found
            own = own or found
    if own is None:
        assert refusal is not None
        raise refusal
    return own


def measure(name: str) -> Iterator[dict[str, Any]]:
    """Yield what became of one network, as a row of the table: once it is adapted, and once it is evaluated."""
    import ducat
    from ducat.dummy import dummy_heads

    torch.manual_seed(0)
    torch.set_num_threads(1)
    row: dict[str, Any] = {"network": name}
    try:
        description = described(name)
        model = description.build().eval()
        row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        row["size"] = description.fit_size or description.image_size
        for module in model.modules():  # heads of zeros would make all predictions alike
            if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.02)
        x = torch.rand(COMPARED, 3, description.image_size, description.image_size)
        with torch.no_grad():
            before = model(x)
            ducat.add_dummy_classes(model, images=x[:2])
            after = ducat.recover(model(x))
        row["heads"] = len(dummy_heads(model))
        row["unchanged"] = int((after.argmax(1) == before.argmax(1)).sum())
    except ValueError as error:
        yield {**row, "refused": str(error)}
        return
    yield dict(row)
    began = time.perf_counter()
    y = before.argmax(1)[:ATTACKED]
    try:
        measured = ducat.evaluate(model, x[:ATTACKED], y, ducat.ThreatModel(), "quick", num_classes=CLASSES)
        row |= {"robust": float(measured.robust.float().mean()), "attacked": ATTACKED}
    except ValueError as error:
        row["refused"] = str(error)
    yield {**row, "seconds": round(time.perf_counter() - began, 1)}


def run(name: str, limit: int) -> dict[str, Any]:
    """Measure a network in a process of its own, so that none can stop the others.

    It has so many seconds of processor, and `MEMORY`.
    """

    def measured(end: Any) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for row in measure(name):
            end.send(row)

    forked = multiprocessing.get_context("fork")  # which has imported everything already
    ours, theirs = forked.Pipe()
    process = forked.Process(target=measured, args=(theirs,))
    process.start()
    theirs.close()
    row: dict[str, Any] = {"network": name}
    with contextlib.suppress(EOFError):
        while True:
            row = ours.recv()
    process.join()
    if process.exitcode:
        row["failed"] = f"ended with {process.exitcode} after at most {limit} s of processor"
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown, with the counts above it."""
    adapted = [row for row in rows if row.get("unchanged") == COMPARED]
    evaluated = [row for row in adapted if "robust" in row]
    refused = [row for row in rows if "refused" in row]
    others = [row for row in rows if row not in evaluated and row not in refused]
    lines = [
        "# Networks of timm",
        "",
        f"One network from each of {len(rows)} modules of timm, by `python -m benchmarks.timm_networks`: "
        f"{len(adapted)} adapted with {COMPARED} of {COMPARED} recovered predictions unchanged, {len(evaluated)} of "
        f"them evaluated (`quick`), {len(refused)} refused in one line, {len(others)} neither. Seconds are of one core "
        "that has other work, too.",
        "",
        "Images are of 64 pixels a side, or of 84 or 96 where the network does not take 64, or are resized to its own "
        "size where it takes no other. Of each module the smallest classifier is taken, or one of the smallest; where "
        "a module has encoders too, as gemma4_vit, those are refused in one line: they return no logits.",
        "",
        "| module | network | parameters | pixels a side | heads | predictions unchanged | images evaluated | else |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        same = f"{row['unchanged']} of {COMPARED}" if "unchanged" in row else ""
        seconds = f"{row['attacked']} in {row['seconds']} s" if "robust" in row else ""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--limit", type=int, default=600, help="seconds of processor for a network")
    parser.add_argument("--work", type=Path, help="file of JSON lines: networks that are in it are not measured again")
    given = parser.parse_args()
    declare_operators()
    import timm  # noqa: F401

    known = given.work.read_text().splitlines() if given.work is not None and given.work.is_file() else []
    rows = {row["module"]: row for row in map(json.loads, known)}
    picked = dict(line.split() for line in PICKED.read_text().splitlines())
    for module, name in picked.items():
        if module not in rows or rows[module]["network"] != name:
            rows[module] = {"module": module, **run(name, given.limit)}
            print(json.dumps(rows[module]), flush=True)
            if given.work is not None:
                with open(given.work, "a") as file:
                    file.write(json.dumps(rows[module]) + "\n")
    if given.out is not None:
        given.out.write_text(table([rows[module] for module in picked]))


if __name__ == "__main__":
    main()
