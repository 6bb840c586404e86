"""Names of the Hub from the first question to the first call: what is fetched when, and that it fails closed."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = "a" * 40
ALLOWED = {"HF_HUB_OFFLINE": "1", "ATTNREG_KERNELS_ALLOW": "org/*"}
EVIL = "raise SystemExit('this must not run')"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, put) -> Path:
    """A cache with kernels that work, that need others, and that do not work."""
    folder = tmp_path_factory.mktemp("hub")
    put(folder, "org/attn")
    put(folder, "org/needy", needs=({"repo-id": "evil/lib", "version": 1},))
    put(folder, "evil/lib", source=EVIL)
    put(folder, "org/deep", needs=({"repo-id": "org/needy", "revision": COMMIT},))
    put(folder, "org/elsewhere", variant="torch28-cxx11-cu118-x86_64-linux")
    put(folder, "org/raises", source="raise RuntimeError('no such driver')")
    put(folder, "org/quits", source="import sys; sys.exit(3)")
    return folder


@pytest.fixture(scope="module")
def trusting(cache: Path, outcomes) -> dict[str, Any]:
    """What happens offline where everything but evil/lib is trusted by name."""
    code = """
    import pickle
    results["listed"] = attnreg.names()
    results["imported by listing"] = sorted({"attnreg_kernels.provision", "kernels"} & set(sys.modules))
    for repository in ("attn", "needy", "deep", "elsewhere", "raises", "quits", "missing"):
        declare(f"org/{repository}")
    backend = attnreg.get("org/attn@v1")
    results["imported by get"] = sorted({"kernels", "_org_attn"} & set(sys.modules))
    results["origin"] = str(backend.origin)
    results["again"] = attnreg.get("org/attn@v1") is backend
    results["pickled"] = pickle.loads(pickle.dumps(backend)) is backend
    results["explained"] = attnreg.explain(only="org/attn@v1").winner
    results["auto"] = attnreg.explain(attnreg.Request(device="cpu", dtype="bfloat16")).winner
    names = ["org/attn@v1", "org/attn@1", "org/attn@main", "org/attn@" + "a" * 40, "org/attn@v1:flash_attn_func"]
    results["loaded"] = [load(name) for name in names]
    results["version"] = backend.kernel.version()
    import torch
    q = torch.randn(1, 2, 5, 16).bfloat16()
    found = attnreg.attention(q, q, q, impl="org/attn@v1")
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    results["computed"] = bool(torch.allclose(found, expected, atol=0.05))
    for name in ("org/attn@v2", "org/missing@main", "org/needy@v1", "org/deep@v1", "org/elsewhere@v1", "org/raises@v1",
                 "org/quits@v1"):
        results[name] = outcome(load, name)
    results["reason after failure"] = [reason.code for reason in attnreg.get("org/raises@v1").kernel.reasons()]
    """
    trusted = ",".join(f"org/{each}" for each in ("attn", "needy", "deep", "elsewhere", "raises", "quits", "missing"))
    return outcomes(code, cache, **ALLOWED, ATTNREG_KERNELS_TRUST=trusted)


def test_listing_and_asking_fetch_nothing(trusting: dict[str, Any]) -> None:
    """Names of the Hub are not listed; asking for one makes a record, and imports neither `kernels` nor the kernel."""
    assert not any("/" in name for name in trusting["listed"])
    assert trusting["imported by listing"] == []
    assert trusting["imported by get"] == []
    assert trusting["version"] == "0.17.2"


def test_the_package_is_light(tmp_path: Path, outcomes) -> None:
    """Importing it, and saying what has to be said, imports neither torch nor the Hub's libraries."""
    code = """
    attnreg_kernels.allow("org/*"); attnreg_kernels.trust("org/attn"); declare("org/attn")
    results["imported"] = sorted({"torch", "kernels", "huggingface_hub"} & set(sys.modules))
    """
    assert outcomes(code, tmp_path)["imported"] == []


