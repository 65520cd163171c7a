"""dataset/download.py: one file from a server on this machine, whole or not at all."""

import http.server
import threading

import pytest

from configurator import UserError
from dataset.download import download, is_url, url_name
from dataset.shards import DataFolder
from prepare import PrepareConfig
from prepare import main as prepare_main

TEXT = b"".join(b"line %d of the first file\n" % i for i in range(900))


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/notes.txt")
            self.end_headers()
            return
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if "page" in self.path else "text/plain")
        if "nosize" not in self.path:
            self.send_header("Content-Length", str(len(TEXT) + 10 * ("short" in self.path)))
        self.end_headers()
        self.wfile.write(TEXT)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server, and the list of paths that it was asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", server.requests
        server.shutdown()
        thread.join()


def test_a_file_is_downloaded_once(server, tmp_path, capsys):
    address, requests = server
    path = download(f"{address}/a/notes.txt?raw=1")
    assert path.read_bytes() == TEXT and path.parent.parent.as_posix() == "data/downloads"
    assert path.name == "notes.txt" and "notes.txt, 0.0 MB" in capsys.readouterr().out
    assert download(f"{address}/a/notes.txt?raw=1") == path and len(requests) == 1
    assert "is there already; delete it to download it again" in capsys.readouterr().out
    assert download(f"{address}/b/notes.txt") != path  # another file of the same name
    assert download(f"{address}/moved.txt").read_bytes() == TEXT
    assert download(f"{address}/nosize%20%C3%A9.txt").name == "nosize \u00e9.txt"
    assert "of unknown size" in capsys.readouterr().out


@pytest.mark.parametrize("name, message", [
    ("missing.txt", r"HTTP Error 404: Not Found; by hand: curl -L -o missing.txt 'http://.*missing.txt\?a=1'"),
    ("short.txt", f"the connection broke after {len(TEXT):,} of {len(TEXT) + 10:,} bytes"),
    ("page.txt", "is a web page, not a file"),
    ("page.html", r"page.html shows no known kind of file; for text: curl -L -o FILE.txt 'http"),
    ("", r"\(none\) shows no known kind of file"),
])  # fmt: skip
def test_what_cannot_be_downloaded_leaves_nothing(server, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        download(f"{server[0]}/{name}?a=1")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_server_and_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    for url in ("http://127.0.0.1:1/a.txt", "http://[/a.txt", "https://127.0.0.1:x/a.txt"):
        with pytest.raises(UserError, match="curl -L -o|source="):
            download(url)


def test_prepare_reads_an_address(server, tmp_path, capsys):
    url = f"{server[0]}/notes.txt"
    args = [f"--source={url}", "--vocab_size=300", "--num_proc=1"]
    prepare_main(args)
    data = DataFolder("data/notes")
    assert data.meta["source"] == url and sum(data.meta["bytes"].values()) == len(TEXT)
    prepare_main(args)
    assert len(server[1]) == 1
    assert "data/notes is up to date" in capsys.readouterr().out


def test_names():
    assert is_url("https://a.b/c.txt") and not is_url("hf:a/b") and not is_url("https.txt")
    assert url_name("https://a.b/c/d.jsonl.gz?download=true#x") == "d.jsonl.gz"
    assert str(PrepareConfig(source="https://a.b/c/d.jsonl.gz?x=*").folder) == "data/d"
    with pytest.raises(UserError, match="gives the data folder no name"):
        PrepareConfig(source="https://a.b/")
