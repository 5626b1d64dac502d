"""A `datalist.json` of any shape gives sections, or an error of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pfedsam.data.sites import SECTIONS, read_split
from pfedsam.errors import PFedSAMError

NAMES = ["case-1", "case-2", "case-3", "case-4", "images/case-1.nii.gz", "/etc", "..", ""]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NAMES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["image", "label", "patient", *NAMES]), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for name in NAMES[:4]:
            (tmp_path / kind / f"{name}.nii.gz").touch()
    return tmp_path


def split_or_code(site: Path) -> str:
    try:
        read_split(site)
    except PFedSAMError as error:
        return error.code
    return ""


@given(JSON | st.dictionaries(st.sampled_from([*SECTIONS, "patients"]), JSON, max_size=4))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_a_split_or_an_error_of_ours(site: Path, content: Any) -> None:
    (site / "datalist.json").write_text(json.dumps(content))
    assert split_or_code(site) in ("", "E02", "E03", "E06", "E08", "E09")


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "3", "", '{"training": [{"image": "\\u0000"}]}', '{"training": [{"image": "' + "a" * 5000 + '"}]}'],
)
def test_what_no_reader_can_use_is_an_error_of_the_file(site: Path, content: str) -> None:
    (site / "datalist.json").write_text(content)
    assert split_or_code(site) == "E08"
