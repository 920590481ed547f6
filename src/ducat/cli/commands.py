"""One thin function per command. Bad input gives one line and exit code 2."""

import contextlib
import json
import os
import signal
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jsonargparse import ActionConfigFile, ArgumentError, Namespace
from rich.console import Console
from rich.table import Table
from rich.text import Text
from yaml import YAMLError

from ducat import checkpoint, data, models, training
from ducat import demo as demo_room
from ducat.attacks.suites import SUITES
from ducat.cli.overview import BAD_INPUT, check, complain
from ducat.cli.parser import Parser, told
from ducat.config import DERIVED, Config, DataConfig, ModelConfig, ThreatConfig, check_keys, config_parser
from ducat.data.loading import find_spec
from ducat.evaluation import kept
from ducat.evaluation.audit import FAILURE
from ducat.evaluation.rejection import SIGNALS
from ducat.evaluation.result import check_free
from ducat.evaluation.runs import calibrate_run, evaluate_checkpoint, evaluate_run
from ducat.evaluation.studies import STUDIES
from ducat.progress import Live
from ducat.reporting import compare as comparing
from ducat.reporting import page, plots
from ducat.reporting.compare import Comparison, Run
from ducat.runs import RunFolder, Which
from ducat.threat import Norm
from ducat.training import Interrupted
from ducat.training.adapt import adapt, settings

# What a user can cause; anything else is a defect of ours and shows its traceback.
USER_ERRORS = (ArgumentError, ValueError, OSError, FloatingPointError)

NORMALIZATION = "of a checkpoint: whether its network takes images normalised by the data's mean and deviation"
EPS = "radius of the ball on images in [0, 1], such as 8/255; default: the run's, or what is usual for the data"
SOURCE = "local archive or folder instead of a download; wds:SHARDS, hf:NAME, folder:PATH are decoded as they come"
REJECT = "measure refusing too: shares of correctly classified benign images that may be refused, such as 0.02 0.05"
CALIBRATE = "share of correctly classified benign validation images that may be refused, in [0, 1), such as 0.05"
PUSH = "of --format hub: send --out, made where it is not there, to this repository; a dry run without --confirm"
THREADS = "threads of a CPU; default: as many as the network's passes are worth, for digits one"
KEPT = Path("evaluations")  # where what is measured of checkpoints from elsewhere goes
EVALUATED = "checkpoint, best or last; default: the one that was evaluated, for corruption and targeted the best"


class Command(NamedTuple):
    """A row of the table of commands: a parser of its arguments, and what it does with them."""

    parser: Callable[[Sequence[str]], Parser]
    run: Callable[[Namespace, Console], None]


def _run_train(arguments: Namespace, console: Console) -> None:
    if arguments.resume is not None:
        folder = RunFolder.open(arguments.resume)
        if folder.manifest["status"] == "finished":
            _print(console, f"{folder.path} is finished: nothing was left to do")
            return
        with Live(console) as live:
            training.resume(folder.path, live.training(folder.name))
    else:
        config = _config(arguments)
        with Live(console) as live:
            folder = training.train(config, arguments.runs, live.training(config.name or config.method.name))
    _print_trained(console, folder)


def _config(arguments: Namespace) -> Config:
    return Config(**{name: getattr(arguments, name) for name in Config.__dataclass_fields__})


def _print_trained(console: Console, folder: RunFolder) -> None:
    last = folder.metrics[-1]
    told, which = "nothing was held out to validate on", " --which last"
    if "robust" in last:
        shares = ", ".join(f"{name} {100 * last[name]:.1f}" for name in ("clean", "blind", "robust"))
        told, which = f"validation {shares} (last epoch)", ""
    _print(console, f"{folder.path}: {told}. Next: ducat evaluate {folder.quoted}{which}")


def _check_resume(given: Namespace) -> None:
    others = sorted(set(given.keys()) - {"resume"})
    if given.get("resume") is not None and others:
        raise ValueError(f"--resume takes the settings of the run, so --{others[0]} cannot be given with it")


