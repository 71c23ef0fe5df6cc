"""CoCa captions from a tiny model with random weights: their text and score, and independence of the batch."""

import io
import json
import math

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from captioning.captioner import Caption, Captioner, fingerprint_of, load_captioner
from captioning.settings import CaptionSettings
from clipmill.base.errors import ItemError, UserError
from tests.helpers.pictures import random_jpeg

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 32,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
        "output_tokens": True,
    },
    "text_cfg": {
        "context_length": 20,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
        "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "custom_text": True,
}


def random_coca(seed: int = 0) -> open_clip.CoCa:
    torch.manual_seed(seed)
    model = open_clip.CoCa(**{key: value for key, value in CONFIG.items() if key != "custom_text"})
    for parameter in model.parameters():
        if parameter.ndim > 1:  # larger than usual, so that pictures and words affect the captions
            torch.nn.init.normal_(parameter, std=3 * parameter.shape[-1] ** -0.5)
    return model


def write_folder(folder, model) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return write_folder(tmp_path_factory.mktemp("coca") / "model", random_coca())


def settings_for(folder: str, **chosen) -> CaptionSettings:
    return CaptionSettings(model=folder, device="cpu", max_tokens=12, **chosen)


FRAMES = [random_jpeg(seed) for seed in range(8)]
DECODINGS = [
    {"generation": "beam_search", "num_beams": 6, "num_beam_groups": 3},
    {"generation": "beam_search", "num_beams": 2, "num_beam_groups": 1, "min_tokens": 2, "repetition_penalty": 2.0},
    {"generation": "top_k", "top_k": 1},
    {"generation": "top_k", "top_k": 20, "temperature": 2.0},
    {"generation": "top_p", "top_p": 0.9, "seed": 3},
]


@pytest.mark.parametrize("decoding", DECODINGS, ids=lambda d: f"{d['generation']}-{len(d)}")
def test_a_batch_of_eight_says_what_eight_batches_of_one_say(folder, decoding):
    captioner = load_captioner(settings_for(folder, **decoding))
    together = captioner.caption(FRAMES)
    alone = [captioner.caption([frame])[0] for frame in reversed(FRAMES)][::-1]
    assert [c.text for c in together] == [c.text for c in alone]
    assert [c.score for c in together] == pytest.approx([c.score for c in alone], abs=2e-4)
    assert len({c.text for c in together}) > 1, "the pictures must matter, or this test shows nothing"
    smaller = load_captioner(settings_for(folder, **decoding, batch_size=3)).caption(FRAMES)
    assert [c.text for c in smaller] == [c.text for c in together]


def test_the_score_is_the_mean_log_probability_of_the_generated_tokens(folder):
    captioner = load_captioner(settings_for(folder, generation="top_k"))
    caption = captioner.caption(FRAMES[:1])[0]
    model, _, preprocess = open_clip.create_model_and_transforms(folder)
    picture = preprocess(Image.open(io.BytesIO(FRAMES[0])).convert("RGB"))[None]
    ids, log_probs = [open_clip.get_tokenizer("ViT-B-32").sot_token_id], []
    with torch.no_grad():
        while ids[-1] != 49407 and len(ids) < 12:  # greedy decoding, step by step
            logits = model.eval()(picture, torch.tensor([ids]), output_labels=False)["logits"][0, -1]
            allowed = logits.clone()
            if len(ids) < 5:
                allowed[49407] = -math.inf
            ids.append(49407 if len(ids) == 11 else int(allowed.argmax()))
            log_probs.append(float(logits.double().log_softmax(-1)[ids[-1]]))
    assert caption.num_tokens == len(ids) - 2
    assert caption.score == pytest.approx(sum(log_probs) / len(log_probs), abs=2e-4)
    assert caption.score < 0


def test_a_drawn_caption_belongs_to_the_frame_and_the_seed(folder):
    drawn = {"generation": "top_k", "top_k": 50, "temperature": 3.0}
    first = load_captioner(settings_for(folder, **drawn)).caption(FRAMES)
    torch.manual_seed(99)
    assert load_captioner(settings_for(folder, **drawn)).caption(FRAMES) == first
    assert load_captioner(settings_for(folder, **drawn, seed=1)).caption(FRAMES) != first


def test_drawing_leaves_the_callers_random_state_alone(folder):
    captioner = load_captioner(settings_for(folder, generation="top_p", top_p=0.9))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    captioner.caption(FRAMES[:2])
    assert torch.rand(1) == expected