def test_the_record_is_one_like_any_other(trusting: dict[str, Any]) -> None:
    """It is the plugin's, the same each time, pickled by its name and explained; auto prefers what is built in."""
    assert trusting["origin"] == "attnreg-kernels 0.1.0"
    assert trusting["again"]
    assert trusting["pickled"]
    assert trusting["explained"] == "org/attn@v1"
    assert trusting["auto"] == "sdpa"


def test_a_cached_and_trusted_kernel_computes(trusting: dict[str, Any]) -> None:
    """A version, a branch and a commit all find it in the cache, and what it computes is attention."""
    assert trusting["loaded"] == ["_org_attn"] * 5
    assert trusting["computed"]


FAILURES = [
    ("org/attn@v2", ["hub_not_cached"], "org/attn at v2, offline"),
    ("org/missing@main", ["hub_not_cached"], "Call it once online, or name a commit that is in the cache"),
    ("org/needy@v1", ["hub_trust"], "evil/lib, of whose publisher nothing is known offline"),
    ("org/deep@v1", ["hub_trust"], "evil/lib, of whose publisher nothing is known offline"),
    ("org/elsewhere@v1", ["hub_build"], "Name a revision with such a build"),
    ("org/raises@v1", ["kernel_import"], "RuntimeError: no such driver"),
    ("org/quits@v1", ["kernel_import"], "SystemExit: 3"),
]


@pytest.mark.parametrize(("name", "codes", "text"), FAILURES, ids=[name for name, *_ in FAILURES])
def test_what_keeps_it_from_being_loaded(trusting: dict[str, Any], name: str, codes: list[str], text: str) -> None:
    """Each failure has a code and a remedy of its own; what a kernel needs is trusted by itself, however deep."""
    found = trusting[name]
    assert (found["error"], found["codes"]) == ("KernelError", codes)
    assert text in found["text"]


def test_a_failure_is_a_reason_afterwards(trusting: dict[str, Any]) -> None:
    """Selection and `explain` see why the last attempt failed."""
    assert trusting["reason after failure"] == ["kernel_import"]


def test_offline_fails_closed(cache: Path, outcomes) -> None:
    """What `kernels` would run from the cache without asking anybody is refused: allowed is not trusted."""
    code = """
    declare("org/attn"); declare("org/needy")
    results["reasons"] = [reason.code for reason in attnreg.get("org/attn@v1").kernel.reasons()]
    results["untrusted"] = outcome(load, "org/attn@v1")
    results["attention"] = outcome(lambda: attnreg.resolve("org/attn@v1"))
    results["ran"] = "_org_attn" in sys.modules
    attnreg_kernels.trust("org/attn")
    results["trusted"] = outcome(load, "org/attn@v1")
    attnreg_kernels.trust("org/needy", "evil/lib")
    results["with dependency"] = outcome(load, "org/needy@v1")
    """
    found = outcomes(code, cache, **ALLOWED)
    assert found["reasons"] == ["hub_trust"]
    assert found["untrusted"]["codes"] == ["hub_trust"]
    assert (
        "Go online (HF_HUB_OFFLINE=0); or, if you trust what is in the cache, set ATTNREG_KERNELS_TRUST=org/attn or "
        "call attnreg_kernels.trust('org/attn')." in found["untrusted"]["text"]
    )
    assert found["attention"]["error"] == "UnsupportedError"
    assert not found["ran"]
    assert found["trusted"] == "_org_attn"
    assert "SystemExit: this must not run" in found["with dependency"]["text"]


def other(cache: Path, repository: str, commit: str, put, source: str) -> None:
    """Put another commit of *repository* into the cache, which no branch is at."""
    place = f"kernels--{repository.replace('/', '--')}"
    put(cache / "elsewhere", repository, commit=commit, source=source)
    (cache / "elsewhere" / place / "snapshots" / commit).rename(cache / place / "snapshots" / commit)


