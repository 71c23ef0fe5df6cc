"""Make Whisper models with random weights, for OpenAI's package and, with the same weights, for faster-whisper."""

from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch

SIZES = {
    "n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": 8, "n_audio_head": 2, "n_audio_layer": 1,
    "n_vocab": 51865, "n_text_ctx": 24, "n_text_state": 8, "n_text_head": 2, "n_text_layer": 2,
}  # fmt: skip


def save_random_whisper(path: Path, **sizes: int) -> Path:
    """Save a checkpoint with the multilingual vocabulary and, by default, minimal sizes."""
    from whisper.model import ModelDimensions, Whisper

    dims = ModelDimensions(**SIZES | sizes)
    model = Whisper(dims)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    torch.save({"dims": asdict(dims), "model_state_dict": model.state_dict()}, path)
    return path


def convert_for_faster_whisper(checkpoint: Path, folder: Path) -> Path:
    """Save a checkpoint of OpenAI's package as a folder that faster-whisper reads."""
    import whisper
    from ctranslate2.specs.whisper_spec import WhisperSpec

    model = whisper.load_model(str(checkpoint), device="cpu")
    dims = model.dims
    spec = WhisperSpec(dims.n_audio_layer, dims.n_audio_head, dims.n_text_layer, dims.n_text_head)
    encoder, decoder = model.encoder, model.decoder
    for conv, source in ((spec.encoder.conv1, encoder.conv1), (spec.encoder.conv2, encoder.conv2)):
        conv.weight, conv.bias = source.weight.numpy(force=True), source.bias.numpy(force=True)
    spec.encoder.position_encodings.encodings = encoder.positional_embedding.numpy(force=True)
    spec.decoder.position_encodings.encodings = decoder.positional_embedding.numpy(force=True)
    spec.decoder.embeddings.weight = spec.decoder.projection.weight = decoder.token_embedding.weight.numpy(force=True)
    _copy_norm(spec.encoder.layer_norm, encoder.ln_post)
    _copy_norm(spec.decoder.layer_norm, decoder.ln)
    for layers, blocks in ((spec.encoder.layer, encoder.blocks), (spec.decoder.layer, decoder.blocks)):
        for layer, block in zip(layers, blocks, strict=True):
            _copy_norm(layer.self_attention.layer_norm, block.attn_ln)
            _copy_linear(layer.self_attention.linear[0], block.attn.query, block.attn.key, block.attn.value)
            _copy_linear(layer.self_attention.linear[1], block.attn.out)
            if block.cross_attn:
                _copy_norm(layer.attention.layer_norm, block.cross_attn_ln)
                _copy_linear(layer.attention.linear[0], block.cross_attn.query)
                _copy_linear(layer.attention.linear[1], block.cross_attn.key, block.cross_attn.value)
                _copy_linear(layer.attention.linear[2], block.cross_attn.out)
            _copy_norm(layer.ffn.layer_norm, block.mlp_ln)
            _copy_linear(layer.ffn.linear_0, block.mlp[0])
            _copy_linear(layer.ffn.linear_1, block.mlp[2])
    tokens = _save_tokenizer(folder, dims.n_vocab)
    spec.register_vocabulary(tokens)
    spec.config.suppress_ids, spec.config.suppress_ids_begin = [], []
    languages = {f"<|{code}|>" for code in whisper.tokenizer.LANGUAGES}
    spec.config.lang_ids = [number for number, token in enumerate(tokens) if token in languages]
    layers = range(dims.n_text_layer // 2, dims.n_text_layer)
    spec.config.alignment_heads = [[layer, head] for layer in layers for head in range(dims.n_text_head)]
    spec.validate()
    spec.optimize(quantization="float32")
    spec.save(str(folder))
    return folder


def _copy_norm(spec, norm) -> None:
    spec.gamma, spec.beta = norm.weight.numpy(force=True), norm.bias.numpy(force=True)


def _copy_linear(spec, *parts) -> None:
    """Copy a linear layer, or several whose outputs are put one after another. Whisper's keys have no bias."""
    biases = [torch.zeros(part.out_features) if part.bias is None else part.bias for part in parts]
    spec.weight = torch.cat([part.weight for part in parts]).numpy(force=True)
    spec.bias = torch.cat(biases).numpy(force=True)


def _save_tokenizer(folder: Path, num_tokens: int) -> list[str]:
    """Save OpenAI's vocabulary in the format of the tokenizers package; return its tokens in order."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from whisper.tokenizer import get_encoding

    encoding = get_encoding("multilingual")
    alphabet = _visible_bytes()
    ranks = encoding._mergeable_ranks
    visible = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    halves = [_halves(token, ranks) for token in ranks if len(token) > 1]
    merges = [tuple("".join(alphabet[byte] for byte in half) for half in both) for both in halves]
    tokenizer = Tokenizer(models.BPE({visible[token]: rank for token, rank in ranks.items()}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted(encoding._special_tokens, key=encoding._special_tokens.get)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    assert tokenizer.get_vocab_size() == num_tokens
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return sorted(vocabulary := tokenizer.get_vocab(), key=vocabulary.get)


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens that byte-pair encoding joins to this one: merge as it does, and stop at two."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        costs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        k = costs.index(min(costs))
        parts[k : k + 2] = [parts[k] + parts[k + 1]]
    return parts[0], parts[1]


def _visible_bytes() -> dict[int, str]:
    """Return the character that stands for each byte in byte-level vocabularies."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + k) for k, byte in enumerate(others)}
