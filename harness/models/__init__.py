"""Networks by name, built from a seed and refused where they mix examples."""

from harness.models.catalog import build
from harness.models.check import CrossExampleLayer, check
from harness.models.layers import Headed, WSConv2d, to_groupnorm

__all__ = ["CrossExampleLayer", "Headed", "WSConv2d", "build", "check", "to_groupnorm"]
