"""Studies of the methods' central claims in miniature, on the demo world, where the truth is known.

How one is written. A study is a module of this package that has a `STUDY` and is named in `STUDIES`. `STUDY` is a pure
description (`bench.studies.study.Study`): a question, what the paper claims, arms, sizes, and `run(arm, seed, size,
cache) -> {metric: value}`, a function of its arguments alone, which does one arm with one seed on one thread.
Everything else is the frame's (`bench.studies.runner`): it runs every arm with every seed, in their own processes,
keeps each result in DIR/rows.csv the moment it is there, goes on where it was interrupted, and writes DIR/README.md and
DIR/plot.svg (`bench.studies.report`). See `bench.studies.proxies` for one.

    arm     `Arm(name, condition)`: what is compared, and under which of several conditions (a level of noise, a size)
    claims  `Claim`s: "this arm is above that one by more than so much on this metric"; the report says of each what
            came out of the differences within seeds, whatever that is
    sizes   a dataclass instance by name: "default" ends within 20 minutes on two cores, "small" is for tests
    cache   a folder that outlives the run, for what arms share (rendered clips, corpora); `keep.kept` makes a thing
            once, whichever of the processes comes first. Put everything that decides the thing into its name
    draw    a function of the rows (a `Table`) that returns the plot, a matplotlib Figure

Helpers to share: `scenes` (clips of the world as uint8 arrays with their texts), `fitting` (training with the project's
learner; retrieval scores). Scores are of held-out clips only; where something is chosen by a score, that score is
one of a validation set. Nothing heavy is imported here.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from clipmill.base.errors import UserError

if TYPE_CHECKING:
    from bench.studies.study import Study

# Name on the command line: the module here that holds it, and the question in a few words
STUDIES = {
    "proxies": ("proxies", "video proxies, mean pooling or CLIP4Clip heads, where only the order of frames answers"),
    "losses": ("losses", "the losses over videos, frames, subtitles and captions, with wrong subtitles"),
    "corpus-size": ("corpus_size", "fine-tuned scores against the number of clips post-pretrained on"),
    "language": ("language", "how far subtitles, captions and queries are apart, by the NMI of k-means"),
    "selections": ("selections", "which SQL selection of a noisy corpus teaches best at the same budget"),
    "tuning": ("tuning", "what UniPT reaches and keeps in memory against full fine-tuning and a frozen model"),
    "editing": ("editing", "clips from single timestamps, and a teacher that edits their boundaries"),
}


def load(name: str) -> "Study":
    """Raises UserError for a name that is no study's."""
    if name not in STUDIES:
        raise UserError(f"there is no study {name!r}; there are {', '.join(STUDIES)}.")
    return import_module(f"bench.studies.{STUDIES[name][0]}").STUDY
