"""SiT, the self-slimmed vision transformer: its patch tokens are softly aggregated by stages."""

from tokenmodels.sit.checkpoint import from_official, infer_config
from tokenmodels.sit.config import VARIANTS, SiTConfig
from tokenmodels.sit.model import SiT, SlimTokens

__all__ = ["VARIANTS", "SiT", "SiTConfig", "SlimTokens", "from_official", "infer_config"]
