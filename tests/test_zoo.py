import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ducat
from ducat import checkpoint, zoo
from ducat.cli import main
from ducat.evaluation import kept
from ducat.export import Classifier, export, robustbench
from ducat.export.push import push
from ducat.reporting import zoo as showing
from ducat.reporting.compare import Run
from ducat.runs import RunFolder

NAME = "zoo:digits-recovery-aware"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUCAT_DATA", str(tmp_path / "cache"))
    monkeypatch.delenv("DUCAT_ZOO", raising=False)
    return tmp_path / "cache"


DIGITS = [name for name in zoo.NETWORKS if name.startswith("digits-")]
PHOTOGRAPHS = [name for name in zoo.NETWORKS if name.startswith("cifar10-jpeg-")]


@pytest.mark.parametrize("name", DIGITS)
def test_a_network_predicts_what_its_card_says(name: str) -> None:
    known = zoo.card(name)
    evaluation, manifest = known["evaluation"], known["manifest"]
    x, y = ducat.data.load_test("digits")
    with torch.no_grad():
        logits = ducat.load(f"zoo:{name}")(x)
    assert logits.shape == (500, 10)
    assert (logits.argmax(1) == y).double().mean().item() == pytest.approx(evaluation["clean"]["accuracy"])
    assert evaluation["samples"] == 500
    assert evaluation["robust"] <= evaluation["blind"]
    assert manifest["data"]["fingerprint"] == ducat.data.load("digits").fingerprint
    assert len(known["made_by"]) == 3
    assert "/" not in manifest["command"][0]


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_network_of_photographs_is_the_one_that_its_card_was_measured_on(name: str) -> None:
    known, (tensors, _) = zoo.card(name), checkpoint.read(zoo.fetch(name))
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float16}
    assert ducat.load(f"zoo:{name}")(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    evaluation, rows = known["evaluation"], json.loads((ROOT / "results" / "size.json").read_text())["cpu"]
    assert (evaluation["suite"], evaluation["samples"]) == ("standard", 1000)
    assert evaluation["robust"] <= evaluation["blind"]
    (row,) = (row for row in rows.values() if row["manifest"]["command"][1:] == known["manifest"]["command"][1:])
    there = next(one for one in row["evaluations"].values() if one["suite"] == "standard")
    assert evaluation["origin"] == there["origin"]  # the digest of the weights is in it
    assert evaluation["attacks"] == there["attacks"]


def test_only_networks_on_data_at_hand_are_attacked_unless_they_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert showing.at_hand() == DIGITS
    assert main(["zoo", PHOTOGRAPHS[0], "--evaluate", "--samples", "10"]) == 2
    assert "ducat data prepare cifar10-jpeg" in capsys.readouterr().err


def test_the_published_one_has_a_sink_and_ours_has_a_small_one() -> None:
    gaps = {name: zoo.card(name)["evaluation"]["sink_gap"] for name in zoo.NETWORKS}
    assert gaps["digits-pgd-at"] == 0
    assert gaps["digits-published"] > 0.3
    assert gaps["digits-recovery-aware"] < 0.1


def test_the_pages_have_the_numbers_of_the_cards() -> None:
    page, readme = (ROOT / "results" / "demo.md").read_text(), (ROOT / "README.md").read_text()
    rows = {"digits-pgd-at": "PGD-AT", "digits-published": "DUCAT, published"}
    rows["digits-recovery-aware"] = "DUCAT, recovery-aware"
    alone, robust = {}, []
    for name, title in rows.items():
        evaluation = zoo.card(name)["evaluation"]
        assert (evaluation["suite"], evaluation["samples"]) == ("standard", 500)
        by_attack = {row["name"]: f"{100 * row['accuracy']:.1f}" for row in evaluation["attacks"]}
        worst = [f"{100 * evaluation[kind]:.1f}" for kind in ("blind", "robust")]
        assert f"| {title} | {worst[0]} | {worst[1]} | {by_attack['autoattack-recovered']} |" in page
        alone[title] = by_attack["autoattack"]
        robust.append(worst[1])
    assert f"*robust* is {', '.join(robust)} of" in readme
    assert f"blind AutoAttack leaves {alone['DUCAT, published']} %\n  against {alone['PGD-AT']}" in readme
    assert f"alone leaves {alone['DUCAT, published']} % of the published network" in page


def _in_linf(row: dict) -> dict[str, dict]:
    return {
        content["suite"]: content
        for name, content in row["evaluations"].items()
        if content["threat"]["norm"] == "linf" and name != "by-sum"
    }


def _left(evaluation: dict, attack: str) -> float:
    (left,) = (row["accuracy"] for row in evaluation["attacks"] if row["name"] == attack)
    return left


def test_the_pages_have_the_numbers_that_were_measured_on_photographs() -> None:
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "results" / "size.md").read_text()
    titles = {
        "PGD-AT, trained on": ("PGD-AT", "PGD-AT"),
        "mixed, half benign": ("mixed: half benign, no dummy classes", "half benign, no dummy classes"),
        "dummy classes, published": ("PGD-AT with dummy classes as published", "dummy classes as published"),
        "dummy classes, recovery-aware": ("PGD-AT with recovery-aware dummy classes (ours)", "recovery-aware"),
    }
    settings = json.loads((ROOT / "results" / "size.json").read_text())
    rows, sentence = settings["cpu"], " ".join(readme.partition("At twice the width")[2].partition("\n\n")[0].split())
    for title, (_, on_page) in titles.items():
        (light,) = (
            content
            for content in settings["wide"][title]["evaluations"].values()
            if (content["suite"], content["threat"]["norm"]) == ("light", "linf")
        )
        assert light["samples"] == 1000
        numbers = [f"{100 * each:.1f}" for each in (light["clean"]["accuracy"], light["blind"], light["robust"])]
        assert f"| ours, width 32, {on_page} | {' | '.join(numbers)} |" in page
        assert all(number in sentence for number in numbers), title
    whole = json.loads((ROOT / "results" / "size-shipped.json").read_text())
    for name in PHOTOGRAPHS:
        light, kind = whole[f"zoo:{name}"], name.removeprefix("cifar10-jpeg-")
        assert (light["suite"], light["samples"], light["at_most"]) == ("light", 8000, False)
        assert kept.is_current(RunFolder(zoo.folder(name)), light), "it is not of the network that ships"
        on_page = {"pgd-at": "PGD-AT", "published": "dummy classes as published"}.get(kind, kind)
        numbers = [f"{100 * each:.1f}" for each in (light["clean"]["accuracy"], light["blind"], light["robust"])]
        assert f"| ours, seed 0 on 8,000, {on_page} | {' | '.join(numbers)} |" in page
        assert all(number in readme for number in numbers), name
    seed_1 = json.loads((ROOT / "results" / "size-seed-1.json").read_text())
    base = _in_linf(seed_1["wide"]["the base, trained longer, seed 1"])["light"]
    clean, worst, *interval = (
        f"{100 * each:.1f}" for each in (base["clean"]["accuracy"], base["robust"], *base["robust_ci95"])
    )
    assert base["samples"] == 8000
    assert not base["at_most"]
    assert f"such a base has {clean} clean and {worst} [{', '.join(interval)}] robust" in page
    assert f"has {clean} clean and {worst} robust." in sentence
    for title, (_, on_page) in list(titles.items())[:3]:
        light = _in_linf(seed_1["wide"][f"{title}, seed 1"])["light"]
        numbers = [f"{100 * each:.1f}" for each in (light["clean"]["accuracy"], light["blind"], light["robust"])]
        assert f"| ours, width 32, seed 1, {on_page} | {' | '.join(numbers)} |" in page
    again = seed_1["cpu"]
    sentence = " ".join(readme.partition("Trained anew with another seed")[2].partition("\n\n")[0].split())
    for title, (_, on_page) in titles.items():
        light = _in_linf(again[f"{title}, seed 1"])["light"]
        assert light["samples"] == 8000
        numbers = [f"{100 * each:.1f}" for each in (light["clean"]["accuracy"], light["blind"], light["robust"])]
        assert f"| ours, seed 1, {on_page} | {' | '.join(numbers)} |" in page
        assert all(number in sentence for number in numbers), title
    for title, (_, on_page) in titles.items():
        suites = _in_linf(settings["tiny"][title])
        light, standard = suites["light"], suites["standard"]
        assert (light["samples"], standard["samples"]) == (1000, 200)
        numbers = [light["clean"]["accuracy"], _left(standard, "autoattack"), light["blind"], light["robust"]]
        told = " | ".join(f"{100 * each:.1f}" for each in numbers)
        assert f"| ours, Tiny-ImageNet, {on_page} | {told} |" in page
    plain, published = (_in_linf(settings["wide"][title])["standard"] for title in list(titles)[:3:2])
    assert (plain["samples"], published["samples"]) == (100, 100)
    assert (
        f"leaves {100 * _left(plain, 'autoattack'):.1f} % of PGD-AT (clean {100 * plain['clean']['accuracy']}" in page
    )
    blind, knowing = (100 * _left(published, name) for name in ("autoattack", "autoattack-recovered"))
    assert f"{blind:.1f} %\n  blind and {knowing:.1f} % where it knows recovery" in page
    for title, (in_readme, on_page) in titles.items():
        suites = _in_linf(rows[title])
        light, standard = suites["light"], suites["standard"]
        assert light["samples"] == 1000
        of = "" if standard["samples"] == 1000 else f" ({standard['samples']})"
        left = f"{100 * _left(standard, 'autoattack'):.1f}{of}"
        clean, worst = (f"{100 * each:.1f}" for each in (light["clean"]["accuracy"], light["robust"]))
        assert f"| {in_readme} | {clean} | {left} | {100 * light['blind']:.1f} | {worst} |" in readme
        assert f"| ours, {on_page} | {clean} | {left} | {worst} |" in page


