"""A kit takes a new certificate or a renewed root, and nothing else; keys are for their owner only."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from nvflare.lighter.utils import Identity, generate_cert, generate_keys, serialize_cert, serialize_pri_key
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.deployment.authority import ROOT_KEY, fingerprint, make_authority, renew_root
from pfedsam.deployment.certificates import STATE_FILE, of_kit
from pfedsam.deployment.kit_renewal import pair_problem, renew_kit
from pfedsam.deployment.kits import init_kit
from pfedsam.deployment.processes import Deployment
from pfedsam.deployment.site_check import Finding, check_kit
from pfedsam.errors import PFedSAMError
from pfedsam.federated.settings import SiteSettings

PROJECT = Path(__file__).resolve().parents[2] / "poc_workspace" / "project.yml"
SITE, OTHER = "hospital-a", "hospital-b"


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<workspace>/<project>` as NVFlare makes it."""
    deployment = Deployment(tmp_path_factory.mktemp("provisioned"), PROJECT)
    deployment.provision()
    return deployment.kit(SITE).parents[1]


@pytest.fixture
def project(provisioned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(provisioned, tmp_path / "project"))


@pytest.fixture
def kit(project: Path) -> Path:
    return project / "prod_00" / SITE


@pytest.fixture
def authority(project: Path, tmp_path: Path) -> Path:
    make_authority(project, tmp_path / "authority")
    return tmp_path / "authority"


def signed(
    authority: Path, out: Path, name: str = SITE, org: str = "hospital_a", days: int = 700, key: object = None
) -> Path:
    """A folder with a new certificate, as `nvflare package` leaves it."""
    root_key = serialization.load_pem_private_key((authority / ROOT_KEY).read_bytes(), password=None)
    private, public = generate_keys()
    ends = datetime.now(timezone.utc) + timedelta(days=days)
    made = generate_cert(Identity(name, org, "client"), Identity("pfedsam"), root_key, public, not_valid_after=ends)
    out.mkdir()
    (out / "client.crt").write_bytes(serialize_cert(made))
    (out / "client.key").write_bytes(serialize_pri_key(key or private))
    shutil.copy(authority / "rootCA.pem", out)
    return out


def contents(kit: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in kit.rglob("*") if path.is_file()}


def found(kit: Path, name: str) -> list[Finding]:
    return [one for one in check_kit(kit) if one.name == name]


def test_a_new_certificate_takes_the_place_of_the_old_one_which_is_kept(
    kit: Path, authority: Path, tmp_path: Path
) -> None:
    before, old = contents(kit), of_kit(kit)
    (kit / "startup" / "client.key").chmod(0o644)
    assert len(renew_kit(kit, signed(authority, tmp_path / "new"))) == 2
    new = of_kit(kit)
    assert new[0].serial != old[0].serial and new[0].days > old[0].days and new[1].serial == old[1].serial
    assert pair_problem(kit) is None
    after = contents(kit)
    for name in ("client.crt", "client.key"):
        path = kit / "startup" / name
        assert after.pop(path) != before[path] and after.pop(path.with_name(f"{name}.before")) == before.pop(path)
    assert after == before, "settings and policy stay"
    for name in ("client.key", "client.key.before"):
        assert stat.S_IMODE((kit / "startup" / name).stat().st_mode) == 0o600


def _of_another_site(authority: Path, out: Path, kit: Path) -> Path:
    return signed(authority, out, OTHER, "hospital_b")


def _of_another_organisation(authority: Path, out: Path, kit: Path) -> Path:
    return signed(authority, out, org="hospital_b")


def _that_ends_before(authority: Path, out: Path, kit: Path) -> Path:
    return signed(authority, out, days=30)


def _with_a_strange_key(authority: Path, out: Path, kit: Path) -> Path:
    return signed(authority, out, key=generate_keys()[0])


def _of_another_root(authority: Path, out: Path, kit: Path) -> Path:
    key, public = generate_keys()
    root = generate_cert(Identity("pfedsam"), Identity("pfedsam"), key, public, ca=True)
    (authority / ROOT_KEY).write_bytes(serialize_pri_key(key))
    (authority / "rootCA.pem").write_bytes(serialize_cert(root))
    return signed(authority, out)


def _under_a_root_that_did_not_sign_it(authority: Path, out: Path, kit: Path) -> Path:
    made = _of_another_root(authority, out, kit)
    shutil.copy(kit / "startup" / "rootCA.pem", made)
    return made


def _that_provisioning_has_kept(authority: Path, out: Path, kit: Path) -> Path:
    return Path(shutil.copytree(kit, out))


def _that_is_none(authority: Path, out: Path, kit: Path) -> Path:
    out.mkdir()
    return out


def _whose_key_is_elsewhere(authority: Path, out: Path, kit: Path) -> Path:
    made = signed(authority, out)
    (made / "client.key").unlink()
    return made


REFUSED: dict[Callable[[Path, Path, Path], Path], str] = {
    _of_another_site: "the kit is of .*hospital-a",
    _of_another_organisation: "the kit is of .*hospital_a",
    _that_ends_before: "no later than the present one",
    _with_a_strange_key: "is not the key of",
    _of_another_root: "has another key than",
    _under_a_root_that_did_not_sign_it: "was not signed by",
    _that_provisioning_has_kept: "the certificate that the kit has",
    _that_is_none: "no startup kit",
    _whose_key_is_elsewhere: "there is no .*client.key",
}


