"""Secrets are planted wherever one can enter a build; no file of the corpus holds one of them."""

import json
from pathlib import Path

import pytest
import yaml

from clipmill.base.errors import UserError
from pipeline.engine import registry
from pipeline.engine.build import Silent, session
from pipeline.maintenance.forget import compact, find, forget
from pipeline.runtime.task import execute
from pipeline.stages.ingest.stage import ingest_sources
from pipeline.stages.pack import pack_corpus
from shards.packing.verify import verify
from shards.query.sql import open_manifest
from tests.helpers.builds import ask
from tests.helpers.http import make_video, media_server
from tests.packing.test_forget_leaves_nothing import decoded_values

SETTINGS = [
    "download.allow_private_addresses=true", "download.retries=0", "download.stall_timeout_s=600",
    "transcribe.whisper=null", "score.model=null", "cut.short_side=96", "cut.timeout_base_s=600",
    "caption.captioner=tests.helpers.plain_captioner:Plain",
]  # fmt: skip


def canary(number: int) -> str:
    """Return a secret that occurs nowhere else."""
    return f"c4nary{number:02d}Zq81Vx07Lm55Rt"


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def server():
    with media_server() as media:
        yield media


def build(root: Path, rows: list[dict] | None, *settings: str, command: str = "clipmill build"):
    """Run every stage in this process, as the driver and the workers do; return the ingest report."""
    report = None
    with session(root, None, [*SETTINGS, *settings], command, create=True) as (current, _):
        if rows is not None:
            path = root.parent / "list.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            report = ingest_sources(current, [str(path)])
        current.record_run(ended=False)
        engine = current.engine([stage.name for stage in registry.stages()])
        for stage in engine.stages:
            current.refresh_state()
            units = current.ledger.unit_of_work(stage.name) if current.ledger.has_work(stage.name) else {}
            by_unit: dict[str, list] = {}
            for item in current.ledger.work(stage.name) if units else []:
                by_unit.setdefault(units[item["item_id"]], []).append(item)
            for unit, items in by_unit.items():
                engine.ledger.load([execute(stage.run, engine._task(stage, unit, items)).name])
        current.publish()
        pack_corpus(current, Silent(), write=True, redo=False)
        current.record_run(ended=True)
        current.publish()
    return report


def leaks(root: Path, secrets: list[str]) -> list[tuple[str, str]]:
    """Return (file, secret) for each secret in the names, bytes or values of the corpus's files."""
    found = []
    for path in sorted(root.rglob("*")):
        if path.is_file():
            content = str(path).encode() + path.read_bytes() + decoded_values(path)
            found += [(str(path.relative_to(root)), secret) for secret in secrets if secret.encode() in content]
    return found


def video(folder: Path, seconds: float) -> bytes:
    return make_video(folder / f"{seconds}.mp4", duration_s=seconds)