def test_offline_nothing_leads_out_of_a_repository(tmp_path: Path, outcomes, put) -> None:
    """Neither a branch's file nor a dependency's revision names another repository's code, trusted or not."""
    up = "../../kernels--evil--m/snapshots/" + COMMIT
    put(tmp_path, "evil/m", source=EVIL)
    put(tmp_path, "org/attn")
    (tmp_path / "kernels--org--attn" / "refs" / "led").write_text(up)
    (tmp_path / "kernels--org--attn" / "refs" / "v3").write_text(up)
    put(tmp_path, "org/needy", needs=({"repo-id": "org/attn", "revision": f"{up}/ref"},))
    put(tmp_path, "org/proposed", needs=({"repo-id": "org/attn", "revision": "refs/pr/7"},))
    code = """
    for repository in ("attn", "needy", "proposed"):
        declare(f"org/{repository}")
    for name in ("org/attn@led", "org/attn@v3", "org/needy@v1", "org/proposed@v1"):
        results[name] = outcome(load, name)
    """
    found = outcomes(code, tmp_path, **ALLOWED, ATTNREG_KERNELS_TRUST="org/attn,org/needy,org/proposed")
    assert {name: each["codes"] for name, each in found.items()} == {name: ["hub_not_cached"] for name in found}


def test_offline_what_was_looked_at_runs(tmp_path: Path, outcomes, put) -> None:
    """A version that is two commits is refused, whichever `kernels` would take; two names of one commit are one."""
    for repository in ("org/two", "org/same", "org/legacy"):
        put(tmp_path, repository)
        other(tmp_path, repository, "b" * 40, put, EVIL)
    (tmp_path / "kernels--org--two" / "refs" / "v01").write_text("b" * 40)
    (tmp_path / "kernels--org--same" / "refs" / "v01").write_text(COMMIT)
    (tmp_path / "models--org--legacy" / "refs").mkdir(parents=True)
    (tmp_path / "models--org--legacy" / "refs" / "v1").write_text("b" * 40)
    code = """
    for repository in ("two", "same", "legacy"):
        declare(f"org/{repository}")
        results[repository] = outcome(load, f"org/{repository}@v1")
    """
    found = outcomes(code, tmp_path, **ALLOWED, ATTNREG_KERNELS_TRUST="org/two,org/same,org/legacy")
    assert found["two"]["codes"] == found["legacy"]["codes"] == ["hub_not_cached"]
    assert found["same"] == "_org_same"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"kernel-depends": [{"version": 1}]}', '{"kernel-depends": [{"repo-id": "org/x"}]}']
)
def test_offline_a_broken_cache_is_a_reason(tmp_path: Path, outcomes, put, text: str) -> None:
    """What cannot be read does not run, and stands in the way of nobody else."""
    put(tmp_path, "org/attn")
    for path in tmp_path.glob("kernels--org--attn/snapshots/*/build/*/metadata.json"):
        path.write_text(text)
    code = """
    declare("org/attn")
    results["reasons"] = [reason.code for reason in attnreg.get("org/attn@v1").kernel.reasons()]
    results["auto"] = attnreg.explain(attnreg.Request(device="cpu", dtype="bfloat16")).winner
    results["load"] = outcome(load, "org/attn@v1")
    """
    found = outcomes(code, tmp_path, **ALLOWED, ATTNREG_KERNELS_TRUST="org/attn,org/x")
    assert found["reasons"] == found["load"]["codes"] == ["hub_not_cached"]
    assert "kernels that can be looked at before they run" in found["load"]["text"]
    assert found["auto"] == "sdpa"


def test_permission_is_asked_again_at_the_first_call(cache: Path, outcomes) -> None:
    """A record that was made while its repository was allowed does not run once it is not."""
    code = """
    import os
    declare("org/attn")
    backend = attnreg.get("org/attn@v1")
    os.environ["ATTNREG_KERNELS_ALLOW"] = ""
    results["load"] = outcome(backend.kernel.load)
    """
    found = outcomes(code, cache, **ALLOWED, ATTNREG_KERNELS_TRUST="org/attn")
    assert found["load"]["codes"] == ["hub_not_allowed"]


