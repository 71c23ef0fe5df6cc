"""Studies of the methods' central claims in miniature, on the demo world, where the truth is known.

To write a study, add a module with a `STUDY` to this package, and a line to `STUDIES`. `STUDY` is a description
(`bench.studies.study.Study`): a question, the paper's claim, arms, sizes, and `run(arm, seed, size, cache) -> {metric:
value}`, a function of its arguments alone, which runs one arm with one seed on one thread. `bench.studies.runner` does
the rest: it runs every arm with every seed in its own process, stores each result in DIR/rows.csv at once, resumes
after an interruption, and writes DIR/README.md and DIR/plot.svg (`bench.studies.report`). `bench.studies.proxies` is an
example.

    arm     `Arm(name, condition)`: a treatment, and one of several conditions (a level of noise, a size)
    claims  `Claim`s: "this arm is above that one by more than this on this metric"; the report gives the outcome of
            each, from the differences within seeds
    sizes   dataclass instances by name: "default" ends within 20 minutes on two cores, "small" is for tests
    cache   a folder that outlives the run, for what arms share (rendered clips, corpora); `keep.kept` makes each item
            once, in whichever process needs it first. Its name has to contain everything that determines it
    draw    a function of the rows (a `Table`) that returns the plot, a matplotlib Figure

Shared modules: `scenes` (clips of the world as uint8 arrays with their texts), `fitting` (training with the project's
learner; retrieval scores). Scores are those of held-out clips; a choice by a score uses a validation set. Import
nothing heavy at the top of this module.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from clipmill.base.errors import UserError

if TYPE_CHECKING:
    from bench.studies.study import Study

# Name on the command line: module, and the question in a few words
STUDIES = {
    "proxies": ("proxies", "video proxies, mean pooling or CLIP4Clip heads, for queries about the order of frames"),
    "losses": ("losses", "the losses over videos, frames, subtitles and captions, with wrong subtitles"),
    "corpus-size": ("corpus_size", "scores after fine-tuning, by the number of clips in post-pretraining"),
    "language": ("language", "the distance between subtitles, captions and queries, by the NMI of k-means"),
    "selections": ("selections", "the SQL selection of a noisy corpus that trains the best model, at the same budget"),
    "tuning": ("tuning", "scores and memory of UniPT against full fine-tuning and a frozen model"),
    "editing": ("editing", "clips from single timestamps, and a teacher that edits their boundaries"),
}


def load(name: str) -> "Study":
    """Load a study by name. Raises UserError for an unknown name."""
    if name not in STUDIES:
        raise UserError(f"there is no study {name!r}; the studies are {', '.join(STUDIES)}.")
    return import_module(f"bench.studies.{STUDIES[name][0]}").STUDY
