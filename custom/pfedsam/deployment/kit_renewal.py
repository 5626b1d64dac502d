"""A kit's certificate exchanged for a new one, or its root: checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from pfedsam.deployment.certificates import ROOT_FILE
from pfedsam.deployment.kits import keep_before
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import write_like


@dataclass(frozen=True)
class _Held:
    """A certificate as it lies in a folder."""

    path: Path
    pem: bytes
    x509: x509.Certificate

    @property
    def key(self) -> Path:
        return self.path.with_suffix(".key")


def renew_kit(kit: Path, new: Path) -> list[str]:
    """Put a new certificate with its key, or a new root, into a kit. The files before are kept as `<name>.before`.

    A server or site that runs goes on with what it has read, until it is started again.

    Args:
        kit: startup kit of a server, a site or an administrator.
        new: a kit with the new certificate, from `nvflare package` or `nvflare provision`; or a `rootCA.pem`.

    Returns:
        The files that were written, with their new ends, one line each; none if all is as it was.

    Raises:
        PFedSAMError: E01, and nothing is written, if the new certificate is of somebody else, ends no later, is not
            signed by the root, does not fit its key, is not valid today, or if the root has another key. Also if a file
            cannot be written.
    """
    own, root = _own(kit), _held(_startup(kit) / ROOT_FILE)
    new_own = _own(new) if new.is_dir() else own
    new_root = _held(_startup(new) / ROOT_FILE) if new.is_dir() else _held(new)
    changed = list(_changed(own, root, new_own, new_root))
    for held in [new_root] if new_own is own else [new_own, new_root]:
        _require_valid(held)
    require_signed(new_own, new_root)
    try:
        for path, data, _ in changed:
            if path.suffix == ".key":
                path.chmod(0o600)
            keep_before(path)
            write_like(path, data, path)
    except OSError as error:
        raise _refused(f"{error}: some files may be new, and the ones before are there as <name>.before") from None
    return [f"{path}: ends {ends:%Y-%m-%d}" for path, _, ends in changed]


def pair_problem(kit: Path) -> str | None:
    """Why a kit's key, certificate and root do not belong together, or None. Raises E01 as `renew_kit`."""
    try:
        require_signed(_own(kit), _held(_startup(kit) / ROOT_FILE))
    except PFedSAMError as error:
        return error.message
    return None


def require_signed(own: _Held, root: _Held) -> None:
    """Refuse a certificate that the root has not signed, or that the key beside it does not fit (E01)."""
    try:
        own.x509.verify_directly_issued_by(root.x509)
    except (ValueError, TypeError, InvalidSignature):
        raise _refused(f"{own.path} was not signed by {root.path}") from None
    try:
        key = serialization.load_pem_private_key(own.key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise _refused(f"{own.key} holds no private key ({type(error).__name__})") from None
    if key.public_key() != own.x509.public_key():
        raise _refused(f"{own.key} is not the key of {own.path}")


def _changed(own: _Held, root: _Held, new_own: _Held, new_root: _Held) -> Iterator[tuple[Path, bytes, datetime]]:
    """Files to write, the key before its certificate."""
    if new_root.x509.public_key() != root.x509.public_key():
        raise _refused(
            f"{new_root.path} has another key than the kit's {ROOT_FILE}: with it the kit talks to nobody who has the "
            "old one. If the federation begins anew with new keys, replace the whole startup/ at the agreed hour"
        )
    if new_own.x509 != own.x509:
        _require_same_owner(own, new_own)
        ends = new_own.x509.not_valid_after_utc
        if not new_own.key.is_file():
            raise _refused(f"there is no {new_own.key}")
        yield own.key, new_own.key.read_bytes(), ends
        yield own.path, new_own.pem, ends
    elif new_own is not own and new_root.x509 == root.x509:
        raise _refused(
            f"{new_own.path} is the certificate that the kit has: `nvflare provision` hands out what it has kept until "
            "`pfedsam certificates renew` takes it out"
        )
    # an older root beside a new certificate: the one that the kit has lasts longer
    if new_root.x509.not_valid_after_utc > root.x509.not_valid_after_utc:
        yield root.path, new_root.pem, new_root.x509.not_valid_after_utc


def _require_same_owner(own: _Held, new: _Held) -> None:
    if new.path.name != own.path.name or _identity(own.x509) != _identity(new.x509):
        raise _refused(f"{new.path} is of {_identity(new.x509)}, the kit is of {_identity(own.x509)}")
    if new.x509.not_valid_after_utc <= own.x509.not_valid_after_utc:
        raise _refused(f"{new.path} ends {new.x509.not_valid_after_utc:%Y-%m-%d}, no later than the present one")
    if missing := _hosts(own.x509) - _hosts(new.x509):
        raise _refused(f"{new.path} does not name {sorted(missing)}, by which others reach it")


def _require_valid(held: _Held) -> None:
    begins, ends, now = held.x509.not_valid_before_utc, held.x509.not_valid_after_utc, datetime.now(timezone.utc)
    if not begins <= now < ends:
        raise _refused(f"{held.path} is valid from {begins:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M} UTC, not now")


def _identity(certificate: x509.Certificate) -> dict[str, str]:
    found = {str(one.oid._name): str(one.value) for one in certificate.subject}
    # `nvflare cert approve` writes a role into every certificate, `nvflare provision` into a person's only
    kept = ["commonName", "organizationName", *(["unstructuredName"] if "@" in found.get("commonName", "") else [])]
    return {name: found[name] for name in kept if name in found}


def _hosts(certificate: x509.Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return {str(name.value) for name in names}


def _startup(kit: Path) -> Path:
    return kit / "startup" if (kit / "startup").is_dir() else kit


def _own(kit: Path) -> _Held:
    names = [_startup(kit) / name for name in ("server.crt", "client.crt")]
    found = next((path for path in names if path.is_file()), None)
    if found is None:
        raise _refused(f"{kit} is no startup kit: there is neither {names[0]} nor {names[1].name}")
    return _held(found)


def _held(path: Path) -> _Held:
    try:
        pem = path.read_bytes()
        return _Held(path, pem, x509.load_pem_x509_certificate(pem))
    except (OSError, ValueError) as error:
        raise _refused(f"{path} holds no certificate: {error}") from None


def _refused(what: str) -> PFedSAMError:
    return PFedSAMError(ErrorCode.SITE_SETTINGS, f"{what}.", "See 'When certificates end' in poc_workspace/life.md.")
