"""Evaluate retrieval on a selection: encode clips and distinct texts once each, exactly on any number of processes.

1. The selection's rows are cut into batches of `eval.batch_size`, its distinct texts likewise. Process r of W encodes
   batches r, r + W, r + 2W, …: batches do not depend on the process, so features do not depend on W.
2. Every process gathers all features with their ids and sorts them by id, without padding or repeats. A clip that
   cannot be read is left out and reported.
3. Every process then ranks all texts and videos (`training.evaluation.metrics`), so all return the same. Cosines are
   computed in blocks, so memory holds features and a block (`python -m bench.retrieval` measures it); the scores of a
   model that scores pairs are all in memory.

A sentence of several clips counts as in the published benchmarks: it is a query of each clip, and only that clip is
right. From video to text the other clips' sentences are exactly as near, and a tie counts against the query, so such
sentences limit the recalls. `num_repeated_texts` counts them, and SQL can leave them out:
`SELECT clip_id FROM catalog QUALIFY count(*) OVER (PARTITION BY caption) = 1`. Texts with equal tokens are the same
sentence: "A dog." and "a dog", or texts that differ only after the cut.

Legend: N clips that could be read, M texts, U distinct texts, D the features' size, B a batch, L tokens of a text.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from safetensors.numpy import save
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipmill.base.atomic_file import atomic_file
from clipmill.base.errors import UserError
from training.data.loader import Loader, default_processes
from training.data.reader_pool import Request
from training.data.sample_reader import Failure, SampleReader
from training.data.selection import Selection
from training.evaluation.metrics import Dsl, Similarities, WholeMatrix, chance, retrieval_metrics, slices
from training.models.encode import encode_clips, needs_pairs, score_pairs, text_encoder
from training.parallel.all_gather import gather_counts, gather_rows
from training.parallel.distributed import Process
from training.run.settings import RunSettings

Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # (clips this process has encoded, clips it has to encode)
ShouldStop = Callable[[], bool]  # asked equally often on all processes, which must all get the same answer
_CPU = torch.device("cpu")
_VIDEOS_AT_A_TIME = 1024  # whose pairs with a batch of texts are scored between two questions whether to stop


class EvaluationStopped(Exception):
    """The evaluation ended without a result, because `should_stop` returned True."""


@dataclass(frozen=True)
class CosineBlocks:
    """Cosines [M, N] of unit vectors, computed in blocks.

    They are computed in float64, so that the order of summation in a matrix product changes no rank.
    """

    text_UD: Tensor
    distinct_M: Tensor  # row in `text_UD` of each text
    video_ND: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.distinct_M), len(self.video_ND)

    def row_blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        video_DN = self.video_ND.double().T
        for part in slices(*self.shape):
            yield part, (self.text_UD[self.distinct_M[part]].double() @ video_DN).float().numpy()

    def column_blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield blocks in which equal sentences have exactly equal similarities."""
        text_UD = self.text_UD.double()
        for part in slices(*self.shape[::-1]):
            yield part, (text_UD @ self.video_ND[part].double().T).float()[self.distinct_M].numpy()


@dataclass(frozen=True)
class EvalFeatures:
    """A model's features of a selection, the same on every process: float32, on the CPU.

    Features are unit vectors and similarities their cosines. A model that scores pairs (`needs_pairs`) has a vector per
    frame and its own scale of similarities.
    """

    clip_ids: list[str]  # N
    video_ND: Tensor
    texts: list[str]  # M: none, one or several per clip
    text_UD: Tensor
    text_to_video_M: Tensor  # int64: row in `video_ND` of each text's clip
    distinct_M: Tensor  # int64: row in `text_UD` of each text, equal for texts with equal tokens
    scores_UN: Tensor | None  # of a model that scores pairs
    failures: list[dict[str, str]]  # clip_id, error_class and message of the clips that could not be read

    @property
    def text_MD(self) -> Tensor:
        return self.text_UD[self.distinct_M]

    @property
    def similarities(self) -> Similarities:
        """Return the similarities [M, N] in blocks; larger is nearer."""
        if self.scores_UN is not None:
            return WholeMatrix(self.scores_UN.numpy(), self.distinct_M.numpy())
        return CosineBlocks(self.text_UD, self.distinct_M, self.video_ND)

    @property
    def similarity_MN(self) -> Tensor:
        """Return the whole matrix, which takes 4 bytes for each text and video."""
        matrix = np.empty(self.similarities.shape, dtype=np.float32)
        for part, block in self.similarities.row_blocks():
            matrix[part] = block
        return torch.from_numpy(matrix)


