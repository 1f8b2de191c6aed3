"""SiT, the self-slimmed vision transformer: its patch tokens are softly aggregated by stages."""

from tokenmodels.sit.checkpoint import infer_config
from tokenmodels.sit.config import VARIANTS, SiTConfig
from tokenmodels.sit.distillation import FRDLosses, frd_losses
from tokenmodels.sit.export import export_onnx
from tokenmodels.sit.model import SiT, SiTOutput
from tokenmodels.sit.recovery import RecoverTokens, TrainingParts
from tokenmodels.sit.slimming import SlimTokens, compose, unpool

__all__ = [
    "VARIANTS",
    "FRDLosses",
    "RecoverTokens",
    "SiT",
    "SiTConfig",
    "SiTOutput",
    "SlimTokens",
    "TrainingParts",
    "compose",
    "export_onnx",
    "frd_losses",
    "infer_config",
    "unpool",
]
