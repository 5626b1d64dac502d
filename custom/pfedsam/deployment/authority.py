"""The authority of a federation: the folder that `nvflare cert approve` takes, and its root made anew.

The root is renewed with its key. The same name and the same key sign, so that a certificate that was signed before is
good under the new root, and one that is signed from now on is good under the old: who changes first does not matter,
and nobody stops. It takes no access away; a root with another key does (`certificates.renew`).
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.x509.oid import NameOID
from nvflare.lighter.utils import Identity, generate_cert, serialize_cert
from nvflare.tool.cert.fingerprint import cert_fingerprint_sha256

from pfedsam.deployment.certificates import ROOT, ROOT_FILE, Certificate, certificate, state_file
from pfedsam.deployment.kits import keep_before
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import read_object, write_atomically

ROOT_KEY, AUTHORITY_FILE, PROFILE = "rootCA.key", "ca.json", "profile.yml"
_BACKUP = "Take it from the backup."


def make_authority(project: Path, out: Path) -> Certificate:
    """Write the folder that `nvflare cert approve` takes, for a federation that `nvflare provision` has made.

    Args:
        project: `<workspace>/<project>` of `nvflare provision`.
        out: folder to write, with mode 0700: `rootCA.pem`, `rootCA.key` (mode 0600), `ca.json` and `profile.yml`, which
            tells how the server is reached: a kit with another scheme than the server's never connects.

    Returns:
        The root.

    Raises:
        PFedSAMError: E01 if no certificates are kept there, or `out` holds the authority of another root key; E29 if
            a file cannot be read.
    """
    path = state_file(project)
    content = read_object(path, _BACKUP)
    root, key = _root(str(content.get("root_cert")), path), str(content.get("root_pri_key")).encode()
    _require_fits(_key(key, path), root, path)
    there = out / ROOT_FILE
    if there.exists() and _root(there.read_text(), there).public_key() != root.public_key():
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS, f"{out} holds the authority of another root key.", "Name another folder."
        )
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(out / ROOT_KEY, key)
    _write(out, root, {"project": _name(root), "provision_version": "00"})
    write_atomically(out / PROFILE, yaml.safe_dump(_profile(path.parents[1]), sort_keys=False).encode())
    return certificate(there, ROOT)


def renew_root(folder: Path, days: int | None = None) -> Certificate:
    """Make the root certificate anew with the same name and key; the file before is kept as `<name>.before`.

    Args:
        folder: with `rootCA.key`, as `nvflare cert init` or `make_authority` made it; or `<workspace>/<project>` of
            `nvflare provision`.
        days: that it is valid; by default as long as the one before: `nvflare provision` refuses another length.

    Returns:
        The new root, in the file that goes to everybody: `rootCA.pem` in the folder, or in `state/` of the project.

    Raises:
        PFedSAMError: E01 if the folder holds no root key, E29 if a file cannot be read.
    """
    if not (folder / ROOT_KEY).is_file():
        path = state_file(folder)
        content = read_object(path, _BACKUP)
        before, key = _root(str(content.get("root_cert")), path), _key(str(content.get("root_pri_key")).encode(), path)
        renewed = _renewed(before, key, days, path)
        # both hold every private key of the federation
        path.chmod(0o600)
        keep_before(path)
        write_atomically(path, json.dumps({**content, "root_cert": serialize_cert(renewed).decode()}).encode())
        public = path.with_name(ROOT_FILE)
        write_atomically(public, serialize_cert(renewed))
        public.chmod(0o644)
        return certificate(public, ROOT)
    path, told = folder / ROOT_FILE, read_object(folder / AUTHORITY_FILE, _BACKUP)
    before, key = _root(path.read_text(), path), _key((folder / ROOT_KEY).read_bytes(), folder / ROOT_KEY)
    renewed = _renewed(before, key, days, path)
    keep_before(path)
    _write(folder, renewed, told)
    return certificate(path, ROOT)


def _profile(project: Path) -> dict[str, Any]:
    """How the server is reached, by its newest kit."""
    kits = sorted(project.glob("prod_*/*/startup/fed_server.json"))
    if not kits:
        remedy = "Provision the server's kit again: `nvflare provision`."
        raise PFedSAMError(ErrorCode.SITE_SETTINGS, f"{project} holds no kit of a server.", remedy)
    try:
        (server,) = read_object(kits[-1], _BACKUP)["servers"]
        host, _, port = server["service"]["target"].rpartition(":")
        return {
            "name": server["name"],
            "scheme": server["service"]["scheme"],
            "connection_security": server["connection_security"],
            "server": {"host": host, "fed_learn_port": int(port), "admin_port": int(server["admin_port"])},
        }
    except (KeyError, ValueError, TypeError) as error:
        raise PFedSAMError(
            ErrorCode.CONFIGURATION_FILE, f"{kits[-1]} does not say how the server is reached: {error!r}.", _BACKUP
        ) from None


def fingerprint(path: Path) -> str:
    """SHA-256 of a root, as `nvflare package --fingerprint` takes it."""
    return str(cert_fingerprint_sha256(_root(path.read_text(), path)))


def _write(folder: Path, root: x509.Certificate, told: dict[str, Any]) -> None:
    write_atomically(folder / ROOT_FILE, serialize_cert(root))
    # it goes to everybody
    (folder / ROOT_FILE).chmod(0o644)
    content = {**told, "rootCA_fingerprint": cert_fingerprint_sha256(root)}
    write_atomically(folder / AUTHORITY_FILE, (json.dumps(content, indent=2) + "\n").encode())


def _renewed(before: x509.Certificate, key: RSAPrivateKey, days: int | None, path: Path) -> x509.Certificate:
    _require_fits(key, before, path)
    organisation = before.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    who = Identity(_name(before), str(organisation[0].value) if organisation else None)
    valid = before.not_valid_after_utc - before.not_valid_before_utc if days is None else timedelta(days=days)
    now = datetime.now(timezone.utc).replace(microsecond=0)
    how: dict[str, Any] = {"not_valid_before": now, "not_valid_after": now + valid}
    return generate_cert(who, who, key, key.public_key(), ca=True, **how)


def _require_fits(key: RSAPrivateKey, root: x509.Certificate, path: Path) -> None:
    if key.public_key() != root.public_key():
        raise PFedSAMError(ErrorCode.SITE_SETTINGS, f"the root key of {path} is not the root's.", _BACKUP)


def _root(pem: str, path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError as error:
        raise PFedSAMError(ErrorCode.SITE_SETTINGS, f"{path} holds no root: {error}.", _BACKUP) from None


def _key(pem: bytes, path: Path) -> RSAPrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        why = type(error).__name__
        raise PFedSAMError(ErrorCode.SITE_SETTINGS, f"{path} holds no root key: {why}.", _BACKUP) from None
    if not isinstance(key, RSAPrivateKey):
        raise PFedSAMError(ErrorCode.SITE_SETTINGS, f"the key in {path} is no RSA key, as NVFlare's are.", _BACKUP)
    return key


def _name(root: x509.Certificate) -> str:
    return str(root.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