def evaluate(
    model: nn.Module,
    selection: Selection,
    settings: RunSettings,
    process: Process,
    *,
    dsl: Dsl | None = None,
    save_similarity: str | Path | None = None,
    progress: Progress | None = None,
    should_stop: ShouldStop = lambda: False,
) -> dict[str, Any]:
    """Compute the `features` of a selection and their metrics; the first process writes `save_similarity`.

    Raises EvaluationStopped, on all processes, once `should_stop` is true: it is asked after every batch and block.
    """
    if save_similarity is not None:
        similarity_format(save_similarity)
    made = features(model, selection, settings, process, progress, should_stop)
    if save_similarity is not None and process.is_first:
        write_similarity(made, save_similarity)
    return metrics_of(made, settings.eval.text, dsl, should_stop)


def metrics_of(
    made: EvalFeatures, text: str, dsl: Dsl | None = None, should_stop: ShouldStop = lambda: False
) -> dict[str, Any]:
    """Compute retrieval in both directions as plain JSON.

    Keys are `t2v` and `v2t` (with `dsl` also `t2v_dsl` and `v2t_dsl`) as of `retrieval_metrics`, the same for guessing
    under `chance`, counts of clips and texts, and `failures`.

    text  column of the queries. Raises UserError if there is no text to rank
    """
    if not made.texts:
        raise UserError(
            f"eval.text = {text!r}: of the clips selected for evaluation {len(made.clip_ids)} could be read and "
            f"{len(made.failures)} could not, and none has such a text. Choose another eval.text or eval.where."
        )
    metrics: dict[str, Any] = retrieval_metrics(
        made.similarities, made.text_to_video_M, dsl=dsl, between_blocks=lambda: _stop_if(should_stop)
    )
    num_asking = metrics["v2t"]["num_queries"]
    return metrics | {
        "chance": {"t2v": chance(len(made.clip_ids)), "v2t": chance(num_asking)},
        "text": text,
        "num_videos": len(made.clip_ids),
        "num_texts": len(made.texts),
        "num_without_text": len(made.clip_ids) - num_asking,
        "num_repeated_texts": int((made.distinct_M.bincount()[made.distinct_M] > 1).sum()),
        "num_failures": len(made.failures),
        "failures": made.failures,
    }


# --- Features


@torch.no_grad()
def features(
    model: nn.Module,
    selection: Selection,
    settings: RunSettings,
    process: Process,
    progress: Progress | None = None,
    should_stop: ShouldStop = lambda: False,
) -> EvalFeatures:
    """Encode the clips of a selection and the texts in its column `eval.text`, together with the other processes.

    model  a `VideoTextModel`, whole on every process, on `process.device`; its training mode is restored
    Frames are `eval_indices`, never jittered. The precision is `train.precision`. Raises EvaluationStopped, see
    `evaluate`.
    """
    rows, texts = queries(selection.column(settings.eval.text))
    ids_UL, distinct = _distinct(text_encoder(model.config, settings.data.max_text_tokens)(texts))
    with _evaluating(model):
        video_ND, read, failures = _videos(model, selection, settings, process, progress, should_stop)
        encode = model.text_features if needs_pairs(model) else model.encode_text
        mine = _share(len(ids_UL), settings.eval.batch_size, process)
        texts_of = (_encoded(encode, settings, ids_UL[numbers].to(process.device)) for numbers in mine)
        rounds = _num_rounds(len(ids_UL), settings.eval.batch_size, process)
        parts = list(_asking(texts_of, rounds, should_stop))
        text_UD = _of_all(_tensors(mine), parts, (model.config.embed_dim,), process)[1]
        if not needs_pairs(model):  # bf16 leaves unit vectors a few thousandths too long or too short
            video_ND, text_UD = normalize(video_ND, dim=1), normalize(text_UD, dim=1)
        scores_UN = None
        if needs_pairs(model):
            scores_UN = _pair_scores(model, text_UD, video_ND.to(process.device), settings, process, should_stop)
    column = np.full(selection.num_clips, -1)
    column[read] = np.arange(len(read))
    readable = np.flatnonzero(column[rows] >= 0)
    distinct_M = distinct[readable]
    return EvalFeatures(
        clip_ids=selection.take(read)["clip_id"].to_pylist(),
        video_ND=video_ND,
        texts=[texts[i] for i in readable],
        text_UD=text_UD,
        text_to_video_M=torch.from_numpy(column[rows[readable]]),
        distinct_M=distinct_M,
        scores_UN=scores_UN,
        failures=failures,
    )


