"""Every causal language model of transformers: found, streamed, folded, quantized and loaded exactly, or refused.

`make test` runs the fast ones, `make test-zoo` all.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import transformers
from architecture_check import NotHandled, Outcome, outcome_of
from architecture_table import TABLE, is_built, table_text
from small_models import pinned, registry

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
PINNED_VERSION = re.search(r"^transformers==(.*)$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)[1]
pytestmark = pytest.mark.skipif(
    transformers.__version__ != PINNED_VERSION, reason=f"the data file is about transformers {PINNED_VERSION}"
)

ENTRIES = pinned()
EVERYTHING = os.environ.get("AWQKIT_ZOO") == "all"
SHARE_HANDLED = 0.95  # of those that can be built small


def looked_at(model_type: str) -> bool:
    entry = ENTRIES[model_type]
    return EVERYTHING or not (entry.get("slow") or "reason" in entry)


@pytest.mark.parametrize("model_type", [name for name in ENTRIES if looked_at(name)])
def test_an_architecture_is_handled_as_the_data_file_says(model_type: str) -> None:
    entry = ENTRIES[model_type]
    try:
        found = outcome_of(model_type)
    except NotHandled as error:
        found = Outcome(reason=str(error))
    assert found.as_json() == {name: value for name, value in entry.items() if name not in ("class", "config", "slow")}


def test_the_data_file_has_every_architecture_of_the_registry_and_no_other() -> None:
    assert {name: entry["class"] for name, entry in ENTRIES.items()} == registry()


def test_most_of_them_are_handled() -> None:
    handled = sum("blocks" in entry for entry in ENTRIES.values())
    assert handled >= SHARE_HANDLED * sum(map(is_built, ENTRIES.values()))


def test_the_readme_says_how_many() -> None:
    handled = sum("blocks" in entry for entry in ENTRIES.values())
    readme = (TABLE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"{handled} of the {len(ENTRIES)} causal language models" in readme


def test_the_page_is_made_from_the_data_file() -> None:
    assert TABLE.read_text(encoding="utf-8") == table_text(ENTRIES)
