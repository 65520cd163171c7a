"""One file from the web -> data/downloads/, for prepare.py --source=https://...

    path = download("https://example.com/books/notes.txt")     # data/downloads/<hash of the URL>/notes.txt

A file that was downloaded before is not downloaded again. An interrupted download leaves nothing. Left out:
web pages, several files at once, retries, and passwords. The error message has a curl line for these.
"""

import hashlib
import http.client
import os
import re
import shlex
import shutil
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

from configurator import ProgressBar, UserError
from dataset.sources import KINDS, file_kind

DOWNLOADS = Path("data/downloads")
TIMEOUT = 30  # seconds without a byte


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def url_name(url: str) -> str:
    """The file's name in a URL: "https://example.com/a/b%20c.txt?raw=1" -> "b c.txt"."""
    return Path(unquote(re.sub(r"^\w+://[^/?#]*|[?#].*", "", url))).name


def copy_response(response: Any, file: BinaryIO) -> None:
    """Write the whole response to the file. Raises OSError if it is shorter than it should be."""
    total = int(response.headers.get("Content-Length") or 0)
    print(f"download  {url_name(response.url)}, {f'{total / 1e6:,.1f} MB' if total else 'of unknown size'}")
    with ProgressBar.wrapattr(response, "read", total=total or None) as stream:
        shutil.copyfileobj(stream, file)
    if total and file.tell() != total:
        raise OSError(f"the connection broke after {file.tell():,} of {total:,} bytes")
    file.flush()
    os.fsync(file.fileno())  # before the rename, so that a power cut leaves no half file under the final name


def download(url: str) -> Path:
    """The path of a local copy of the file. Raises UserError, with a curl line, if that fails."""
    name = url_name(url)
    path = DOWNLOADS / hashlib.sha256(url.encode()).hexdigest()[:8] / name
    if file_kind(Path(name)) not in KINDS:
        raise UserError(f"source={url}: the name {name or '(none)'} shows no known kind of file; for text: "
                        f"curl -L -o FILE.txt {shlex.quote(url)}, then --source=FILE.txt")
    if path.is_file():
        print(f"download  {path} is there already; delete it to download it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{name}.{os.getpid()}.part")
    try:
        request = urllib.request.Request(quote(url, safe=":/?#[]@!$&'()*+,;=%~"))
        request.add_header("User-Agent", "nanollama")  # some servers refuse urllib's own name
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response, open(part, "wb") as file:
            if response.headers.get_content_type() == "text/html":
                raise OSError("is a web page, not a file; give the address of the file itself")
            copy_response(response, file)
        os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"source={url}: {error}; by hand: curl -L -o {shlex.quote(name)} {shlex.quote(url)}, "
                        f"then --source={shlex.quote(name)}") from None
    finally:
        part.unlink(missing_ok=True)
    return path
