import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import ducat
from ducat import sweep
from ducat.cli import main
from ducat.cli.commands import COMMANDS
from ducat.cli.overview import OTHERS, SUMMARIES
from ducat.config import Config
from ducat.data import SPECS
from ducat.runs import RunFolder, environment

pytestmark = pytest.mark.slow

TINY = [
    *("--data.name", "digits", "--data.samples", "64", "--train.batch_size", "32", "--train.precision", "float32"),
    *("--train.learning_rate", "0.05", "--train.schedule", "constant", "--threat.steps", "2"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    out, err = capsys.readouterr()
    return " ".join(out.split()), err


@pytest.mark.slow
def test_train_then_evaluate_twice_gives_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--train.epochs", "2", "--dummy.kind", "published", "--dummy.start_epoch", "1"]) == 0
    run = "runs/digits-small-pgd-at-published-s0"
    assert f"ducat evaluate {run}" in said(capsys)[0]
    results = []
    for number in (1, 2):
        assert main(["evaluate", run, "--suite", "quick", "--samples", "40", "--json", f"{number}.json"]) == 0
        results.append(json.loads(Path(f"{number}.json").read_text()))
    for result in results:
        for attack in result["attacks"]:
            attack.pop("seconds")
    assert results[0] == results[1]
    assert results[0]["samples"] == 40
    assert json.loads((Path(run) / "evaluation.json").read_text())["robust"] == results[0]["robust"]
    out, _ = said(capsys)
    assert "linf eps 0.2 on images in [0, 1], suite quick, seed 0" in out
    assert all(header in out for header in ("clean", "blind", "robust", "sink gap"))
    x, y = ducat.data.load_test("digits", 40)
    correct = (ducat.load(run)(x).argmax(1) == y).float().mean().item()
    assert correct == pytest.approx(results[0]["clean"]["accuracy"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --method.name pgdat", "method 'pgdat' is unknown: did you mean pgd-at?"),
        ("train --threat.eps 8", "eps=8 is outside [0, 1]: images are in [0, 1]; did you mean 8/255?"),
        ("train --train.epochs -3", "train.epochs=-3 must be at least 1"),
        ("train --train.epochs many", "train.epochs"),
        ("train --train.epoch 3", "--train.epoch"),
        ("train --data.name nothing", "nothing"),
        ("train --config missing.yaml", "missing.yaml"),
        ("train --dummy.kind on", "off"),
        ("evaluate nowhere", "nowhere is not a run folder"),
        ("evaluate", "run"),
        ("adapt nowhere", "nowhere does not exist"),
        ("data prepare", "name a data set"),
        ("data verify cifar10 --root empty", "ducat data prepare cifar10"),
        ("data prepare mine --from nowhere --root empty", "nowhere"),
        ("data fly", "action: choose from 'list', 'prepare', 'verify'. Got value: fly"),
        ("data list digits", "`ducat data verify digits` shows one"),
        ("data verify digits --size 3", "--size is for prepare"),
        ("evaluate . --suite huge", "suite: choose from 'quick'"),
        ("evaluate . --seed x", "seed: expected int. Got value: x"),
        ("evaluate . --samples 1.5", "samples: expected int. Got value: 1.5"),
        ("train --resume nowhere", "nowhere is not a run folder"),
        ("evaluate . --json nowhere/x.json", "--json: the folder nowhere does not exist"),
        ("train --name a/b", "name='a/b' is not the name of a folder"),
        ("evalute", "command 'evalute' is unknown: did you mean evaluate?"),
        ("help evalute", "did you mean evaluate?"),
        ("completion bsh", "did you mean bash?"),
        ("train --train.epoch 3", "option --train.epoch is unknown: did you mean --train.epochs?"),
        ("train --data.nmae=digits", "did you mean --data.name?"),
        ("train --epochs 3", "did you mean --train.epochs?"),
        ("train --learning-rate 3", "did you mean --train.learning_rate?"),
        ("evaluate . --sampels 3", "did you mean --samples?"),
        ("train --zzz 3", "option --zzz is unknown: see `ducat train --help`"),
        ("train base", "'base' is one argument too many"),
        ("train --dummy.kind recovry-aware", "did you mean recovery-aware?"),
        ("train --train.schedule cosin", "did you mean cosine?"),
        ("evaluate . --suite standrd", "did you mean standard?"),
        ("adapt --train.epochs 1 nowhere", "nowhere does not exist"),
        ("adapt", "checkpoint is missing: run folder, or file of weights"),
        ("data prepare digits --from empty", "--from empty: the digits come with scikit-learn"),
        ("data prepare digits --replace", "--replace: the digits come with scikit-learn"),
        ("zoo --suite full", "--suite goes with --evaluate"),
        ("zoo --samples 5", "--samples goes with --evaluate"),
        ("data verify digts", "did you mean digits?"),
        ("evaluate a --checkpoint b", "a and --checkpoint b are both given"),
        ("evaluate a --data digits", "--data does not fit: a is a run, which brings its own"),
        ("evaluate --checkpoint b --which last", "--which does not fit: a file of weights holds one network"),
        ("export . --format onnx", "--out is missing: new file or folder to write"),
        ("train --resume . --name x", "--resume takes the settings of the run"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ducat: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir()), "something was left behind"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: 3", "expected ',' or '}'"),
        ("train:\n  epoch: 3\n", "train.epoch is unknown: did you mean train.epochs?"),
        ("train:\n  epochs: many\n", "train.epochs: expected int. Got value: many"),
        ("train: {epochs: -3}\n", "train.epochs=-3 must be at least 1"),
        ("- 1\n", "it holds no settings"),
        ("train: {epochs: 3}\ndata: {name: digits}\ntrain: {seed: 1}\n", "train is there twice"),
    ],
)
def test_a_bad_file_of_settings_is_named(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(text)
    assert main(["train", "--name", "x", "--config", "bad.yaml", "--train.seed", "1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("ducat: bad.yaml: ")
    assert message in told
    assert main(["train", "--config=bad.yaml", "--train.sed", "1"]) == 2
    Path("good.yaml").write_text("train: {epochs: 2}\n")
    assert main(["train", "--config", "good.yaml", "--train.schedule", "x"]) == 2
    assert "good.yaml" not in capsys.readouterr().err, "the file is not at fault"


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--version"], ["-V"], ["--help"], ["help"], ["nothing"], ["evalute", "--help"], ["help", "nothing"]),
        *(["completion", shell] for shell in ("bash", "zsh", "fish")),
    ],
    ids=" ".join,
)
def test_what_needs_no_network_imports_no_pytorch(arguments: list[str]) -> None:
    code = "import sys; from ducat.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout or done.stderr


@pytest.mark.slow
def test_an_image_folder_is_prepared_trained_on_and_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, label, number in itertools.product(("train", "test"), ("cat", "dog"), range(20)):
        file = tmp_path / "pets" / split / label / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 100 if label == "cat" else 200, 7)).save(file)
    root = ["--root", str(tmp_path / "cache")]
    assert main(["data", "prepare", "pets", "--from", "pets", *root]) == 0
    prepared, _ = said(capsys)
    assert "fingerprint: sha256:" in prepared
    assert main(["data", "verify", "pets", *root]) == 0
    assert said(capsys)[0] == prepared
    assert main(["data", "list", *root]) == 0
    listed, _ = said(capsys)
    assert "pets" in listed
    assert "not prepared" in listed
    settings = ["--data.name", "pets", "--data.root", "cache", "--model.name", "small", "--name", "pets"]
    short = ["--train.epochs", "1", "--train.batch_size", "16", "--threat.steps", "2", "--train.precision", "float32"]
    assert main(["train", *settings, *short]) == 0
    assert main(["evaluate", "runs/pets", "--suite", "quick"]) == 0
    assert "pets, 40 test images, linf eps 0.03137" in said(capsys)[0]


@pytest.mark.slow
def test_adapt_leaves_a_run_with_dummy_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--train.epochs", "1", "--name", "base"]) == 0
    assert main(["adapt", "runs/base", "--train.epochs", "1"]) == 0
    assert "runs/base-adapted-recovery-aware" in said(capsys)[0]
    adapted = RunFolder.open(Path("runs/base-adapted-recovery-aware"))
    assert adapted.config.data.samples == 64, "the settings of the run were not taken over"
    assert isinstance(ducat.load(adapted.path, "last"), ducat.RecoveredClassifier)


@pytest.mark.slow
def test_options_after_the_config_of_a_run_change_what_was_derived_from_them() -> None:
    assert main(["train", *TINY, "--data.augmentation", "strong", "--train.epochs", "1"]) == 0
    config = ["--config", "runs/digits-small-pgd-at-s0/config.yaml"]
    assert main(["train", *config, "--method.name", "trades", "--threat.eps", "0.03"]) == 0
    made = RunFolder.open("runs/digits-small-trades-s0").config
    assert (made.method.weight, made.threat.eps, made.threat.step_size) == (6.0, 0.03, 0.0075)
    assert (made.data.augmentation, made.data.samples, made.threat.steps) == ("strong", 64, 2)

    words = [*config, "--grid", "method.name=pgd-at,mart"]
    arguments = COMMANDS["sweep"].parser(words).read(words)
    base = Config(**{name: arguments[name] for name in Config.__dataclass_fields__})
    resolved = [made.resolve(SPECS["digits"]) for made in sweep.configs(base, sweep.read_grid(arguments.grid))]
    assert [made.method.weight for made in resolved] == [None, 6.0]

    # In a file of one's own every value is a choice.
    Path("own.yaml").write_text("data: {name: digits}\nthreat: {eps: 0.2, step_size: 0.05}\n")
    words = ["--config", "own.yaml", "--threat.eps", "0.1"]
    assert COMMANDS["train"].parser(words).read(words).threat.step_size == 0.05


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", *TINY, "--train.epochs", "1", "--name", "run"]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(arguments) == 2
    assert "runs/run exists, and a run is never overwritten" in capsys.readouterr().err
    Path("taken.json").write_text("mine")
    assert main(["evaluate", "runs/run", "--json", "taken.json"]) == 2
    assert "taken.json exists" in capsys.readouterr().err
    assert Path("taken.json").read_text() == "mine"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"ducat {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in (*COMMANDS, *OTHERS))
    assert list(SUMMARIES) == list(COMMANDS)


def helped(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "adapt", "sweep"])
def test_help_has_two_levels(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = helped(capsys, command, "--help")
    every = helped(capsys, command, "--help", "all")
    assert helped(capsys, "help", command, "all") == every
    assert len(few.splitlines()) < 80
    assert f"ducat {command} --help all" in few
    for option in ("--method.name", "--dummy.kind", "--threat.eps", "--train.epochs", "--train.schedule"):
        assert f"  {option} " in few
    assert "--train.awp " not in few
    options = [option.name for option in COMMANDS[command].parser([]).options()]
    assert len(options) == len(set(options)) > 50
    assert all(option in every for option in options)
    for text in (few, every):
        values = "natural|mixed|pgd-at|trades|mart|consistency"
        assert f"--method.name {values}" in text
        assert "constant|multi-step|cosine|one-cycle" in text
        assert "resnet18|" in text
        assert not {"Union", "null", "None", "CONFIG", "Literal"} & set(re.findall(r"\w+", text))
        assert max(map(len, text.splitlines())) <= 120


def test_traceback_is_shown_when_asked_for() -> None:
    with pytest.raises(FileNotFoundError):
        main(["evaluate", "nowhere", "--traceback"])


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_can_be_read_and_resumed(signum: int, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "ducat.cli", "train", *TINY, "--name", "run", "--train.epochs", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not get going"
        time.sleep(0.05)
    process.send_signal(signum)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signum
    assert "ducat train --resume runs/run" in err
    assert "Traceback" not in err
    folder = RunFolder.open(Path("runs/run"))
    assert folder.manifest["status"] == "interrupted"
    folder.load("last")


@pytest.mark.slow
def test_python_m_ducat_and_the_version() -> None:
    for command in (["-m", "ducat.cli"], ["-m", "ducat"]):
        result = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True, timeout=300)
        assert result.stdout.strip() == f"ducat {ducat.__version__}", result.stderr


@pytest.mark.slow
def test_any_checkpoint_is_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--train.epochs", "1", "--name", "mine", "--dummy.kind", "published"]) == 0
    network = RunFolder.open(Path("runs/mine")).load("last")
    torch.save({"state_dict": network.state_dict()}, "weights.pt")
    options = ["--model", "small", "--data", "digits", "--suite", "quick", "--samples", "40"]
    assert main(["evaluate", "--checkpoint", "weights.pt", "--num-classes", "10", *options, "--json", "new.json"]) == 0
    assert "Digits, 40 test images, linf eps 0.2" in said(capsys)[0]
    measured = json.loads(Path("new.json").read_text())
    assert main(["evaluate", "runs/mine", "--which", "last", "--suite", "quick", "--samples", "40"]) == 0
    of_the_run = json.loads(Path("runs/mine/evaluation.json").read_text())
    for name in ("clean", "blind", "robust"):
        assert measured[name] == of_the_run[name], name
    assert (measured["checkpoint"], of_the_run["checkpoint"]) == (None, "last")
    # Without --json the result is kept all the same, and is a row like a run's.
    assert main(["evaluate", "--checkpoint", "weights.pt", *options]) == 0
    (kept,) = Path("evaluations").glob("weights-digits-quick-*.json")
    before = kept.read_bytes()
    assert main(["evaluate", "--checkpoint", "weights.pt", *options]) == 0
    assert kept.read_bytes() == before
    capsys.readouterr()
    assert main(["compare", str(kept), "runs/mine", "--figure", "both.svg"]) == 0
    out, _ = said(capsys)
    assert "robust +0.0 points" in out
    assert "verdict" in out
    assert Path("both.svg").stat().st_size > 1000
    # Nothing that a name is derived from is overwritten.
    Path("taken.safetensors").write_text("mine")
    assert main(["evaluate", "--checkpoint", "weights.pt", *options, "--json", "taken.json"]) == 2
    assert "taken.safetensors exists" in said(capsys)[1]
    assert Path("taken.safetensors").read_text() == "mine"
    assert main(["evaluate", "--checkpoint", "weights.pt", "--num-classes", "7", *options]) == 2
    assert "num_classes=7, but digits has 10 classes: a network is measured on data of" in said(capsys)[1]


BUILDERS = """
import torch

class Network(torch.nn.Module):
    def __init__(self, outputs, factor):
        super().__init__()
        self.factor, self.last = factor, torch.nn.Linear(64, outputs)

    def forward(self, x):
        return self.last(self.factor * x.flatten(1))

def plain(num_outputs):
    return Network(num_outputs, 1.0)

def other(num_outputs):
    return Network(num_outputs, -1.0)
"""


@pytest.mark.slow
def test_what_was_measured_of_another_network_with_the_same_weights_is_not_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("nets.py").write_text(BUILDERS)
    images = ducat.data.load("digits").train
    pixels, targets = images.floats().flatten(1), torch.eye(10)[images.labels]
    weights = torch.linalg.lstsq(pixels.T @ pixels + torch.eye(64), pixels.T @ targets).solution.T
    torch.save({"last.weight": weights, "last.bias": torch.zeros(10)}, "weights.pt")
    options = ["--data", "digits", "--suite", "quick", "--samples", "40", "--normalization", "none", "--eps", "0.02"]

    def measured(function: str, *more: str) -> tuple[float, str]:
        named = ["--model", f"nets.py:{function}", "--allow-code", f"nets.py:{function}"]
        assert main(["evaluate", "--checkpoint", "weights.pt", *named, *options, *more]) == 0
        out, _ = said(capsys)
        newest = max(Path("evaluations").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return json.loads(newest.read_text())["clean"]["accuracy"], out

    accurate, out = measured("plain")
    assert accurate > 0.7
    assert "measured before" not in out
    wrong, out = measured("other")
    assert wrong < 0.3
    assert "measured before" not in out
    assert "measured before" in measured("other")[1]
    # The same name, but the function was changed.
    Path("nets.py").write_text(BUILDERS.replace("-1.0", "1.0"))
    again, out = measured("other")
    assert again == accurate
    assert "measured before" not in out
    assert len(list(Path("evaluations").glob("*.json"))) == 3


@pytest.mark.slow
def test_a_run_can_be_evaluated_in_another_ball(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--train.epochs", "1", "--name", "mine"]) == 0
    for options in (["--eps", "0.05"], ["--norm", "l2", "--eps", "0.3"]):
        assert main(["evaluate", "runs/mine", "--suite", "quick", "--samples", "20", *options]) == 0
    kept = [json.loads(path.read_text())["threat"] for path in sorted(Path("runs/mine/evaluations").glob("*.json"))]
    assert [(threat["norm"], threat["eps"]) for threat in kept] == [("l2", 0.3), ("linf", 0.05)]
    assert json.loads(Path("runs/mine/evaluation.json").read_text())["threat"]["norm"] == "linf"
    # Another evaluation replaces nothing, and what was measured is not measured again.
    before = {path: path.read_bytes() for path in Path("runs/mine/evaluations").iterdir()}
    curve = ["--eps", "0.05", "0.2", "1/20", "--figure", "curve.svg", "--json", "curve.json"]
    capsys.readouterr()
    assert main(["evaluate", "runs/mine", "--suite", "quick", "--samples", "20", *curve]) == 0
    out, _ = said(capsys)
    assert "was measured before; --again" in out
    assert [row["threat"]["eps"] for row in json.loads(Path("curve.json").read_text())] == [0.05, 0.2]
    assert "<svg" in Path("curve.svg").read_text()
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads(Path("runs/mine/evaluation.json").read_text())["threat"]["eps"] == 0.2
    assert "All 3 evaluations of this run" in Path("runs/mine/report.html").read_text()


@pytest.mark.slow
def test_runs_are_analysed_together(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in ("0", "1"):
        assert main(["train", *TINY, "--train.epochs", "2", "--name", f"s{seed}", "--train.seed", seed]) == 0
        assert main(["evaluate", f"runs/s{seed}", "--which", "last", "--suite", "quick", "--samples", "40"]) == 0
    capsys.readouterr()
    runs = ["runs/s0", "runs/s1"]
    assert main(["analyze", "always-failed", *runs, "--json", "failed.json", "--figure", "failed.svg"]) == 0
    study = json.loads(Path("failed.json").read_text())
    failed = [~ducat.Evaluation.load(Path(run)).robust for run in runs]
    assert study["failed_on_every"] == int((failed[0] & failed[1]).sum())
    assert f"{study['failed_on_every']} of 40 test images fail on every model" in said(capsys)[0]
    assert "<svg" in Path("failed.svg").read_text()
    assert main(["analyze", "transfer", *runs, "--figure", "transfer.png"]) == 0
    assert "on 2" in said(capsys)[0]
    assert main(["analyze", "always-failed", *runs, "--figure", "failed.svg"]) == 2
    assert "failed.svg exists" in said(capsys)[1]
    assert main(["analyze", "corruption", "runs/s0"]) == 2
    assert "no corrupted images of digits" in said(capsys)[1]
    assert main(["analyze", "corruption", *runs]) == 2
    assert "give one run" in said(capsys)[1]
    assert main(["analyze", "always-failed", "runs/s0"]) == 2
    assert "at least two" in said(capsys)[1]


def test_what_a_terminal_cannot_show_does_not_end_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"name": "digits", "title": "Digits", "fingerprint": "f", "train": 1, "validation": 1, "test": 1}
    with RunFolder.making(tmp_path / "r\xfcn") as made:
        made.write_config(Config(name="r\xfcn"))
        made.update_manifest({"status": "finished", "data": data, **environment()})
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert main(["train", "--resume", str(tmp_path / "r\xfcn")]) == 0
    assert b"r\\xfcn is finished" in written.getvalue()
