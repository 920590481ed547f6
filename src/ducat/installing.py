"""What our distribution is called, how an extra of it is installed, and what else may lie in the same folder."""

import json
import warnings
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

DISTRIBUTION = "ducat-robust"  # `ducat` on the package index is somebody else's log processor
OTHER = "ducat"


def install(extra: str | None = None) -> str:
    """Return the command that installs this package, or an extra of it, right for where this code runs.

    In a checkout, or where it was installed from one, it names the checkout's folder, otherwise the distribution on the
    package index.
    """
    checkout = Path(__file__).parents[2]
    here = (checkout / "pyproject.toml").is_file() and Path(__file__).parent.parent.name == "src"
    what = str(checkout) if here else _installed_from() or DISTRIBUTION
    return f"pip install {'-e ' * here}'{what}{f'[{extra}]' if extra else ''}'"


def _installed_from() -> str | None:
    """Return the folder that the distribution was installed from, if pip noted one (PEP 610) that is still there."""
    try:
        noted = json.loads(metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    url = urlsplit(noted.get("url", ""))
    folder = Path(unquote(url.path))
    return str(folder) if url.scheme == "file" and (folder / "pyproject.toml").is_file() else None


def warn_of_the_other() -> None:
    """Warn if a distribution called `ducat` has put its files into a folder of the name `ducat` as well."""
    try:
        found = metadata.distribution(OTHER)
    except metadata.PackageNotFoundError:
        return
    if any(file.parts[:2] == ("ducat", "__init__.py") for file in found.files or ()):
        warnings.warn(
            f"{OTHER} {found.version}, another project that is imported by the same name, is installed here too, and "
            f"files of one may be the other's: pip uninstall -y {OTHER} {DISTRIBUTION}, then {install()}",
            stacklevel=3,
        )
