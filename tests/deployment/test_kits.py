"""A startup kit that is made ready: called again, nothing that was decided before is lost, and what changes is said."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from nvflare.fuel.sec.authz import AuthzContext, Person
from nvflare.security.security import FLAuthorizer
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.deployment.allowed_classes import needed_classes
from pfedsam.deployment.job_privacy import GUARD, NOISE
from pfedsam.deployment.kits import AUTHORIZATION, FILTER, PRIVACY, RESOURCES, SCOPE, init_kit
from pfedsam.deployment.processes import Deployment
from pfedsam.deployment.site_check import Finding, check_kit
from pfedsam.errors import PFedSAMError
from pfedsam.federated.settings import KIT_DEFAULTS, SITE_SETTINGS, SiteSettings, read_settings
from pfedsam.storage.job_plan import CLIENT, SERVER

PROJECT = Path(__file__).resolve().parents[2] / "poc_workspace" / "project.yml"
OTHER = {"path": "nvflare.app_common.filters.svt_privacy.SVTPrivacy", "args": {"fraction": 0.1}}


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    """Kits as NVFlare makes them."""
    deployment = Deployment(tmp_path_factory.mktemp("kits"), PROJECT)
    deployment.provision()
    return deployment


@pytest.fixture
def fresh(provisioned: Deployment, tmp_path: Path) -> Path:
    return Path(shutil.copytree(provisioned.kit(provisioned.sites[0]), tmp_path / "site"))


@pytest.fixture
def kit(fresh: Path) -> Path:
    """A site's kit that was made ready once."""
    told = {"data_root": "/data", "federations": ["lgg"], "threads": 3, "may_share": ["lora_a", "lora_b"]}
    assert all(file.changes is None for file in init_kit(fresh, SiteSettings.model_validate(told)))
    return fresh


@pytest.fixture
def server(provisioned: Deployment, tmp_path: Path) -> Path:
    kit = Path(shutil.copytree(provisioned.kit(provisioned.server), tmp_path / "server"))
    init_kit(kit, SiteSettings())
    return kit


def content(kit: Path, name: str) -> Any:
    return json.loads((kit / "local" / name).read_text())


def change(kit: Path, name: str, **changed: Any) -> None:
    (kit / "local" / name).write_text(json.dumps({**content(kit, name), **changed}))


def again(kit: Path, byoc: bool = False, **settings: Any) -> dict[str, tuple[str, ...]]:
    """What a second call changes, by file; without the files in which nothing does."""
    files = init_kit(kit, SiteSettings.model_validate(settings), byoc=byoc)
    return {file.path.name: file.changes for file in files if file.changes}


def found(kit: Path, name: str) -> list[Finding]:
    return [one for one in check_kit(kit) if one.name == name]


# init -----------------------------------------------------------------------------------------------------------------


def test_a_second_call_without_options_changes_nothing(kit: Path, server: Path) -> None:
    for one in (kit, server):
        before = {path: path.read_bytes() for path in (one / "local").iterdir()}
        assert again(one) == {}
        assert {path: path.read_bytes() for path in (one / "local").iterdir()} == before


def test_settings_that_are_not_given_stay_and_those_that_are_given_are_told(kit: Path) -> None:
    changes = again(kit, federations=["lgg", "fundus"], device="cpu")
    assert changes == {SITE_SETTINGS: ('federations: added "fundus"', 'device: null -> "cpu"')}
    assert content(kit, SITE_SETTINGS) == {
        "data_root": "/data",
        "device": "cpu",
        "threads": 3,
        "federations": ["lgg", "fundus"],
        "may_share": ["lora_a", "lora_b"],
        **KIT_DEFAULTS,
    }
    before = json.loads((kit / "local" / f"{SITE_SETTINGS}.before").read_text())
    assert before["federations"] == ["lgg"]


