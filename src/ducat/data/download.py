"""Downloads that resume where they stopped."""

from pathlib import Path
from typing import Any

from ducat.data.specs import Source

CHUNK = 2**16
"""Bytes that are written at a time, so the most that an interrupted download loses."""


def download(source: Source, folder: Path) -> Path:
    """Download a publisher's file into `folder`, unless it is there, and check its hash.

    What an interrupted download left is continued by the next one.

    Raises:
        ValueError: the file cannot be downloaded, or is not the one that the publisher offered.
    """
    import pooch
    import requests

    algorithm, digest = source.hashes[0].split(":")
    pooch.get_logger().setLevel("WARNING")
    try:
        return Path(pooch.retrieve(source.url, f"{algorithm}:{digest}", source.file, folder, downloader=_resume))
    except requests.RequestException as error:
        raise ValueError(
            f"{source.url} could not be downloaded ({type(error).__name__}): run the command again to continue, "
            "or give a local copy with --from"
        ) from error
    except ValueError as error:
        raise ValueError(f"{source.url} is not the published file: its {algorithm} is not {digest}") from error


def _resume(url: str, output_file: str, _: Any) -> None:
    import requests
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    name = url.rsplit("/", 1)[-1]
    part = Path(output_file).with_name(f"{name}.part")
    done = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={done}-", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            # All of it was there: the hash that pooch computes next decides whether it is right.
            part.replace(output_file)
            return
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            done = 0
        total = done + int(response.headers.get("Content-Length", 0))
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        with Progress(*columns, console=Console(stderr=True)) as progress, part.open("ab" if done else "wb") as file:
            task = progress.add_task(name, total=total or None, completed=done)
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                progress.advance(task, len(chunk))
    part.replace(output_file)
