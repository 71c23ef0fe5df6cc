"""Generate captions with a CoCa: beam search, and drawing from the likeliest tokens.

The rules are those of open_clip 3.3's `generate` on transformers 4.56, by which the captions of existing corpora were
made, and tests/captioning/test_coca_decoding.py has its answers. Three of them differ from the textbook. The score of a
hypothesis is the mean of its raw logits, not of log-probabilities. Groups of beams do not see each other, so all of
them find the same hypotheses, and only one is searched: of num_beams / num_beam_groups beams. A drawn caption also ends
with the token that pads batches, "!" in CLIP's vocabulary.

Shapes: B pictures, K beams, L ids of a caption so far, P picture tokens, D their width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import open_clip
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from captioning.settings import CaptionSettings

_NEVER = -1e9  # score of a beam that is still a copy of the first


@dataclass(frozen=True)
class Decoder:
    """A CoCa and how it decodes captions of at most `max_tokens` ids, both ends included."""

    model: open_clip.CoCa
    settings: CaptionSettings
    start_id: int
    end_id: int
    max_tokens: int

    def generate(self, latent_BD: Tensor, tokens_BPD: Tensor) -> list[Tensor]:
        """Generate the ids of each encoded picture's caption: start, text, and mostly an end token."""
        if self.settings.generation == "beam_search":
            return self._search(latent_BD, tokens_BPD)
        return self._draw(latent_BD, tokens_BPD)

    def _search(self, latent_BD: Tensor, tokens_BPD: Tensor) -> list[Tensor]:
        """Search beams of all pictures together; a picture leaves the batch when no beam can improve its answer."""
        num_beams = self.settings.num_beams // self.settings.num_beam_groups
        adjust = self._processors(latent_BD.device)
        found = [Hypotheses(num_beams) for _ in latent_BD]
        active_B = torch.arange(len(latent_BD), device=latent_BD.device)
        ids_BKL = torch.full((len(active_B), num_beams, 1), self.start_id, device=latent_BD.device)
        scores_BK = torch.full((len(active_B), num_beams), _NEVER, device=latent_BD.device)
        scores_BK[:, 0] = 0
        while len(active_B):
            ids_NL = ids_BKL.flatten(0, 1)
            rows_N = active_B.repeat_interleave(num_beams)
            logits_NV = adjust(ids_NL, self._next_logits(ids_NL, latent_BD[rows_N], tokens_BPD[rows_N]))
            totals_BKV = (logits_NV + scores_BK.flatten()[:, None]).unflatten(0, scores_BK.shape)
            # twice as many as beams, because each beam may end
            best_Bk, places_Bk = totals_BKV.flatten(1).topk(2 * num_beams, dim=1)
            beams_Bk, next_Bk = places_Bk // logits_NV.shape[1], places_Bk % logits_NV.shape[1]
            kept_BK = self._keep(found, active_B, ids_BKL, best_Bk, beams_Bk, next_Bk)
            scores_BK, beams_BK, next_BK = (table.gather(1, kept_BK) for table in (best_Bk, beams_Bk, next_Bk))
            ids_BKL = torch.cat([ids_BKL.take_along_dim(beams_BK[..., None], 1), next_BK[..., None]], dim=2)
            length = ids_BKL.shape[2]
            if length >= self.max_tokens:
                for number, ids_KL, scores_K in zip(active_B.tolist(), ids_BKL, scores_BK.tolist(), strict=True):
                    for ids_L, score in zip(ids_KL, scores_K, strict=True):
                        found[number].add(ids_L, score / length)
                break
            can_improve = [
                not found[number].beats(best / length)
                for number, best in zip(active_B.tolist(), best_Bk[:, 0].tolist(), strict=True)
            ]
            can_improve_B = torch.tensor(can_improve, device=active_B.device)
            active_B, ids_BKL, scores_BK = active_B[can_improve_B], ids_BKL[can_improve_B], scores_BK[can_improve_B]
        return [self._ended(hypotheses.best()) for hypotheses in found]

    def _keep(
        self,
        found: list["Hypotheses"],
        active_B: Tensor,
        ids_BKL: Tensor,
        best_Bk: Tensor,
        beams_Bk: Tensor,
        next_Bk: Tensor,
    ) -> Tensor:
        """Record the hypotheses that end here; return which of each picture's candidates continue, [B, K]."""
        num_beams, length = ids_BKL.shape[1], ids_BKL.shape[2] + 1
        kept = []
        for row, number in enumerate(active_B.tolist()):
            is_end = (next_Bk[row] == self.end_id).tolist()
            kept.append([place for place, ends in enumerate(is_end) if not ends][:num_beams])
            # candidates behind the last that continues, or behind the first K, are not looked at
            for place in range(min(kept[-1][-1], num_beams)):
                if is_end[place]:
                    found[number].add(ids_BKL[row, beams_Bk[row, place]], float(best_Bk[row, place]) / length)
        return torch.tensor(kept, device=ids_BKL.device)

    def _draw(self, latent_BD: Tensor, tokens_BPD: Tensor) -> list[Tensor]:
        """Draw one token after the other; with top_k = 1 take the likeliest."""
        chosen = self.settings
        adjust = self._processors(latent_BD.device)
        is_top_k = chosen.generation == "top_k"
        adjust.append(TopKLogitsWarper(chosen.top_k) if is_top_k else TopPLogitsWarper(chosen.top_p))
        captions = [torch.empty(0)] * len(latent_BD)
        active_B = torch.arange(len(latent_BD), device=latent_BD.device)
        ids_BL = torch.full((len(active_B), 1), self.start_id, device=latent_BD.device)
        while len(active_B):
            if ids_BL.shape[1] + 1 >= self.max_tokens:
                next_B = torch.full_like(active_B, self.end_id)
            else:
                logits_BV = adjust(ids_BL, self._next_logits(ids_BL, latent_BD[active_B], tokens_BPD[active_B]))
                probabilities_BV = torch.softmax(logits_BV / chosen.temperature, dim=-1)
                drawn_B = torch.multinomial(probabilities_BV, 1)[:, 0] if chosen.samples else None
                next_B = probabilities_BV.argmax(dim=-1) if drawn_B is None else drawn_B
            ids_BL = torch.cat([ids_BL, next_B[:, None]], dim=1)
            ends_B = (next_B == self.end_id) | (next_B == self.model.pad_id)
            for row in ends_B.nonzero()[:, 0].tolist():
                captions[active_B[row]] = ids_BL[row]
            active_B, ids_BL = active_B[~ends_B], ids_BL[~ends_B]
        return captions

    def _next_logits(self, ids_NL: Tensor, latent_ND: Tensor, tokens_NPD: Tensor) -> Tensor:
        answers = self.model(None, ids_NL, image_latent=latent_ND, image_embs=tokens_NPD, output_labels=False)
        return answers["logits"][:, -1]

    def _processors(self, device: torch.device) -> LogitsProcessorList:
        return LogitsProcessorList(
            [
                MinLengthLogitsProcessor(self.settings.min_tokens, self.end_id, device=device),
                RepetitionPenaltyLogitsProcessor(self.settings.repetition_penalty),
            ]
        )

    def _ended(self, ids_L: Tensor) -> Tensor:
        """Append the end token if there is room."""
        return torch.cat([ids_L, ids_L.new_tensor([self.end_id])]) if len(ids_L) < self.max_tokens else ids_L


class Hypotheses:
    """The best `size` finished captions of a picture, with the mean score of their ids."""

    def __init__(self, size: int):
        self.size = size
        self._found: list[tuple[float, Tensor]] = []

    def add(self, ids_L: Tensor, score: float) -> None:
        """Add a caption, and drop the worst if there are too many; of equal ones the new."""
        if len(self._found) < self.size or score > self._worst():
            self._found.append((score, ids_L))
            if len(self._found) > self.size:
                self._found.remove(min(self._found, key=_score))

    def beats(self, score: float) -> bool:
        """Return whether there are `size` captions and none is worse than a score."""
        return len(self._found) == self.size and self._worst() >= score

    def best(self) -> Tensor:
        """Return the ids of the best caption; of equal ones the last."""
        return sorted(self._found, key=_score)[-1][1]

    def _worst(self) -> float:
        return min(score for score, _ in self._found)


_score: Callable[[tuple[float, Tensor]], float] = lambda found: found[0]  # noqa: E731