def test_a_hospitals_kit_asks_for_three_sites_and_five_validation_cases_unless_it_says_otherwise(fresh: Path) -> None:
    line = ["site", "init", str(fresh), "--data-root", "/data"]
    assert CliRunner().invoke(app, line).exit_code == 0
    assert content(fresh, SITE_SETTINGS) == {"data_root": "/data", **KIT_DEFAULTS}
    assert (KIT_DEFAULTS["least_sites"], KIT_DEFAULTS["least_validation_cases"]) == (3, 5)
    done = CliRunner().invoke(app, [*line[:3], "--least-sites", "2", "--least-validation-cases", "1", "--curves"])
    assert done.exit_code == 0 and "least_sites: 3 -> 2" in done.output
    # what was decided stays
    assert again(fresh) == {}
    told = {"data_root": "/data", **KIT_DEFAULTS, "least_sites": 2, "least_validation_cases": 1, "curves": True}
    assert content(fresh, SITE_SETTINGS) == told


def test_a_site_without_settings_takes_part_with_any_number_of_sites() -> None:
    assert SiteSettings().least_sites is None and SiteSettings().curves is None


def test_the_sites_of_a_deployment_on_one_machine_say_what_is_enough_for_them(
    provisioned: Deployment, tmp_path: Path
) -> None:
    copy = Deployment(Path(shutil.copytree(provisioned.root, tmp_path / "poc")), PROJECT)
    copy.init(dict.fromkeys(copy.sites, tmp_path), {"least_sites": 2})
    told = content(copy.kit(copy.sites[0]), SITE_SETTINGS)
    assert (told["least_sites"], told["least_validation_cases"], told["curves"]) == (2, 1, True)


def test_limits_of_a_job_are_set_where_nothing_was_said_and_then_stay(fresh: Path) -> None:
    init_kit(fresh, SiteSettings(data_root="/data", most_rounds=20))
    assert {key: content(fresh, SITE_SETTINGS)[key] for key in KIT_DEFAULTS} == {**KIT_DEFAULTS, "most_rounds": 20}
    assert again(fresh, most_hours=2.5) == {SITE_SETTINGS: ("most_hours: 168.0 -> 2.5",)}
    assert again(fresh) == {} and content(fresh, SITE_SETTINGS)["most_rounds"] == 20


def test_what_was_there_first_is_kept_however_often_a_kit_is_made_ready(kit: Path) -> None:
    first = (kit / "local" / SITE_SETTINGS).read_bytes()
    for number in range(3):
        again(kit, threads=10 + number)
    kept = [kit / "local" / f"{SITE_SETTINGS}.before{end}" for end in ("", "-2", "-3")]
    assert kept[0].read_bytes() == first
    assert [json.loads(path.read_text())["threads"] for path in kept[1:]] == [10, 11]


def test_a_group_that_does_not_exist_is_refused_and_nothing_is_written(fresh: Path) -> None:
    before = sorted((fresh / "local").iterdir())
    with pytest.raises(PFedSAMError, match=r"E01.*expert_weights"):
        init_kit(fresh, SiteSettings(may_share=("expert_weights",)))
    assert sorted((fresh / "local").iterdir()) == before


def test_filters_and_scopes_that_were_added_by_hand_stay_after_ours(kit: Path) -> None:
    scope = {"name": SCOPE, "properties": {"a": 1}, "task_result_filters": [OTHER, {"path": FILTER}, OTHER]}
    private = {"name": "private", "task_result_filters": [OTHER], "task_data_filters": [OTHER]}
    change(kit, PRIVACY, scopes=[private, scope], default_scope="private")
    changes = again(kit)
    assert set(changes) == {PRIVACY} and 'default_scope: "private" -> "pfedsam"' in changes[PRIVACY]
    written = {one["name"]: one for one in content(kit, PRIVACY)["scopes"]}
    assert written[SCOPE]["task_result_filters"] == [{"path": FILTER}, OTHER, OTHER]
    assert written[SCOPE]["properties"] == {"a": 1}
    assert written["private"]["task_result_filters"] == [{"path": FILTER}, OTHER]
    assert written["private"]["task_data_filters"] == [OTHER]
    assert again(kit) == {}


