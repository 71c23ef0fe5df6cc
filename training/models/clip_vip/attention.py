"""Attention patterns of the two towers, each as fused scaled-dot-product calls without parameters.

Shape letters, used as suffixes here and in `training.models.clip_vip.model`:
    B clips   T frames   L patches of a frame   M proxies, the class token among them   S = M + T·L tokens
    D width   H heads    E width of a head      3 query, key, value
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def proxy_attention(qkv_BS3HE: Tensor, num_proxies: int, num_frames: int) -> Tensor:
    """Attend from proxies to all tokens, from a patch to the proxies and its own frame's patches: [B, S, D].

    This is docs/methods/clip_vip.md section 2.2 in two calls without a mask: the patches of a frame are one batch entry
    whose keys are [proxies, its patches]. The code splits and unbinds because the gradient of a slice is a zero tensor
    of full size.
    """
    if num_frames == 1:
        return _attend(*qkv_BS3HE.unbind(2))
    parts = [num_proxies, qkv_BS3HE.shape[1] - num_proxies]
    q, k, v = qkv_BS3HE.unbind(2)
    q_proxies, q_patches = q.split(parts, dim=1)
    proxies_BMD = _attend(q_proxies, k, v)
    q_frames = q_patches.unflatten(1, (num_frames, -1)).flatten(0, 1)
    frames = _attend(q_frames, _keys_by_frame(k, parts, num_frames), _keys_by_frame(v, parts, num_frames))
    return torch.cat([proxies_BMD, frames.reshape(len(proxies_BMD), parts[1], -1)], dim=1)


def first_token_attention(q_B1HE: Tensor, kv_BS2HE: Tensor) -> Tensor:
    """Attend from the class token to all tokens: [B, 1, D]."""
    return _attend(q_B1HE, *kv_BS2HE.unbind(2))


def causal_attention(qkv_BS3HE: Tensor, bias_B1SS: Tensor | None = None) -> Tensor:
    """Attend from each token to itself and those before it, or with the bias of `causal_bias`: [B, S, D]."""
    return _attend(*qkv_BS3HE.unbind(2), bias=bias_B1SS, causal=bias_B1SS is None)


def biased_attention(qkv_BS3HE: Tensor, bias: Tensor) -> Tensor:
    """Attend from every token to every token with `bias`, broadcast to [B, H, S, S], added to the scores: [B, S, D]."""
    return _attend(*qkv_BS3HE.unbind(2), bias=bias.to(qkv_BS3HE.dtype))


def causal_bias(mask_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bias of the scores, [B, 1, S, S], that hides later positions and those where `mask` is 0.

    As in the published model it is the dtype's lowest value instead of -inf, twice where both reasons hold: a row
    without any visible position then gets a defined average instead of NaN.
    """
    lowest = torch.finfo(dtype).min
    num_tokens = mask_BS.shape[1]
    future_SS = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=mask_BS.device).triu(1)
    hidden_B11S = mask_BS[:, None, None, :] == 0
    zero = torch.zeros((), dtype=dtype, device=mask_BS.device)
    return zero.masked_fill(future_SS, lowest) + zero.masked_fill(hidden_B11S, lowest)


def _attend(q_BSHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, bias: Tensor | None = None, causal: bool = False) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BSHE, k_BSHE, v_BSHE))
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal).transpose(1, 2).flatten(2)


def _keys_by_frame(k_BSHE: Tensor, parts: list[int], num_frames: int) -> Tensor:
    """Concatenate the proxies' keys (or values) with those of each frame's patches: [B·T, M+L, H, E]."""
    proxies, patches = k_BSHE.split(parts, dim=1)
    proxies = proxies.unsqueeze(1).expand(-1, num_frames, -1, -1, -1)
    return torch.cat([proxies, patches.unflatten(1, (num_frames, -1))], dim=2).flatten(0, 1)
