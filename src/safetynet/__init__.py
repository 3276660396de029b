"""SafetyNet: plant, dissect, detect and remove backdoors in open-weight language models."""

__version__ = "0.1.0"