def test_resources_that_were_set_by_hand_stay_and_what_opens_the_site_is_closed_and_told(kit: Path) -> None:
    resources = content(kit, RESOURCES)
    manager = next(one for one in resources["components"] if one["id"] == "resource_manager")
    manager["args"]["num_of_gpus"] = 2
    sender = {"id": "logs", "path": "nvflare.app_common.logging.site_log_streamer.SiteLogStreamer"}
    change(
        kit,
        RESOURCES,
        components=[*resources["components"], sender],
        class_allow_list=[*resources["class_allow_list"], "my.Class"],
        class_list_enforcement_mode="warn",
        allow_log_streaming=True,
    )
    (changes,) = again(kit).values()
    assert 'class_allow_list: removed "my.Class"' in changes and "allow_log_streaming: true -> false" in changes
    assert any("SiteLogStreamer" in one for one in changes)
    assert content(kit, RESOURCES) == resources


def test_a_right_that_was_taken_away_stays_so_and_code_is_denied_again(kit: Path) -> None:
    permissions = content(kit, AUTHORIZATION)["permissions"]
    permissions["lead"] |= {"submit_job": "none"}
    change(kit, AUTHORIZATION, permissions=permissions)
    assert again(kit) == {}
    opened = again(kit, byoc=True)
    assert opened[AUTHORIZATION] == (
        'permissions.project_admin.byoc: "none" -> "any"',
        'permissions.lead.byoc: "none" -> "any"',
    )
    assert again(kit)[AUTHORIZATION] == (
        'permissions.project_admin.byoc: "any" -> "none"',
        'permissions.lead.byoc: "any" -> "none"',
    )
    assert content(kit, AUTHORIZATION)["permissions"]["lead"]["submit_job"] == "none"


def test_a_file_that_cannot_be_read_is_named_and_not_replaced(kit: Path) -> None:
    (kit / "local" / PRIVACY).write_text("{")
    with pytest.raises(PFedSAMError, match=rf"E01.*{PRIVACY}"):
        init_kit(kit, SiteSettings())
    assert (kit / "local" / PRIVACY).read_text() == "{"


@pytest.mark.parametrize("given", ["any", "o:site", ["o:site", "n:lead@hospital-a.org"], "none"])
def test_a_role_whose_rights_are_one_word_keeps_them_without_code_and_shell(kit: Path, given: Any) -> None:
    permissions = content(kit, AUTHORIZATION)["permissions"] | {"member": given}
    change(kit, AUTHORIZATION, permissions=permissions)
    again(kit)
    rights = content(kit, AUTHORIZATION)["permissions"]["member"]
    assert rights["view"] == rights["submit_job"] == given
    assert rights["byoc"] == rights["shell_commands"] == "none"
    assert all(one.fine for one in [*found(kit, "code in jobs"), *found(kit, "shell commands")])


@pytest.mark.parametrize("name", ["server", "kit"])
def test_who_may_look_sees_versions_and_who_may_download_a_job_sees_the_servers_log(
    name: str, request: pytest.FixtureRequest
) -> None:
    """By NVFlare's own reading of the policy: its commands that are in no category are nobody's by default."""
    authorizer = FLAuthorizer("coordination", content(request.getfixturevalue(name), AUTHORIZATION))
    mine, others = Person("lead@a.org", "a", "lead"), Person("lead@b.org", "b", "lead")

    def may(right: str, user: Person) -> bool:
        return authorizer.authorize(AuthzContext(right, user, mine))[0]

    everyone = [mine, others, *(Person("x", "x", role) for role in ("project_admin", "org_admin", "member"))]
    assert all(may("report_version", user) for user in everyone)
    # of a site nobody can ask for a log
    at_server = name == "server"
    assert [may("get_job_log", user) for user in everyone] == [at_server, False, at_server, False, False]
    assert not any(may(right, user) for right in ("cat", "download_job_components") for user in everyone)


