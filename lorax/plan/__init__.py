"""Will it fit, what will it cost: by arithmetic over abstract trees, and by the chip's own compiler."""

from lorax.plan.closed import Estimate, estimate
from lorax.plan.job import Job
from lorax.plan.presets import PRESETS, config_of
from lorax.plan.target import Target, parse_mesh, parse_target

__all__ = ["PRESETS", "Estimate", "Job", "Target", "config_of", "estimate", "parse_mesh", "parse_target"]
