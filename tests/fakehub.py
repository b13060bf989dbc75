"""A stand-in for the Hub: a local HTTP server with repositories in memory. It can ask for a token, cut, and refuse."""
import base64
import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".parquet", ".mp4", ".safetensors", ".npz")


def is_lfs(name): return name.endswith(LFS)


def git_sha1(data): return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(name, data):
    "A file as the tree listing shows it."
    found = {"type": "file", "path": name, "size": len(data), "oid": git_sha1(data)}
    if is_lfs(name): found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return found


class Repo:
    "Commits (name -> bytes), branches and tags."
    def __init__(self): self.commits, self.refs, self.gated, self.private = {}, {"main": None}, False, False

    def commit(self, files, ref="main"):
        sha = hashlib.sha1(json.dumps([len(self.commits), sorted(files)]).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def sha(self, revision): return revision if revision in self.commits else self.refs.get(revision)


class FakeHub:
    """A server at `.url`; a context manager.

    `token`: what a request must carry. `cut`: path -> how often, and after how many bytes, its download breaks off.
    `refuse`: status with which every request is answered. `log`: (method, path, Range header). `sent`: bytes per path.
    """
    def __init__(self):
        self.repos, self.objects, self.log, self.sent = {}, {}, [], Counter()
        self.token = self.refuse = None
        self.cut, self.ranges = {}, True
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args): pass
            def do_GET(self): answer(hub, self)
            do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self): return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind, repo_id, folder, tags=()):
        "Put a folder into a repository as a new commit on main."
        repo = self.repos.setdefault((kind, repo_id), Repo())
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        sha = repo.commit(files)
        for tag in tags: repo.refs[tag] = sha
        return sha

    def files(self, kind, repo_id, revision="main"):
        repo = self.repos[kind, repo_id]
        return repo.commits[repo.sha(revision)]

    def downloads(self): return sorted(re.sub(r".*/resolve/[^/]+/", "", p) for m, p, _ in self.log if m == "GET" and "/resolve/" in p)


def send(h, status, body=b"", **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    h.send_response(status)
    for k, v in headers.items(): h.send_header(k.replace("_", "-"), v)
    if "Content_Length" not in headers: h.send_header("Content-Length", str(len(data)))
    h.end_headers()
    if h.command != "HEAD": h.wfile.write(data)


def refuse(h, status, code="", message=""):
    headers = {k: v for k, v in (("X_Error_Code", code), ("X_Error_Message", message)) if v}
    send(h, status, {"error": message or code}, **headers)


def read_body(h):
    "What the client sent, in one piece or in chunks."
    if h.headers.get("Transfer-Encoding") != "chunked": return h.rfile.read(int(h.headers.get("Content-Length") or 0))
    parts = []
    while n := int(h.rfile.readline(), 16):
        parts.append(h.rfile.read(n))
        h.rfile.readline()
    h.rfile.readline()
    return b"".join(parts)


def answer(hub, h):
    "Route one request."
    url = urlsplit(h.path)
    path, query = unquote(url.path), parse_qs(url.query)
    body = read_body(h)
    hub.log.append((h.command, path, h.headers.get("Range")))
    if hub.refuse: return refuse(h, hub.refuse)
    if m := re.fullmatch(r"/lfs/(\w+)", path): return put_object(hub, h, m[1], body)   # an address that is its own key
    given = (h.headers.get("Authorization") or "").removeprefix("Bearer ")
    if hub.token and given and given != hub.token: return refuse(h, 401, message="Invalid credentials in Authorization header")
    if hub.token and not given: return refuse(h, 401, "RepoNotFound")
    if path == "/api/repos/create": return create(hub, h, json.loads(body))
    if path == "/api/validate-yaml": return send(h, 200, {"errors": [], "warnings": []})
    if m := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path): return batch(hub, h, json.loads(body))
    if m := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
        return resolve(hub, h, "dataset" if m[1] else "model", *m.groups()[1:])
    m = re.fullmatch(r"/api/(dataset|model)s/([^/]+/[^/]+)(?:/([\w-]+)(?:/([^/]+)(?:/(.+))?)?)?", path)
    if not m: return refuse(h, 404)
    kind, name, verb, revision, rest = m.groups()
    repo = hub.repos.get((kind, name))
    if repo is None: return refuse(h, 404 if given else 401, "RepoNotFound")
    if repo.gated: return refuse(h, 403, "GatedRepo")
    api(hub, h, repo, name, verb, revision, rest, query, body)


