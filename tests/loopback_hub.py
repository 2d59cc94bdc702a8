"""A small Hub on 127.0.0.1, so that publishing is tested with the unmodified huggingface_hub client.

It keeps repositories in memory and has the HTTP endpoints for pushing to the Hub and loading from it: repositories,
pre-upload, LFS (batch, upload, verify, redirected download), commits, tags, branches, files with ranges, and trees. It
also checks the metadata of cards. Xet is not supported, so clients must set HF_HUB_DISABLE_XET.

    with LoopbackHub() as hub:
        subprocess.run([...], env=hub.env(tmp_path), check=True)   # HF_ENDPOINT is read when the client is imported
        assert "model.safetensors" in hub.files("me/model")
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
# The Hub sends by LFS what .gitattributes names, and everything above ten megabytes.
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.npz", "*.parquet", "*.arrow", "*.tar", "*.zip", "saved_model/*")
LFS_BYTES = 10_000_000
SPACE_SDKS = ("gradio", "docker", "static", "streamlit")
TASKS = (
    "image-segmentation",
    "image-to-image",
    "object-detection",
    "image-classification",
    "image-to-text",
    "image-text-to-text",
)
COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")


@dataclass(frozen=True)
class Blob:
    content: bytes
    lfs: bool

    @property
    def oid(self):
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    type: str
    id: str
    private: bool = False
    sdk: str | None = None
    commits: dict = field(default_factory=dict)  # sha -> {path: Blob}
    messages: list = field(default_factory=list)
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)

    def commit(self, files, message, branch="main"):
        sha = hashlib.sha1(f"{self.type} {self.id} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision):
        revision = unquote(revision)
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


class HubError(Exception):
    def __init__(self, status, message, code=""):
        super().__init__(message)
        self.status, self.code = status, code


class LoopbackHub:
    """The server; `repos` is keyed by (type, id), `requests` lists (method, path) of all that was asked.

    The commits with the numbers `failing_commits`, counted from 1, are answered by a server error.
    """

    def __init__(self, user="me"):
        self.user = user
        self.repos, self.objects, self.requests = {}, {}, []
        self.commits, self.failing_commits = 0, set()
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        # LFS objects are on a separate host, as on the Hub. Clients must not follow the redirect when they ask for
        # the metadata of a file, and must not send their token to that host.
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    def __enter__(self):
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def env(self, home, *, token=TOKEN):
        """The environment of a client process: this server, an empty cache, and the token or none."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**kept, **proxies, **own, "HF_HUB_DISABLE_TELEMETRY": "1", **({"HF_TOKEN": token} if token else {})}

    def files(self, repo_id, revision="main", *, type="model"):
        repo = self.repos[type, repo_id]
        return {path: blob.content for path, blob in repo.commits[repo.resolve(revision)].items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("DELETE", r"/api/repos/delete", "delete"),
        ("POST", r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/tag/([^/]+)", "tag"),
        ("POST", r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/paths-info/([^/]+)", "paths_info"),
        ("GET", r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("GET", r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("POST", r"/(datasets/|spaces/|)([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/upload/([0-9a-f]{64})", "lfs_upload"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("GET", r"/lfs/objects/([0-9a-f]{64})", "lfs_download"),
        ("GET", r"/(datasets/|spaces/|)([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def _answer(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        # Read the body first: on a connection that is kept, it would be taken for the next request.
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method = "GET" if self.command == "HEAD" else self.command
        self.hub.requests.append((self.command, url.path))
        try:
            for known, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and known == method:
                    with self.hub.lock:
                        return getattr(self, name)(*match.groups())
            raise HubError(404, f"{self.command} {url.path} is not spoken here")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)} if error.code else {}
            self.send({"error": str(error)}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, *args):
        pass

    def send(self, content, status=200, headers=None):
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Token and path of a request

    @property
    def authorized(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def require_token(self):
        if not self.authorized:
            raise HubError(401, "Invalid username or password.")

    def refuse_token(self):
        if self.headers.get("Authorization"):
            raise HubError(400, "A token was sent to the storage host.")

    def repo(self, kind, repo_id, *, write=False):
        if write:
            self.require_token()
        repo = self.hub.repos.get((kind.strip("/").removesuffix("s") or "model", repo_id))
        if repo is None or repo.private and not self.authorized:
            raise HubError(404 if self.authorized else 401, "Repository not found", "RepoNotFound")
        return repo

    def whoami(self):
        self.require_token()
        self.send({"type": "user", "name": self.hub.user, "fullname": self.hub.user, "orgs": [], "auth": {}})

    def validate_yaml(self):
        asked = json.loads(self.body)
        errors = list(_card_errors(asked["content"], asked.get("repoType", "model")))
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.send(answer, 400 if errors else 200)

    # Repositories

    def create(self):
        self.require_token()
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.hub.user
        if owner != self.hub.user:
            raise HubError(403, f"You don't have the rights to create a repository under the namespace {owner!r}")
        kind, repo_id = asked.get("type", "model"), f"{owner}/{asked['name']}"
        url = f"{self.hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            return self.send({"error": "You already created this repo", "url": url}, 409)
        repo = Repo(kind, repo_id, private=asked.get("visibility") == "private", sdk=asked.get("sdk"))
        attributes = "\n".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text" for pattern in LFS_PATTERNS)
        repo.commit({".gitattributes": Blob(attributes.encode(), lfs=False)}, "initial commit")
        self.hub.repos[kind, repo_id] = repo
        self.send({"url": url, "name": repo_id, "id": repo_id})

    def delete(self):
        self.require_token()
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        self.repo(asked.get("type", "model"), repo_id)
        del self.hub.repos[asked.get("type", "model"), repo_id]
        self.send({})

    def info(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id)
        sha = repo.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        common = {"_id": "0", "id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}
        self.send({**common, "downloads": 0, "likes": 0, "disabled": False, "gated": False, "sdk": repo.sdk})

    def refs(self, kind, repo_id):
        repo = self.repo(kind, repo_id)
        named = {
            key: [{"name": name, "ref": f"refs/{ref}/{name}", "targetCommit": sha} for name, sha in found.items()]
            for key, ref, found in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
        }
        self.send({**named, "converts": []})

    def tag(self, kind, repo_id, revision):
        repo, name = self.repo(kind, repo_id, write=True), json.loads(self.body)["tag"]
        if name in repo.tags:
            raise HubError(409, f"Tag reference exists already: {name}")
        repo.tags[name] = repo.resolve(revision)
        self.send({})

    def branch(self, kind, repo_id, name):
        repo, asked = self.repo(kind, repo_id, write=True), json.loads(self.body or b"{}")
        if unquote(name) in repo.branches:
            raise HubError(409, f"Reference already exists: {name}")
        repo.branches[unquote(name)] = repo.resolve(asked.get("startingPoint", "main"))
        self.send({})

    # Writing files

    def preupload(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id, write=True)
        present = repo.commits[repo.resolve(revision)]
        files = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            lfs = asked["size"] > LFS_BYTES or any(fnmatch(path, pattern) for pattern in LFS_PATTERNS)
            oid = present[path].oid if path in present else None
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        self.send({"files": files})

    def lfs_batch(self, kind, repo_id):
        self.repo(kind or "models", repo_id, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.storage}/lfs/upload/{asked['oid']}"}
            verify = {"href": f"{self.hub.endpoint}/lfs/verify"}
            actions = {} if asked["oid"] in self.hub.objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append({**asked, **actions})
        self.send({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        self.refuse_token()
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the promised sha256.")
        self.hub.objects[oid] = self.body
        self.send(b"")

    def lfs_verify(self):
        asked = json.loads(self.body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(404, "Object not found or of another size.")
        self.send({})

    def commit(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id, write=True)
        self.hub.commits += 1
        if self.hub.commits in self.hub.failing_commits:
            raise HubError(500, "Internal error")
        branch = unquote(revision)
        files = dict(repo.commits[repo.resolve(branch)])
        message = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise HubError(400, f"{value['path']}: its LFS object was never uploaded.")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], lfs=True)
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            elif entry["key"] == "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
        sha = repo.commit(files, message, branch)
        prefix = "" if repo.type == "model" else f"{repo.type}s/"
        self.send({"commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{prefix}{repo_id}/commit/{sha}"})

    # Reading files

    def entry(self, path, blob):
        entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
        return (
            {**entry, "lfs": {"oid": blob.oid, "size": len(blob.content), "pointerSize": 134}} if blob.lfs else entry
        )

    def tree(self, kind, repo_id, revision, folder):
        repo = self.repo(kind, repo_id)
        files, prefix = repo.commits[repo.resolve(revision)], f"{unquote(folder)}/" if folder else ""
        found = {path: blob for path, blob in files.items() if path.startswith(prefix)}
        if prefix and not found:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = sorted({prefix + path.removeprefix(prefix).split("/")[0] for path in found} - found.keys())
        entries = [
            self.entry(path, blob)
            for path, blob in sorted(found.items())
            if recursive or "/" not in path.removeprefix(prefix)
        ]
        self.send([{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders] + entries)

    def paths_info(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id)
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        files = repo.commits[repo.resolve(revision)]
        self.send([self.entry(path, files[path]) for path in paths if path in files])

    def resolve(self, kind, repo_id, revision, path):
        repo = self.repo(kind or "models", repo_id)
        sha = repo.resolve(revision)
        blob = repo.commits[sha].get(unquote(path))
        if blob is None:
            self.send(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            linked = {"X-Linked-ETag": f'"{blob.oid}"', "X-Linked-Size": len(blob.content)}
            location = f"{self.hub.storage}/lfs/objects/{blob.oid}"
            return self.send(b"", 302, {**headers, **linked, "Location": location})
        self.send_range(blob.content, headers)

    def lfs_download(self, oid):
        self.refuse_token()
        if oid not in self.hub.objects:
            raise HubError(404, "Object not found.")
        self.send_range(self.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def send_range(self, content, headers):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self.send(content, 200, headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        if start >= len(content):
            return self.send(b"", 416, {"Content-Range": f"bytes */{len(content)}"})
        self.send(content[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


def _card_errors(text, repo_type):
    """List the errors that the Hub would report in the metadata of a README, for the fields that we write."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        yield f"Invalid YAML: {error}"
        return
    if not isinstance(data, dict):
        yield "The metadata is not a mapping."
        return
    if not isinstance(data.get("license", ""), (str, list)):
        yield '"license" must be a string'
    for key in ("tags", "datasets", "metrics"):
        if not all(isinstance(item, str) for item in data.get(key) or []):
            yield f'"{key}" must be a list of strings'
    if repo_type == "dataset":
        yield from _dataset_errors(data)
    if repo_type == "space":
        if data.get("sdk") not in SPACE_SDKS:
            yield f'"sdk" must be one of {SPACE_SDKS}'
        for key in ("colorFrom", "colorTo"):
            if data.get(key, "red") not in COLORS:
                yield f'"{key}" must be one of {COLORS}'
    for model in data.get("model-index") or []:
        if not model.get("name"):
            yield '"model-index[0].name" is required'
        for result in model.get("results") or []:
            if not (result.get("task") or {}).get("type"):
                yield '"model-index[0].results[0].task.type" is required'
            for key in ("name", "type"):
                if not (result.get("dataset") or {}).get(key):
                    yield f'"model-index[0].results[0].dataset.{key}" is required'
            for metric in result.get("metrics") or []:
                if not metric.get("type") or metric.get("value") is None:
                    yield "a metric needs a type and a value"


def _dataset_errors(data):
    """List the errors in the fields of a dataset."""
    sizes = data.get("size_categories") or []
    for size in [sizes] if isinstance(sizes, str) else sizes:
        if not re.fullmatch(r"n<1K|\d+[KMB]<n<\d+[KMB]|n>1T", size):
            yield f'"size_categories": {size!r} is unknown'
    for task in data.get("task_categories") or []:
        if task not in TASKS:
            yield f'"task_categories": {task!r} is unknown'
    for config in data.get("configs") or []:
        if not config.get("config_name"):
            yield '"configs[0].config_name" is required'
        for files in config.get("data_files") or []:
            if not {"split", "path"} <= set(files):
                yield '"configs[0].data_files" needs a split and a path'
    info = data.get("dataset_info") or {}
    if info and not {"features", "splits", "download_size", "dataset_size"} <= set(info):
        yield '"dataset_info" is incomplete'
