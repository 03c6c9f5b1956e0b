"""What `import awqkit` offers, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import awqkit


def test_the_public_names_are_these():
    assert awqkit.__all__ == [
        "PlainModel",
        "Recipe",
        "RunOptions",
        "__version__",
        "compare",
        "convert",
        "estimate",
        "evaluate",
        "folds",
        "inspect",
        "load",
        "quantize",
    ]
    for name in awqkit.__all__:
        assert getattr(awqkit, name) is not None


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'awqkit' has no attribute 'quantise'"):
        _ = awqkit.quantise


def test_importing_awqkit_and_its_recipe_does_not_import_torch():
    code = "import sys, awqkit; awqkit.Recipe(); assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