def _train_parser(arguments: Sequence[str]) -> Parser:
    parser = _settings_parser("ducat train", _check_resume)
    parser.add_argument("--resume", type=Path | None, help="run folder to continue; no other setting may be given")
    return parser


class _File(ActionConfigFile):
    """`--config`: what a run's config.yaml has written out of defaults follows the options that come after it."""

    def __call__(self, parser: Any, given: Any, value: Any, option: str | None = None) -> None:
        try:
            check_keys(Path(value).read_text(encoding="utf-8"))
        except (OSError, YAMLError, UnicodeDecodeError):  # which is told by what reads it
            pass
        except ValueError as error:
            raise ArgumentError(None, f"{value}: {error}") from error
        super().__call__(parser, given, value, option)
        try:
            run = Config.from_yaml(str(given[self.dest][-1]), whole=True)
        except (OSError, ValueError):  # somebody's own file, in which every value is a choice
            return
        settings = run.unresolved(find_spec(run.data.name, run.data.root)).flat()
        for name, left in DERIVED.items():
            if settings[name] == left:
                given[name] = left


def _settings_parser(prog: str, check: Callable[[Namespace], None] = lambda given: None) -> Parser:
    parser = Parser.of(prog, check)
    config_parser(parser)
    parser.add_argument("--config", action=_File, metavar="FILE", help="YAML file of settings; see recipes/")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that the run folder is made in")
    return parser


def _run_adapt(arguments: Namespace, console: Console) -> None:
    with Live(console) as live:
        config = _config(arguments)
        title = config.name or arguments.checkpoint.stem
        folder = adapt(arguments.checkpoint, config, arguments.runs, live.training(title))
    _print_trained(console, folder)


def _adapt_parser(arguments: Sequence[str]) -> Parser:
    parser = _settings_parser("ducat adapt")
    parser.add_argument("checkpoint", type=Path, help="run folder, or file of weights")
    if not {"-h", "--help"} & set(arguments):
        with contextlib.suppress(ArgumentError):  # which is told when all is read
            parser.set_defaults(settings(parser.parse_args(arguments).checkpoint).flat())
    return parser


def _run_sweep(arguments: Namespace, console: Console) -> None:
    from ducat import sweep

    base = _config(arguments)
    with Live(console) as live:
        made = sweep.sweep(
            replace(base, name=None),
            sweep.read_grid(arguments.grid),
            arguments.runs / (base.name or "sweep"),
            suite=arguments.suite,
            samples=arguments.samples,
            which=arguments.which,
            progress=live,
        )
    print_comparison(console, made.comparison)
    for name, why in made.failed.items():
        _print(console, f"{name} is missing: {why}", label="warning")
    _print(console, f"Tables, plot and page: {made.page.parent}/ (open {made.page})")


def _sweep_parser(arguments: Sequence[str]) -> Parser:
    parser = _settings_parser("ducat sweep")
    parser.add_argument(
        "--grid",
        type=str,
        nargs="+",
        required=True,
        metavar="OPTION=VALUE,...",
        help="options and their values, as dummy.benign_weight=0,0.25 train.seed=0,1,2: every combination is trained",
    )
    parser.add_argument("--suite", choices=tuple(SUITES), default="light", help="which attacks to run")
    parser.add_argument("--samples", type=int | None, help="test images, a fixed stratified subset; default: all")
    parser.add_argument("--which", type=Which, default="best", help="checkpoint: best on validation, or last")
    return parser


