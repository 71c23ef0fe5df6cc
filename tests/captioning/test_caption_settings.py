"""Caption and score settings: wrong values are refused, fingerprints follow the settings, and neither loads a model."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from captioning import captioner
from captioning import model_identity as identity
from captioning.captioner import fingerprint_of
from captioning.scorer import fingerprint_of as score_fingerprint_of
from captioning.settings import CaptionSettings, ScoreSettings
from clipmill.base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ({"captioner": "blip"}, "captioner"),
        ({"captioner": "a b:c"}, "captioner"),
        ({"generation": "greedy"}, "generation"),
        ({"top_p": 1.5}, "top_p"),
        ({"batch_size": 0}, "batch_size"),
        ({"min_tokens": 30}, "min_tokens"),
        ({"num_beams": 4}, "num_beam_groups"),
        ({"captioner": "demo", "model": "coca_ViT-B-32"}, "demo"),
        ({"captioner": "huggingface"}, "needs model"),
        ({"beams": 3}, "beams"),
    ],
)
def test_a_wrong_caption_setting_is_refused_by_name(chosen, named):
    with pytest.raises(ValidationError, match=named):
        CaptionSettings(**chosen)


def test_what_changes_captions_changes_the_fingerprint_and_nothing_else_does():
    plain = fingerprint_of(CaptionSettings())
    for chosen in (
        {"model": "coca_ViT-B-32"},
        {"pretrained": "laion2b_s13b_b90k"},
        {"captioner": "demo"},
        {"captioner": "huggingface", "model": "org/name"},
        {"generation": "top_k"},
        {"num_beams": 9},
        {"max_tokens": 20},
        {"seed": 1},
        {"precision": "bf16"},
    ):
        assert fingerprint_of(CaptionSettings(**chosen)) != plain, chosen
    for chosen in ({"batch_size": 7}, {"device": "cpu"}, {"num_threads": 3}):
        assert fingerprint_of(CaptionSettings(**chosen)) == plain, chosen
    named = {"captioner": "huggingface", "model": "org/name"}
    assert fingerprint_of(CaptionSettings(**named)) != fingerprint_of(CaptionSettings(**named, revision="v2"))


def test_a_local_models_fingerprint_follows_its_content_not_its_place(tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "elsewhere.safetensors"
    first.write_bytes(b"weights")
    second.write_bytes(b"weights")
    assert fingerprint_of(CaptionSettings(pretrained=str(first))) == fingerprint_of(
        CaptionSettings(pretrained=str(second))
    )
    before = score_fingerprint_of(ScoreSettings(pretrained=str(second)))
    second.write_bytes(b"other weights")
    assert fingerprint_of(CaptionSettings(pretrained=str(first))) != fingerprint_of(
        CaptionSettings(pretrained=str(second))
    )
    assert score_fingerprint_of(ScoreSettings(pretrained=str(second))) != before
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    settings = CaptionSettings(captioner="huggingface", model=str(folder))
    before = fingerprint_of(settings)
    (folder / "config.json").write_text('{"changed": 1}')
    assert fingerprint_of(settings) != before


def test_a_file_is_hashed_once_while_it_stays_the_same(tmp_path, monkeypatch):
    file = tmp_path / "large.safetensors"
    file.write_bytes(b"weights")
    identity.file_sha256(file)
    monkeypatch.setattr(identity.hashlib, "file_digest", lambda *_: pytest.fail("read the file again"))
    identity.file_sha256(file)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (CaptionSettings(pretrained="/gone/weights.pt"), "caption.pretrained = /gone/weights.pt"),
        (CaptionSettings(model="local-dir:/gone"), "caption.model = local-dir:/gone"),
        (CaptionSettings(captioner="no_such_module:load"), "caption.captioner = no_such_module:load"),
    ],
)
def test_a_missing_file_or_module_is_the_users_mistake(settings, named):
    with pytest.raises(UserError, match=named):
        fingerprint_of(settings)


def test_settings_and_fingerprints_load_no_model_library():
    code = """
import sys
from captioning.settings import CaptionSettings, ScoreSettings
import captioning.captioner, captioning.scorer
captioning.captioner.fingerprint_of(CaptionSettings())
captioning.captioner.fingerprint_of(CaptionSettings(captioner="demo"))
captioning.scorer.fingerprint_of(ScoreSettings(model="demo"))
heavy = {"torch", "open_clip", "transformers", "numpy", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_only_another_major_of_a_library_makes_captions_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"open_clip_torch": "3.3.0", "torch": "2.15.0+cu130", "transformers": "5.24.0"}
    monkeypatch.setattr(captioner.metadata, "version", installed.__getitem__)
    coca, named = CaptionSettings(), CaptionSettings(captioner="huggingface", model="a/model")
    first = fingerprint_of(coca), fingerprint_of(named)
    installed |= {"open_clip_torch": "2.30.0", "torch": "2.99.1", "transformers": "4.56.2"}
    assert (fingerprint_of(coca), fingerprint_of(named)) == first
    installed["open_clip_torch"] = "4.0.0"
    assert fingerprint_of(coca) != first[0] and fingerprint_of(named) == first[1]
    installed |= {"open_clip_torch": "3.4.0", "transformers": "6.0.1"}
    assert fingerprint_of(coca) != first[0] and fingerprint_of(named) != first[1]
    six = fingerprint_of(coca)
    installed["transformers"] = "6.5.0"
    assert fingerprint_of(coca) == six