def api(hub, h, repo, name, verb, revision, rest, query, body):
    "Requests about one repository."
    if verb == "refs":
        branches = [{"name": k, "ref": k, "targetCommit": v or "0" * 40} for k, v in repo.refs.items()]
        tags = [b for b in branches if b["name"] != "main"]
        return send(h, 200, {"branches": [b for b in branches if b["name"] == "main"], "tags": tags, "converts": []})
    if verb == "tag": return set_tag(h, repo, revision, body)
    if verb == "preupload":
        files = json.loads(body)["files"]
        return send(h, 200, {"files": [{"path": f["path"], "uploadMode": "lfs" if is_lfs(f["path"]) else "regular",
                                        "shouldIgnore": False, "oid": None} for f in files]})
    if verb == "commit": return commit(hub, h, repo, revision, body)
    sha = repo.sha(revision or "main")
    if sha is None and revision not in (None, "main"): return refuse(h, 404, "RevisionNotFound")
    files = repo.commits.get(sha, {})
    if verb == "tree":
        return send(h, 200, [entry(n, d) for n, d in sorted(files.items()) if not rest or n.startswith(rest + "/")])
    if verb == "paths-info":
        wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
        return send(h, 200, [entry(n, files[n]) for n in wanted if n in files])
    info = {"id": name, "sha": sha or "0" * 40, "private": repo.private, "tags": [], "downloads": 0, "likes": 0}
    send(h, 200, info | {"siblings": [{"rfilename": n} for n in files]})


def resolve(hub, h, kind, name, revision, path):
    "Content of a file, or its headers."
    repo = hub.repos.get((kind, name))
    if repo is None: return refuse(h, 404, "RepoNotFound")
    if repo.gated: return refuse(h, 403, "GatedRepo")
    sha = repo.sha(revision)
    if sha is None: return refuse(h, 404, "RevisionNotFound")
    if path not in repo.commits[sha]: return refuse(h, 404, "EntryNotFound")
    data, e = repo.commits[sha][path], entry(path, repo.commits[sha][path])
    etag = f'"{e["lfs"]["oid"] if is_lfs(path) else e["oid"]}"'
    first = re.fullmatch(r"bytes=(\d+)-(\d*)", h.headers.get("Range") or "") if hub.ranges else None
    start, stop = (int(first[1]), int(first[2]) + 1 if first[2] else len(data)) if first else (0, len(data))
    piece, headers = data[start:stop], {"ETag": etag, "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
    if is_lfs(path): headers |= {"X_Linked_Etag": etag, "X_Linked_Size": str(len(data))}
    if first: headers["Content_Range"] = f"bytes {start}-{start + len(piece) - 1}/{len(data)}"
    times, after = hub.cut.get(path, (0, 0))
    if times and h.command == "GET":
        hub.cut[path] = (times - 1, after)
        send(h, 206 if first else 200, piece[:after], Content_Length=str(len(piece)), **headers)
        hub.sent[path] += len(piece[:after])
        h.close_connection = True
        h.wfile.flush()
        return h.connection.shutdown(2)
    if h.command == "GET": hub.sent[path] += len(piece)
    send(h, 206 if first else 200, piece, Content_Length=str(len(piece)), **headers)


def create(hub, h, wanted):
    name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
    key = (wanted.get("type") or "model", name)
    if key in hub.repos: return send(h, 409, {"error": "exists", "url": f"{hub.url}/{name}"})
    hub.repos[key] = Repo()
    hub.repos[key].private = bool(wanted.get("private") or wanted.get("visibility") == "private")
    send(h, 200, {"url": f"{hub.url}/{'datasets/' if key[0] == 'dataset' else ''}{name}", "name": name, "id": name})


def batch(hub, h, wanted):
    objects = [{"oid": o["oid"], "size": o["size"]} | ({} if o["oid"] in hub.objects else {"actions": {
        "upload": {"href": f"{hub.url}/lfs/{o['oid']}", "header": {}}}}) for o in wanted["objects"]]
    send(h, 200, {"transfer": "basic", "objects": objects})


def put_object(hub, h, oid, body):
    if hashlib.sha256(body).hexdigest() != oid: return refuse(h, 400)
    hub.objects[oid] = body
    send(h, 200)


def commit(hub, h, repo, revision, body):
    files = dict(repo.commits.get(repo.sha(revision), {}))
    for line in body.splitlines():
        step = json.loads(line)
        v = step["value"]
        if step["key"] == "file": files[v["path"]] = base64.b64decode(v["content"])
        if step["key"] == "lfsFile": files[v["path"]] = hub.objects[v["oid"]]
        if step["key"] == "deletedFile": del files[v["path"]]
    sha, page = repo.commit(files, revision), re.sub(r"^/api/(?:models/)?|/commit/.*", "", h.path)
    send(h, 200, {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{page}/commit/{sha}"})


def set_tag(h, repo, revision, body):
    if h.command == "DELETE": del repo.refs[revision]
    else: repo.refs[json.loads(body)["tag"]] = repo.sha(revision)
    send(h, 200)
