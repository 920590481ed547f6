import csv
import io
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace
from rich.console import Console

from ducat.cli import commands, main
from ducat.config import Config, DataConfig, DummyConfig, ThreatConfig, TrainConfig
from ducat.reporting.compare import Comparison, Pair, Run, compare, folded, reached, to_csv, to_latex, to_markdown, told
from ducat.runs import RunFolder

CONFIG = Config(name="run", data=DataConfig("digits"), threat=ThreatConfig(eps=0.2))


def evaluation(clean: float = 0.9, blind: float = 0.7, robust: float = 0.6, **others: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "data": "digits",
        "checkpoint": "best",
        "fingerprint": "f",
        "samples": 500,
        "seed": 0,
        "suite": "light",
        "threat": {"norm": "linf", "eps": 0.2},
        "clean": {"accuracy": clean, "ci95": [clean - 0.05, clean + 0.04]},
        "attacks": [
            {"name": "pgd-20", "knows_recovery": False, "accuracy": blind, "ci95": [0.1, 0.2], "seconds": 1.0},
            {
                "name": "pgd-20-recovered",
                "knows_recovery": True,
                "accuracy": robust,
                "ci95": [0.1, 0.2],
                "seconds": 1.0,
            },
        ],
        "blind": blind,
        "blind_ci95": [blind - 0.05, blind + 0.04],
        "robust": robust,
        "robust_ci95": [robust - 0.05, robust + 0.04],
        "sink_gap": blind - robust,
        "warnings": [],
        **others,
    }


MANIFEST = {
    "ducat": "0.1.0",
    "status": "finished",
    "git": None,
    "command": ["ducat"],
    "data": {"name": "digits", "title": "Digits", "fingerprint": "sha256:1", "train": 9, "validation": 9, "test": 9},
}


def run(
    name: str, seed: int = 0, config: Config = CONFIG, measured: dict[str, Any] | None = None, **manifest: Any
) -> Run:
    settings = replace(config, name=name, train=replace(config.train, seed=seed)).flat()
    return Run(name, Path("runs") / name, settings, {**MANIFEST, **manifest}, [], measured or evaluation())


def test_seeds_of_one_setting_are_one_line_with_mean_and_sample_deviation() -> None:
    robust = [0.60, 0.63, 0.69]
    runs = [run(f"a-s{seed}", seed, measured=evaluation(robust=value)) for seed, value in enumerate(robust)]
    compared = compare([*runs, run("b", config=replace(CONFIG, train=TrainConfig(epochs=7)))])
    first, second = compared.sections[0].groups
    assert (first.name, first.seeds, second.name) == ("a", [0, 1, 2], "b")
    assert first.mean("robust") == pytest.approx(0.64)
    assert first.spread("robust") == pytest.approx(statistics.stdev(robust))
    table = to_markdown(compared)
    assert "| run | n | clean | blind | robust | sink gap |" in table
    assert "| a | 3 | 90.0 ± 0.0 | 70.0 ± 0.0 | 64.0 ± 4.6 | 6.0 ± 4.6 |" in table
    assert "| b | 1 | 90.0 [85.0, 94.0] | 70.0 [65.0, 74.0] | 60.0 [55.0, 64.0] | 10.0 |" in table
    assert "sample standard deviation" in table
    assert any("different training seeds: a: 0, 1, 2; b: 0" in note for note in compared.notes)


def test_where_a_run_was_kept_and_watched_does_not_matter() -> None:
    other = replace(CONFIG, data=DataConfig("digits", root=Path("/x")), train=TrainConfig(keep=3, tracker="none"))
    assert len(compare([run("a-s0"), run("a-s1", 1, other)]).sections[0].groups) == 1


def test_no_two_lines_have_one_name() -> None:
    """A line of seeds loses the end of its name only if no other is called so: tests and figures go by names."""
    other, third = (replace(CONFIG, train=TrainConfig(epochs=epochs)) for epochs in (7, 9))
    runs = [run("base-s0"), run("base-s1", 1), run("base", config=other)]
    runs += [run("base-s2", 2, third), run("base-s3", 3, third)]
    assert [group.name for group in compare(runs).sections[0].groups] == ["base-s0", "base", "base-s2"]
    assert [group.name for group in compare([*runs[:2], *runs[3:]]).sections[0].groups] == ["base", "base-s2"]


def test_checkpoints_and_what_was_given_to_train_are_no_seeds_of_each_other() -> None:
    for change in (
        {"measured": evaluation(checkpoint="last")},
        {"initial": {"file": "a network given to train"}},
        {"objective": "given to train"},
    ):
        first = {name: value for name, value in change.items() if name != "measured"}
        runs = [run("a-s0", **first), run("a-s1", 1, **change)]
        assert [group.name for group in compare(runs).sections[0].groups] == ["a-s0", "a-s1"], change


