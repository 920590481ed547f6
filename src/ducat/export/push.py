"""A run, as a folder for Hugging Face's hub, into a repository there: what would be sent first, and only then sent."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from ducat.export import hub
from ducat.export.classifier import Deployed
from ducat.export.formats import export
from ducat.runs import Which

CARD = "README.md"


@dataclass(frozen=True)
class Pushed:
    """What is sent to a repository.

    Attributes:
        repository: OWNER/NAME.
        files: sizes in bytes by name.
        address: of the commit; None where nothing was sent.
    """

    repository: str
    files: dict[str, int]
    address: str | None


def push(
    run: Path | str,
    repository: str,
    folder: Path,
    *,
    which: Which = "best",
    detector: bool = False,
    confirm: bool = False,
) -> Pushed:
    """Send what `export` wrote for the hub to a repository, which is made, private, if it is not there.

    The folder may have been changed by hand since, the card by more words: the weights must still be the run's, and the
    card must have the numbers of its evaluation as they are now.

    Args:
        run: the run folder, or a network of the zoo.
        repository: OWNER/NAME on the hub.
        folder: what to send; it is exported first if it is not there.
        which: the checkpoint.
        detector: as for `export`.
        confirm: whether to send it; otherwise nothing leaves this machine.

    Raises:
        FileNotFoundError: if there is no such run or checkpoint.
        ValueError: if the checkpoint was not evaluated, the folder differs from the run, the name of the repository
            is none, or nobody is logged in.
        OSError: if the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"push: {error}") from error
    if repository.count("/") != 1:
        raise ValueError(f"push: {repository!r} must be OWNER/NAME")
    source = Deployed.read(run, which, detector=detector)
    if source.evaluated is None:
        raise ValueError(f"push: {run} has no evaluation of its checkpoint {which}: run `ducat evaluate` first")
    if not folder.exists():
        export(run, "hub", folder, which=which, detector=detector)
    _check(source, folder, detector)
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    if not confirm:
        return Pushed(repository, files, None)
    if get_token() is None:
        raise ValueError("push: nobody is logged in to the hub: run `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="ducat")
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(files), commit_message=f"Add {run}"
        )
    except HfHubHTTPError as error:
        raise OSError(f"push: the hub refuses {repository}: {error}") from error
    except Exception as error:  # of whichever library the hub's goes by
        raise OSError(f"push: the hub cannot be reached ({type(error).__name__}: {error}): try again") from error
    return Pushed(repository, files, commit.commit_url)


def _check(source: Deployed, folder: Path, detector: bool) -> None:
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    if "\n".join(hub.accuracy(source)) not in card:
        raise ValueError(f"{folder / CARD} has other numbers than the run's evaluation: export it again")
    with tempfile.TemporaryDirectory() as temporary:
        fresh = export(source.folder.path, "hub", Path(temporary) / "fresh", which=source.which, detector=detector).path
        for file in sorted(fresh.iterdir()):
            other = folder / file.name
            if file.name != CARD and (not other.is_file() or other.read_bytes() != file.read_bytes()):
                raise ValueError(f"{other} is not that of the run {source.folder.path}: export it again")
        more = {file.name for file in folder.iterdir()} - {file.name for file in fresh.iterdir()}
    if more:
        raise ValueError(f"{folder} has more than was exported: take out {', '.join(sorted(more))}")
