"""Downloads from a server on this machine, which breaks off where it is told to."""

import hashlib
import http.server
import runpy
import shlex
import socket
import threading

import pytest
from data_files import RNG, check, write_medmnist

from ses_lab.data import archives, load
from ses_lab.data.download import download

CONTENT = RNG.bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range"))
        body, start = server.files.get(self.path), 0
        if body is None:
            return self.send_error(404)
        if server.ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        stop = server.breaks.pop(0) if server.breaks else len(body)
        self.wfile.write(body[start:stop])  # and the connection closes, whatever was promised

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.breaks, server.asked, server.ranges = {"/a.bin": CONTENT}, [], [], True
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_broken_connection_is_gone_on_with(tmp_path, server):
    server.breaks = [100_000, 250_000]
    path = tmp_path / "new" / "a.bin"
    download(f"{server.url}/a.bin", path, MD5)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=250000-"]
    assert list(path.parent.iterdir()) == [path]


def test_a_later_call_asks_for_the_rest(tmp_path, server):
    server.breaks = [100_000, 100_000]  # the second request brings nothing
    path = tmp_path / "a.bin"
    with pytest.raises(ConnectionError, match="at byte 100000 again"):
        download(f"{server.url}/a.bin", path, MD5)
    assert not path.exists()
    assert (tmp_path / "a.bin.part").read_bytes() == CONTENT[:100_000]
    download(f"{server.url}/a.bin", path, MD5)
    assert path.read_bytes() == CONTENT
    assert server.asked[2:] == ["bytes=100000-"]


def test_a_process_killed_before_the_rename_has_nothing_left_to_fetch(tmp_path, server):
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    download(f"{server.url}/a.bin", tmp_path / "a.bin", MD5)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_is_asked_for_all_of_it(tmp_path, server):
    server.ranges, server.breaks = False, [100_000]
    download(f"{server.url}/a.bin", tmp_path / "a.bin", MD5)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    server.breaks = [100_000] * 5  # for ever at the same place
    with pytest.raises(ConnectionError, match="at byte 100000 again"):
        download(f"{server.url}/a.bin", tmp_path / "b.bin", MD5)
    assert len(server.asked) == 2 + 2


def test_another_content_is_refused_and_forgotten(tmp_path, server):
    server.files["/a.bin"] = b"<html>sign in</html>"
    path = tmp_path / "a.bin"
    with pytest.raises(ValueError, match=f"not {MD5}"):
        download(f"{server.url}/a.bin", path, MD5)
    assert not path.exists()
    server.files["/a.bin"] = CONTENT
    download(f"{server.url}/a.bin", path, MD5)
    assert path.read_bytes() == CONTENT


def test_a_server_that_refuses_is_one_error(tmp_path, server):
    with pytest.raises(ConnectionError, match="HTTP 404"):
        download(f"{server.url}/b.bin", tmp_path / "b.bin", MD5)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ConnectionError, match=r"cannot be reached.*b\.bin from another machine"):
        download(f"http://127.0.0.1:{port}/b.bin", tmp_path / "b.bin", MD5)


def test_of_two_at_once_one_fetches(tmp_path, server):
    path = tmp_path / "a.bin"
    threads = [
        threading.Thread(target=download, args=(f"{server.url}/a.bin", path, MD5)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == [None]
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == CONTENT


def test_the_command_of_the_error_fetches(tmp_path, server, monkeypatch, capsys):
    write_medmnist(tmp_path / "there.npz", 28, 28)
    server.files["/octmnist.npz"] = (tmp_path / "there.npz").read_bytes()
    monkeypatch.setattr(archives, "MEDMNIST_URL", server.url + "/{}")
    md5 = hashlib.md5(server.files["/octmnist.npz"]).hexdigest()
    monkeypatch.setitem(archives.MEDMNIST_MD5, "octmnist", md5)
    root = tmp_path / "root of it's own"
    with pytest.raises(FileNotFoundError) as error:
        load("octmnist", root=root)
    python, option, module, *arguments = shlex.split(str(error.value).splitlines()[1])
    assert (python, option) == ("python", "-m")
    monkeypatch.setattr("sys.argv", [module, *arguments])
    runpy.run_module(module, run_name="__main__")  # in this process: the URL is ours here alone
    assert "octmnist: (6, 1, 28, 28) to train on" in capsys.readouterr().out
    check(load("octmnist", root=root), 6, 3, 1, 28)
    assert server.asked == [None]
