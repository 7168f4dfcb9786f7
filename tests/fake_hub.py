"""A small Hugging Face Hub over HTTP: what its own client asks of it when it downloads a data set of one folder."""

import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_handler(repository, folder, asked):
    """Answers for `repository`, OWNER/NAME, with the files of a folder; keeps what was asked for in a list."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    parents = {parent.as_posix() for name in files for parent in (folder / name).relative_to(folder).parents} - {"."}
    api, resolve = f"/api/datasets/{repository}", f"/datasets/{repository}/resolve/"

    def entry(name):
        if name in files:
            return dict(type="file", path=name, size=len(files[name]), oid=hashlib.sha1(files[name]).hexdigest())
        return dict(type="directory", path=name, size=0, oid=hashlib.sha1(name.encode()).hexdigest())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def answer(self, content, status=200, **headers):
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(content), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def missing(self, code):
            self.answer(dict(error=code), 404, X_Error_Code=code)

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            if path.startswith(resolve):
                name = path.removeprefix(resolve).partition("/")[2]
                if name not in files:
                    return self.missing("EntryNotFound")
                return self.answer(files[name], ETag=f'"{entry(name)["oid"]}"')
            if path.startswith(f"{api}/tree/"):
                under = path.removeprefix(f"{api}/tree/").partition("/")[2]
                if under and under not in parents:
                    return self.missing("EntryNotFound")
                deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
                inside = [name for name in sorted({*files, *parents}) if name.startswith(f"{under}/" if under else "")]
                return self.answer([entry(name) for name in inside if deep or "/" not in name[len(under) :].lstrip("/")])
            if path == api or path.startswith(f"{api}/revision/"):
                siblings = [dict(rfilename=name) for name in files]
                return self.answer(dict(_id="1", id=repository, sha=COMMIT, private=False, gated=False, disabled=False, tags=[],
                                        downloads=0, likes=0, siblings=siblings))
            return self.missing("RepoNotFound")

        do_HEAD = do_GET

        def do_POST(self):
            text = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            path = unquote(urlsplit(self.path).path)
            asked.append(f"POST {path}")
            if not path.startswith(f"{api}/paths-info/"):
                return self.missing("RepoNotFound")
            paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
            return self.answer([entry(name) for name in paths if name in files or name in parents])

    return Handler


@contextmanager
def fake_hub(repository, folder):
    """(its address, what it was asked for so far) while it serves the folder as that data set."""
    asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(repository, folder, asked))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
