"""A web server on this machine that hands out files, and cuts, refuses or lies when told to."""

import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """Serves `files`, a dict from names to bytes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {}
        self.cuts = []  # after how many bytes to cut the answers, one after the other
        self.ranges = True  # whether parts can be asked for
        self.status = None  # answer everything with this error
        self.told_length = True
        self.asked = []  # the Range of each request

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.asked.append(wanted)
        body = server.files.get(self.path[1:].partition("?")[0])
        if server.status or body is None:
            self.send_error(server.status or 404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        if start >= len(body) > 0 and start:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if server.told_length:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        limit = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(body[start:] if limit is None else body[start : start + limit])

    def log_message(self, *words):
        """Keep quiet."""


@contextmanager
def serving():
    """Run a `FileServer` for a while."""
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def fetched(folder):
    """Return the names of what was fetched into a folder, without the locks, which stay."""
    paths = folder.iterdir() if folder.exists() else []
    return sorted(path.name for path in paths if path.suffix != ".lock")
