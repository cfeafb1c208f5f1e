"""Language models of the Llama family: one NNX decoder, weights from Hugging Face and GGUF files."""

from lorax.models.classifier import with_labels
from lorax.models.config import ModelConfig, RopeScaling
from lorax.models.generate import generate
from lorax.models.load import load
from lorax.models.model import Model
from lorax.models.original import Original
from lorax.models.resolve import resolve_base
from lorax.models.save import save_hf

__all__ = [
    "Model",
    "ModelConfig",
    "Original",
    "RopeScaling",
    "generate",
    "load",
    "resolve_base",
    "save_hf",
    "with_labels",
]
