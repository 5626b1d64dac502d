"""Jobs say plain words: what NVFlare would fill in at a site or a server is refused before it can leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pfedsam.bundles import folder
from pfedsam.errors import PFedSAMError
from pfedsam.federated.literals import require_literal
from pfedsam.storage.job_plan import CLIENT, PLAN_FILE, SERVER

JOBS = sorted(path.parent for path in folder("jobs").glob("*/meta.json"))


def app(out: Path, content: dict, name: str = CLIENT) -> Path:
    (out / "config").mkdir(exist_ok=True)
    (out / "config" / name).write_text(json.dumps(content))
    return out


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_the_packaged_jobs_are_plain(job: Path) -> None:
    require_literal(job / "app", CLIENT)
    require_literal(job / "app", SERVER, references=True)
    require_literal(job / "app", PLAN_FILE)


@pytest.mark.parametrize(
    "text",
    ["{$HOME}", "x_{$SECRET[3]}", "{WORKSPACE}", "{num_rounds}", "${secret}", "$__import__", "/data", "..", "a\\b"],
)
def test_variables_paths_and_expressions_are_refused_wherever_they_are(tmp_path: Path, text: str) -> None:
    for content in ({"components": [{"args": {"a": [text]}}]}, {"components": [{text: 1}]}):
        with pytest.raises(PFedSAMError, match=r"E18.*components\.0") as caught:
            require_literal(app(tmp_path, content), CLIENT)
        assert repr(text) in str(caught.value)


def test_a_server_setting_may_be_named_and_nothing_else(tmp_path: Path) -> None:
    require_literal(app(tmp_path, {"num_rounds": 3, "args": {"n": "{num_rounds}"}}, SERVER), SERVER, references=True)
    for text in ("{$HOME}", "{WORKSPACE}", "{a}{b}", "{@a:b=c}"):
        with pytest.raises(PFedSAMError, match="E18"):
            require_literal(app(tmp_path, {"args": text}, SERVER), SERVER, references=True)


def test_a_second_form_of_the_file_is_refused(tmp_path: Path) -> None:
    app(tmp_path, {})
    (tmp_path / "config" / "config_fed_client.conf").write_text('include "/etc/passwd"')
    with pytest.raises(PFedSAMError, match=r"E18.*config_fed_client\.conf"):
        require_literal(tmp_path, CLIENT)
