"""Networks by name: `zoo:NAME` stands for a run folder wherever one is asked for.

Each network is one safetensors file with its weights, settings, manifest, metrics and evaluation, checked against the
SHA-256 in the table. Small ones lie beside this file. Others are fetched from Hugging Face's hub when they are first
used, or taken from the folder that the environment variable DUCAT_ZOO names, which needs no network.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ducat import checkpoint
from ducat.config import Config

PREFIX = "zoo:"
HERE = Path(__file__).parent
CARD = ("config", "manifest", "metrics", "evaluation", "made_by")  # what a file's header holds besides the weights


@dataclass(frozen=True)
class Entry:
    """A row of the table of networks.

    Attributes:
        about: what it is, in a few words.
        sha256: of its file, NAME.safetensors, in hexadecimal digits.
        repository: on Hugging Face's hub; None for a file that comes with the package.
        revision: commit of the repository.
    """

    about: str
    sha256: str
    repository: str | None = None
    revision: str | None = None


NETWORKS: Mapping[str, Entry] = MappingProxyType(
    {
        "digits-pgd-at": Entry(
            "PGD-AT, no dummy classes", "e72d9eef4fc1e77319fbac2cc1c8750106f4fb3f961611def356e3517cce00d2"
        ),
        "digits-published": Entry(
            "PGD-AT with dummy classes as published", "8c962a80a39490eb8c2f10e6a7efc6984b97985593581d8e18542afdbd979c3a"
        ),
        "digits-recovery-aware": Entry(
            "PGD-AT with recovery-aware dummy classes",
            "53af2a88049f1f841d208056602db42e641dd0e5d2337f31f8eb99656a043591",
        ),
        "cifar10-jpeg-pgd-at": Entry(
            "PGD-AT, no dummy classes", "f9a04da4b8ea64bee95b440844b559a9eb679682ac7a4f587660332608a4e4cd"
        ),
        "cifar10-jpeg-published": Entry(
            "PGD-AT with dummy classes as published", "4ef75e2c07f238774bdee5de737700336cd807c96569cb9518128524bc79169e"
        ),
        "cifar10-jpeg-recovery-aware": Entry(
            "PGD-AT with recovery-aware dummy classes",
            "c59bbcf6aae69b3147ee4dbec33cb2c37282c0647c18f8af8df67669ddb1c9ae",
        ),
    }
)


def is_name(source: Path | str) -> bool:
    """Whether a path is the name of a network of the zoo, such as "zoo:digits-pgd-at"."""
    return str(source).startswith(PREFIX)


def place(source: Path | str) -> Path:
    """Return a path as it is, or for the name of a network of the zoo its run folder, see `folder`.

    Raises:
        ValueError, OSError: as `folder`.
    """
    return folder(str(source)) if is_name(source) else Path(source)


def find(name: str, networks: Mapping[str, Entry] = NETWORKS) -> Entry:
    """Return the row of a name, with or without "zoo:".

    Raises:
        ValueError: if there is none.
    """
    name = name.removeprefix(PREFIX)
    if name not in networks:
        raise ValueError(f"{PREFIX}{name} is unknown: choose from {', '.join(PREFIX + known for known in networks)}")
    return networks[name]


def fetch(name: str, networks: Mapping[str, Entry] = NETWORKS) -> Path:
    """Return the file of a network, which is the one that the table means, bit by bit.

    Raises:
        ValueError: if there is no such network, or the file is not the one of the table.
        OSError: if it is not here and cannot be fetched.
    """
    entry, file = find(name, networks), f"{name.removeprefix(PREFIX)}.safetensors"
    folder = os.environ.get("DUCAT_ZOO")
    if entry.repository is None:
        path = HERE / file
    elif folder:
        path = Path(folder) / file
    else:
        path = _from_hub(entry, file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist" + (": DUCAT_ZOO names its folder" if folder else ""))
    with open(path, "rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != entry.sha256:
        raise ValueError(
            f"{path} is not the network {name}: its SHA-256 is {found[:12]}..., not {entry.sha256[:12]}..."
        )
    return path


def _from_hub(entry: Entry, file: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    assert entry.repository is not None
    try:
        return Path(hf_hub_download(entry.repository, file, revision=entry.revision))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise OSError(
            f"{file} cannot be fetched from {entry.repository} ({type(error).__name__}): without a network, put it "
            "into a folder, and name that in the environment variable DUCAT_ZOO"
        ) from error


def card(name: str, networks: Mapping[str, Entry] = NETWORKS) -> dict[str, Any]:
    """Return what is known of a network: "config" (YAML), "manifest", "metrics", "evaluation" and "made_by".

    Raises:
        ValueError, OSError: as `fetch`.
    """
    state = checkpoint.read(fetch(name, networks))[1]
    return {key: state[key] for key in CARD}


def folder(name: str, networks: Mapping[str, Entry] = NETWORKS) -> Path:
    """Return the run folder of a network, made in the user's cache folder when it is first asked for.

    Its checkpoint is called "best". It belongs to the user: evaluations of theirs are written into it.

    Raises:
        ValueError, OSError: as `fetch`.
    """
    import platformdirs

    entry, short = find(name, networks), name.removeprefix(PREFIX)
    root = Path(os.environ.get("DUCAT_DATA") or platformdirs.user_cache_dir("ducat")).expanduser()
    path = root / "zoo" / entry.sha256[:16] / short
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        _unpack(fetch(name, networks), path)
    return path


def _unpack(file: Path, path: Path) -> None:
    tensors, state = checkpoint.read(file)
    hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    best = hidden / "checkpoints" / "best"
    best.mkdir(parents=True)
    checkpoint.save(best / "checkpoint.safetensors", tensors, {"model": state["model"]})
    # The weights that were evaluated, without what else their checkpoint held, and perhaps in half precision.
    origin = {**(state["evaluation"].get("origin") or {}), "weights": checkpoint.digest(tensors)}
    card = {**state["evaluation"], "origin": origin}
    texts = {
        "config.yaml": state["config"],
        "manifest.json": json.dumps(state["manifest"], indent=2) + "\n",
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in state["metrics"]),
        "evaluation.json": json.dumps(card, indent=2) + "\n",
    }
    for name, text in texts.items():
        checkpoint.write_text(hidden / name, text)
    with contextlib.suppress(OSError):  # Another process was faster.
        hidden.rename(path)
    shutil.rmtree(hidden, ignore_errors=True)


def pack(
    run: Path, file: Path, made_by: list[str], which: str = "last", measured: Mapping[str, Any] | None = None
) -> str:
    """Write an evaluated run as a file of the zoo, and return its SHA-256.

    Weights that half precision holds exactly are written in it. The folder of the data is left out of the settings:
    it is this machine's.

    Args:
        run: the run folder.
        file: the new file.
        made_by: the commands that make it, in their order.
        which: the checkpoint, the one that was evaluated.
        measured: content of the evaluation that goes along; by default the one that speaks for the run.

    Raises:
        ValueError: if the evaluation is of another checkpoint, or of other weights.
    """
    tensors, state = checkpoint.read(run / "checkpoints" / which / "checkpoint.safetensors")
    evaluation = measured or json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    if evaluation.get("checkpoint") != which:
        raise ValueError(f"{run}: the checkpoint {which} is not the one that was evaluated")
    if (evaluation.get("origin") or {}).get("weights") not in (None, checkpoint.digest(tensors)):
        raise ValueError(f"{run}: the checkpoint {which} has been trained on since it was evaluated: evaluate it again")
    config = Config.from_yaml(run / "config.yaml", whole=True)
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    program, *arguments = manifest["command"]
    metrics = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    content = {
        "model": state["model"],
        "config": replace(config, data=replace(config.data, root=None)).to_yaml(),
        "manifest": {**manifest, "command": [Path(program).name, *arguments]},
        "metrics": [json.loads(line) for line in metrics],
        "evaluation": {**evaluation, "checkpoint": "best"},
        "made_by": made_by,
    }
    weights = {name: _shortest(tensor) for name, tensor in checkpoint.part("model", tensors).items()}
    checkpoint.save(file, checkpoint.named("model", weights), content)
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _shortest(tensor: Tensor) -> Tensor:
    """Return a tensor in half precision where that loses nothing, and else as it is."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor
