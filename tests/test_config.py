import json
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from ducat.config import (
    Config,
    DataConfig,
    DummyConfig,
    MethodConfig,
    ModelConfig,
    ThreatConfig,
    TrainConfig,
    config_parser,
)
from ducat.data.specs import SPECS


def test_a_resolved_config_survives_yaml(tmp_path: Path) -> None:
    config = Config(
        data=DataConfig("digits", samples=100, root=tmp_path),
        dummy=DummyConfig("recovery-aware", start_epoch=3),
        threat=ThreatConfig(eps="51/255"),
        train=TrainConfig(epochs=7, milestones=(2, 0.5)),
    ).resolve(SPECS["digits"])
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert Config.from_yaml(path) == config
    assert config.threat.eps == pytest.approx(0.2)
    assert config.name == "digits-small-pgd-at-recovery-aware-s0"


def test_settings_that_are_read_again_are_a_copy_and_files_that_they_name_lie_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "main.yaml").write_text("data: data.yaml\n")
    (tmp_path / "there" / "data.yaml").write_text("name: digits\nsamples: 100\n")
    monkeypatch.chdir(tmp_path)
    assert Config.from_yaml("there/main.yaml").data.samples == 100

    config = Config(data=DataConfig("digits"), model=ModelConfig(options={"depth": 2})).resolve(SPECS["digits"])
    Path("whole.yaml").write_text(config.to_yaml())
    Config.from_yaml("whole.yaml", whole=True).model.options["depth"] = 3
    assert Config.from_yaml("whole.yaml", whole=True) == config


def test_what_depends_on_the_data_comes_from_the_data() -> None:
    digits = Config(data=DataConfig("digits")).resolve(SPECS["digits"])
    assert (digits.model.name, digits.threat.eps, digits.threat.step_size) == ("small", 0.2, 0.05)
    chosen = Config(data=DataConfig("digits"), threat=ThreatConfig(eps=0.1)).resolve(SPECS["digits"])
    assert chosen.threat.eps == 0.1
    # The L-inf budget of the data set means nothing in another norm.
    l2 = Config(data=DataConfig("digits"), threat=ThreatConfig("l2")).resolve(SPECS["digits"])
    assert l2.threat.eps == 128 / 255


@pytest.mark.parametrize("name", ["natural", "pgd-at"])
def test_a_weight_that_a_method_does_not_read_is_no_other_methods(name: str, tmp_path: Path) -> None:
    resolved = Config(data=DataConfig("digits"), method=MethodConfig(name)).resolve(SPECS["digits"])
    # Runs of earlier versions have a zero.
    old = tmp_path / "config.yaml"
    old.write_text(resolved.to_yaml().replace("weight: null", "weight: 0.0"))
    for config in (resolved, Config.from_yaml(old, whole=True)):
        trades = replace(config, method=replace(config.method, name="trades")).resolve(SPECS["digits"])
        assert (config.method.weight, trades.method.weight) == (None, 6.0)


def test_what_was_written_out_follows_again_and_what_was_chosen_stays() -> None:
    for made in (
        Config(data=DataConfig("digits")),
        Config(data=DataConfig("cifar10"), method=MethodConfig("consistency"), threat=ThreatConfig("l2", eps=0.4)),
        Config("mine", DataConfig("digits", augmentation="strong"), threat=ThreatConfig(step_size=0.01)),
        Config(data=DataConfig("digits", crop_padding=1), method=MethodConfig("trades", weight=3)),
        Config(model=ModelConfig("wrn-28-10"), data=DataConfig("cifar10", samples=100)),
    ):
        spec = SPECS[made.data.name]
        assert made.resolve(spec).unresolved(spec).resolve(spec) == made.resolve(spec)
        assert made.resolve(spec).unresolved(spec) == made

    colour = Config(data=DataConfig("cifar10")).resolve(SPECS["cifar10"]).unresolved(SPECS["cifar10"])
    changed = replace(colour, method=MethodConfig("consistency"), threat=replace(colour.threat, eps=4 / 255))
    changed = changed.resolve(SPECS["cifar10"])
    assert (changed.data.augmentation, changed.method.weight) == ("strong", 1.0)
    assert changed.threat.step_size == 1 / 255
    assert changed.name == "cifar10-resnet18-consistency-s0"


