"""A corpus.yaml from somebody else runs no program, opens no address and reads no file outside without a word."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from clipmill.base.errors import UserError
from clipmill.cli.app import app
from pipeline.engine.build import build, session, status
from pipeline.engine.settings import CorpusSettings, resolve
from pipeline.engine.trust import confirm
from pipeline.stages.ingest.stage import ingest_sources

# A value of each setting by which a corpus would reach outside, and words of what it may do.
REACHING = {
    "download.ytdlp_options": {"add-headers": "$HOME"},
    "download.cookies_file": "/home/somebody/cookies.txt",
    "download.cookies_from_browser": "firefox",
    "download.proxy": "http://127.0.0.1:1",
    "download.allow_private_addresses": True,
    "download.object_store_schemes": ["s3", "file"],
    "transcribe.whisper": "/tmp/weights.pt",
    "transcribe.whisper_folder": "/tmp",
    "segment.punctuate": "evil.module:run",
    "caption.captioner": "evil.module:run",
    "caption.model": "local-dir:/tmp/model",
    "caption.pretrained": "/tmp/weights.pt",
    "caption.options": {"endpoint": "http://127.0.0.1:1"},
    "score.model": "local-dir:/tmp/model",
    "score.pretrained": "/tmp/weights.pt",
    "engine.address": "ray://198.51.100.1:10001",
    "engine.allow_open_cluster": True,
}
HARMLESS = {
    "download.ytdlp_options": {"sleep-requests": 1, "extractor-args": ["youtube:lang=en"]},
    "download.object_store_schemes": ["s3", "gs"],
    "transcribe.whisper": "large-v3-turbo",
    "caption.captioner": "demo",
    "caption.pretrained": "laion2b_s13b_b90k",
    "score.model": None,
    "cut.fps": 2,
}
SMALL = ["caption.captioner=null", "score.model=null", "transcribe.whisper=null"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Make a corpus of one listed URL, which no stage has worked on."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "list.txt").write_text("http://127.0.0.1:1/a.mp4\n")
    with session(folder / "corpus", None, SMALL, "test", create=True) as (current, _):
        ingest_sources(current, [str(folder / "list.txt")])
        current.publish()
    return folder / "corpus"


@pytest.fixture
def corpus(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "corpus")


def rewrite(corpus: Path, values: dict) -> None:
    """Change settings in corpus.yaml as somebody else would."""
    content = yaml.safe_load((corpus / "corpus.yaml").read_text())
    for name, value in values.items():
        section, key = name.split(".")
        content["settings"][section][key] = value
    (corpus / "corpus.yaml").write_text(yaml.safe_dump(content))


def run(corpus: Path, *assignments: str, stages=("download",)):
    return build(corpus, [], stages=list(stages), recipe=None, assignments=list(assignments), command="test")


def reaching(values: dict) -> set[str]:
    data = CorpusSettings().model_dump(mode="json")
    for name, value in values.items():
        section, key = name.split(".")
        data[section][key] = value
    return {each.name for each in CorpusSettings.model_construct(
        **{name: type(getattr(CorpusSettings(), name)).model_construct(**part) for name, part in data.items()}
    ).reaching_out()}  # fmt: skip


def test_every_setting_that_reaches_outside_is_known():
    assert reaching(REACHING) == set(REACHING)
    assert reaching(HARMLESS) == set() == {each.name for each in CorpusSettings().reaching_out()}
    declared = {
        f"{section}.{name}"
        for section, field in CorpusSettings.model_fields.items()
        for name, each in field.annotation.model_fields.items()
        if "reaches" in (each.json_schema_extra or {})
    }
    assert declared == set(REACHING)


def test_the_page_lists_them():
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    section = page.partition("## A corpus from somebody else")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+\.\w+)`", section)) >= set(REACHING)


def test_a_new_setting_that_names_a_place_has_to_say_if_it_reaches_outside():
    """A guard for whoever adds a setting: these words in a name mean a file, an address or code."""
    words = re.compile(r"file|folder|path|dir$|address|url|host|endpoint|proxy|cookie|browser|module|captioner|command")
    harmless = {"ingest.url_column", "download.reference_local_files", "download.per_host"}
    for section, field in CorpusSettings.model_fields.items():
        for name, each in field.annotation.model_fields.items():
            if words.search(name) and f"{section}.{name}" not in harmless:
                assert "reaches" in (each.json_schema_extra or {}), f"{section}.{name}"


@pytest.mark.parametrize("name", [name for name in REACHING if name.startswith(("download", "engine", "caption.capt"))])
def test_a_foreign_setting_is_refused_before_any_work(corpus, name):
    rewrite(corpus, {name: REACHING[name]})
    with pytest.raises(UserError, match=rf"not saved by you on this machine[\s\S]*  {name} = .*\n.*clipmill trust"):
        run(corpus)
    assert not list((corpus / "fragments").glob("runs/*")), "no work has begun"


def test_code_named_by_a_foreign_corpus_is_not_imported_by_any_command(corpus, tmp_path, monkeypatch):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "__init__.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')")
    (tmp_path / "evil" / "module.py").write_text("def run(settings): ...")
    monkeypatch.syspath_prepend(tmp_path)
    rewrite(corpus, {"caption.captioner": "evil.module:run"})
    for command in (
        ["build", "--corpus"],
        ["run", "cut", "--corpus"],
        ["compact"],
        ["forget", "--yes", "--url", "http://127.0.0.1:1/a.mp4"],
    ):
        result = CliRunner().invoke(app, [*command, str(corpus)])
        assert isinstance(result.exception, UserError), command
    result = CliRunner().invoke(app, ["status", str(corpus)])
    assert result.exit_code == 0 and "caption.captioner" in result.output and "not yours" in result.output
    assert not (tmp_path / "RAN").exists()
    assert CliRunner().invoke(app, ["trust", str(corpus)]).exit_code == 0
    CliRunner().invoke(app, ["status", str(corpus)])
    assert (tmp_path / "RAN").exists(), "this test could fail"


def test_what_needs_no_foreign_setting_works_without_a_question(corpus):
    rewrite(corpus, {"download.allow_private_addresses": True, "engine.address": "ray://198.51.100.1:10001"})
    with session(corpus, None, [], "test", create=False) as (current, _):
        current.publish()
    assert status(corpus, []).counts["download"]["pending"] == 1
    assert run(corpus, stages=["cut"]).engine.num_done == 0, "nothing to cut"


def test_one_confirmation_is_enough_also_for_copies(corpus, tmp_path):
    rewrite(corpus, {"download.allow_private_addresses": True, "caption.pretrained": "/tmp/weights.pt"})
    assert [each.name for each in confirm(corpus)] == ["download.allow_private_addresses", "caption.pretrained"]
    assert confirm(corpus) == []
    shutil.move(corpus, tmp_path / "moved")
    with session(tmp_path / "moved", None, ["cut.fps=2"], "test", create=False) as (current, _):
        assert current.trust.untrusted == ()
    rewrite(tmp_path / "moved", {"caption.pretrained": "/tmp/other.pt"})
    with session(tmp_path / "moved", None, [], "test", create=False) as (current, _):
        assert [each.name for each in current.trust.untrusted] == ["caption.pretrained"]


def test_the_users_own_corpus_asks_nothing(tmp_path):
    settings = ["download.allow_private_addresses=true", "engine.address=auto", *SMALL]
    for assignments in (settings, [], ["download.proxy=http://127.0.0.1:9"], []):
        with session(tmp_path / "corpus", None, assignments, "test", create=True) as (current, _):
            assert current.trust.untrusted == ()


def test_a_setting_given_again_is_confirmed_alone(corpus):
    rewrite(corpus, {"download.allow_private_addresses": True, "download.proxy": "http://127.0.0.1:1"})
    with session(corpus, None, ["download.allow_private_addresses=true"], "test", create=False) as (current, _):
        assert [each.name for each in current.trust.untrusted] == ["download.proxy"]
    with session(corpus, None, [], "test", create=False) as (current, _):
        assert [each.name for each in current.trust.untrusted] == ["download.proxy"]


def test_another_user_does_not_inherit_the_marks(tmp_path, monkeypatch):
    root = tmp_path / "corpus"
    with session(root, None, ["download.allow_private_addresses=true", *SMALL], "test", create=True):
        pass
    first = yaml.safe_load((root / "corpus.yaml").read_text())["trusted"]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    assert [each.name for each in confirm(root)] == ["download.allow_private_addresses"]
    both = yaml.safe_load((root / "corpus.yaml").read_text())["trusted"]
    (name,) = both
    assert both[name][0] == first[name][0] and len(both[name]) == 2, "two machines do not ask in turn"


@pytest.mark.parametrize("marks", ["x", 1, ["a"], {"download.proxy": "x"}, {"download.proxy": [1, None]}, {1: [2]}])
def test_marks_of_any_shape_confirm_nothing(corpus, marks):
    rewrite(corpus, {"download.proxy": "http://127.0.0.1:1"})
    content = yaml.safe_load((corpus / "corpus.yaml").read_text())
    (corpus / "corpus.yaml").write_text(yaml.safe_dump(content | {"trusted": marks}))
    with session(corpus, None, [], "test", create=False) as (current, _):
        assert [each.name for each in current.trust.untrusted] == ["download.proxy"]


def test_a_refused_option_of_yt_dlp_is_not_saved(corpus):
    before = (corpus / "corpus.yaml").read_text()
    with pytest.raises(UserError, match="exec cannot be set"):
        run(corpus, "download.ytdlp_options={exec: touch RAN}")
    assert (corpus / "corpus.yaml").read_text() == before
    assert resolve(None, None, ["download.ytdlp_options={a: 1}"]), "an old corpus with one still opens"