def test_the_kernels_own_word(cache: Path, outcomes) -> None:
    """A kernel that declares itself is believed only if the user says so, and is then loaded to be asked."""
    code = """
    results["not asked for"] = outcome(attnreg.get, "org/attn@v1:flash_attn_func")
    results["ran"] = "_org_attn" in sys.modules
    attnreg_kernels.declare("org/attn", convention=attnreg_kernels.OWN)
    supports = attnreg.get("org/attn@v1:flash_attn_func").supports
    results["supports"] = sorted(supports.devices), supports.softcap, supports.lse
    for function in ("nonsense", "adapted", "attend", ""):
        results[function] = outcome(attnreg.get, f"org/attn@v1:{function}".rstrip(":"))
    """
    found = outcomes(code, cache, **ALLOWED, ATTNREG_KERNELS_TRUST="org/attn")
    assert found["not asked for"]["codes"] == ["hub_undeclared"]
    assert not found["ran"]
    assert found["supports"] == [["cpu"], True, False]
    for function in ("nonsense", "adapted", "attend", ""):
        assert found[function]["codes"] == ["hub_undeclared"], function
    assert "what its __attnreg__ declares: adapted, flash_attn_func, nonsense" in found["attend"]["text"]
    assert (
        "Name the function: org/attn@v1:flash_attn_func; or say what it does: attnreg_kernels.declare('org/attn', "
        "function='flash_attn_func', convention='flash_attn_2')." in found[""]["text"]
    )
    assert "words that mean something" in found["nonsense"]["text"]


class _Hub(BaseHTTPRequestHandler):
    """Says of `good` that it is a trusted publisher, of `bad` that it is not, and has nothing else."""

    def do_GET(self) -> None:
        known = {"/api/organizations/good/overview": True, "/api/organizations/bad/overview": False}
        body = {"name": "x", "fullname": "x", "avatarUrl": "x", "trustedKernelPublisher": known.get(self.path)}
        self.send_response(200 if self.path in known else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body if self.path in known else {"error": "not found"}).encode())

    do_HEAD = do_GET  # noqa: N815 - the server looks for this name

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the server's own word
        """Keep quiet."""


@pytest.fixture
def hub():
    """The address of a server that answers as the Hub does."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_online_the_publisher_is_asked_about(tmp_path: Path, hub: str, outcomes) -> None:
    """A publisher that the Hub does not vouch for is refused; if it does, or the user, the download begins."""
    code = """
    for repository in ("good/attn", "bad/attn", "mine/attn", "unknown/attn"):
        declare(repository)
        results[repository] = outcome(load, f"{repository}@v1")
    """
    allowed = {"ATTNREG_KERNELS_ALLOW": "*/attn", "ATTNREG_KERNELS_TRUST": "mine/attn", "HF_HUB_OFFLINE": "0"}
    found = outcomes(code, tmp_path, HF_ENDPOINT=hub, **allowed)
    assert {name: each["codes"] for name, each in found.items()} == {
        "good/attn": ["hub_download"],
        "bad/attn": ["hub_trust"],
        "mine/attn": ["hub_download"],
        "unknown/attn": ["hub_trust"],
    }
    assert "If you trust its code, set ATTNREG_KERNELS_TRUST" in found["bad/attn"]["text"]


def test_no_network_fails_closed(cache: Path, outcomes) -> None:
    """Nobody answers, and nobody said that this is offline: the cache is not used on nobody's word."""
    code = """
    declare("org/attn"); declare("org/deep")
    results["untrusted"] = outcome(load, "org/attn@v1")
    attnreg_kernels.trust("org/attn")
    results["trusted"] = outcome(load, "org/attn@v1")
    results["reasons"] = attnreg.get("org/attn@v1").kernel.reasons()
    """
    found = outcomes(code, cache, ATTNREG_KERNELS_ALLOW="org/*", HF_HUB_OFFLINE="0")
    assert found["reasons"] == []  # the next attempt may reach it
    assert found["untrusted"]["codes"] == ["hub_trust"]
    assert found["trusted"]["codes"] == ["hub_download"]
