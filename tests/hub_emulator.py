"""A Hub on the loopback: what `huggingface_hub` asks of it to make, push and pull model repositories. In memory only.

with HubEmulator() as hub:
    HfApi(endpoint=hub.url, token=hub.token)
"""

import base64
import fnmatch
import hashlib
import json
import re
import socket
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

IN_LFS = "*.safetensors"
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<action>[^/]+)(?:/(?P<revision>[^/]+)(?:/.*)?)?)?")


def sha1(*parts: bytes) -> str:
    return hashlib.sha1(b"\0".join(parts)).hexdigest()


class Repository:
    def __init__(self, name: str, private: bool):
        self.name, self.private = name, private
        first = sha1(name.encode())
        self.branches, self.commits = {"main": first}, {first: {}}  # a commit is {path: bytes}
        self.messages = {first: "initial commit"}

    def commit_of(self, revision: str) -> str | None:
        found = self.branches.get(revision, revision)
        return found if found in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.commit_of(revision)]


class HubEmulator:
    """`drop` is a pattern of paths at which a request with a body loses its connection, and one without is refused."""

    token, user = "hf_right", "me"

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # uploaded for LFS, in commits or not
        self.drop = None
        self.lock = threading.Lock()

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        path = urllib.parse.unquote(url.path)
        self.is_known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        length = int(self.headers.get("Content-Length") or 0)
        if self.hub.drop and fnmatch.fnmatchcase(path, self.hub.drop):
            if not length:
                return self.refuse(503, "Unavailable", "The Hub is down.")
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        with self.hub.lock:
            self.answer(path, body)

    do_HEAD = do_POST = do_PUT = do_GET

    def send(self, content: dict | list | bytes, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status, code, message):
        self.send({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def answer(self, path, body):
        if path.startswith("/lfs/"):
            return self.upload(path.removeprefix("/lfs/"), body)
        is_open = self.command != "POST" and path != "/api/whoami-v2"
        if not (is_open or self.is_known or path == "/api/validate-yaml"):
            return self.refuse(401, "", "Invalid username or password.")
        if path == "/api/validate-yaml":
            return self.send({"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            return self.send({"type": "user", "name": self.hub.user, "auth": {"accessToken": {"role": "write"}}})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.offer_uploads(json.loads(body))
        found = RESOLVE.fullmatch(path) or API.fullmatch(path)
        if found is None:
            return self.refuse(404, "", f"no such page: {path}")
        repository = self.hub.repositories.get(found["repo"])
        if repository is None or (repository.private and not self.is_known):
            return self.refuse(401, "RepoNotFound", "Repository Not Found")
        revision = found["revision"] or "main"
        if found.groupdict().get("action") == "branch":
            if revision in repository.branches:
                return self.refuse(409, "", "Reference already exists")
            repository.branches[revision] = repository.branches["main"]
            return self.send({})
        if repository.commit_of(revision) is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if found.re is RESOLVE:
            return self.download(repository, revision, found["file"])
        actions = {"preupload": self.say_which_are_lfs, "commit": self.commit, "tree": self.list_files}
        if found["action"] in actions:
            return actions[found["action"]](repository, revision, body)
        files = [{"rfilename": file} for file in sorted(repository.files(revision))]
        about = {"id": found["repo"], "private": repository.private, "tags": [], "siblings": files}
        return self.send({**about, "sha": repository.commit_of(revision)})

    def create(self, wanted):
        name = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        if name in self.hub.repositories:
            return self.send({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.hub.repositories[name] = Repository(name, private)
        self.send({"url": f"{self.hub.url}/{name}", "name": name})

    def say_which_are_lfs(self, repository, revision, body):
        modes = [
            {"path": path, "uploadMode": "lfs" if fnmatch.fnmatchcase(path, IN_LFS) else "regular"}
            for path in (file["path"] for file in json.loads(body)["files"])
        ]
        self.send({"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def offer_uploads(self, wanted):
        objects = []
        for item in wanted["objects"]:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(item)
        self.send({"transfer": "basic", "objects": objects})

    def upload(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, "", "sha256 mismatch")
        self.hub.objects[oid] = body
        self.send({})

    def commit(self, repository, revision, body):
        files, message = dict(repository.files(revision)), ""
        for operation in map(json.loads, body.splitlines()):
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                assert operation["key"] == "deletedFile", operation
                del files[value["path"]]
        parent = repository.commit_of(revision)
        new = sha1(parent.encode(), message.encode(), *(sha1(p.encode(), files[p]).encode() for p in sorted(files)))
        repository.commits[new], repository.messages[new], repository.branches[revision] = files, message, new
        url = f"{self.hub.url}/{repository.name}/commit/{new}"
        self.send({"success": True, "commitOid": new, "commitUrl": url, "hookOutput": ""})

    def list_files(self, repository, revision, _):
        files = sorted(repository.files(revision).items())
        self.send([{"type": "file", "path": path, "oid": sha1(data), "size": len(data)} for path, data in files])

    def download(self, repository, revision, file):
        data = repository.files(revision).get(file)
        if data is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        self.send(data, ETag=f'"{sha1(data)}"', X_Repo_Commit=repository.commit_of(revision))
