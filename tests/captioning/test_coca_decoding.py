"""CoCa's captions stay those of open_clip 3.3's own generate on transformers 4.56, which made existing corpora.

tests/data/coca holds a tiny CoCa with random weights (fp16), pictures, and the ids that generate gave, up to the end
token, with torch's seed 0 for each case.
"""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from captioning.captioners.coca_decoding import Decoder, Hypotheses
from captioning.settings import CaptionSettings

DATA = Path(__file__).parents[1] / "data" / "coca"
GOLDEN = json.loads((DATA / "golden.json").read_text())


@pytest.fixture(scope="module")
def encoded():
    """Return the model and its encoding of the pictures."""
    tensors = {name: tensor.float() for name, tensor in load_file(DATA / "model.safetensors").items()}
    pixels = tensors.pop("pixels")
    model = open_clip.CoCa(**GOLDEN["config"]).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all("attn_mask" in name for name in missing)
    with torch.inference_mode():
        return model, *model._encode_image(pixels)


def decoder_for(model: open_clip.CoCa, max_tokens: int, **chosen) -> Decoder:
    return Decoder(model, CaptionSettings(**chosen), GOLDEN["start_id"], GOLDEN["end_id"], max_tokens)


@torch.inference_mode()
@pytest.mark.parametrize("generation", ["beam_search", "top_k", "top_p"])
def test_captions_are_those_of_open_clips_generate(encoded, generation):
    model, latent_BD, tokens_BPD = encoded
    cases = [dict(case) for case in GOLDEN["cases"] if case["generation"] == generation]
    assert len(cases) > 15
    for case in cases:
        expected, wanted = case.pop("ids"), dict(case)
        torch.manual_seed(0)
        ids = decoder_for(model, case.pop("max_tokens"), **case).generate(latent_BD, tokens_BPD)
        assert [row.tolist() for row in ids] == expected, wanted


@torch.inference_mode()
def test_a_search_with_one_beam_takes_the_likeliest_tokens(encoded):
    model, latent_BD, tokens_BPD = encoded
    common = {"min_tokens": 0, "repetition_penalty": 1.7}
    beam = decoder_for(model, 12, generation="beam_search", num_beams=1, num_beam_groups=1, **common)
    greedy = decoder_for(model, 12, generation="top_k", top_k=1, **common)
    both = [[row.tolist() for row in decoder.generate(latent_BD, tokens_BPD)] for decoder in (beam, greedy)]
    assert both[0] == both[1]


@torch.inference_mode()
def test_equally_likely_tokens_are_not_drawn_when_the_likeliest_is_asked_for(encoded):
    model, latent_BD, tokens_BPD = encoded
    tied = open_clip.CoCa(**GOLDEN["config"]).eval()
    tied.load_state_dict(model.state_dict())
    tied.text_decoder.text_projection.zero_()  # every token is as likely as any other
    greedy = decoder_for(tied, 12, generation="top_k", top_k=1)
    answers = {str([row.tolist() for row in greedy.generate(latent_BD, tokens_BPD)]) for _ in range(5)}
    assert len(answers) == 1


def test_hypotheses_keep_the_best():
    found = Hypotheses(2)
    for score in (1.0, 3.0, 2.0, 0.5, 3.0):
        assert not (found.beats(3.0) or found.beats(2.5))
        found.add(torch.tensor([score]), score)
    assert found.beats(3.0) and not found.beats(3.5)
    assert found.best().item() == 3.0
