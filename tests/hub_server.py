"""A small Hub on this machine: the routes of its API that a model folder needs, over real HTTP."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_nobody"


def sha1(*parts):
    return hashlib.sha1(repr(parts).encode()).hexdigest()


class Hub:
    """Repositories of models: ``repositories[id][branch]`` is a list of commits, each a dict of
    path and content.

    Writing needs `TOKEN`, and so does reading from the ids in `private`.
    """

    def __init__(self):
        self.repositories, self.private, self.requests = {}, set(), []

    def sha(self, repo, revision):
        """Return the commit that a branch or a commit stands for, or None."""
        branches = self.repositories[repo]
        if revision in branches:
            return sha1(repo, branches[revision])
        return revision if revision in self.commits(repo) else None

    def commits(self, repo):
        branches = self.repositories[repo].values()
        histories = [commits[:count] for commits in branches for count in range(len(commits) + 1)]
        return {sha1(repo, history): history for history in histories}

    def files(self, repo, sha):
        found = {}
        for commit in self.commits(repo)[sha]:
            found |= commit
        return found


@contextlib.contextmanager
def serving():
    """Yield a `Hub` and its address."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def answer(self, content=b"", status=200, **headers):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def handle_request(self):
            path = unquote(urlsplit(self.path).path)
            assert "Transfer-Encoding" not in self.headers
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.requests.append(f"{self.command} {path}")
            self.knows_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif self.command == "POST" and not self.knows_token:
                self.answer({"error": "Invalid username or password."}, 401)
            elif path == "/api/repos/create":
                self.create(json.loads(self.body))
            else:
                self.of_repository(path)

        do_GET = do_HEAD = do_POST = handle_request  # noqa: N815

        def create(self, asked):
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            is_new = repo not in hub.repositories
            hub.repositories.setdefault(repo, {"main": []})
            if asked.get("visibility") == "private" or asked.get("private"):
                hub.private.add(repo)
            self.answer({"url": f"{hub.url}/{repo}", "name": repo}, 200 if is_new else 409)

        def of_repository(self, path):
            parts = path.strip("/").split("/")
            parts = parts[2:] if parts[0] == "api" else parts
            repo = "/".join(parts[:2]).removesuffix(".git")
            action, *rest = parts[2:] or ["revision"]
            if repo not in hub.repositories or (repo in hub.private and not self.knows_token):
                self.answer({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
                return
            revision = rest[0] if rest else "main"
            if action == "branch":
                hub.repositories[repo].setdefault(revision, list(hub.repositories[repo]["main"]))
                self.answer()
            elif (sha := hub.sha(repo, revision)) is None:
                self.answer({"error": revision}, 404, X_Error_Code="RevisionNotFound")
            elif action == "revision":
                files = [{"rfilename": name} for name in hub.files(repo, sha)]
                self.answer({"id": repo, "sha": sha, "tags": [], "siblings": files})
            elif action == "tree":
                files = hub.files(repo, sha).items()
                about = [{"path": path, "size": len(content)} for path, content in files]
                self.answer([{"type": "file", "oid": sha1(file), **file} for file in about])
            elif action == "resolve":
                self.download(hub.files(repo, sha).get("/".join(rest[1:])), sha)
            elif action == "preupload":
                files = json.loads(self.body)["files"]
                regular = {"shouldIgnore": False, "uploadMode": "regular"}
                self.answer({"files": [file | regular for file in files]})
            elif action == "commit":
                self.commit(repo, revision)

        def download(self, content, sha):
            if content is None:
                codes = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": sha}
                self.answer({"error": "Entry not found"}, 404, **codes)
            else:
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self.answer(content, X_Repo_Commit=sha, ETag=etag, Accept_Ranges="bytes")

        def commit(self, repo, branch):
            added = {}
            for operation in map(json.loads, self.body.splitlines()):
                if operation["key"] == "file":
                    value = operation["value"]
                    added[value["path"]] = base64.b64decode(value["content"])
            hub.repositories[repo][branch].append(added)
            sha = hub.sha(repo, branch)
            address = f"{hub.url}/{repo}/commit/{sha}"
            self.answer({"commitUrl": address, "commitOid": sha, "success": True})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
