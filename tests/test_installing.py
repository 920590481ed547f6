import re
import subprocess
import tomllib
import warnings
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import ducat
from ducat import installing

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d")


def texts() -> list[Path]:
    """The files that somebody reads or runs, but for the tests."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() if listed.returncode == 0 else []
    kinds = (".py", ".md", ".yaml", ".yml", ".toml", ".ipynb", "")
    chosen = [ROOT / name for name in names if Path(name).suffix in kinds and not name.startswith("tests/")]
    return [path for path in chosen if path.is_file()]  # docs/results is a link to a folder


def test_every_line_that_installs_names_our_distribution_and_an_extra_that_there_is() -> None:
    found = 0
    for path in texts():
        for line in path.read_text(encoding="utf-8").splitlines():
            for name, extras in re.findall(r"(?<![\w/.-])(ducat(?:-robust)?|\.)\[([a-z][a-z,]*)\]", line):
                assert name != "ducat", f"{path}: {line}"
                assert set(extras.split(",")) <= EXTRAS, f"{path}: {line}"
                found += 1
            assert not re.search(r"pip install (-\S+ )*['\"]?ducat(?!-robust)\b", line), f"{path}: {line}"
    assert found > 5 or not texts()


def test_the_name_is_that_of_the_project() -> None:
    assert PROJECT["name"] == installing.DISTRIBUTION
    assert "version" in PROJECT["dynamic"]
    assert f"version: {ducat.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_a_checkout_is_installed_from_itself_and_a_copy_from_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installing.install("onnx") == f"pip install -e '{ROOT}[onnx]'"
    monkeypatch.setattr(installing, "__file__", "/somewhere/site-packages/ducat/installing.py")
    noted = SimpleNamespace(read_text=lambda name: f'{{"url": "{ROOT.as_uri()}", "dir_info": {{}}}}')
    monkeypatch.setattr(metadata, "distribution", lambda name: noted)
    assert installing.install("onnx") == f"pip install '{ROOT}[onnx]'", "a copy that was installed from a checkout"
    noted.read_text = lambda name: '{"url": "file:///gone"}'
    assert installing.install("onnx") == "pip install 'ducat-robust[onnx]'"
    noted.read_text = lambda name: None
    assert installing.install("onnx") == "pip install 'ducat-robust[onnx]'"
    assert installing.install() == "pip install 'ducat-robust'"


@pytest.mark.parametrize(("files", "told"), [(["ducat/__init__.py", "ducat/adb.py"], True), (["ducat.pth"], False)])
def test_the_other_project_of_that_name_is_noticed(
    files: list[str], told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SimpleNamespace(version="1.0.1", files=[metadata.PackagePath(file) for file in files])
    monkeypatch.setattr(metadata, "distribution", lambda name: other)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        installing.warn_of_the_other()
    assert ["ducat 1.0.1, another project" in str(warning.message) for warning in caught] == [True] * told


def test_actions_are_pinned_by_commit() -> None:
    used = []
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        yaml.safe_load(text)
        used += re.findall(r"uses: (.+)", text)
    assert [action for action in used if not PINNED.match(action)] == []


def test_the_lock_has_a_hash_for_every_package_of_the_core() -> None:
    text = (ROOT / "requirements.lock").read_text()
    pinned = dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.MULTILINE))
    needed = {re.split(r"[<>=\[]", line)[0].replace("_", "-") for line in PROJECT["dependencies"]}
    assert needed <= pinned.keys()
    for block in re.split(r"^(?=[a-z0-9._-]+==)", text, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in block