def queries(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Return (rows, texts) of a column of strings, or of lists of them; null and blank texts are left out."""
    lists = ([value] if value is None or isinstance(value, str) else value for value in column.to_pylist())
    pairs = [(row, text) for row, texts in enumerate(lists) for text in texts if text and not text.isspace()]
    return np.array([row for row, _ in pairs], dtype=np.int64), [text for _, text in pairs]


def _videos(
    model: nn.Module,
    selection: Selection,
    settings: RunSettings,
    process: Process,
    progress: Progress | None,
    should_stop: ShouldStop,
) -> tuple[Tensor, np.ndarray, list[dict[str, str]]]:
    """Encode clips: [N, D] (or [N, frames, D]), the row of each, and the clips that could not be read."""
    mine = _share(selection.num_clips, settings.eval.batch_size, process)
    num_mine, num_done = sum(map(len, mine)), 0
    shape = (settings.data.num_frames, model.config.embed_dim)[0 if needs_pairs(model) else 1 :]
    failures: list[Failure] = []
    parts, rows = [], []
    with _loader(model, selection, settings, process, failures) as loader:
        rounds = _num_rounds(selection.num_clips, settings.eval.batch_size, process)
        for batch in _asking(loader.read(Request(numbers, 0) for numbers in mine), rounds, should_stop):
            clips = batch.video_BT3SS.to(process.device), batch.frame_mask_BT.to(process.device)
            parts.append(_encoded(encode_clips, settings, model, *clips)[batch.video_mask_B])
            rows.append(batch.rows_B[batch.video_mask_B])
            num_done += len(batch)
            if progress:
                progress(num_done, num_mine)
    rows_N, video_ND = _of_all(rows, parts, shape, process)
    return video_ND, rows_N.numpy(), _failures_of_all(failures, process)


def _loader(
    model: nn.Module, selection: Selection, settings: RunSettings, process: Process, failures: list[Failure]
) -> Loader:
    """Open a loader that appends to `failures`; it does not read stills, so a missing JPEG is no failure."""
    data = settings.data.model_copy(update={"still": "middle"})
    texts = text_encoder(model.config, data.max_text_tokens)
    reader = SampleReader(selection, data, texts, model.config.image_size, train=False)
    num_processes = data.loader_processes
    if num_processes is None:
        num_processes = default_processes(process.local_world_size)
    return Loader(
        reader, num_processes=num_processes, prefetch_samples=data.prefetch_samples, on_failures=failures.extend
    )


def _distinct(ids_ML: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct rows [U, L] by first appearance, and the index [M] of each row among them."""
    numbers: dict[bytes, int] = {}
    distinct_M = torch.tensor([numbers.setdefault(row.tobytes(), len(numbers)) for row in ids_ML.numpy()]).long()
    ids_UL = torch.from_numpy(np.frombuffer(b"".join(numbers), np.int64).reshape(-1, ids_ML.shape[1]).copy())
    return ids_UL, distinct_M


def _pair_scores(
    model: nn.Module,
    text_UD: Tensor,
    video_NFD: Tensor,
    settings: RunSettings,
    process: Process,
    should_stop: ShouldStop,
) -> Tensor:
    """Score the pairs [U, N] of distinct texts, so that equal sentences have equal scores."""
    mine = _share(len(text_UD), settings.eval.batch_size, process)
    videos = video_NFD.split(_VIDEOS_AT_A_TIME)
    scored = (
        _encoded(score_pairs, settings, model, text_UD[numbers].to(process.device), some)
        for numbers in mine
        for some in videos
    )
    rounds = _num_rounds(len(text_UD), settings.eval.batch_size, process) * len(videos)
    blocks = list(_asking(scored, rounds, should_stop))
    parts = [torch.cat(blocks[start : start + len(videos)], dim=1) for start in range(0, len(blocks), len(videos))]
    return _of_all(_tensors(mine), parts, (len(video_NFD),), process)[1]


def _encoded(encode: Callable[..., Tensor], settings: RunSettings, *inputs: Any) -> Tensor:
    """Encode in the settings' precision; return float32 on the CPU. The last input is on the device."""
    with torch.autocast(inputs[-1].device.type, torch.bfloat16, enabled=settings.train.precision == "bf16"):
        return encode(*inputs).float().cpu()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# --- Sharing the work among processes


def _share(num_items: int, size: int, process: Process) -> list[np.ndarray]:
    """Return the items of this process's batches, every W-th of all batches."""
    starts = range(process.rank * size, num_items, process.world_size * size)
    return [np.arange(start, min(start + size, num_items)) for start in starts]


def _num_rounds(num_items: int, size: int, process: Process) -> int:
    """Return the largest number of batches of any process."""
    return -(-num_items // (size * process.world_size))


def _asking(results: Iterable[Result], num_rounds: int, should_stop: ShouldStop) -> Iterator[Result]:
    """Yield results, and ask after each of `num_rounds` whether to stop, also if there are fewer results."""
    num_results = 0
    for result in results:
        yield result
        _stop_if(should_stop)
        num_results += 1
    for _ in range(num_rounds - num_results):
        _stop_if(should_stop)


def _stop_if(should_stop: ShouldStop) -> None:
    if should_stop():
        raise EvaluationStopped


def _tensors(arrays: list[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def _of_all(ids: list[Tensor], parts: list[Tensor], shape: tuple[int, ...], process: Process) -> tuple[Tensor, Tensor]:
    """Gather ids [N] and features [N, *shape] from all processes, in the order of the ids."""
    ids_N = torch.cat([torch.empty(0, dtype=torch.long), *ids])
    features_N = torch.cat([torch.empty(0, *shape), *parts])
    if process.group is not None:
        [counts] = gather_counts([len(ids_N)], process.control, _CPU)
        ids_N, features_N = (gather_rows(rows, process.control, counts) for rows in (ids_N, features_N))
    order = ids_N.argsort()
    return ids_N[order], features_N[order]


def _failures_of_all(failures: list[Failure], process: Process) -> list[dict[str, str]]:
    gathered = [failures]
    if process.group is not None:
        gathered = [[] for _ in range(process.world_size)]
        dist.all_gather_object(gathered, failures, group=process.control)
    found = sorted((failure for some in gathered for failure in some), key=lambda failure: failure.row)
    return [{"clip_id": f.clip_id, "error_class": f.error.error_class, "message": f.error.message} for f in found]


# --- Files


def similarity_format(path: str | Path) -> str:
    """Return the suffix of a similarities file. Raises UserError for any but .npz and .safetensors."""
    suffix = Path(path).suffix
    if suffix not in (".npz", ".safetensors"):
        raise UserError(f"--save-similarity {path}: the name must end in .npz or .safetensors.")
    return suffix


def write_similarity(made: EvalFeatures, path: str | Path) -> None:
    """Write the matrix `similarity` [texts, videos] with `text_to_video` and the ids, whole or not at all.

    Ids are arrays `clip_ids` and `texts` in an .npz (no pickles), JSON lists in the header of a .safetensors file.
    """
    arrays = {"similarity": made.similarity_MN.numpy(), "text_to_video": made.text_to_video_M.numpy()}
    names = {"clip_ids": made.clip_ids, "texts": made.texts}
    with atomic_file(path) as file:
        if similarity_format(path) == ".npz":
            np.savez(file, **arrays, **{name: np.array(values, dtype=np.str_) for name, values in names.items()})
        else:
            file.write(save(arrays, metadata={name: json.dumps(values) for name, values in names.items()}))