def test_a_bad_frame_fails_alone_and_in_its_place(folder):
    captioner = load_captioner(settings_for(folder, generation="top_k", batch_size=2))
    good = captioner.caption(FRAMES[:3])
    bad = [b"", b"<html>not found</html>", FRAMES[3][: len(FRAMES[3]) // 2], FRAMES[4][:20]]
    answers = captioner.caption([bad[0], FRAMES[0], bad[1], bad[2], FRAMES[1], bad[3], FRAMES[2]])
    assert [answers[i].text for i in (1, 4, 6)] == [c.text for c in good]
    failures = [answers[i] for i in (0, 2, 3, 5)]
    assert all(isinstance(f, ItemError) and f.error_class == "undecodable-frame" for f in failures)
    assert captioner.caption([]) == []
    assert all(isinstance(answer, ItemError) for answer in captioner.caption(bad))


def test_pictures_and_their_jpeg_bytes_get_the_same_caption(folder):
    captioner = load_captioner(settings_for(folder, generation="top_p", top_p=0.9))
    pictures = [Image.open(io.BytesIO(frame)) for frame in FRAMES[:3]]
    assert captioner.caption(pictures) == captioner.caption(FRAMES[:3])


def test_an_empty_caption_is_recorded(tmp_path):
    model = random_coca()
    with torch.no_grad():  # makes the end token the most likely for any picture
        model.text_decoder.ln_final.weight.zero_()
        model.text_decoder.ln_final.bias.fill_(1.0)
        model.text_decoder.text_projection.zero_()
        model.text_decoder.text_projection[:, 49407] = 1.0
    folder = write_folder(tmp_path / "silent", model)
    for decoding in ({"generation": "top_k"}, {"num_beams": 2, "num_beam_groups": 1}):
        captions = load_captioner(settings_for(folder, min_tokens=1, **decoding)).caption(FRAMES[:2])
        assert [(c.text, c.num_tokens) for c in captions] == [("", 0), ("", 0)]
        assert all(c.score == pytest.approx(32 - math.log(math.exp(32) + 49407), abs=1e-3) for c in captions)


def test_a_captioner_has_the_interface_and_the_announced_fingerprint(folder):
    settings = settings_for(folder)
    captioner = load_captioner(settings)
    assert isinstance(captioner, Captioner)
    assert captioner.fingerprint == fingerprint_of(settings)
    assert captioner is load_captioner(settings)
    assert str(folder).removeprefix("local-dir:") not in captioner.name
    assert all(isinstance(c, Caption) for c in captioner.caption(FRAMES[:1]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_captions_too(folder, precision):
    captions = load_captioner(settings_for(folder, precision=precision)).caption(FRAMES[:2])
    assert all(math.isfinite(c.score) and c.score < 0 for c in captions)


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("weights ran code",))


def test_weights_that_would_run_code_are_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": Malicious()}, path)
    with pytest.raises(UserError, match="caption.pretrained.*does not hold tensors only"):
        load_captioner(CaptionSettings(model="coca_ViT-B-32", pretrained=str(path), device="cpu"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="caption.model.*does not hold tensors only"):
        load_captioner(CaptionSettings(model=f"local-dir:{folder}", device="cpu"))


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"model": "coca_ViT-B-99"}, "caption.model = coca_ViT-B-99"),
        ({"model": "coca_ViT-B-32", "pretrained": "nothing_like_it"}, "caption.pretrained = nothing_like_it"),
        ({"pretrained": "missing.safetensors"}, "caption.pretrained = missing.safetensors: this file does not exist"),
        ({"model": "local-dir:/nowhere"}, "caption.model = local-dir:/nowhere"),
        ({"device": "cuda"}, "caption.device = cuda"),
    ],
)
def test_a_wrong_model_is_the_users_mistake_and_named(chosen, said):
    if chosen.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=said):
        load_captioner(CaptionSettings(**{"device": "cpu", **chosen}))


def test_a_caption_is_no_longer_than_the_model_reads(folder):
    settings = CaptionSettings(model=folder, device="cpu", max_tokens=100, generation="top_k")
    assert all(0 < caption.num_tokens <= 18 for caption in load_captioner(settings).caption(FRAMES[:3]))
    with pytest.raises(UserError, match="caption.min_tokens = 20"):
        load_captioner(CaptionSettings(model=folder, device="cpu", min_tokens=20, max_tokens=100))
