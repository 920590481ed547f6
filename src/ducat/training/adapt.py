"""Dummy classes onto a trained C-class network: the last layer is doubled with copied rows, then trained on as always.

Right after the copy every dummy class equals its real class, so that the recovered prediction is the original's; what
is left to learn is which of the pair an image belongs to.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from ducat import methods, weights, zoo
from ducat.architecture import Architecture
from ducat.config import Config, DummyConfig, MethodConfig
from ducat.data.loading import find_spec
from ducat.runs import RunFolder
from ducat.training.initial import Initial, run_of, source_of
from ducat.training.loop import Listener, train
from ducat.training.validation import Validate
from ducat.weights import Weights


def settings(source: Path | str) -> Config:
    """Return the settings that `ducat adapt` begins with.

    They are those of the run that the checkpoint is from, or else the defaults; the method is the default one where
    the run's has no place for dummy classes. These are recovery-aware, and the training is the tail of the paper's
    recipe: 25 epochs at a learning rate of 0.001.

    Raises:
        FileNotFoundError: if there is no such file or folder.
    """
    source = zoo.place(source)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a run folder, or a file of weights")
    run = run_of(source)
    config = run.config if run is not None else Config()
    # A run's config has the defaults written out; here they follow again what they are derived from.
    config = config.unresolved(find_spec(config.data.name, config.data.root))
    tail = replace(
        config.train,
        epochs=25,
        learning_rate=0.001,
        schedule="constant",
        warmup_epochs=0.0,
        eps_ramp_epochs=0.0,
        averaging_start_epoch=0.0,
        awp_start_epoch=0.0,
    )
    dummy = DummyConfig("recovery-aware", start_epoch=0.0)
    method = MethodConfig() if methods.find(config.method.name).no_dummy_classes else config.method
    return replace(config, name=None, method=method, dummy=dummy, train=tail)


def adapt(
    source: Path | str,
    config: Config | None = None,
    root: Path | str = Path("runs"),
    listener: Listener | None = None,
    *,
    validate: Validate | None = None,
) -> RunFolder:
    """Give a trained network dummy classes, train it on with them, and leave a run folder.

    A network that has dummy classes already, as a run of kind published or a checkpoint of the released code, keeps
    them: trained on recovery-aware, it becomes robust against attackers who know recovery.

    Args:
        source: a run folder, of which the best checkpoint is taken, a network of the zoo by its name, or a file: one of
            our checkpoints, or a state_dict as `weights.read` takes it. No code in a file is run.
        config: what to train, as for `train`; `settings(source)` by default. Dummy classes are in use from the first
            epoch on, whatever `dummy.start_epoch` says. `model.normalization` says what a bare state_dict was trained
            with: data if its network took normalised images, none if it took images in [0, 1] as they are. Our own
            checkpoints bring their architecture and their normalisation along.
        root: the folder that the run folder is made in.
        listener: told of each step and epoch.
        validate: measures the network after an epoch, as for `train`.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        FileExistsError: if there is a run of that name.
        ValueError: if the file is not what it should be, or does not fit the network that the settings ask for; the
            message names the keys at fault.
    """
    source = zoo.place(source)
    config = settings(source) if config is None else config
    if config.dummy.kind == "off":
        raise ValueError("dummy.kind=off leaves nothing to adapt: choose published or recovery-aware")
    found = weights.read(source)
    config = replace(config, dummy=replace(config.dummy, start_epoch=0))
    if found.architecture is not None:
        if config.model.name not in (None, found.architecture.name):
            raise ValueError(f"model.name={config.model.name}, but {found.file} holds a {found.architecture.name}")
        architecture = found.architecture
        options = dict(architecture.options) or None
        model = replace(config.model, name=architecture.name, width=architecture.width, options=options, weights=None)
        config = replace(config, model=model)
    if config.name is None:
        run = run_of(source)
        stem = source.stem if run is None else run.name
        config = replace(config, name=f"{stem}-adapted-{config.dummy.kind}")
    initial = Initial(partial(_doubled, config, found), source_of(found.file))
    return train(config, root, listener, model=initial, validate=validate)


def _doubled(config: Config, found: Weights, architecture: Architecture) -> tuple[Architecture, nn.Module]:
    """Return the network with dummy classes, and its description; new ones are copies of their real classes."""
    if found.architecture is None:
        architecture = config.described(architecture)
    ours, model = found.network(replace(architecture, dummy_classes=False))
    return (ours, model) if ours.dummy_classes else ours.doubled(model, "copy")