@pytest.mark.slow
def test_no_file_of_a_corpus_holds_a_planted_secret(server, tmp_path):
    echo = f"<html>you sent Cookie: session={canary(5)} and X-Token {canary(11)}</html>".encode()
    films = {name: video(tmp_path, 2 + number / 4) for number, name in enumerate("abcd")}
    for name in "abc":
        server.add(f"/{name}.mp4", films[name])
    server.add("/moved.mp4", status=302, headers={"Location": server.url("/d.mp4") + f"?sig={canary(4)}"})
    server.add("/d.mp4", films["d"])
    server.add("/echo.mp4", echo, content_type="text/html")
    server.add("/a.vtt", b"WEBVTT\n\n00:00.000 --> 00:01.500\nhello there\n", content_type="text/vtt")
    cookies = tmp_path / "cookies.txt"
    cookies.write_text(f"# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t0\tsession\t{canary(5)}\n")
    host = f"127.0.0.1:{server.port}"
    rows = [
        {"id": "signed", "url": server.url("/a.mp4") + f"?v=1&token={canary(1)}",
         "subtitle": server.url("/a.vtt") + f"?token={canary(6)}",
         "thumbnail": f"https://cdn.example/a.jpg?X-Amz-Signature={canary(7)}", "password": canary(8)},
        {"id": "userinfo", "url": f"http://somebody:{canary(2)}@{host}/b.mp4"},
        {"url": server.url("/c.mp4") + f"?Expires=1&Signature={canary(13)}"},
        {"id": "missing", "url": server.url("/none.mp4") + f"?X-Amz-Signature={canary(3)}"},
        {"id": "silent", "url": f"http://a:{canary(14)}@127.0.0.1:1/x.mp4?access_token={canary(15)}"},
        {"id": "moved", "url": server.url("/moved.mp4")},
        {"id": "echo", "url": server.url("/echo.mp4")},
        {"id": "bad", "url": f"http://user:{canary(9)}/x@[host/a.mp4"},
        {"id": "scheme", "url": f"ftp://user:{canary(16)}@host/a.mp4"},
    ]  # fmt: skip
    root = tmp_path / "corpus"
    build(
        root,
        rows,
        f"download.cookies_file={cookies}",
        f"download.ytdlp_options={{password: {canary(10)}, add-headers: 'X-Token:{canary(11)}'}}",
        f"caption.options={{api_key: {canary(12)}}}",
        command=f"clipmill build {rows[0]['url']} --set download.proxy=http://u:{canary(17)}@127.0.0.1:1 "
        f"--set download.ytdlp_options.password={canary(10)}",
    )
    failed = dict(ask(root, "SELECT item_id, error_class FROM failures WHERE stage = 'download'"))
    assert failed == {
        "missing": "not-found", "silent": "connection", "echo": "not-a-video", "scheme": "unsupported-url",
    }  # fmt: skip
    assert len(ask(root, "SELECT 1 FROM samples")) == 4, "the secrets were used: each film is in a shard"
    assert server.requests_for("/b.mp4")[0]["Authorization"].startswith("Basic ")
    assert any(f"token={canary(1)}" in path for path, _ in server.requests)
    assert ask(root, "SELECT url FROM videos WHERE video_id = 'userinfo'") == [(f"http://REMOVED@{host}/b.mp4",)]
    assert leaks(root, [canary(number) for number in range(1, 18)]) == []
    with open_manifest(root) as connection:
        assert verify(root, connection) == []
    assert leaks(tmp_path / "state", [canary(1), canary(10)]), "they are in the user's state folder: this test can fail"
    for path in (tmp_path / "state").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0 or path.parent == tmp_path, path


def test_the_password_of_a_proxy_is_kept_elsewhere_and_in_no_message(tmp_path):
    rows = [{"id": "a", "url": "http://192.0.2.1/a.mp4"}]
    plain = f"download.proxy=http://somebody:{canary(1)}@127.0.0.1:1"
    build(tmp_path / "corpus", rows, plain)
    saved = (tmp_path / "corpus" / "corpus.yaml").read_text()
    build(tmp_path / "corpus", None, plain)
    assert (tmp_path / "corpus" / "corpus.yaml").read_text() == saved, "the same password is not a change"
    ((error, message),) = ask(tmp_path / "corpus", "SELECT error_class, message FROM failures")
    assert error == "connection" and "127.0.0.1" in message
    assert leaks(tmp_path / "corpus", [canary(1)]) == []


@pytest.mark.parametrize("where", ["environment", "file"])
def test_a_setting_names_where_its_secret_is(where, server, tmp_path, monkeypatch):
    secret = f"http://somebody:{canary(1)}@127.0.0.1:{server.port}"
    monkeypatch.setenv("MY_PROXY", secret)
    (tmp_path / "proxy.txt").write_text(secret + "\n")
    reference = {"environment": "$MY_PROXY", "file": f"file:{tmp_path}/proxy.txt"}[where]
    rows = [{"id": "a", "url": "http://192.0.2.1/a.mp4"}]
    build(tmp_path / "corpus", rows, f"download.proxy={reference}")
    assert (
        yaml.safe_load((tmp_path / "corpus" / "corpus.yaml").read_text())["settings"]["download"]["proxy"] == reference
    )
    assert server.requests, "the proxy was asked"
    assert leaks(tmp_path / "corpus", [canary(1)]) == []
    monkeypatch.delenv("MY_PROXY")
    (tmp_path / "proxy.txt").unlink()
    with pytest.raises(UserError, match=r"download.proxy = .*(is not set|cannot be read)"):
        build(tmp_path / "corpus", [{"id": "b", "url": "http://192.0.2.1/b.mp4"}])