def test_weights_are_packed_in_half_precision_where_that_loses_nothing(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    file = run / "checkpoints" / "best" / "checkpoint.safetensors"
    tensors, state = checkpoint.read(file)
    (odd, one), *others = sorted(checkpoint.part("model", tensors).items())
    exact = {name: value.half().float() if value.is_floating_point() else value for name, value in others}
    checkpoint.save(file, checkpoint.named("model", {**exact, odd: one + 1e-7}), state)
    evaluation = {**json.loads((run / "evaluation.json").read_text()), "checkpoint": "best"}
    with pytest.raises(ValueError, match="best has been trained on since it was evaluated: evaluate it again"):
        zoo.pack(run, tmp_path / "packed.safetensors", ["made"], which="best", measured=evaluation)
    assert not (tmp_path / "packed.safetensors").exists()
    origin = {**evaluation["origin"], "weights": checkpoint.digest_of(file)}
    zoo.pack(run, tmp_path / "packed.safetensors", ["made"], which="best", measured={**evaluation, "origin": origin})
    packed = checkpoint.part("model", checkpoint.read(tmp_path / "packed.safetensors")[0])
    assert packed[odd].dtype == torch.float32
    assert torch.equal(packed[odd], one + 1e-7)
    for name, value in exact.items():
        assert packed[name].dtype == (torch.float16 if value.is_floating_point() else value.dtype)
        assert torch.equal(packed[name].to(value.dtype), value)


def test_a_name_is_a_run_folder_of_the_user(cache: Path) -> None:
    folder = RunFolder.open(NAME)
    assert folder.path.is_relative_to(cache)
    assert (folder.name, folder.checkpoints) == ("digits-recovery-aware", ["best"])
    assert Run.read(Path(NAME)).evaluation["checkpoint"] == "best"
    (folder.path / "mine").touch()
    assert (RunFolder.open(NAME).path / "mine").is_file()


def test_an_unknown_name_lists_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "zoo:cats"]) == 2
    assert "zoo:cats is unknown: choose from zoo:digits-pgd-at" in capsys.readouterr().err