def test_without_the_data_what_is_usual_for_them_stays() -> None:
    trades = Config(data=DataConfig("folder:gone"), method=MethodConfig("trades")).resolve(SPECS["cifar10"])
    left = trades.unresolved(None)
    assert (left.method.weight, left.threat.step_size, left.name) == (None, None, None)
    assert (left.data, left.model, left.threat.eps) == (trades.data, trades.model, 8 / 255)


@pytest.mark.parametrize(
    ("kind", "epoch", "reading", "two_hot"),
    [
        ("off", 0, "all", False),
        ("off", 9, "all", False),
        ("published", 4, "all", False),
        ("published", 5, "all", True),
        ("recovery-aware", 4, "real", False),
        ("recovery-aware", 5, "recovered", True),
    ],
)
def test_what_an_epoch_minimises(kind: str, epoch: int, reading: str, two_hot: bool) -> None:
    config = Config(dummy=DummyConfig(kind, start_epoch=0.5), train=TrainConfig(epochs=10))
    objective = config.objective(epoch)
    assert objective.reading == reading
    assert (objective.targets is not None) is two_hot


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MethodConfig("pgdat"), "method 'pgdat' is unknown: did you mean pgd-at"),
        (lambda: MethodConfig("zzz"), "method 'zzz' is unknown: choose from natural"),
        (lambda: DummyConfig(benign_weight=1.5), r"dummy\.benign_weight=1\.5 is outside \[0, 1\]"),
        (lambda: TrainConfig(epochs=-1), r"train\.epochs=-1 must be at least 1"),
        (lambda: ThreatConfig(eps=8), "did you mean 8/255"),
        (lambda: Config(name="a" * 300), r"of 300 characters cannot name a run: .* at most 200 bytes"),
        (lambda: Config(name="a\x1b[31mb"), r"name='a\\x1b\[31mb' of 7 characters cannot name a run"),
        (lambda: Config(model=ModelConfig(width=10**20)), r"model\.width=10+ is outside \[1, 4096\]"),
        (lambda: Config(train=TrainConfig(seed=2**63)), r"train\.seed=\d+ does not fit: numbers end below 2\^63"),
        (
            lambda: Config(method=MethodConfig("natural"), dummy=DummyConfig("published")),
            "choose an adversarial method",
        ),
        (
            lambda: Config(dummy=DummyConfig("published", start_epoch=10), train=TrainConfig(epochs=10)),
            r"dummy\.start_epoch=10",
        ),
    ],
)
def test_bad_settings_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("text", ["train:\n  epochs: many\n", "train:\n  epoch: 3\n", "- 1\n", "train: {epochs: -3}\n"])
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml") as raised:
        Config.from_yaml(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: 1}\ndata: {name: digits}\ntrain: {seed: 1}\n", r"bad\.yaml: train is there twice"),
        ("train:\n  epochs: 1\n  seed: 2\n  epochs: 3\n", r"bad\.yaml: train\.epochs is there twice"),
        ("# train: {epochs: 1}\n", r"bad\.yaml: it holds no settings"),
    ],
)
def test_nothing_in_a_file_is_silently_left_out(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Config.from_yaml(path)


def test_every_setting_is_explained_on_the_command_line() -> None:
    text = " ".join(config_parser().format_help().split())
    for section, part in vars(Config()).items():
        for name in getattr(part, "__dataclass_fields__", {}):
            explanation = text.split(f" --{section}.{name} ")[-1].split("(type:")[0]
            assert len(explanation.split()) > 3, f"--{section}.{name} is not explained"
    assert "Radius of the ball, on images in [0, 1]: a number or a fraction such as 8/255." in text


def test_start_epochs_are_numbers_or_fractions() -> None:
    base = Config(train=TrainConfig(epochs=130))
    assert base.start_epoch == 130
    assert replace(base, dummy=DummyConfig("published", start_epoch=105)).start_epoch == 105
    assert replace(base, dummy=DummyConfig("published", start_epoch=0.5)).start_epoch == 65
    assert replace(base, dummy=DummyConfig("published", start_epoch=0)).start_epoch == 0


def test_numpys_numbers_are_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which takes a plain int alone
    config = Config(train=TrainConfig(seed=np.int64(3), learning_rate=np.float32(0.5)))
    assert json.dumps([config.train.seed, config.train.learning_rate]) == "[3, 0.5]"
    with pytest.raises(ValueError, match=r"train\.epochs=0 must be at least 1"):
        TrainConfig(epochs=np.int64(0))