def _run_data(arguments: Namespace, console: Console) -> None:
    for option in ("from", "size", "replace", "test-images"):
        if arguments.action != "prepare" and arguments[option.replace("-", "_")]:
            raise ValueError(f"ducat data {arguments.action}: --{option} is for prepare")
    if arguments.action == "list":
        if arguments.name is not None:
            raise ValueError(f"ducat data list: it lists all data sets; `ducat data verify {arguments.name}` shows one")
        statuses = data.list_datasets(arguments.root)
    elif arguments.name is None:
        raise ValueError(f"ducat data {arguments.action}: name a data set; `ducat data list` shows them")
    elif arguments.action == "prepare":
        options = {name: arguments[name] for name in ("size", "replace", "test_images", "root")}
        statuses = [data.prepare(arguments.name, arguments["from"], **options)]
    else:
        statuses = [data.verify(arguments.name, arguments.root)]
    table = Table("name", "title", "classes", "images", box=None)
    for status in statuses:
        sizes = ", ".join(f"{part} {count:,}" for part, count in list(status.sizes.items())[:3])
        classes = f"{status.classes:,}" if status.prepared else ""
        table.add_row(status.name, status.title, classes, sizes if status.prepared else "not prepared")
    console.print(table)
    for status in statuses:
        if status.notice:
            console.print(f"notice: {status.notice}", highlight=False, soft_wrap=True)
        if arguments.action != "list":
            console.print(f"fingerprint: {status.fingerprint}", highlight=False, soft_wrap=True)


def _data_parser(arguments: Sequence[str]) -> Parser:
    parser = Parser.of("ducat data")
    parser.add_argument("action", type=Literal["list", "prepare", "verify"], help="list, prepare or verify")
    parser.add_argument("name", type=str | None, nargs="?", help="data set, or a new name for an image folder")
    parser.add_argument("--from", type=str | None, help=SOURCE)
    parser.add_argument("--size", type=int | None, help="for an image folder: scale images to this many pixels a side")
    parser.add_argument("--replace", action="store_true", help="replace a set of that name that holds other images")
    parser.add_argument("--test-images", type=Path | None, help="of a stream: file that names the test images to keep")
    parser.add_argument("--root", type=Path | None, help="cache folder; default: DUCAT_DATA, or the user's cache")
    return parser


def _check_new(**files: Path | None) -> None:
    """Before hours of work: say of each file that is to be written, by the name of its option, whether it can be."""
    for option, path in files.items():
        if path is not None and path.exists():
            raise FileExistsError(f"--{option}: {path} exists, and nothing is overwritten")
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"--{option}: the folder {path.parent} does not exist")


def _check_figure(path: Path | None) -> None:
    if path is not None and path.suffix not in (".svg", ".png"):
        raise ValueError(f"--figure: {path} must end in .svg or .png")


def _run_evaluate(arguments: Namespace, console: Console) -> None:
    if arguments.run is None and arguments.checkpoint is None:
        raise ValueError("ducat evaluate: give a run folder, or --checkpoint with a file of weights")
    _check_new(json=arguments.json, figure=arguments.figure)
    if arguments.json is not None and arguments.checkpoint is not None:
        check_free(arguments.json)
    _check_figure(arguments.figure)
    if arguments.checkpoint is not None:
        _evaluate_checkpoint(arguments, console)
        return
    folder = RunFolder.open(arguments.run)
    norm = folder.config.threat.norm
    balls = [threat.ball if threat is not None else None for threat in _threats(arguments, norm)]
    before, results = _times(folder.evaluations_path), []
    with Live(console) as live:
        for ball in balls:
            measured = evaluate_run(
                folder,
                arguments.suite,
                samples=arguments.samples,
                seed=arguments.seed,
                which=arguments.which,
                threat=ball,
                reject=arguments.reject,
                surrogates=arguments.surrogates,
                second_round_seconds=arguments.second_round_seconds,
                again=arguments.again,
                progress=live.attacks(folder.name),
                num_threads=arguments.threads,
                notice=live.notice,
            )
            results.append(measured)
    report = folder.path / "report.html"
    page.page(report, folder.name, comparing.compare([Run.read(folder.path)]))
    runs = [Run.read(folder.evaluations_path / f"{kept.name_of(measured)}.json") for measured in results]
    for run in runs:
        _print_kept(console, run, before)
    spokesman = next((name for name, content in kept.evaluations(folder).items() if content == _of(folder)), None)
    if spokesman is not None and spokesman not in [run.file for run in runs]:
        text = f"the evaluation that speaks for the run is a stronger one, {spokesman.name}: {_short(_of(folder))}"
        _print(console, text, label="note")
    _finish_evaluation(arguments, console, runs)
    _print(console, f"Page: {report}")


