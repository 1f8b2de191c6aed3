"""SiT, the self-slimmed vision transformer: its patch tokens are softly aggregated by stages."""

from tokenmodels.sit.checkpoint import infer_config
from tokenmodels.sit.config import VARIANTS, SiTConfig
from tokenmodels.sit.distillation import FRDLosses, frd_losses
from tokenmodels.sit.distilled import Distilled
from tokenmodels.sit.distilled_vit import DistilledViT
from tokenmodels.sit.evaluate import Accuracy, accuracy, evaluation_transform
from tokenmodels.sit.export import export_onnx
from tokenmodels.sit.hosts import record_tokens
from tokenmodels.sit.model import SiT, SiTOutput
from tokenmodels.sit.recipe import Recipe, parameter_groups
from tokenmodels.sit.recovery import RecoverTokens, TrainingParts
from tokenmodels.sit.slim import Slimming, slim
from tokenmodels.sit.slimming import SlimTokens, compose, unpool
from tokenmodels.sit.timing import Throughput, throughput
from tokenmodels.sit.train import Training

__all__ = [
    "VARIANTS",
    "Accuracy",
    "Distilled",
    "DistilledViT",
    "FRDLosses",
    "Recipe",
    "RecoverTokens",
    "SiT",
    "SiTConfig",
    "SiTOutput",
    "SlimTokens",
    "Slimming",
    "Throughput",
    "Training",
    "TrainingParts",
    "accuracy",
    "compose",
    "evaluation_transform",
    "export_onnx",
    "frd_losses",
    "infer_config",
    "parameter_groups",
    "record_tokens",
    "slim",
    "throughput",
    "unpool",
]
