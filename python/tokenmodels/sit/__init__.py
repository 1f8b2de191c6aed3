"""SiT, the self-slimmed vision transformer: a ViT whose patch tokens are softly aggregated stage by stage."""

from tokenmodels.sit.checkpoint import from_official, infer_config
from tokenmodels.sit.config import VARIANTS, SiTConfig
from tokenmodels.sit.model import SiT, SlimTokens

__all__ = ["VARIANTS", "SiT", "SiTConfig", "SlimTokens", "from_official", "infer_config"]