def _of(folder: RunFolder) -> dict[str, Any]:
    return kept.read(folder.evaluation_path)


def _short(measured: Mapping[str, Any]) -> str:
    """Return blind and robust accuracy, which always stand together."""
    bound = "at most " if measured.get("at_most") else ""
    return f"blind {100 * measured['blind']:.1f}, robust {bound}{100 * measured['robust']:.1f}"


def _times(folder: Path) -> dict[Path, int]:
    """Return when each evaluation in a folder was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def _print_kept(console: Console, run: Run, before: Mapping[Path, int]) -> None:
    assert run.file is not None
    if before.get(run.file) == run.file.stat().st_mtime_ns:
        _print(console, f"{run.file} was measured before; --again measures it anew and replaces it", label="note")
    else:
        _print(console, f"Kept: {run.file}")


def _finish_evaluation(arguments: Namespace, console: Console, runs: Sequence[Run]) -> None:
    """Print what was measured, and write the files that were asked for."""
    if len(runs) > 1:
        runs = [run.bounded for run in runs]
        print_curve(console, runs)
    else:
        compared = comparing.compare(runs)
        runs = compared.runs
        print_comparison(console, compared)
    contents = [run.evaluation for run in runs]
    if arguments.json is not None and arguments.checkpoint is None:
        written = contents if len(contents) > 1 else contents[0]
        checkpoint.write_text(arguments.json, json.dumps(written, indent=2) + "\n")
    if arguments.figure is not None:
        plots.save(plots.curve(contents, comparing.setting(contents[0], eps=False)), arguments.figure)


def _threats(arguments: Namespace, norm: Norm) -> list[ThreatConfig | None]:
    """Return the balls that are asked for, None for the run's own; `norm` is that of the run."""
    if not arguments.eps:
        return [ThreatConfig(arguments.norm) if arguments.norm else None]
    threats = [ThreatConfig(arguments.norm or norm, eps) for eps in arguments.eps]
    return list({threat.ball: threat for threat in threats}.values())


def _evaluate_checkpoint(arguments: Namespace, console: Console) -> None:
    source, runs = arguments.checkpoint, []
    before = _times(KEPT)
    threats = _threats(arguments, "linf")
    if arguments.json is not None and len(threats) > 1:
        raise ValueError("--json: it names one file, for one --eps; without it each result is kept in evaluations/")
    for threat in threats:
        config = Config(
            data=DataConfig(arguments.data),
            model=ModelConfig(arguments.model, arguments.width, arguments.normalization),
            threat=threat or ThreatConfig(),
        )
        with Live(console) as live:
            measured = evaluate_checkpoint(
                source,
                config,
                arguments.suite,
                num_classes=arguments.num_classes,
                samples=arguments.samples,
                seed=arguments.seed,
                path=arguments.json,
                keep=KEPT if arguments.json is None else None,
                again=arguments.again,
                reject=arguments.reject,
                surrogates=arguments.surrogates,
                second_round_seconds=arguments.second_round_seconds,
                progress=live.attacks(source.stem),
                num_threads=arguments.threads,
                notice=live.notice,
            )
        name = f"{source.stem}-{arguments.data}-{kept.name_of(measured)}.json"
        file = arguments.json or kept.place(KEPT, name)
        runs.append(Run.read(file, source.stem))
        _print_kept(console, runs[-1], before)
    _finish_evaluation(arguments, console, runs)


