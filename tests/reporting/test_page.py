import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ducat.config import Config, DataConfig, DummyConfig, ThreatConfig, TrainConfig, config_parser
from ducat.evaluation import behaviour
from ducat.reporting.compare import Run, compare
from ducat.reporting.page import page, reproduce
from ducat.runs import RunFolder

CONFIG = Config(
    name="first-run",
    data=DataConfig("digits"),
    dummy=DummyConfig("published", start_epoch=2),
    threat=ThreatConfig(eps="8/255"),
    train=TrainConfig(epochs=3, milestones=(0.5, 0.75), seed=4),
)

pytestmark = pytest.mark.slow


class Half(nn.Module):
    """A network that tells the first half of an image from the second."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 3.0], [2.0, -1.0], [-1.0, 2.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([half.flatten(1).mean(1) for half in x.chunk(2, dim=3)], dim=1) @ self.weight.T


DATA = {"name": "digits", "title": "Digits", "fingerprint": "f", "train": 1, "validation": 1, "test": 1}


def evaluated(path: Path, config: Config, robust: float, warnings: list[str]) -> Run:
    interval = [robust - 0.04, robust + 0.04]
    with RunFolder.making(path) as folder:
        folder.write_config(config)
        folder.update_manifest({"status": "finished", "command": ["ducat", "train"], "data": DATA, "ducat": "0.1.0"})
        for epoch, loss in enumerate((2.0, 1.5, 1.25)):
            accuracies = {"clean": 0.5 + 0.1 * epoch, "blind": 0.4, "robust": 0.3}
            folder.append_metrics({"epoch": epoch, "loss": loss, "seconds": 2.0, **accuracies})
        evaluation = {
            "schema": 1,
            "data": "Digits",
            "checkpoint": "last",
            "fingerprint": "same",
            "samples": 40,
            "seed": 0,
            "suite": "light",
            "threat": {"norm": "linf", "eps": 8 / 255},
            "clean": {"accuracy": 0.925, "ci95": [0.8, 0.97]},
            "attacks": [{"name": "pgd-20", "knows_recovery": False, "accuracy": 0.7, "ci95": interval, "seconds": 1.5}],
            "blind": 0.7,
            "blind_ci95": [0.6, 0.8],
            "robust": robust,
            "robust_ci95": interval,
            "sink_gap": 0.7 - robust,
            "warnings": warnings,
        }
        (folder.path / "evaluation.json").write_text(json.dumps(evaluation))
    x = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = (x[..., :2].mean((1, 2, 3)) < x[..., 2:].mean((1, 2, 3))).long()
    seen = behaviour.measure(
        Half(), x, (x + 0.3 * torch.where(y == 0, -1, 1)[:, None, None, None]).clamp(0, 1), y, ("a<b", "b")
    )
    return replace(Run.read(path), behaviour=seen)


def test_a_curve_is_of_the_weights_that_the_run_has_and_of_one_version(runs: list[Run]) -> None:
    path = runs[0].path
    assert path is not None
    ducats = [(0.1, {"ducat": "0.1.0"}), (0.2, {"ducat": "0.2.0"})]
    gone = [(eps, {"ducat": "0.2.0", "weights": "gone"}) for eps in (0.1, 0.2)]
    for radii, curves in ((ducats + gone, 0), ([(0.1, {}), (0.2, {})], 1)):
        kept = [
            {**runs[0].evaluation, "threat": {"norm": "linf", "eps": eps}, "origin": origin} for eps, origin in radii
        ]
        page(path / "curve.html", "Curve", compare([replace(runs[0], kept=kept)]))
        assert (path / "curve.html").read_text().count("Accuracy by eps, the numbers") == curves


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("runs")
    second = replace(CONFIG, name="second", dummy=DummyConfig())
    return [
        evaluated(folder / "first-run", CONFIG, 0.25, ["sink gap of <45> points"]),
        evaluated(folder / "second", second, 0.5, []),
    ]


@pytest.fixture(scope="module")
def written(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    page(path, "Two & runs", compare(runs), text=["What <this> is."], command="ducat demo --seed 0")
    return path


class Page(HTMLParser):
    """The parts of a page that matter to those who do not see it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def parsed(written: Path) -> Page:
    return Page(written.read_text(encoding="utf-8"))


def test_the_command_of_an_evaluation_says_what_was_refused(runs: list[Run]) -> None:
    rows = {"signals": [{"signal": "confidence", "rows": [{"reject": 0.02}, {"reject": 0.05}]}]}
    source = {"source": {"checkpoint": "w.pt", "data": "digits", "model": "small", "width": None}}
    for origin in (None, source):
        measured = {**runs[0].evaluation, "rejection": rows, "origin": origin}
        *_, evaluate = reproduce(replace(runs[0], evaluation=measured))
        assert evaluate.endswith(" --reject 0.02 0.05")
        assert ("--checkpoint w.pt" in evaluate) == (origin is not None)
        assert "--reject" not in " ".join(reproduce(replace(runs[0], evaluation={**measured, "rejection": None})))


