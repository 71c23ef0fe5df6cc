"""The stages in order: settings, code version, where they run. Their SQL is in `pipeline.stages.queries`."""

from dataclasses import dataclass
from pathlib import Path

from clipmill.base.errors import UserError
from clipmill.base.settings import Settings, digest
from pipeline.engine.settings import CorpusSettings


@dataclass(frozen=True)
class Stage:
    name: str
    pool: str  # io: many at a time, waiting mostly · cpu: one per core · model: actors that hold models
    code_version: int  # raised when the code writes something else for the same input and settings
    help: str

    def settings(self, settings: CorpusSettings) -> Settings:
        return getattr(settings, self.name)

    def fingerprint(self, settings: CorpusSettings) -> str | None:
        """Hash of everything but the input that shapes what the stage writes: settings, models, code version.

        None: the stage is off.
        """
        if self.settings(settings).is_off:
            return None
        return digest([self.name, self.code_version, self._identity(settings)])

    def _identity(self, settings: CorpusSettings) -> str:
        own = self.settings(settings)
        if self.name == "caption":
            from captioning.captioner import fingerprint_of

            return fingerprint_of(own)
        if self.name == "score":
            from captioning.scorer import fingerprint_of

            return fingerprint_of(own)
        if self.name == "transcribe" and own.whisper and (Path(own.whisper).suffix or Path(own.whisper).is_file()):
            return digest([own.fingerprint(), _weights_identity(own.whisper)])
        return own.fingerprint()


def _weights_identity(path: str) -> str:
    from captioning.model_identity import file_sha256

    if not Path(path).is_file():
        raise UserError(f"setting transcribe.whisper = {path}: there is no such file.")
    return file_sha256(Path(path))


STAGES = (
    Stage("download", "io", 1, "URL → file, subtitles, metadata"),
    Stage("transcribe", "cpu", 1, "subtitles or speech → words with times"),
    Stage("segment", "cpu", 1, "words → sentences → spans"),
    Stage("cut", "cpu", 1, "spans → clips, caption frames, motion, hashes"),
    Stage("caption", "model", 1, "caption frames → captions"),
    Stage("score", "model", 1, "frames and texts → similarities"),
)
STAGE_NAMES = ("ingest", *(stage.name for stage in STAGES), "pack")


def fingerprints(settings: CorpusSettings) -> dict[str, str | None]:
    return {stage.name: stage.fingerprint(settings) for stage in STAGES}