@pytest.mark.parametrize("made", list(REFUSED), ids=lambda made: made.__name__.strip("_"))
def test_a_certificate_is_refused_and_the_kit_is_as_it_was(
    kit: Path, authority: Path, tmp_path: Path, made: Callable[[Path, Path, Path], Path]
) -> None:
    new, before = made(authority, tmp_path / "new", kit), contents(kit)
    with pytest.raises(PFedSAMError, match=f"E01.*{REFUSED[made]}"):
        renew_kit(kit, new)
    assert contents(kit) == before


def test_a_renewed_root_holds_what_the_old_one_has_signed_and_the_old_one_what_it_signs(
    kit: Path, authority: Path, tmp_path: Path
) -> None:
    old = x509.load_pem_x509_certificate((authority / "rootCA.pem").read_bytes())
    told = fingerprint(authority / "rootCA.pem")
    renewed = renew_root(authority, days=4000)
    assert renewed.days >= 3999 and renewed.serial != old.serial_number
    assert json.loads((authority / "ca.json").read_text())["rootCA_fingerprint"] == fingerprint(renewed.path) != told
    later = signed(authority, tmp_path / "later", OTHER, "hospital_b", days=1000)
    x509.load_pem_x509_certificate((later / "client.crt").read_bytes()).verify_directly_issued_by(old)
    done = CliRunner().invoke(app, ["site", "renew", str(kit), str(authority / "rootCA.pem")])
    assert done.exit_code == 0 and "rootCA.pem: ends" in done.output
    assert of_kit(kit)[1].serial == renewed.serial and pair_problem(kit) is None
    # the old one again: the kit keeps the one that lasts longer
    assert renew_kit(kit, authority / "rootCA.pem.before") == []


def test_the_root_of_a_provisioned_project_is_renewed_in_what_the_next_provisioning_reads(project: Path) -> None:
    before = json.loads((project / STATE_FILE).read_text())
    old = x509.load_pem_x509_certificate(before["root_cert"].encode())
    renewed = renew_root(project)
    after = json.loads((project / STATE_FILE).read_text())
    now = x509.load_pem_x509_certificate(after["root_cert"].encode())
    assert renewed.serial == now.serial_number != old.serial_number
    # NVFlare compares the length with the project file's
    assert now.not_valid_after_utc - now.not_valid_before_utc == old.not_valid_after_utc - old.not_valid_before_utc
    assert {**after, "root_cert": ""} == {**before, "root_cert": ""}
    for path in (project / "state").glob("cert.json*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_authoritys_folder_is_its_owners_and_says_how_the_server_is_reached(
    project: Path, authority: Path, tmp_path: Path
) -> None:
    assert stat.S_IMODE(authority.stat().st_mode) == 0o700
    assert stat.S_IMODE((authority / ROOT_KEY).stat().st_mode) == 0o600
    profile = yaml.safe_load((authority / "profile.yml").read_text())
    config = json.loads((project / "prod_00" / SITE / "startup" / "fed_client.json").read_text())
    service = config["servers"][0]["service"]
    assert f"{profile['server']['host']}:{profile['server']['fed_learn_port']}" == service["target"]
    assert profile["scheme"] == service["scheme"] and profile["connection_security"] == "mtls"
    renew_root(project)
    assert make_authority(project, authority).path == authority / "rootCA.pem", "the same key again"
    made = _of_another_root(authority, tmp_path / "other", project)
    with pytest.raises(PFedSAMError, match=r"E01.*another root key"):
        make_authority(project, authority)
    with pytest.raises(PFedSAMError, match=r"E01.*no provisioned project"):
        renew_root(made)


def test_the_command_prints_a_fingerprint_that_nvflare_takes(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    # the colons and letters of one in nine are an emoji's name
    while ":AB:" not in fingerprint(renew_root(project).path):
        pass
    done = CliRunner().invoke(app, ["certificates", "authority", str(project), str(out)])
    assert done.exit_code == 0 and fingerprint(out / "rootCA.pem") in done.output and "profile.yml" in done.output


def test_keys_that_others_can_read_are_wrong_and_site_init_closes_them(kit: Path) -> None:
    key = kit / "startup" / "client.key"
    init_kit(kit, SiteSettings(data_root="/data"))
    (fine,) = found(kit, "private key")
    assert fine.fine
    key.chmod(0o644)
    (wrong,) = found(kit, "private key")
    assert not wrong.fine and f"chmod 600 {key}" in wrong.message
    (changed,) = (file for file in init_kit(kit, SiteSettings()) if file.path == key)
    assert changed.changes == ("mode: 0644 -> 0600",) and found(kit, "private key")[0].fine


def test_a_key_that_does_not_fit_is_wrong(kit: Path) -> None:
    (kit / "startup" / "client.key").write_bytes(serialize_pri_key(generate_keys()[0]))
    assert any("is not the key of" in one.message and not one.fine for one in found(kit, "certificate"))
