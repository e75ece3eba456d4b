"""A Hugging Face Hub in memory, on loopback: as much of it as `push_to_hub` and `from_pretrained` ask for.

Only the token `hf_fake` may write, and only to repositories of its user `tester`, and read what is private. The
connection breaks when a commit of the name `BROKEN` arrives."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

BROKEN = "breaks"
REPO = r"(?P<repo>[^/]+/[^/]+)"

ROUTES = {
    "GET /api/whoami-v2": "whoami",
    "POST /api/repos/create": "create",
    "POST /api/validate-yaml": "validate_yaml",
    f"GET /api/models/{REPO}/auth-check/write": "check_writer",
    f"POST /api/models/{REPO}/branch/(?P<revision>[^/]+)": "branch",
    f"POST /api/models/{REPO}/preupload/(?P<revision>[^/]+)": "preupload",
    f"POST /api/models/{REPO}/commit/(?P<revision>[^/]+)": "commit",
    f"GET /api/models/{REPO}(/revision/(?P<revision>[^/]+))?": "info",
    f"GET /api/models/{REPO}/tree/(?P<revision>[^/]+)": "tree",
    f"(GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "resolve",
}


class FakeHub:
    """`with FakeHub() as hub:` serves at `hub.endpoint`, to be set as HF_ENDPOINT before a client is imported."""

    def __init__(self):
        self.repos = {}  # id -> {revision: (sha, {path: bytes})}, where a revision is a branch or a sha
        self.private = set()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id):
        return self.repos[repo_id]["main"][1]

    def commit(self, repo_id, files, branch="main"):
        revisions = self.repos.setdefault(repo_id, {})
        sha = hashlib.sha1(f"{repo_id} {len(revisions)}".encode()).hexdigest()
        revisions[branch] = revisions[sha] = (sha, files)
        return sha


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def dispatch(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        for pattern, name in ROUTES.items():
            if match := re.fullmatch(pattern, request):
                arguments = match.groupdict()
                repo, revision = (arguments.get(name) for name in ("repo", "revision"))
                if repo and (repo not in self.hub.repos or (repo in self.hub.private and not self.is_tester)):
                    return self.missing("RepoNotFound")
                if revision and name != "branch" and revision not in self.hub.repos[repo]:
                    return self.missing("RevisionNotFound")
                return getattr(self, name)(**arguments)
        self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = dispatch

    @property
    def is_tester(self):
        return self.headers["Authorization"] == "Bearer hf_fake"

    def reply(self, content, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", len(content))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_json(self, value, status=200):
        self.reply(json.dumps(value).encode(), status, Content_Type="application/json")

    def missing(self, code, **headers):
        self.reply(b"{}", 404, X_Error_Code=code, **headers)

    def whoami(self):
        self.reply_json({"name": "tester", "type": "user", "orgs": []})

    def create(self):
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        if not self.may_write(repo):
            return self.reply_json({"error": "you may not create this"}, 403)
        known = repo in self.hub.repos
        if not known:
            self.hub.commit(repo, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(repo)
        self.reply_json({"url": f"{self.hub.endpoint}/{repo}"}, 409 if known else 200)

    def may_write(self, repo):
        return self.is_tester and repo.startswith("tester/")

    def check_writer(self, repo):
        self.reply_json({}, 200 if self.may_write(repo) else 403)

    def branch(self, repo, revision):
        known = revision in self.hub.repos[repo]
        if not known:
            self.hub.repos[repo][revision] = self.hub.repos[repo]["main"]
        self.reply_json({}, 409 if known else 200)

    def validate_yaml(self):
        self.reply_json({"errors": [], "warnings": []})

    def preupload(self, repo, revision):
        files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(self.body)["files"]]
        self.reply_json({"files": files})

    def commit(self, repo, revision):
        files = dict(self.hub.repos[repo][revision][1])
        for line in map(json.loads, self.body.splitlines()):
            assert line["key"] in ("header", "file"), line
            if line["key"] == "header" and line["value"]["summary"] == BROKEN:
                self.close_connection = True
                return
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        sha = self.hub.commit(repo, files, revision)
        self.reply_json({"success": True, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha})

    def info(self, repo, revision):
        sha, files = self.hub.repos[repo][revision or "main"]
        siblings = [{"rfilename": path} for path in files]
        self.reply_json(
            {"id": repo, "sha": sha, "private": repo in self.hub.private, "tags": [], "siblings": siblings}
        )

    def tree(self, repo, revision):
        _, files = self.hub.repos[repo][revision]
        self.reply_json([{"type": "file", "path": path, "oid": _oid(f), "size": len(f)} for path, f in files.items()])

    def resolve(self, repo, revision, path):
        sha, files = self.hub.repos[repo][revision]
        if path in files:
            self.reply(files[path], X_Repo_Commit=sha, ETag=f'"{_oid(files[path])}"')
        else:
            self.missing("EntryNotFound", X_Repo_Commit=sha)


def _oid(content):
    return hashlib.sha1(content).hexdigest()
