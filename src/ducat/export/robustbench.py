"""A run as a folder with what RobustBench asks for: the model, a claim, and its record."""

import json
from collections.abc import Callable, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from torch import Tensor

from ducat.export.classifier import Deployed, save
from ducat.methods import DUMMY_CLASSES, Paper, find
from ducat.reporting.compare import refusing_at_most

_LOADER = '''"""The model of this folder for RobustBench: images in [0, 1] to logits, one deterministic forward pass.

It needs `pip install ducat-robust`.
"""

from pathlib import Path

from torch import Tensor, nn

from ducat import recover
from ducat.export import load


class Model(nn.Module):
    """The classifier by names without "model.", which RobustBench's loader takes off the names of weights."""

    def __init__(self) -> None:
        super().__init__()
        loaded = load(Path(__file__).with_name("weights.safetensors"))
        self.network, self.dummy_classes = loaded.model, loaded.architecture.dummy_classes

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        return recover(logits) if self.dummy_classes else logits


def load_model() -> nn.Module:
    """Return the model in evaluation mode."""
    return Model().eval()
'''

NOT_MEASURED = "not measured"


def write(source: Deployed, path: Path) -> None:
    path.mkdir()
    save(source, path / "weights.safetensors")
    (path / "model.py").write_text(_LOADER)
    (path / "claim.md").write_text(_claim(source))
    (path / "model_info.json").write_text(json.dumps(_model_info(source), indent=2) + "\n")


def read(path: Path) -> Callable[[Tensor], Any]:
    spec = spec_from_file_location("robustbench_model", path / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_model()


def _paper(source: Deployed) -> Paper:
    """Return the paper of the method; title and address are empty where there is none."""
    config = source.folder.config
    return DUMMY_CLASSES if config.dummy.kind != "off" else find(config.method.name).paper or Paper("")


def _percent(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{100 * share:.2f}"


def _bound(at_most: bool | None) -> str:
    return ", an upper bound" if at_most else ""


def _robust(evaluation: Mapping[str, Any]) -> str:
    """Write robust accuracy, which is "at most" a number where something hid the gradients."""
    return f"{'at most ' if evaluation.get('at_most') else ''}{_percent(evaluation['robust'])}"


def _eps(evaluation: Mapping[str, Any]) -> str:
    """Write eps as RobustBench does, in 255ths where it is a whole number of them."""
    eps = evaluation["threat"]["eps"]
    return f"{round(255 * eps)}/255" if abs(255 * eps - round(255 * eps)) < 1e-6 else f"{eps:g}"


def _autoattack(evaluation: Mapping[str, Any], knows_recovery: bool) -> float | None:
    found = [
        attack["accuracy"]
        for attack in evaluation["attacks"]
        if attack["name"].startswith("autoattack") and attack["knows_recovery"] == knows_recovery
    ]
    return min(found, default=None)


def _claim(source: Deployed) -> str:
    """Fill RobustBench's issue form for new models, with what was measured and nothing else."""
    evaluation, manifest = source.evaluation, source.folder.manifest
    title, address = _paper(source)
    fill_in = "(to fill in)"
    if evaluation is None:
        norm, eps, clean, robust, method = "", "", NOT_MEASURED, NOT_MEASURED, f"{NOT_MEASURED}: run `ducat evaluate`"
    else:
        norm, eps = evaluation["threat"]["norm"].capitalize(), _eps(evaluation)
        clean, robust = _percent(evaluation["clean"]["accuracy"]), _robust(evaluation)
        method = (
            f"per-sample worst case over {len(evaluation['attacks'])} attacks, blind and recovery-aware, on "
            f"{evaluation['samples']} of {manifest['data']['test']} test images (`ducat evaluate --suite "
            f"{evaluation['suite']}`)"
        )
    lines = [
        "# Paper Information",
        "",
        f"- **Paper Title**: {title or fill_in}",
        f"- **Paper URL**: {address or fill_in}",
        f"- **Paper authors**: {fill_in}",
        "",
        "# Leaderboard Claim(s)",
        "",
        "## Model 1",
        "",
        f"- **Architecture**: {source.classifier.architecture.name}",
        f"- **Dataset**: {manifest['data']['title']}",
        f"- **Threat Model**: {norm or NOT_MEASURED}",
        f"- **eps**: {eps or NOT_MEASURED}",
        f"- **Clean accuracy**: {clean}",
        f"- **Robust accuracy**: {robust}",
        f"- **Additional data**: {_additional_data(manifest)[1]}",
        f"- **Evaluation method**: {method}",
        f"- **Checkpoint and code**: {fill_in}; `model.py` and `weights.safetensors` in this folder",
        "",
    ]
    if evaluation is not None:
        rows = {
            "blind worst case (the attacker does not know recovery)": evaluation["blind"],
            f"robust worst case (all attacks){_bound(evaluation.get('at_most'))}": evaluation["robust"],
            "AutoAttack, blind, on the raw outputs": _autoattack(evaluation, knows_recovery=False),
            "AutoAttack, recovery-aware, on the logits of `model.py`": _autoattack(evaluation, knows_recovery=True),
        }
        lines += ["| measured | accuracy (%) |", "| --- | --- |"]
        lines += [f"| {name} | {_percent(share)} |" for name, share in rows.items()]
        refused, bound = evaluation.get("rejection") or {"signals": []}, _bound(refusing_at_most(evaluation))
        lines += [
            f"| not in the claim, which never refuses: robust with {100 * row['reject']:g}% refused by "
            f"{each['signal']} ({100 * row['clean_refused']['share']:.2f} % of the benign images refused){bound} | "
            f"{_percent(row['robust']['share'])} |"
            for each in refused["signals"]
            for row in each["rows"]
        ]
        lines += [""]
    lines += [
        "# Model Zoo:",
        "",
        "- [ ] I want to add my models to the Model Zoo (check if true)",
        "- [ ] I use an architecture that is **not** included among those of the Model Zoo (check if true)",
        "- [ ] I agree to release my model(s) under MIT license (check if true) **OR**",
        f"- [ ] I want my models to be released under a custom license, located here: {fill_in}",
    ]
    return "\n".join(lines) + "\n"


def _additional_data(manifest: Mapping[str, Any]) -> tuple[bool | None, str]:
    """Tell whether other images than the data set's were trained on, None where it is not known, and in words."""
    initial, extra = manifest.get("initial"), manifest["data"].get("extra")
    if extra is not None:
        return True, f"true: {extra['images']:,} images of {Path(extra['file']).name}"
    if initial is not None:
        return None, f"not known: training began with {initial.get('file') or initial['weights']}"
    return False, "false"


def _model_info(source: Deployed) -> dict[str, Any]:
    """Return RobustBench's record of a model; null is what was not measured or is not known."""
    evaluation, manifest = source.evaluation, source.folder.manifest
    title, address = _paper(source)
    aware = None if evaluation is None else _autoattack(evaluation, knows_recovery=True)
    return {
        "link": address or None,
        "name": title or None,
        "authors": None,
        "venue": None,
        "additional_data": _additional_data(manifest)[0],
        "number_forward_passes": 1,
        "dataset": source.folder.config.data.name,
        "architecture": source.classifier.architecture.name,
        "eps": None if evaluation is None else _eps(evaluation),
        "clean_acc": None if evaluation is None else _percent(evaluation["clean"]["accuracy"]),
        "reported": None if evaluation is None else _robust(evaluation),
        "autoattack_acc": None if aware is None else _percent(aware),
        "unreliable": None,
    }