def _run_compare(arguments: Namespace, console: Console) -> None:
    files = {name: getattr(arguments, name) for name in (*comparing.TABLES, "html", "figure")}
    _check_new(**files)
    _check_figure(arguments.figure)
    comparison = comparing.compare(comparing.read_alike(arguments.runs))
    if arguments.figure is not None and len(comparison.sections) > 1:
        raise ValueError("--figure: the runs were not measured alike, see the notes of the table without --figure")
    print_comparison(console, comparison)
    for section in comparison.sections:
        for pair in section.pairs:
            _print(console, comparing.told(pair))
        if section.verdict:
            _print(console, section.verdict, label="verdict")
    for name, write in comparing.TABLES.items():
        if files[name] is not None:
            checkpoint.write_text(files[name], write(comparison))
    if files["html"] is not None:
        page.page(files["html"], "Comparison of runs", comparison)
    if files["figure"] is not None:
        page.draw(comparison.sections[0], files["figure"])


def _compare_parser(arguments: Sequence[str]) -> Parser:
    parser = Parser.of("ducat compare")
    parser.add_argument(
        "runs", type=Path, nargs="+", help="evaluated run folders, or .json files of evaluations; seeds are grouped"
    )
    parser.add_argument("--html", type=Path | None, help="write the page to this new file")
    parser.add_argument("--figure", type=Path | None, help="draw the trade-off into this new .svg or .png file")
    for name in comparing.TABLES:
        parser.add_argument(f"--{name}", type=Path | None, help=f"write the table as {name} to this new file")
    return parser


def _check_evaluated(given: Namespace) -> None:
    """Tell a run, which brings its data, its network and its checkpoints, from a file of weights."""
    run, file = given.get("run"), given.get("checkpoint")
    if run is not None and file is not None:
        raise ValueError(f"{run} and --checkpoint {file} are both given: evaluate one of the two")
    of_a_file = ("model", "width", "num_classes", "normalization", "data")
    for name in of_a_file if run is not None else ("which",) if file is not None else ():
        if name in given:
            told = f"{run} is a run, which brings its own" if file is None else "a file of weights holds one network"
            raise ValueError(f"--{name.replace('_', '-')} does not fit: {told}")


def _evaluate_parser(arguments: Sequence[str]) -> Parser:
    parser = Parser.of("ducat evaluate", _check_evaluated)
    parser.add_argument("run", type=Path | None, nargs="?", help="run folder")
    parser.add_argument("--checkpoint", type=Path | None, help="instead of a run: file of weights, from anywhere")
    parser.add_argument("--model", type=str | None, help="of a checkpoint: its network; default: the data's usual one")
    parser.add_argument("--width", type=int | None, help="of a checkpoint: channels of its network's first stage")
    parser.add_argument(
        "--num-classes", type=int | None, help="of a checkpoint: real classes, checked against the data"
    )
    parser.add_argument("--normalization", type=Literal["auto", "data", "none"], default="auto", help=NORMALIZATION)
    parser.add_argument("--data", type=str, default="cifar10", help="for a checkpoint: data set to evaluate on")
    parser.add_argument("--norm", type=Norm | None, help="linf, l2 or l1; default: the run's, or linf")
    parser.add_argument("--eps", type=float | str, nargs="*", default=[], help=f"{EPS}; several give a curve")
    parser.add_argument("--suite", choices=tuple(SUITES), default="standard", help="which attacks to run")
    parser.add_argument("--samples", type=int | None, help="test images, a fixed stratified subset; default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the attacks")
    parser.add_argument("--which", type=Which, default="best", help="checkpoint: best on validation, or last")
    parser.add_argument("--reject", type=float, nargs="*", default=[], metavar="SHARE", help=REJECT)
    parser.add_argument(
        "--surrogates", type=Path, nargs="*", default=[], metavar="RUN", help="runs whose adversarial images are tried"
    )
    parser.add_argument(
        "--second-round-seconds",
        type=float | None,
        metavar="SECONDS",
        help="longest that a second round may take (it begins where something may hide the gradients; cut short, it "
        "leaves an upper bound); default: no limit",
    )
    parser.add_argument("--threads", type=int | None, help=THREADS)
    parser.add_argument(
        "--again", action="store_true", help="measure anew what has been measured in the same way, and replace it"
    )
    parser.add_argument("--figure", type=Path | None, help="draw the curve over eps into this new .svg or .png file")
    parser.add_argument(
        "--json",
        type=Path | None,
        help="also write the result to this new file; of a checkpoint: in place of evaluations/",
    )
    return parser