def test_a_command_that_was_denied_by_name_stays_denied(kit: Path) -> None:
    permissions = content(kit, AUTHORIZATION)["permissions"]
    permissions["lead"] |= {"report_version": "none"}
    change(kit, AUTHORIZATION, permissions=permissions)
    assert again(kit) == {}


def test_a_single_shell_command_is_taken_away_too(kit: Path) -> None:
    permissions = content(kit, AUTHORIZATION)["permissions"]
    permissions["lead"] |= {"cat": "any"}
    change(kit, AUTHORIZATION, permissions=permissions)
    assert again(kit)[AUTHORIZATION] == ('permissions.lead.cat: "any" -> "none"',)


@pytest.mark.parametrize("name", [RESOURCES, PRIVACY, AUTHORIZATION])
def test_a_policy_that_cannot_be_written_is_as_before(kit: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the file NVFlare would take its own default, which allows more."""
    change(kit, name, note="by hand")
    if name == PRIVACY:
        change(kit, name, default_scope="other")
    if name == RESOURCES:
        change(kit, name, allow_log_streaming=True)
    if name == AUTHORIZATION:
        change(kit, name, permissions=content(kit, name)["permissions"] | {"member": "any"})
    before = (kit / "local" / name).read_bytes()

    def full(*args: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr(Path, "write_text", full)
        with pytest.raises(PFedSAMError, match=rf"E01.*{name}.*No space left"):
            init_kit(kit, SiteSettings())
    assert (kit / "local" / name).read_bytes() == before
    assert not list((kit / "local").glob("*.tmp"))
    assert name in again(kit)
    assert (kit / "local" / f"{name}.before").read_bytes() == before


def test_a_new_policy_is_its_owners_and_one_that_is_there_keeps_its_mode(fresh: Path) -> None:
    init_kit(fresh, SiteSettings(data_root="/data"))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (fresh / "local").glob("*.json")}
    assert modes == dict.fromkeys([RESOURCES, PRIVACY, AUTHORIZATION, SITE_SETTINGS], 0o600)
    (fresh / "local" / SITE_SETTINGS).chmod(0o640)
    again(fresh, device="cpu")
    for name in (SITE_SETTINGS, f"{SITE_SETTINGS}.before"):
        assert (fresh / "local" / name).stat().st_mode & 0o777 == 0o640


def test_what_is_set_by_hand_in_the_sites_file_stays(kit: Path) -> None:
    change(kit, SITE_SETTINGS, least_validation_cases=5)
    again(kit, device="cpu")
    assert content(kit, SITE_SETTINGS)["least_validation_cases"] == 5


def test_a_kit_of_our_projects_sends_no_log_even_before_it_is_made_ready(fresh: Path) -> None:
    assert content(fresh, f"{RESOURCES}.default")["allow_log_streaming"] is False
    for name in ("project.yml", "hospitals.yml"):
        assert yaml.safe_load((PROJECT.parent / name).read_text())["allow_log_streaming"] is False


def test_each_side_allows_the_classes_of_its_own_side_only(kit: Path, server: Path) -> None:
    assert content(kit, RESOURCES)["class_allow_list"] == needed_classes(CLIENT)
    assert content(server, RESOURCES)["class_allow_list"] == needed_classes(SERVER)
    assert NOISE in needed_classes(CLIENT) and GUARD not in needed_classes(CLIENT)


def test_the_command_keeps_and_tells(kit: Path) -> None:
    done = CliRunner().invoke(app, ["site", "init", str(kit), "--threads", "1", "--may-share", "lora_a"])
    assert done.exit_code == 0, done.output
    assert "threads: 3 -> 1" in done.output and 'may_share: removed "lora_b"' in done.output
    assert "as before" in done.output
    written = content(kit, SITE_SETTINGS)
    assert (written["threads"], written["may_share"], written["federations"]) == (1, ["lora_a"], ["lgg"])


@pytest.mark.parametrize(("option", "value"), [("--labels", "{"), ("--largest-clip", "-1")])
def test_a_wrong_option_is_an_error_of_ours(kit: Path, option: str, value: str) -> None:
    done = CliRunner().invoke(app, ["site", "init", str(kit), option, value])
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E01"


def test_a_site_needs_its_data(fresh: Path) -> None:
    done = CliRunner().invoke(app, ["site", "init", str(fresh)])
    assert isinstance(done.exception, PFedSAMError) and "--data-root" in str(done.exception)


# check ----------------------------------------------------------------------------------------------------------------


def test_a_kit_that_was_made_ready_is_fine_without_a_warning(kit: Path, server: Path) -> None:
    for one in (kit, server):
        (classes,) = found(one, "classes")
        assert classes.fine and not classes.warning
    (filters,) = found(kit, "outgoing filter")
    assert filters.fine


def test_classes_beyond_the_needed_ones_are_a_warning(kit: Path) -> None:
    change(kit, RESOURCES, class_allow_list=[*needed_classes(CLIENT), "subprocess.Popen"])
    first, second = found(kit, "classes")
    assert first.fine and second.fine and second.warning and "subprocess.Popen" in second.message
    done = CliRunner().invoke(app, ["site", "check", str(kit)])
    assert "NOTE" in done.output and "subprocess.Popen" in done.output


@pytest.mark.parametrize(
    "filters",
    [[], [OTHER], [OTHER, {"path": FILTER}], [{"path": FILTER, "direction": "in"}]],
    ids=["none", "another", "another first", "of what comes in"],
)
@pytest.mark.parametrize("name", [SCOPE, "open"])
def test_a_scope_whose_first_outgoing_filter_is_not_ours_is_wrong(kit: Path, name: str, filters: list[Any]) -> None:
    ours = {"name": SCOPE, "task_result_filters": [{"path": FILTER}]}
    change(kit, PRIVACY, scopes=[ours, {"name": name, "task_result_filters": filters}][name == SCOPE :])
    (finding,) = found(kit, "outgoing filter")
    assert not finding.fine and f"'{name}'" in finding.message


def test_a_default_scope_that_does_not_exist_is_wrong(kit: Path) -> None:
    change(kit, PRIVACY, default_scope="nothing")
    (finding,) = found(kit, "outgoing filter")
    assert not finding.fine and "nothing" in finding.message


@pytest.mark.parametrize("given", ["any", "o:site", ["o:site"], " ANY ", {"byoc": "o:site", "Cat": "any"}])
def test_a_role_that_may_bring_code_or_read_files_is_wrong_however_it_is_written(kit: Path, given: Any) -> None:
    change(kit, AUTHORIZATION, permissions=content(kit, AUTHORIZATION)["permissions"] | {"member": given})
    for name in ("code in jobs", "shell commands"):
        (finding,) = found(kit, name)
        assert not finding.fine and "['member']" in finding.message


@pytest.mark.parametrize("right", ["shell_commands", "cat", "tail"])
def test_a_shell_command_is_wrong_where_code_is_denied(kit: Path, right: str) -> None:
    permissions = content(kit, AUTHORIZATION)["permissions"]
    permissions["lead"] |= {right: "o:site"}
    change(kit, AUTHORIZATION, permissions=permissions)
    (code,), (shell,) = found(kit, "code in jobs"), found(kit, "shell commands")
    assert code.fine and not shell.fine and "lead" in shell.message


@pytest.mark.parametrize("given", ["none", "No", {"view": "any", "shell_commands": "none", "byoc": "no"}])
def test_a_role_without_code_and_shell_is_fine(kit: Path, given: Any) -> None:
    change(kit, AUTHORIZATION, permissions=content(kit, AUTHORIZATION)["permissions"] | {"member": given})
    assert all(one.fine for one in [*found(kit, "code in jobs"), *found(kit, "shell commands")])


@pytest.mark.parametrize("permissions", [None, {}, "any", {"lead": 5}, {"lead": {"byoc": [7]}}])
def test_a_policy_that_nvflare_would_not_read_is_wrong(kit: Path, permissions: Any) -> None:
    change(kit, AUTHORIZATION, permissions=permissions)
    assert not any(one.fine for one in [*found(kit, "code in jobs"), *found(kit, "shell commands")])


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others on this machine can look into: those of pytest are closed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_what_others_can_read_is_a_warning_with_the_command_that_closes_it(kit: Path, open_folder: Path) -> None:
    site = Path(shutil.copytree(kit, open_folder / "a kit"))
    (site / "job-1").mkdir(mode=0o755)
    for log in (site / "log.txt", site / "job-1" / "error_log.txt"):
        log.write_text("case-1")
        log.chmod(0o644)
    for folder in (open_folder / "data" / "images", open_folder / "data" / "labels", open_folder / "states"):
        folder.mkdir(parents=True)
        (folder / "case-1.nii.gz").write_text("")
    (open_folder / "data" / "labels").chmod(0o750)
    change(site, SITE_SETTINGS, data_root=str(open_folder / "data"), state_root=str(open_folder / "states"))
    warnings = {one.name: one.message for one in check_kit(site) if one.name.endswith(" access")}
    assert all(one.fine and one.warning for one in check_kit(site) if one.name.endswith(" access"))
    assert set(warnings) == {"kit access", "data access", "state access"}
    (limits,) = (one.message for one in check_kit(site) if one.name == "limits")
    assert "sites at least 3" in limits and "rounds at most 1000" in limits and "clip at most any" in limits
    assert "log.txt" in warnings["kit access"] and "job-1/error_log.txt" in warnings["kit access"]
    assert RESOURCES not in warnings["kit access"], "a policy is its owner's only"
    assert "labels" not in warnings["data access"]
    for name, path in (("kit", site), ("data", open_folder / "data"), ("state", open_folder / "states")):
        assert f"chmod -R o-rwx {shlex.quote(str(path))}" in warnings[f"{name} access"]
        path.chmod(0o750)
    assert not [one for one in check_kit(site) if one.name.endswith(" access")]


def test_the_folder_of_prepared_volumes_is_looked_at_like_the_state(kit: Path, open_folder: Path) -> None:
    site = Path(shutil.copytree(kit, open_folder / "kit"))
    data = open_folder / "data"
    for folder in (data / "images", data / "labels"):
        folder.mkdir(parents=True)
        (folder / "case-1.nii.gz").write_text("")

    def found(place: Path) -> dict[str, Finding]:
        change(site, SITE_SETTINGS, data_root=str(data), state_root=str(open_folder / "s"), prepared_root=str(place))
        return {one.name: one for one in check_kit(site) if one.name.startswith("prepared volumes")}

    (fine,) = found(open_folder / "prepared").values()
    assert fine.fine and str(open_folder / "prepared") in fine.message
    assert not found(site / "prepared")["prepared volumes"].fine
    (open_folder / "a file").write_text("")
    assert "cannot be written" in found(open_folder / "a file")["prepared volumes"].message
    (open_folder / "prepared").chmod(0o755)
    for folder in (open_folder / "prepared").iterdir():
        folder.chmod(0o755)
    assert found(open_folder / "prepared")["prepared volumes access"].warning


def test_no_limit_that_it_has_written_down_stays_no_limit(fresh: Path) -> None:
    init_kit(fresh, SiteSettings(data_root="/data"))
    path = fresh / "local" / SITE_SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), "least_sites": None, "most_hours": None}))
    for _ in range(2):
        assert again(fresh) == {}
        assert content(fresh, SITE_SETTINGS)["least_sites"] is None and read_settings(path).most_hours is None
