"""Language models of the Llama family: one NNX decoder, weights from Hugging Face directories and GGUF
files."""

from lorax.models.config import ModelConfig, RopeScaling
from lorax.models.model import Model

__all__ = ["Model", "ModelConfig", "RopeScaling"]