def _run_calibrate(arguments: Namespace, console: Console) -> None:
    folder = RunFolder.open(arguments.run)
    made = calibrate_run(folder, arguments.reject, arguments.signal, which=arguments.which)
    _print(
        console,
        f"{folder.rejection_path}: refuses images whose {made['signal']} is below {made['threshold']:.4g}, "
        f"{100 * made['reject']:g} % of the correctly classified among {made['images']} validation images. "
        f"What that withstands: ducat evaluate {folder.quoted} --which {made['checkpoint']} "
        f"--reject {made['reject']:g}",
    )


def _calibrate_parser(arguments: Sequence[str]) -> Parser:
    parser = Parser.of("ducat calibrate")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--reject", type=float, required=True, metavar="SHARE", help=CALIBRATE)
    parser.add_argument("--signal", choices=tuple(SIGNALS), default="confidence", help="what decides")
    parser.add_argument("--which", type=Which, default="best", help="checkpoint: best on validation, or last")
    return parser


def _run_export(arguments: Namespace, console: Console) -> None:
    from ducat.export import export

    if arguments.push is not None:
        _push(arguments, console)
        return
    if arguments.confirm:
        raise ValueError("--confirm goes with --push")
    with console.status(f"exporting {arguments.run}"):
        made = export(
            arguments.run, arguments.format, arguments.out, which=arguments.which, detector=arguments.detector
        )
    _print(console, f"{made.path}: differs from the network by at most {made.difference:.1g} on {made.images}")


def _push(arguments: Namespace, console: Console) -> None:
    from ducat.export.push import push

    if arguments.format != "hub":
        raise ValueError(f"--push takes --format hub, not {arguments.format}")
    options = {name: arguments[name] for name in ("which", "detector", "confirm")}
    with console.status(f"pushing {arguments.run}"):
        made = push(arguments.run, arguments.push, arguments.out, **options)
    sizes = ", ".join(f"{name} ({size:,} bytes)" for name, size in made.files.items())
    told = f"sent: {made.address}" if made.address else "nothing was sent; add --confirm to send it"
    _print(console, f"{made.repository}: {sizes}: {told}")


def _export_parser(arguments: Sequence[str]) -> Parser:
    from ducat.export import FORMATS

    parser = Parser.of("ducat export")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--format", choices=tuple(FORMATS), required=True, help="what to write: a file or a folder")
    parser.add_argument("--out", type=Path, required=True, help="new file or folder to write")
    parser.add_argument("--which", type=Which, default="best", help="checkpoint: best on validation, or last")
    parser.add_argument(
        "--detector", action="store_true", help="second output: the probability that an image is adversarial"
    )
    parser.add_argument("--push", type=str | None, metavar="OWNER/NAME", help=PUSH)
    parser.add_argument("--confirm", action="store_true", help="with --push: send it, instead of saying what would be")
    return parser


def _run_serve(arguments: Namespace, console: Console) -> None:
    from ducat.serve import serve

    serve(arguments.run, arguments.which, port=arguments.port, ready=lambda url: _print(console, f"open {url}"))


def _serve_parser(arguments: Sequence[str]) -> Parser:
    parser = Parser.of("ducat serve")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--which", type=Which, default="best", help="checkpoint: best on validation, or last")
    parser.add_argument("--port", type=int, default=7860, help="port on 127.0.0.1; 0 is any free one")
    return parser