def test_the_list_shows_both_numbers_and_a_card_shows_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo"]) == 0
    shown = capsys.readouterr().out
    for name in zoo.NETWORKS:
        assert f"zoo:{name}: " in shown
    assert "blind" in shown
    assert "robust" in shown
    assert main(["zoo", "zoo:digits-published"]) == 0
    assert "ducat demo --out demo" in capsys.readouterr().out


@pytest.mark.slow
def test_three_networks_are_attacked_and_the_sink_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    before = Run.read(Path("zoo:digits-published")).evaluation
    assert main(["zoo", "--evaluate", "--samples", "100"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"warning digits-published\b[^:]*: sink gap of", shown)
    assert "ducat demo" in shown
    assert Run.read(Path("zoo:digits-published")).evaluation == before, "something was written"


@pytest.mark.slow
def test_evaluate_and_export_take_a_name(tmp_path: Path) -> None:
    assert main(["evaluate", NAME, "--suite", "quick", "--samples", "20"]) == 0
    assert main(["export", NAME, "--format", "robustbench", "--out", str(tmp_path / "claim")]) == 0


def test_the_card_is_of_the_network_and_speaks_for_it_until_something_stronger_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compare", *(f"zoo:{name}" for name in zoo.NETWORKS)]) == 0
    assert "trained on since" not in capsys.readouterr().out
    assert main(["evaluate", NAME, "--suite", "quick", "--samples", "20"]) == 0
    assert "the evaluation that speaks for the run is a stronger one" in " ".join(capsys.readouterr().out.split())
    assert Run.read(Path(NAME)).evaluation["suite"] == "standard"


@pytest.mark.slow
def test_a_network_is_adapted_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--train.epochs", "1", "--data.samples", "64", "--train.batch_size", "64"]
    assert main(["adapt", "zoo:digits-pgd-at", "--runs", str(tmp_path), "--name", "mine", *short]) == 0
    assert "mine: epoch 1 of 1" in capsys.readouterr().out, "the progress is that of the new run"
    adapted = RunFolder.open(tmp_path / "mine")
    assert adapted.config.threat.build(None).eps == pytest.approx(0.2)
    assert adapted.load("last")(torch.rand(2, 1, 8, 8)).shape == (2, 20)


def test_robustbenchs_loader_finds_the_weights_of_a_claim(tmp_path: Path) -> None:
    model = robustbench.read(export(NAME, "robustbench", tmp_path / "claim").path)
    assert isinstance(model, torch.nn.Module)
    state = model.state_dict()
    # What robustbench.utils.load_model does to the names in a file, for both of these.
    for start in ("module.", "model."):
        state = {name[len(start) :] if start in name else name: tensor for name, tensor in state.items()}
    model.load_state_dict(state, strict=True)
    x, _ = ducat.data.load_test("digits", samples=20)
    torch.testing.assert_close(model(x), ducat.load(NAME)(x))


def test_a_file_that_is_not_the_tables_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "big.safetensors"
    shutil.copy(zoo.HERE / "digits-pgd-at.safetensors", file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    networks = {"big": zoo.Entry("a larger one", digest, "ducat/zoo", "main")}
    monkeypatch.setenv("DUCAT_ZOO", str(tmp_path))
    assert zoo.fetch("zoo:big", networks) == file
    assert RunFolder(zoo.folder("big", networks)).checkpoints == ["best"]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"is not the network zoo:big: its SHA-256 is"):
        zoo.fetch("zoo:big", networks)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"DUCAT_ZOO names its folder"):
        zoo.fetch("zoo:big", networks)


