"""UniPT (docs/methods/unipt.md): small networks beside a frozen CLIP that read every layer's hidden states at once."""

from training.models.method import Method
from training.models.unipt.settings import UniPtSettings

METHOD = Method(
    "unipt",
    code_in="training.models.unipt.build",
    settings=UniPtSettings,
    takes_frames_per_s=lambda settings: settings.pooling == "mean",
)
