"""One file over HTTP: taken up where it broke off, checked, and there only when it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import wrap_file

CHUNK = 1 << 20
BROKEN = (ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)


def download(url: str, path: Path, md5: str) -> None:
    """Fetches ``url`` into ``path``, whose folder is made if need be.

    The bytes gather in ``path`` + ".part", which stays when the connection breaks or the process
    is killed: the next request, in this call while each brings something new, or in a later call,
    asks for the rest (HTTP Range), or begins again where the server knows no ranges. ``path``
    itself appears by a rename, after the checksum. Of several processes one fetches, the others
    wait for it.

    Raises:
        ConnectionError: the server refused, or a request brought nothing new.
        ValueError: the whole file has another MD5; the next call begins again.
    """
    import fcntl  # not on Windows, where files that are on the disk can still be loaded

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():  # fetched by the process that had the lock
            part.unlink(missing_ok=True)
            return
        reached = -1
        while not _append(url, file, path):
            # Strictly more each time: a server without ranges could break off for ever.
            if file.tell() <= reached:
                raise ConnectionError(
                    f"{url} broke off at byte {file.tell()} again. What came is kept in {part}: "
                    "try later, and the rest is asked for"
                )
            reached = file.tell()
        got = _md5(part)
        if got != md5:
            file.truncate(0)  # not unlinked: whoever waits for the lock waits for this very file
            raise ValueError(
                f"{url} has MD5 {got}, not {md5}: something else was served, or the .part file of "
                "another was gone on with. It was dropped; try again"
            )
        part.replace(path)


def _append(url: str, file: BinaryIO, path: Path) -> bool:
    """Appends what ``file`` lacks of ``url``; False where the connection broke on the way."""
    start = file.seek(0, 2)
    headers = {"User-Agent": "ses-lab"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if start and error.code == 416:  # nothing is left to ask for
            return True
        raise ConnectionError(f"{url}: HTTP {error.code} {error.reason}") from error
    except (urllib.error.URLError, *BROKEN) as error:
        raise ConnectionError(
            f"{url} cannot be reached: {error}. Try again, or bring the file to {path} from "
            "another machine"
        ) from error
    with response:
        if response.status != 206:  # all of it, whatever was asked for
            file.truncate(0)
            start = 0
        length = response.headers.get("Content-Length")
        total = None if length is None else int(length)
        console = Console(stderr=True)
        with (
            contextlib.suppress(*BROKEN),
            wrap_file(response, total, description=path.name, console=console) as body,
        ):
            while chunk := body.read(CHUNK):
                file.write(chunk)
    # A body that broke off can look like one that ended: only the length tells.
    end = file.seek(0, 2)
    return total is None or end == start + total


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)  # what the publishers give
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
