"""The certificates of a federation: when they end, and how the project administrator renews them.

NVFlare's `provision` keeps all certificates and keys in `<workspace>/<project>/state/cert.json`, and hands the same
ones out again for as long as they are in there, also when they have ended. A renewal takes them out: the next
`provision` makes new ones. The root stays, so that the kits of all others go on working.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cryptography import x509

from pfedsam.errors import ErrorCode, PFedSAMError, few
from pfedsam.files import read_object, write_atomically

STATE_FILE = Path("state") / "cert.json"
#: A certificate that ends sooner should be renewed: so many days lie between the first warning and the end.
WARN_DAYS = 60
ROOT, ROOT_FILE = "root", "rootCA.pem"
_BACKUP = "Take it from the backup of the workspace."
_ROOT_KEYS = ("root_cert", "root_pri_key")


@dataclass(frozen=True)
class Certificate:
    """A certificate and its end.

    Attributes:
        name: of whom it is, `ROOT` for the federation's own.
        path: the file that holds it.
        ends: in UTC.
        serial: number that tells a renewed certificate from the one before.
    """

    name: str
    path: Path
    ends: datetime
    serial: int

    @property
    def days(self) -> int:
        """Whole days that are left, negative if it has ended."""
        return (self.ends - datetime.now(timezone.utc)).days

    @property
    def words(self) -> str:
        """For people."""
        left = f"in {self.days} days" if self.days >= 0 else "it has ended"
        return f"{self.ends:%Y-%m-%d}, {left}"


def of_kit(kit: Path) -> list[Certificate]:
    """The certificates of a startup kit, the root's last.

    Raises:
        PFedSAMError: E01 naming the file that is missing or holds no certificate.
    """
    startup = kit / "startup"
    paths = [*sorted(startup.glob("*.crt")), startup / ROOT_FILE]
    return [certificate(path, ROOT if path.suffix == ".pem" else path.stem) for path in paths]


def certificate(path: Path, name: str) -> Certificate:
    """The certificate in a PEM file (E01 if there is none)."""
    try:
        return _of(name, path, path.read_bytes())
    except (OSError, ValueError) as error:
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS, f"{path} holds no certificate: {error}.", "Take it from the provisioned kit."
        ) from None


def of_project(folder: Path) -> list[Certificate]:
    """The certificates that a provisioning would hand out again, the root's first.

    Args:
        folder: `<workspace>/<project>`, or the workspace if it holds one project.

    Raises:
        PFedSAMError: E01 if no certificates are kept there, E29 if the file cannot be read.
    """
    path = state_file(folder)
    content = read_object(path, _BACKUP)
    found = [(name, _pem(one)) for name, one in content.items() if name not in _ROOT_KEYS]
    try:
        return [_of(name, path, pem.encode()) for name, pem in [(ROOT, str(content["root_cert"])), *found]]
    except (KeyError, ValueError) as error:
        raise PFedSAMError(ErrorCode.CONFIGURATION_FILE, f"{path} could not be read: {error!r}.", _BACKUP) from None


def renew(folder: Path, names: Collection[str] = (), within: int = WARN_DAYS, root: bool = False) -> list[Certificate]:
    """Let the next `nvflare provision` make new certificates and keys. The file before is kept as `cert.json.before`.

    Args:
        folder: as in `of_project`.
        names: whose; empty: all that end within some days.
        within: those days.
        root: the root, too, and with it every certificate of the federation.

    Returns:
        What was taken out; nothing is written if that is nothing.

    Raises:
        PFedSAMError: as `of_project`; E28 naming who has no certificate there.
    """
    path, known = state_file(folder), of_project(folder)
    unknown = sorted(set(names) - {one.name for one in known if one.name != ROOT})
    if unknown:
        there = few(one.name for one in known if one.name != ROOT)
        raise PFedSAMError(ErrorCode.UNKNOWN_NAME, f"{path} has no certificate of {unknown}.", f"It has {there}.")
    if not root and names == () and known[0].days < within:
        raise PFedSAMError(
            ErrorCode.CONTRADICTION,
            f"the root certificate of the federation ends {known[0].words}; nobody's certificate can outlive it.",
            "Renew it with --root: all kits are then replaced at one agreed time.",
        )
    chosen = known if root else [one for one in known[1:] if one.name in names or (not names and one.days < within)]
    if not chosen:
        return []
    content = read_object(path, _BACKUP)
    gone = {one.name for one in chosen}
    left = {} if root else {name: one for name, one in content.items() if name not in gone}
    # both hold every private key of the federation: nobody else may read them, and NVFlare writes into what is there
    write_atomically(path.with_name(f"{path.name}.before"), path.read_bytes())
    if root:
        path.unlink()
    else:
        write_atomically(path, json.dumps(left).encode())
    return chosen


def state_file(folder: Path) -> Path:
    """Where a project's certificates are kept (E01 if there are none, or several projects)."""
    found = [path for path in _places(folder) if path.is_file()]
    if len(found) == 1:
        return found[0]
    what = f"holds the certificates of {len(found)} projects" if found else "holds no provisioned project"
    raise PFedSAMError(
        ErrorCode.SITE_SETTINGS,
        f"{folder} {what}: expected one {STATE_FILE}.",
        "Give <workspace>/<project>, as `nvflare provision -w <workspace>` made it.",
    )


def _places(folder: Path) -> Iterator[Path]:
    yield folder / STATE_FILE
    yield from sorted(folder.glob(f"*/{STATE_FILE}"))


def _pem(kept: Any) -> str:
    return str(kept.get("cert", "")) if isinstance(kept, dict) else ""


def _of(name: str, path: Path, pem: bytes) -> Certificate:
    found = x509.load_pem_x509_certificate(pem)
    return Certificate(name, path, found.not_valid_after_utc, found.serial_number)