def test_runs_from_other_beginnings_are_not_grouped() -> None:
    assert len(compare([run("a-s0"), run("a-s1", 1, initial={"checkpoint": "c"})]).sections[0].groups) == 2


DIFFERENCES: list[tuple[str, dict[str, Any]]] = [
    ("data", {"data": "cifar10"}),
    ("test images", {"fingerprint": "other"}),
    ("threat model", {"threat": {"norm": "linf", "eps": 0.1}}),
    ("threat model", {"threat": {"norm": "l2", "eps": 0.2}}),
    ("suite", {"suite": "quick"}),
    ("seed of the attacks", {"seed": 1}),
    ("attacks", {"attacks": [*evaluation()["attacks"], {**evaluation()["attacks"][1], "name": "transfer-1"}]}),
    ("attacks", {"origin": {"surrogates": ["other-1f0c9a2b"]}}),
    ("limits of the second round", {"origin": {"second_round_seconds": 5.0}}),
]


@pytest.mark.parametrize("name", ["second-round-recovered", "second-opinion"])
def test_an_attack_that_followed_from_another_is_no_difference(name: str) -> None:
    more = [*evaluation()["attacks"], {**evaluation()["attacks"][1], "name": name}]
    assert len(compare([run("a"), run("b", measured=evaluation(attacks=more))]).sections) == 1


def test_surrogates_are_the_same_attack_on_a_network_with_dummy_classes_and_on_one_without() -> None:
    plain, doubled = (
        evaluation(attacks=[*evaluation()["attacks"], {**evaluation()["attacks"][0], "name": name}])
        for name in ("transfer-1", "transfer-1-recovered")
    )
    assert len(compare([run("a", measured=plain), run("b", measured=doubled)]).sections) == 1


@pytest.mark.parametrize(("what", "difference"), DIFFERENCES)
def test_what_was_not_measured_alike_is_not_put_into_one_table(what: str, difference: dict[str, Any]) -> None:
    compared = compare([run("a"), run("b", measured=evaluation(**difference)), run("c")])
    assert [[each.name for each in section.runs] for section in compared.sections] == [["a", "c"], ["b"]]
    assert f"different {what}: a, c / b; do not compare numbers across these tables" in compared.notes


NOTES: list[tuple[Run, str]] = [
    (run("b", data={"fingerprint": "sha256:2"}), "made with different training data: a / b"),
    (run("b", measured=evaluation(checkpoint="last")), "made with different checkpoints: a / b"),
    (run("b", ducat="0.2.0"), "made with different code: a / b"),
    (run("b", git={"commit": "1", "changed": True}), "made with uncommitted changes to the code: b"),
    (run("b", status="interrupted"), "b is not finished: 0 of 130 epochs (interrupted)"),
    (
        run("b", seed=1, config=replace(CONFIG, threat=ThreatConfig(eps=0.2, steps=5))),
        "different training seeds: a: 0; b: 1",
    ),
    (run("b"), "a has training seed 0 more than once: its spread is too small"),
]


@pytest.mark.parametrize(("other", "note"), NOTES, ids=[note for _, note in NOTES])
def test_what_a_reader_must_know_is_noted(other: Run, note: str) -> None:
    assert not compare([run("a")]).notes
    assert note in compare([run("a"), other]).notes


def test_evaluations_by_other_versions_are_noted() -> None:
    first, second = (run(name, measured=evaluation(origin={"ducat": name})) for name in "ab")
    note = "measured by different versions of ducat, whose attacks may differ: a / b"
    assert note in compare([first, second]).notes
    assert note not in compare([first, replace(first, name="c")]).notes
    assert note not in compare([first, run("b")]).notes, "it is not known"


@pytest.mark.parametrize("name", ["second-opinion", "second-round-recovered", "audit"])
def test_an_attack_on_what_others_left_has_no_accuracy_of_its_own(name: str) -> None:
    row = {"name": name, "knows_recovery": True, "accuracy": 0.89, "ci95": [0.8, 0.9], "seconds": 1.0}
    assert reached(row, evaluation(clean=0.9)) == "broke 5 that others had left"
    assert reached({**row, "name": "pgd-20-recovered"}, evaluation()) == "89.0 [80.0, 90.0]"


def test_no_runs_and_a_run_twice_are_told() -> None:
    with pytest.raises(ValueError, match="no runs"):
        compare([])
    with pytest.raises(ValueError, match="a is given twice"):
        compare([run("a"), run("a")])