def test_a_larger_one_comes_from_the_hub_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = zoo.HERE / "digits-pgd-at.safetensors"
    asked: list[Any] = []

    def download(repository: str, name: str, *, revision: str) -> str:
        asked.append((repository, name, revision))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    networks = {"big": zoo.Entry("a larger one", zoo.NETWORKS["digits-pgd-at"].sha256, "ducat/zoo", "abc")}
    assert zoo.fetch("big", networks) == file
    assert asked == [("ducat/zoo", "big.safetensors", "abc")]


def test_without_a_network_the_message_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*arguments: object, **settings: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(OSError, match=r"name that in the environment variable DUCAT_ZOO"):
        zoo.fetch("big", {"big": zoo.Entry("a larger one", "0" * 64, "ducat/zoo", "abc")})


class Hub:
    """Stands for huggingface_hub.HfApi, and keeps what it is sent in a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.made = root, dict[str, Any]()

    def __call__(self, **settings: object) -> "Hub":
        return self

    def create_repo(self, name: str, **settings: object) -> None:
        self.made[name] = settings

    def upload_folder(self, *, repo_id: str, folder_path: Path, **settings: object) -> SimpleNamespace:
        shutil.copytree(folder_path, self.root / repo_id)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    api = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "mine")
    return api


def test_push_says_what_it_would_send_then_sends_it(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", NAME, "--format", "hub", "--out", str(tmp_path / "out"), "--push", "me/digits"]
    assert main(command) == 0
    assert "nothing was sent" in capsys.readouterr().out
    assert hub.made == {}
    assert main([*command, "--confirm"]) == 0
    assert "https://hub/me/digits" in capsys.readouterr().out
    assert hub.made == {"me/digits": {"private": True, "exist_ok": True}}
    x, _ = ducat.data.load_test("digits", samples=20)
    pulled = Classifier.from_pretrained(hub.root / "me" / "digits")
    torch.testing.assert_close(pulled(x), ducat.load(NAME)(x))


def test_a_hub_that_cannot_be_reached_is_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class UnreachableError(Exception):
        """What the hub's library raises is of the library that it goes by."""

    def fail(*_: object, **__: object) -> None:
        raise UnreachableError("no address associated with hostname")

    monkeypatch.setattr(hub, "create_repo", fail)
    command = ["export", NAME, "--format", "hub", "--out", str(tmp_path / "out"), "--push", "me/digits", "--confirm"]
    assert main(command) == 2
    assert "the hub cannot be reached (UnreachableError: no address" in capsys.readouterr().err