def test_a_new_signature_is_tried_when_the_list_is_given_again(server, tmp_path):
    film = video(tmp_path, 2)
    server.add("/a.mp4", film, failures=[(403, {})])

    def row(number: int) -> dict:
        return {"id": "a", "url": server.url("/a.mp4") + f"?X-Amz-Date={number}&X-Amz-Signature={canary(number)}"}

    assert build(tmp_path / "corpus", [row(1)]).num_new == 1
    build(tmp_path / "corpus", [row(1)])
    assert len(server.requests) == 1, "the same signature is not tried again"
    report = build(tmp_path / "corpus", [row(2)])
    assert (report.num_new, report.num_duplicates, report.num_problems) == (0, 1, 0)
    assert [path.partition("Signature=")[2] for path, _ in server.requests] == [canary(1), canary(2)]
    assert ask(tmp_path / "corpus", "SELECT count(*) FROM samples") == [(1,)]
    assert leaks(tmp_path / "corpus", [canary(1), canary(2)]) == []


def test_without_the_full_url_the_failure_says_what_to_do(server, tmp_path, state):
    server.add("/a.mp4", video(tmp_path, 2), failures=[(503, {})])
    rows = [{"id": "a", "url": server.url("/a.mp4") + f"?token={canary(1)}"}]
    build(tmp_path / "corpus", rows)
    (state / "clipmill" / "urls.sqlite").unlink()
    build(tmp_path / "corpus", None)
    ((error, message),) = ask(tmp_path / "corpus", "SELECT error_class, message FROM failures")
    assert error == "login-required" and "give the list again" in message
    build(tmp_path / "corpus", rows)
    assert ask(tmp_path / "corpus", "SELECT count(*) FROM samples") == [(1,)]


def test_rows_that_differ_in_their_token_alone_are_two_sources(server, tmp_path):
    """A token may name the video, so without ids such rows are not taken for one."""
    rows = [{"url": server.url("/get.mp4") + f"?token={canary(number)}"} for number in (1, 2)]
    assert build(tmp_path / "corpus", rows).num_new == 2
    assert build(tmp_path / "corpus", rows).num_new == 0


def test_a_forgotten_id_is_in_no_setting_of_a_run_and_no_state(server, tmp_path):
    server.add("/a.mp4", video(tmp_path, 2))
    server.add("/b.mp4", video(tmp_path, 3))
    url = server.url("/a.mp4") + f"?token={canary(1)}"
    root = tmp_path / "corpus"
    rows = [{"id": "video-gone", "url": url}, {"id": "video-kept", "url": server.url("/b.mp4")}]
    build(root, rows, "pack.where=video_id <> 'video-gone'", command="clipmill build --set pack.where=video-gone")
    build(root, None, "pack.where=")
    assert any("runs" in name for name, _ in leaks(root, ["video-gone"]))
    forget(root, find(root, [], [url], None), None)
    compact(root)
    assert leaks(root, ["video-gone", canary(1)]) == []
    assert leaks(tmp_path / "state", [canary(1)]) == []
    assert build(root, rows).num_forgotten == 1
    settings = ask(root, "SELECT settings FROM runs ORDER BY started_at")[0][0]
    assert json.loads(settings)["pack"]["where"] == "video_id <> '[forgotten]'"


def test_moving_a_secret_out_of_an_old_corpus_yaml_makes_nothing_pending(server, tmp_path):
    server.add("/a.mp4", video(tmp_path, 2))
    root = tmp_path / "corpus"
    build(root, [{"id": "a", "url": server.url("/a.mp4")}])
    with session(root, None, [], "x", create=False) as (current, _):
        options = {"password": canary(1), "sleep-requests": 1}
        plain = current.settings.model_copy(
            update={"download": current.settings.download.model_copy(update={"ytdlp_options": options})}
        )
        before = registry.fingerprints(plain)
        current.corpus.save_settings(plain.model_dump(mode="json"))
    with session(root, None, [], "x", create=False) as (current, _):
        assert registry.fingerprints(current.settings) == before
        assert current.settings.download.ytdlp_options["password"].startswith("kept:")
        assert current.settings.revealed().download.ytdlp_options == options
    assert leaks(root, [canary(1)]) == []
