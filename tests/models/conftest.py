"""What the tests of models share."""

from pathlib import Path

import pytest
from tests.models import variants


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain LoRA of qwen's miniature, as PEFT saves it."""
    variants.saved("lora", tmp_path / "adapter")
    return tmp_path / "adapter"