def test_other_images_under_the_name_of_the_data_are_not_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ducat.data.load("digits")
    monkeypatch.setattr("ducat.runs.load_data", lambda *_, **__: replace(whole, fingerprint="sha256:other"))
    with pytest.raises(ValueError, match="the data digits are not those"):
        showing.attacked([NAME], samples=5)


def test_push_refuses_other_numbers_other_weights_and_strangers(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export(NAME, "hub", tmp_path / "out").path
    card, text = out / "README.md", (out / "README.md").read_text()
    card.write_text(text + "\nWords of mine.\n")
    assert push(NAME, "me/digits", out).address is None
    robust = f"{100 * zoo.card(NAME)['evaluation']['robust']:.1f}"
    assert robust in text
    card.write_text(text.replace(robust, "99.9"))
    with pytest.raises(ValueError, match=r"other numbers than the run's evaluation"):
        push(NAME, "me/digits", out, confirm=True)
    card.write_text(text)
    with pytest.raises(ValueError, match=r"is not that of the run"):
        push("zoo:digits-published", "me/digits", _with_card(out, "zoo:digits-published", tmp_path), confirm=True)
    (out / "token.txt").touch()
    with pytest.raises(ValueError, match=r"take out token\.txt"):
        push(NAME, "me/digits", out, confirm=True)
    (out / "token.txt").unlink()
    for name in ("digits", "a/b/c", "me/di gits"):
        with pytest.raises(ValueError, match=r"push: "):
            push(NAME, name, out)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"hf auth login"):
        push(NAME, "me/digits", out, confirm=True)
    RunFolder.open(NAME).evaluation_path.write_text(json.dumps({**zoo.card(NAME)["evaluation"], "checkpoint": "last"}))
    with pytest.raises(ValueError, match=r"run `ducat evaluate` first"):
        push(NAME, "me/digits", out)
    assert hub.made == {}


def _with_card(out: Path, name: str, tmp_path: Path) -> Path:
    """Return the files of `out` under the card of another network."""
    mixed = export(name, "hub", tmp_path / "mixed").path
    shutil.copy(out / "model.safetensors", mixed)
    return mixed
