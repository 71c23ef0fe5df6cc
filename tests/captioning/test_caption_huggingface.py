"""Captions by Hugging Face models (BLIP, and ViT with GPT-2), on tiny random models that the tests write."""

import io
import math

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from captioning.captioner import Captioner, fingerprint_of, load_captioner
from captioning.settings import CaptionSettings
from clipmill.base.errors import ItemError, UserError
from tests.helpers.pictures import random_jpeg

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{n}" for n in range(60))]
TEXT = {"vocab_size": len(WORDS), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}


def save_tokenizer(folder) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "bos_token": "[CLS]",
        "eos_token": "[SEP]",
        "sep_token": "[SEP]",
    }
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


def widen(model) -> None:
    """Draw larger random weights than a model starts with, so that pictures and words affect its captions."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)


def save_blip(folder) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BlipConfig(
        text_config={**size, **TEXT, "sep_token_id": 3, "encoder_hidden_size": 32, "max_position_embeddings": 32},
        vision_config={**size, "image_size": 32, "patch_size": 8},
    )
    model = transformers.BlipForConditionalGeneration(config)
    widen(model)
    model.save_pretrained(folder)
    transformers.BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    save_tokenizer(folder)


def save_vit_gpt2(folder) -> None:
    torch.manual_seed(1)
    vision = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    text = transformers.GPT2Config(**TEXT, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    model = transformers.VisionEncoderDecoderModel(config)
    widen(model)
    model.generation_config = transformers.GenerationConfig(decoder_start_token_id=2, pad_token_id=0, eos_token_id=3)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    save_tokenizer(folder)


def save_git(folder) -> None:
    torch.manual_seed(2)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**size, "image_size": 32, "patch_size": 8}
    config = transformers.GitConfig(vision_config=vision, **size, **TEXT, max_position_embeddings=64)
    model = transformers.GitForCausalLM(config)
    widen(model)
    model.save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    save_tokenizer(folder)


@pytest.fixture(scope="module", params=[save_blip, save_vit_gpt2, save_git], ids=["blip", "vit-gpt2", "git"])
def folder(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("huggingface")
    request.param(folder)
    return str(folder)


def settings_for(folder: str, **chosen) -> CaptionSettings:
    return CaptionSettings(captioner="huggingface", model=folder, device="cpu", max_tokens=10, **chosen)


FRAMES = [random_jpeg(seed) for seed in range(6)]
DECODINGS = [
    {"generation": "beam_search", "num_beams": 3},
    {"generation": "top_k"},
    {"generation": "top_k", "top_k": 10, "temperature": 2.0},
    {"generation": "top_p", "top_p": 0.9},
]


@pytest.mark.parametrize("decoding", DECODINGS, ids=lambda d: f"{d['generation']}-{len(d)}")
def test_captions_do_not_depend_on_the_batch(folder, decoding):
    captioner = load_captioner(settings_for(folder, **decoding))
    together = captioner.caption(FRAMES)
    alone = [captioner.caption([frame])[0] for frame in reversed(FRAMES)][::-1]
    assert [c.text for c in together] == [c.text for c in alone]
    assert [c.score for c in together] == pytest.approx([c.score for c in alone], abs=2e-4)
    assert all(len(c.text.split()) <= c.num_tokens <= 9 for c in together)  # special tokens are not words
    assert len({c.text for c in together}) > 1, "the pictures must matter, or this test shows nothing"


def test_the_score_is_the_mean_log_probability_of_the_generated_tokens(folder):
    captioner = load_captioner(settings_for(folder, generation="top_k"))
    caption = captioner.caption(FRAMES[:1])[0]
    pixels = captioner.processor(images=[Image.open(io.BytesIO(FRAMES[0]))], return_tensors="pt")["pixel_values"]
    ids, log_probs = [2], []
    given = "decoder_input_ids" if captioner.model.config.is_encoder_decoder else "input_ids"
    with torch.no_grad():
        while ids[-1] != 3 and len(ids) < 10:  # greedy decoding, step by step
            logits = captioner.model(pixel_values=pixels, **{given: torch.tensor([ids])}).logits[0, -1]
            allowed = logits.clone()
            if len(ids) < 5:
                allowed[3] = -math.inf
            ids.append(int(allowed.argmax()))
            log_probs.append(float(logits.double().log_softmax(-1)[ids[-1]]))
    assert caption.text == " ".join(WORDS[i] for i in ids[1:] if i > 3)
    assert caption.score == pytest.approx(sum(log_probs) / len(log_probs), abs=2e-4)


def test_a_bad_frame_fails_alone_and_in_its_place(folder):
    captioner = load_captioner(settings_for(folder, generation="top_k"))
    good = captioner.caption(FRAMES[:2])
    answers = captioner.caption([FRAMES[0], b"not a picture", FRAMES[1]])
    assert [answers[0].text, answers[2].text] == [c.text for c in good]
    assert isinstance(answers[1], ItemError) and answers[1].error_class == "undecodable-frame"


def test_it_has_the_interface_and_the_announced_fingerprint(folder):
    settings = settings_for(folder)
    captioner = load_captioner(settings)
    assert isinstance(captioner, Captioner)
    assert captioner.fingerprint == fingerprint_of(settings) != fingerprint_of(settings_for(folder, num_beams=3))
    assert folder not in captioner.name


def test_a_folder_without_a_model_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="caption.model"):
        load_captioner(settings_for(str(tmp_path)))