@pytest.fixture
def mixed() -> Comparison:
    other = replace(CONFIG, train=TrainConfig(epochs=7))
    return compare([run("a_1|x%-s0"), run("a_1|x%-s1", 1), run("b", config=other, measured=evaluation(suite="quick"))])


def test_markdown_has_a_table_for_each_way_of_measuring(mixed: Comparison) -> None:
    text = to_markdown(mixed)
    assert text.count("\n| --- ") == 2
    assert r"| a_1\|x% | 2 |" in text
    assert "- different suite:" in text


def test_latex_escapes_and_keeps_mean_and_deviation(mixed: Comparison) -> None:
    text = to_latex(mixed)
    assert r"a\_1|x\% & 2 & 90.0 $\pm$ 0.0 &" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in body} == {5, 4}


def test_csv_has_a_line_for_each_run_with_how_it_was_measured(mixed: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(mixed))))
    assert [row["run"] for row in rows] == ["a_1|x%-s0", "a_1|x%-s1", "b"]
    assert [row["group"] for row in rows] == ["a_1|x%", "a_1|x%", "b"]
    assert [row["training_seed"] for row in rows] == ["0", "1", "0"]
    assert [row["suite"] for row in rows] == ["light", "light", "quick"]
    assert {row["checkpoint"] for row in rows} == {"best"}
    assert float(rows[0]["robust"]) == 0.6
    assert (float(rows[0]["robust_low"]), float(rows[0]["eps"])) == (pytest.approx(0.55), 0.2)


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make the folder of an evaluated run, as far as comparing needs it."""

    def write(name: str, measured: dict[str, Any] | None = None) -> Path:
        with RunFolder.making(tmp_path / name) as folder:
            folder.write_config(replace(CONFIG, name=name))
            folder.update_manifest(MANIFEST)
            folder.append_metrics({"epoch": 0, "loss": 1.0, "seconds": 1.0, "clean": 0.5, "blind": 0.4, "robust": 0.3})
            if measured is not None:
                (folder.path / "evaluation.json").write_text(json.dumps(measured))
        return tmp_path / name

    return write


def test_the_command_prints_the_table_and_writes_the_files(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(make("one", evaluation())), str(make("two", evaluation(suite="quick", warnings=["sink gap"])))]
    files = {option: tmp_path / f"table.{option}" for option in ("csv", "markdown", "latex", "html")}
    options = [part for option, path in files.items() for part in (f"--{option}", str(path))]
    assert main(["compare", *paths, *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "note different suite: one / two" in printed
    assert "warning two: sink gap" in printed
    assert all(path.stat().st_size > 100 for path in files.values())
    assert main(["compare", *paths, *options[:2]]) == 2
    assert "--csv" in (error := capsys.readouterr().err)
    assert "nothing is overwritten" in error


def test_a_run_without_an_evaluation_is_told_with_what_to_do(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    path = make("one")
    assert main(["compare", str(path)]) == 2
    assert capsys.readouterr().err == f"ducat: {path} has no evaluation yet: run `ducat evaluate {path}`\n"


def test_a_damaged_evaluation_is_told(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    path = make("one", evaluation())
    for content, expected in (
        ("{", "is damaged"),
        ("[]", "is damaged (the file is [], not an object)"),
        ('{"schema": 2}', "is damaged (schema is 2, not 1)"),
        (json.dumps({**evaluation(), "robust": "0.6"}), 'is damaged (robust is "0.6", not a number)'),
        (json.dumps({**evaluation(), "clean": {"accuracy": 1}}), "is damaged (clean.ci95 is missing)"),
    ):
        (path / "evaluation.json").write_text(content)
        assert main(["compare", str(path)]) == 2
        assert f"evaluation.json {expected}" in capsys.readouterr().err


def test_training_time_stands_against_the_base_method_on_the_same_machine() -> None:
    def timed(name: str, seconds: float, kind: Any = "off", seed: int = 0, device: str = "cpu") -> Run:
        made = run(name, seed, replace(CONFIG, dummy=DummyConfig(kind)), device=device)
        return replace(made, metrics=[{"epoch": 0, "seconds": seconds}, {"epoch": 1, "seconds": seconds}])

    runs = [timed("base", 50), timed("two-s0", 52, "published"), timed("two-s1", 56, "published", 1)]
    notes = compare([*runs, timed("elsewhere", 9, "recovery-aware", device="cuda")]).notes
    told = [note for note in notes if "training time" in note]
    assert told == ["training time against base: two 1.08 times (108 s against 100 s, without validation)"]
    assert not any("training time" in note for note in compare([runs[0], run("untimed")]).notes)


def test_warnings_of_one_kind_are_one_line() -> None:
    gaps = [f"sink gap of {points} points: {points} % withstand" for points in ("5.0", "7.5")]
    runs = [run("a", measured=evaluation(warnings=gaps[:1])), run("b", measured=evaluation(warnings=gaps[1:]))]
    runs += [run("c", measured=evaluation(warnings=["gradients vanish: for 2 of 27"]))]
    assert folded(runs) == [("a, b", f"{gaps[0]} (numbers of a)"), ("c", "gradients vanish: for 2 of 27")]


def test_a_test_against_an_upper_bound_says_so() -> None:
    pair = Pair("a", "b", 0.1, (0.05, 0.15), 0.001, 0.002, False)
    assert "upper bound" not in told(pair)
    assert told(replace(pair, bounds=["b"])).endswith("; of b robust accuracy is an upper bound only")


def test_the_verdict_names_what_is_sure_and_an_upper_bound_never_wins() -> None:
    other = replace(CONFIG, train=TrainConfig(epochs=7))
    third = replace(CONFIG, train=TrainConfig(epochs=9))
    bound = run("c", config=third, measured=evaluation(robust=0.69, at_most=True))
    runs = [run("a"), run("b", config=other, measured=evaluation(robust=0.5)), bound]
    verdict = compare(runs).sections[0].verdict
    assert verdict.startswith("a has the highest robust accuracy, 60.0 %: not tested against b")
    assert "upper bounds only: c" in verdict
    assert not compare(runs[:1]).sections[0].verdict


@pytest.mark.parametrize(
    ("other", "bounds"),
    [
        ({"suite": "standard", "robust": 0.2}, True),
        ({"suite": "quick", "robust": 0.2}, True),  # helped by surrogates, say
        ({"suite": "standard", "robust": 0.6, "at_most": True}, True),
        ({"suite": "standard", "robust": 0.2, "threat": {"norm": "linf", "eps": 0.1}}, True),
        ({"suite": "standard", "robust": 0.58}, False),
        ({"suite": "standard", "robust": 0.2, "samples": 400}, False),
        ({"suite": "standard", "robust": 0.2, "threat": {"norm": "linf", "eps": 0.3}}, False),
        ({"suite": "standard", "robust": 0.2, "threat": {"norm": "l2", "eps": 0.1}}, False),
        ({"suite": "standard", "robust": 0.2, "origin": {"weights": "others"}}, False),
        ({"suite": "standard", "robust": 0.2, "origin": {"weights": "w", "code": "other"}}, False),
        ({"suite": "quick", "robust": 0.6, "at_most": True}, False),
    ],
)
def test_a_number_that_another_evaluation_has_refuted_is_an_upper_bound(other: dict[str, Any], bounds: bool) -> None:
    """Where runs share a weak evaluation alone, it does not win by what a stronger one of its own has broken."""
    weak, strong = evaluation(origin={"weights": "w"}), evaluation(**{"origin": {"weights": "w"}, **other})
    first = replace(run("a", measured=weak), kept=[weak, strong])
    compared = compare([first, run("b", config=replace(CONFIG, train=TrainConfig(epochs=7)))])
    assert compared.sections[0].groups[0].at_most == bounds
    assert ("| at most 60.0" in to_markdown(compared)) == bounds
    assert any("another evaluation of these weights" in text for _, text in folded(compared.runs)) == bounds
    assert compared.sections[0].verdict.startswith("none") == bounds
    assert compared.runs[0].bounded.evaluation == compared.runs[0].evaluation


def test_what_an_evaluation_prints_and_writes_is_bounded_once(tmp_path: Path) -> None:
    """Bounded twice, the lower number would be at most itself because of the higher one that it refutes."""
    lower, higher = (
        evaluation(suite=suite, robust=robust, origin={"weights": "w"})
        for suite, robust in (("light", 0.4), ("standard", 0.6))
    )
    options = Namespace(json=tmp_path / "out.json", checkpoint=None, figure=None)
    console = Console(file=io.StringIO(), width=500)
    commands._finish_evaluation(options, console, [replace(run("a", measured=lower), kept=[lower, higher])])
    assert "upper bound" not in console.file.getvalue()
    assert json.loads(options.json.read_text()) == lower
    commands._finish_evaluation(options, console, [replace(run("a", measured=higher), kept=[lower, higher])])
    assert console.file.getvalue().count("upper bound") == 1
    assert json.loads(options.json.read_text())["at_most"]