def _run_demo(arguments: Namespace, console: Console) -> None:
    shown = False

    def show(title: str, measured: dict[str, Any]) -> None:
        nonlocal shown
        if not shown:
            columns = "".join(f"{name:>10}" for name in ("clean", "blind", "robust", "sink gap"))
            console.print(f"{'accuracy in %':24}{columns}", highlight=False)
            shown = True
        shares = (measured["clean"]["accuracy"], measured["blind"], measured["robust"], measured["sink_gap"])
        bound = "  (robust: at most)" if measured["at_most"] else ""
        console.print(f"{title:24}" + "".join(f"{100 * share:10.1f}" for share in shares) + bound, highlight=False)

    with Live(console) as live:
        made = demo_room.run(
            arguments.out,
            seed=arguments.seed,
            epochs=arguments.epochs,
            workers=demo_room.processes() if arguments.processes is None else arguments.processes,
            listener=live.training,
            attacks=live.attacks,
            finished=show,
        )
    print_comparison(console, made.comparison)
    for sentence in made.sentences:
        console.print(sentence, highlight=False)
    console.print(f"Runs, plot and page: {made.folder}/ (open {made.folder / 'report.html'})", highlight=False)


def _demo_parser(arguments: Sequence[str]) -> Parser:
    parser = Parser.of("ducat demo")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="new folder for runs, plot and page")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--epochs", type=int, default=demo_room.EPOCHS, help="epochs of each training")
    parser.add_argument(
        "--processes",
        type=int | None,
        help="side by side, default: the cores, 3 at most; the numbers are the same for any",
    )
    return parser


def _run_analyze(arguments: Namespace, console: Console) -> None:
    _check_new(json=arguments.json, figure=arguments.figure)
    _check_figure(arguments.figure)
    measure = STUDIES[arguments.study]
    with Live(console) as live:
        found = measure(arguments.runs, arguments.which, arguments.samples, live.attacks(arguments.study))
    sheet = found.sheet()
    table = Table(*sheet.columns, title=sheet.title, title_justify="left")
    for row in sheet.rows:
        table.add_row(*row)
    console.print(table, markup=False, highlight=False)
    if arguments.json is not None:
        checkpoint.write_text(arguments.json, json.dumps(found.to_dict(), indent=2) + "\n")
    if arguments.figure is not None:
        plots.save(plots.FIGURES[arguments.study](found.to_dict()), arguments.figure)


def _analyze_parser(arguments: Sequence[str]) -> Parser:
    parser = Parser.of("ducat analyze")
    parser.add_argument("study", choices=tuple(STUDIES), help="what to measure")
    parser.add_argument("runs", type=Path, nargs="+", help="evaluated run folders; one for corruption and targeted")
    parser.add_argument("--which", type=Which | None, help=EVALUATED)
    parser.add_argument("--samples", type=int | None, help="for corruption and targeted: how many images; default: all")
    parser.add_argument("--json", type=Path | None, help="also write the numbers to this new file")
    parser.add_argument("--figure", type=Path | None, help="also draw them into this new .svg or .png file")
    return parser


def _run_zoo(arguments: Namespace, console: Console) -> None:
    from ducat.reporting import zoo as showing

    if not arguments.evaluate:
        for text in showing.cards(arguments.names):
            _print(console, text)
        print_comparison(console, showing.comparison(arguments.names))
        return
    with Live(console) as live:
        comparison = showing.attacked(arguments.names, arguments.suite, arguments.samples, live.attacks)
    print_comparison(console, comparison)
    _print(console, "Train them yourself: ducat demo. More attacks on one: ducat evaluate zoo:NAME")


def _check_zoo(given: Namespace) -> None:
    for name in ("suite", "samples"):
        if name in given and not given.get("evaluate"):
            raise ValueError(f"--{name} goes with --evaluate")


def _zoo_parser(arguments: Sequence[str]) -> Parser:
    parser = Parser.of("ducat zoo", _check_zoo)
    parser.add_argument(
        "names",
        type=str,
        nargs="*",
        help="networks, such as zoo:digits-published; default: all, with --evaluate all on digits",
    )
    parser.add_argument("--evaluate", action="store_true", help="attack them here and now")
    parser.add_argument("--suite", choices=tuple(SUITES), default="quick", help="which attacks to run")
    parser.add_argument("--samples", type=int | None, help="test images, a fixed stratified subset; default: all")
    return parser