def test_the_page_says_what_is_known_of_each_run(parsed: Page) -> None:
    text = " ".join(" ".join(parsed.text).split())
    for expected in (
        "What <this> is.",
        "92.5 [80.0, 97.0]",
        "70.0 [60.0, 80.0]",
        "25.0 [21.0, 29.0]",
        "Warning: sink gap of <45> points",
        "pgd-20 no 70.0 [21.0, 29.0] 1.5",
        "epoch loss clean (%) blind (%) robust (%) seconds 1 2.0000 50.0 40.0 30.0 2.0",
        "area under the ROC curve",
        "attack succeeded",
        "prediction real dummy recovered",
        '"fingerprint": "f"',
        "ducat evaluate runs/first-run-again --suite light --samples 40 --seed 0 --which last",
        "suite light, seed 0, checkpoint last",
        "ducat demo --seed 0",
    ):
        assert expected in text, expected


def test_the_page_needs_nothing_else(written: Path, parsed: Page) -> None:
    assert [path.name for path in written.parent.iterdir()] == ["report.html"]
    assert not parsed.all("script")
    sources = [
        tag.get("src") or tag.get("href") or "#" for name, tag in parsed.tags if name in ("img", "link", "a", "use")
    ]
    assert all(source.startswith(("data:", "#")) for source in sources if source)
    assert not re.search(r"url\((?!#)", written.read_text())


def test_those_who_do_not_see_it_get_names_and_numbers(parsed: Page) -> None:
    assert all(image["alt"] for image in parsed.all("img"))
    regions = [tag for _, tag in parsed.tags if tag.get("role") in ("region", "img")]
    labels = [tag["aria-label"] for tag in regions]
    assert all(labels)
    assert any("loss 2.00 to 1.25, clean 50.0 to 70.0 %" in str(label) for label in labels)
    assert any(str(label).startswith("Benign images: own class, real ") for label in labels)
    assert all(tag["tabindex"] == "0" for tag in regions if tag["role"] == "region"), "a keyboard cannot scroll it"
    ids = [tag["id"] for _, tag in parsed.tags if tag.get("id")]
    assert len(set(ids)) == len(ids)
    links = [str(link["href"])[1:] for link in parsed.all("a")]
    assert links
    assert set(links) <= set(ids)


def test_a_run_that_was_only_evaluated_has_a_page_too(runs: list[Run], tmp_path: Path) -> None:
    page(tmp_path / "bare.html", "Bare", compare([replace(runs[0], metrics=[], behaviour=None)]))
    html = Page((tmp_path / "bare.html").read_text())
    assert len(html.all("svg")) == 2, "the trade-off alone, for a desk and for a phone"
    assert "--which last" in " ".join(html.text)


def test_the_command_makes_the_same_settings(runs: list[Run]) -> None:
    train = shlex.split(reproduce(runs[0])[0])
    assert train[:2] == ["ducat", "train"]
    parser = config_parser()
    again = Config(**vars(parser.instantiate(parser.parse_args(train[2:]))))
    assert again.name == "first-run-again"
    assert {**again.flat(), "name": "first-run"} == runs[0].settings


def test_an_evaluation_in_another_ball_is_made_again_in_that_ball(runs: list[Run]) -> None:
    settings = {**runs[0].settings, "threat.eps": 8 / 255}
    assert "--eps" not in reproduce(replace(runs[0], settings=settings))[1]
    other = {**runs[0].evaluation, "threat": {"norm": "l2", "eps": 0.5}}
    assert reproduce(replace(runs[0], settings=settings, evaluation=other))[1].endswith("--norm l2 --eps 0.5")


def test_a_run_that_began_elsewhere_is_made_again_by_its_own_command(runs: list[Run]) -> None:
    manifest = {**runs[0].manifest, "initial": {"checkpoint": "x"}, "command": ["/usr/bin/ducat", "adapt", "a b.pt"]}
    assert reproduce(replace(runs[0], manifest=manifest))[0] == "ducat adapt 'a b.pt'"


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1200, "light"), (1200, "dark")])
def test_a_browser_shows_it_at_any_width_and_in_the_dark(browser: Any, written: Path, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(written.as_uri())
    assert not browser.get_log("browser")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    script = """
        const dark = [];
        for (const text of document.querySelectorAll("main text, main p, main td, main th"))
            dark.push(getComputedStyle(text)[text.tagName == "text" ? "fill" : "color"]);
        return dark;
    """
    colours = set(browser.execute_script(script))
    assert len(colours) == 1, f"text of several colours: {colours}"
    brightness = sum(map(int, re.findall(r"\d+", colours.pop())[:3]))
    assert brightness > 600 if scheme == "dark" else brightness < 150
    images = "return [...document.images].every(image => image.complete && image.naturalWidth > 0)"
    assert browser.execute_script(images)


@pytest.mark.browser
def test_a_keyboard_reaches_all_that_scrolls(browser: Any, written: Path) -> None:
    size = {"width": 360, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(written.as_uri())
    script = """
        for (const part of document.querySelectorAll("details")) part.open = true;
        const scrolling = [...document.querySelectorAll("main *")].filter(part =>
            part.scrollWidth > part.clientWidth + 1 && ["auto", "scroll"].includes(getComputedStyle(part).overflowX));
        return [scrolling.length, scrolling.filter(part => part.tabIndex < 0).length];
    """
    count, unreachable = browser.execute_script(script)
    assert count > 0
    assert unreachable == 0
