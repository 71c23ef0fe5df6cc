"""Trust in the settings of a corpus: what a corpus.yaml from somebody else may not decide.

Settings that run code or a program, open addresses, read other files or send secrets are declared with
`setting(reaches=…)`. When this user sets one, corpus.yaml gets a mark for it: a hash of its name and value with a key
that is in the user's state folder and in no corpus. A value without such a mark came from somebody else, or from
before there were marks. It takes effect once the user has confirmed it (`clipmill trust DIR`) or given it again.
Copies of a corpus keep their marks.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from clipmill.base.errors import UserError
from clipmill.base.settings import ReachingSetting, Settings
from clipmill.base.user_state import user_state, write_private
from pipeline.engine.settings import CorpusSettings, resolve
from shards.corpus.folder import Corpus

RUNS_CODE = "runs code"  # also when a command only reads the corpus, because a model's fingerprint imports its module
Marks = dict[str, list[str]]  # setting → marks of everybody who set or confirmed its value


@dataclass(frozen=True)
class Trust:
    """The settings of a corpus that this user has set or confirmed on this machine, and the others."""

    corpus: str  # its name
    marks: Marks = field(default_factory=dict)  # to be saved with the settings
    untrusted: tuple[ReachingSetting, ...] = ()

    def require(self, sections: Collection[str] | None = None, reaches: str | None = None) -> None:
        """Raise UserError if settings in these sections, or all that reach so, are not the user's own."""
        found = [each for each in self.untrusted if reaches in (None, each.reaches)]
        found = [each for each in found if sections is None or each.name.partition(".")[0] in sections]
        if found:
            raise UserError(
                f"{self.corpus}: its corpus.yaml was not saved by you on this machine, and has settings that reach "
                "outside the corpus:\n"
                + "\n".join(f"  {line}" for line in lines(found))
                + f"\nRead them. Confirm them once with `clipmill trust {self.corpus}`, or give them again with --set."
            )


def trust_in(corpus: Corpus, settings: CorpusSettings, given: Collection[str] | None = ()) -> Trust:
    """Compare the settings with the marks in corpus.yaml.

    given  dotted names that the user's command sets; None: all
    """
    saved, marks, untrusted = corpus.load_marks(), {}, []
    reaching = list(settings.reaching_out())
    key = _key() if reaching else b""
    for each in reaching:
        own = _mark(key, each.name, each.value)
        known = [mark for mark in saved.get(each.name, []) if isinstance(mark, str)]
        if own in known or given is None or each.name in given:
            marks[each.name] = known if own in known else [own]  # others' marks are of the value before
        else:
            marks[each.name] = known
            untrusted.append(each)
    return Trust(corpus.name, {name: found for name, found in marks.items() if found}, tuple(untrusted))


def confirm(root) -> list[ReachingSetting]:
    """Mark all settings of a corpus as this user's own; return those that were not. Needs the corpus's lock."""
    corpus = Corpus(root).require()
    with corpus.writer():
        saved = corpus.load_settings()
        settings = resolve(saved, None, [])
        before = trust_in(corpus, settings)
        key = _key() if before.untrusted else b""
        added = {each.name: [*before.marks.get(each.name, []), _mark(key, each.name, each.value)]
                 for each in before.untrusted}  # fmt: skip
        if added:
            corpus.save_settings(saved, before.marks | added)
    return list(before.untrusted)


def without_foreign_code(settings: CorpusSettings, trust: Trust) -> CorpusSettings:
    """Return the settings with the default in the place of every untrusted one that runs code."""
    for each in trust.untrusted:
        if each.reaches == RUNS_CODE:
            settings = _with_default(settings, each.name.split("."))
    return settings


def _with_default(settings: Settings, path: list[str]) -> Any:
    name, *below = path
    field = type(settings).model_fields[name]
    value = _with_default(getattr(settings, name), below) if below else field.get_default(call_default_factory=True)
    return settings.model_copy(update={name: value})


def assigned(assignments: Iterable[str]) -> list[str]:
    """Return the dotted names that `--set` gives."""
    return [assignment.partition("=")[0].strip() for assignment in assignments]


def lines(settings: Iterable[ReachingSetting]) -> list[str]:
    return [f"{each.name} = {json.dumps(each.value, ensure_ascii=False)}: {each.reaches}" for each in settings]


def _key() -> bytes:
    path = user_state("key")
    write_private(path, secrets.token_bytes(32))
    return path.read_bytes()


def _mark(key: bytes, name: str, value: Any) -> str:
    text = json.dumps([name, value], sort_keys=True, ensure_ascii=False)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()[:32]
