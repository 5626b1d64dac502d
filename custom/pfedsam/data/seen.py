"""Which patients a site's model was trained on or validated on, as salted hashes in the model's file.

A test on a patient that was trained on tells nothing. So a model keeps what it has seen, whatever the split is later:
`pfedsam evaluate` leaves these cases out, and a later job does not validate on them. The hash is HMAC-SHA256 of the
patient's name with a random salt of the file, cut to 16 hex digits: a pseudonym, because who has the file can try
names. The file, and this with it, never leaves the site.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pfedsam.errors import ErrorCode, PFedSAMError

#: Key in `SiteModel.info`.
SEEN = "seen"
#: Between site and patient in a pool of several sites' cases.
POOL = "__"
#: What a patient was seen in; it is told of the first.
SECTIONS = ("training", "validation")
_DIGITS, _SALT_BYTES = 16, 16


@dataclass(frozen=True)
class Seen:
    """What a model has seen. It only grows.

    Attributes:
        salt: hex digits.
        training, validation: hashes of the patients of these sections.
        whole: False if the model goes on from one that did not tell what it had seen.
    """

    salt: str
    training: frozenset[str] = frozenset()
    validation: frozenset[str] = frozenset()
    whole: bool = True

    @classmethod
    def nothing(cls, whole: bool = True) -> Seen:
        """With a salt of its own."""
        return cls(secrets.token_hex(_SALT_BYTES), whole=whole)

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Seen | None:
        """What the `info` of a model tells, None if it tells nothing.

        Raises:
            PFedSAMError: E13 if it is not what was written.
        """
        told = info.get(SEEN)
        if told is None:
            return None
        salt, *lists = [told.get(key) if isinstance(told, dict) else None for key in ("salt", *SECTIONS)]
        named = [frozenset(one) for one in lists if isinstance(one, list) and all(type(name) is str for name in one)]
        if not isinstance(salt, str) or len(named) != len(SECTIONS):
            raise PFedSAMError(ErrorCode.PERSONAL_STATE, f"the model's '{SEEN}' is no salt with two lists of hashes.")
        training, validation = named
        return cls(salt, training, validation, told.get("whole", True) is True)

    def add(self, section: str, patients: Iterable[str]) -> Seen:
        """With the patients of a section, `training` or `validation`, too."""
        grown = getattr(self, section) | {self._hash(patient) for patient in patients}
        return replace(self, **{section: grown})

    def section_of(self, patient: str, site: str = "") -> str | None:
        """`training` or `validation` if the patient was seen there, the first of both; None if it was seen nowhere.

        Args:
            patient: name at its site.
            site: of the patient, for a model that was trained on a pool.
        """
        names = {self._hash(patient), self._hash(f"{site}{POOL}{patient}")}
        return next((section for section in SECTIONS if names & getattr(self, section)), None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, in an order that tells nothing."""
        told = {"salt": self.salt, "training": sorted(self.training), "validation": sorted(self.validation)}
        return told if self.whole else {**told, "whole": False}

    def _hash(self, patient: str) -> str:
        return hmac.new(self.salt.encode(), patient.encode(), "sha256").hexdigest()[:_DIGITS]


def patient_of(item: Mapping[str, Any]) -> str:
    """The patient of an item of `pfedsam.data.sites.datalist`, or of a list of a bundle's own: its case, its image."""
    return str(next(item[key] for key in ("patient", "case", "image") if key in item))