COMMANDS: dict[str, Command] = {
    "zoo": Command(_zoo_parser, _run_zoo),
    "demo": Command(_demo_parser, _run_demo),
    "train": Command(_train_parser, _run_train),
    "adapt": Command(_adapt_parser, _run_adapt),
    "sweep": Command(_sweep_parser, _run_sweep),
    "evaluate": Command(_evaluate_parser, _run_evaluate),
    "calibrate": Command(_calibrate_parser, _run_calibrate),
    "compare": Command(_compare_parser, _run_compare),
    "analyze": Command(_analyze_parser, _run_analyze),
    "export": Command(_export_parser, _run_export),
    "serve": Command(_serve_parser, _run_serve),
    "data": Command(_data_parser, _run_data),
}


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print runs as tables, with what was measured above each and what a reader must know below."""
    warnings = comparing.folded(comparison.runs)
    failures = [told for told in warnings if told[1].startswith(FAILURE)]
    for names, warning in failures:
        _print(console, f"{names}: {warning}", label="warning")
    for lines in (table for section in comparison.sections for table in comparing.tables(section)):
        _print(console, lines.caption)
        table = Table()
        # The interval goes below its number, so that the table fits 80 columns; names break at their hyphens.
        cells = [[cell.replace(" [", "\n[") for cell in row] for row in lines.cells]
        others = [max(map(len, "\n".join(column).split("\n"))) for column in zip(lines.headers, *cells, strict=True)][
            1:
        ]
        room = console.width - sum(others) - 3 * len(lines.headers) - 1
        for header in lines.headers:
            table.add_column(header, overflow="fold")
        for name, *rest in cells:
            table.add_row("\n".join(textwrap.wrap(name, max(room, 12), break_long_words=False)), *rest)
        console.print(table, highlight=False, markup=False)
    for note in comparison.notes:
        _print(console, note, label="note")
    for names, warning in warnings:
        if (names, warning) not in failures:
            _print(console, f"{names}: {warning}", label="warning")


def print_curve(console: Console, runs: Sequence[Run]) -> None:
    """Print the evaluations of one network at several eps, a line each."""
    _print(console, f"{comparing.setting(runs[0].evaluation, eps=False)}. {comparing.CAPTION}")
    table = Table("eps", *comparing.QUANTITIES)
    for run in sorted(runs, key=lambda run: run.evaluation["threat"]["eps"]):
        cells = comparing.cells(comparing.compare([run]).sections[0])[0][1:]
        table.add_row(f"{run.evaluation['threat']['eps']:.4g}", *(cell.replace(" [", "\n[") for cell in cells))
    console.print(table, highlight=False, markup=False)
    for names, warning in comparing.folded(runs):
        _print(console, f"{names}: {warning}", label="warning")


def _print(console: Console, text: str, label: str = "") -> None:
    console.print(Text.assemble((f"{label} " if label else "", "bold"), text), highlight=False, soft_wrap=True)


def run(arguments: list[str], traceback: bool) -> int:
    """Run a command line that names one of `COMMANDS`, and return its exit code."""
    # Of several processes that train together, the first speaks for all.
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    try:
        name, *rest = _allow_code(arguments)
        check(name)
        parser = COMMANDS[name].parser(rest)
        COMMANDS[name].run(parser.read(rest), console)
    except Interrupted as stop:
        complain(str(stop))
        return 128 + stop.signum
    except KeyboardInterrupt:
        complain("stopped")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        raise
    except USER_ERRORS as error:
        if traceback:
            raise
        complain(told(error))
        return BAD_INPUT
    return 0


def _allow_code(arguments: list[str]) -> list[str]:
    """Take the functions out of a command line that may run to build networks."""
    rest, names = [], iter(arguments)
    for name in names:
        option, equals, value = name.partition("=")
        if option == "--allow-code":
            models.allow_code(value if equals else next(names, ""))
        else:
            rest.append(name)
    return rest
