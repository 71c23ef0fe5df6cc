"""Hostile settings and weights: no code in them runs, and attempts to exhaust memory are errors."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import yaml

from captioning.open_clip_loader import check_tensors_only
from clipmill.base.errors import UserError
from clipmill.base.settings import digest, read_yaml
from pipeline.engine.settings import resolve
from pipeline.stages.transcribe.recognition import load_recogniser
from pipeline.stages.transcribe.transcribe import TranscribeSettings
from shards.corpus.folder import Corpus
from tests.helpers.call_count import count_calls
from tests.helpers.pickles import HostilePickle
from training.models.clip_vip.weights import load_model, read_tensors
from training.run.checkpoints import Checkpoints
from training.run.folder import RunFolder

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * ['*' + before])}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
ATTACKS = {
    "a tag that runs a command": "download: {user_agent: !!python/object/apply:os.system ['touch RAN']}",
    "a tag that imports a module": "download: !!python/module:antigravity",
    "a tag that makes an object": "download: !!python/object/new:os.mkdir [RAN]",
    "a tag of one's own": "download: !include /etc/passwd",
    "aliases that unfold to a billion values": LAUGHS,
    "an alias inside of itself": "download: &a {ytdlp_options: *a}",
    "nesting without end": "download: " + "[" * 10_000,
    "a number of a million digits": "download: {retries: " + "9" * 1_000_000 + "}",
    "a date that is none": "download: {user_agent: 2026-99-99}",
    "two documents": "download: {}\n---\ndownload: {}",
    "bytes that are no text": "download: \x00",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_recipe_is_plain_values_of_measured_size(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(ATTACKS[attack])

    def refuse() -> None:
        with pytest.raises(UserError, match="recipe.yaml is not YAML"):
            resolve(None, str(tmp_path / "recipe.yaml"), [])

    _, num_calls = count_calls(refuse)
    assert num_calls < 20_000 + 10 * len(ATTACKS[attack]) and os.listdir(tmp_path) == ["recipe.yaml"]


@pytest.mark.parametrize("attack", [name for name in ATTACKS if "laugh" not in name and "document" not in name])
def test_a_value_on_the_command_line_is_a_plain_value(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = ATTACKS[attack].removeprefix("download: ")
    with pytest.raises(UserError, match="--set"):
        resolve(None, None, [f"download.ytdlp_options={value}"])
    assert os.listdir(tmp_path) == []


def test_settings_saved_with_a_corpus_or_a_run_are_read_as_plainly(tmp_path):
    hostile = "format: 1\nsettings: !!python/object/new:os.mkdir [%s]\n" % (tmp_path / "RAN")
    (tmp_path / "corpus.yaml").write_text(hostile)
    (tmp_path / "run.yaml").write_text(hostile)
    with pytest.raises(UserError, match="corpus.yaml cannot be read"):
        Corpus(tmp_path).load_settings()
    with pytest.raises(UserError, match="run.yaml cannot be read"):
        RunFolder(tmp_path).load()
    assert not (tmp_path / "RAN").exists()


def test_ordinary_aliases_are_still_read():
    assert read_yaml("a: &limits {x: 1}\nb: *limits\n") == {"a": {"x": 1}, "b": {"x": 1}}
    assert read_yaml("") is None
    with pytest.raises(yaml.YAMLError):
        read_yaml("a: *nobody")


def test_a_wrong_value_of_any_length_is_quoted_in_short():
    with pytest.raises(UserError) as caught:
        resolve(None, None, ["download.user_agent=[" + "x," * 2_000 + "]"])
    assert "download.user_agent" in str(caught.value) and len(str(caught.value)) < 1000


@pytest.fixture(params=["zip", "legacy", "type-error"])
def evil(request, tmp_path) -> Path:
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    content = {"state_dict": {"logit_scale": HostilePickle(trace)}, "dims": {"n_mels": HostilePickle(trace)}}
    if request.param == "zip":
        torch.save(content, path)
    else:
        # An unpickler fails at the integer with a TypeError, which some loaders take for an older format of theirs.
        stumble = b"\x80\x02K\x01K\x02s." if request.param == "type-error" else b""
        path.write_bytes(stumble + pickle.dumps(content, protocol=2))
    yield path
    assert not trace.exists()


@pytest.mark.parametrize("source", ["{}", "open_clip:ViT-B-32/{}"])
def test_weights_to_train_from_run_no_code(evil, source):
    with pytest.raises(UserError):
        load_model(source.format(evil))


def test_weights_of_speech_recognition_run_no_code(evil):
    with pytest.raises(UserError, match="transcribe.whisper"):
        load_recogniser(TranscribeSettings(whisper=str(evil)))


def test_weights_of_captioners_and_scorers_run_no_code(evil):
    with pytest.raises(UserError, match="score.pretrained"):
        check_tensors_only(evil, "score.pretrained")


def test_a_safetensors_header_as_large_as_memory_is_refused(tmp_path):
    (tmp_path / "bomb.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    deep = b'{"a":' * 50_000
    (tmp_path / "deep.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep)
    for name in ("bomb", "deep"):
        with pytest.raises(UserError, match=name):
            load_model(str(tmp_path / f"{name}.safetensors"))


def test_an_index_of_weights_names_files_beside_it_only(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"logit_scale": "../../elsewhere.safetensors"}}')
    with pytest.raises(UserError, match="not in the same folder"):
        read_tensors(index)


def test_a_checkpoint_of_a_run_with_code_in_it_is_not_resumed(tmp_path):
    """This holds even if the checkpoint's checksum was made to match."""
    path = tmp_path / "checkpoints" / "step-00000001"
    path.mkdir(parents=True)
    torch.save({"optimiser": HostilePickle(tmp_path / "ran")}, path / "training.pt")
    sealed = {"step": 1, "state": {}, "files": {}, "format": 1}
    (path / "state.json").write_text(json.dumps(sealed | {"digest": digest(sealed)}))
    with pytest.raises(UserError, match="(?s)step-00000001 cannot be read.*mkdir"):
        Checkpoints(path.parent).load(1)
    assert not (tmp_path / "ran").exists()
