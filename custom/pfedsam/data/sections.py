"""The rules by which a patient gets a section. They know names of patients and numbers alone, no files.

By key (`section_by_key`), where a site has no written split
    The section follows from the patient's name and from nothing else. One patient more or less moves no other.
Dealt (`deal`), for a split that is written down
    As even as the numbers allow, so that it also works with few patients. It follows from all of the names, so one more
    would move others: it is made once, and `place` adds new patients.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from pfedsam.errors import ErrorCode, PFedSAMError

SECTIONS: tuple[str, ...] = ("training", "validation", "test")
#: Beside the sections: cases without a label that may be trained on.
UNLABELLED = "unlabelled"
FOLDS, VALIDATION_FRACTION = 3, 0.2
#: Key of the HMAC. It is public and fixed: another key would move every patient of every site.
KEY = b"pfedsam: section of a patient"

#: Patient to section.
Sections = dict[str, str]
_Place = TypeVar("_Place", bound=Hashable)


def section_by_key(
    patient: str, seed: int, folds: int = FOLDS, validation_fraction: float = VALIDATION_FRACTION
) -> str:
    """The section of a patient, which depends on no other patient.

    HMAC-SHA256 with `KEY` of the patient's name in UTF-8, as a number, modulo `folds` is the patient's fold; fold
    `seed % folds` is for test. Among the others the HMAC of `<seed>|<name>`, as a number from 0 to below 1, is for
    validation below `validation_fraction`. So the seeds 0 to folds - 1 test every patient exactly once.

    Args:
        patient: name.
        seed: test fold, and draw of the validation.
        folds: number of folds, at least 2.
        validation_fraction: expected share of the patients outside the test fold, between 0 and 1.

    Raises:
        PFedSAMError: E16 if a setting makes no sense.
    """
    _check(folds, validation_fraction)
    if _keyed(patient) % folds == seed % folds:
        return "test"
    return "validation" if _keyed(f"{seed}|{patient}") / 2**256 < validation_fraction else "training"


def deal(
    patients: Iterable[str], folds: int = FOLDS, validation_fraction: float = VALIDATION_FRACTION
) -> list[Sections]:
    """Deal patients out to folds, as evenly as possible: their sections in each fold.

    One fixed permutation of the patients, which follows from their names, is dealt out; each is tested in one fold. In
    each fold a share of the others, rounded, at least one, is for validation.

    Args:
        patients: names.
        folds: number of folds, at least 2.
        validation_fraction: share of the patients outside the test fold, between 0 and 1.

    Raises:
        PFedSAMError: E06 if there are fewer than 3 patients or fewer than folds, or none is left to train on; E16 if a
            setting makes no sense.
    """
    _check(folds, validation_fraction)
    ordered = sorted(set(patients), key=_hash)
    if len(ordered) < max(3, folds):
        raise PFedSAMError(
            ErrorCode.TOO_FEW_CASES,
            f"{len(ordered)} patient(s), a split into {folds} folds needs at least {max(3, folds)}.",
            "Add cases, or write a datalist.json with the sections training and validation.",
        )
    return [_dealt(ordered, fold, folds, validation_fraction) for fold in range(folds)]


def _dealt(ordered: Sequence[str], fold: int, folds: int, validation_fraction: float) -> Sections:
    tested = set(ordered[fold::folds])
    others = sorted((patient for patient in ordered if patient not in tested), key=lambda one: _hash(f"{fold}|{one}"))
    validated = max(1, round(validation_fraction * len(others)))
    if validated >= len(others):
        raise PFedSAMError(
            ErrorCode.TOO_FEW_CASES,
            f"no patient of {len(ordered)} is left to train on with {folds} folds.",
            "Use more folds or cases.",
        )
    numbered = enumerate(others)
    return dict.fromkeys(tested, "test") | {
        one: "validation" if number < validated else "training" for number, one in numbered
    }


def place(patient: str, folds: Sequence[Sections]) -> None:
    """Add a new patient to folds that were dealt; nobody else moves.

    It is tested in the fold whose test section is the smallest, the first of equal ones; in each other fold it goes
    where the numbers of training and validation are most below their shares, training if they are equally.
    """
    tested = [sum(section == "test" for section in fold.values()) for fold in folds]
    own = most_below(dict(enumerate(tested)), dict.fromkeys(range(len(folds)), 1 / len(folds)))
    shares = {"training": 1 - VALIDATION_FRACTION, "validation": VALIDATION_FRACTION}
    for number, fold in enumerate(folds):
        counts = {section: sum(found == section for found in fold.values()) for section in shares}
        fold[patient] = "test" if number == own else most_below(counts, shares)


def most_below(counts: Mapping[_Place, int], shares: Mapping[_Place, float]) -> _Place:
    """Where the next one goes so that the counts come nearest to the shares; of equal places the first."""
    after = sum(counts.values()) + 1
    # rounded, so that what is equal is equal on every machine
    return max(counts, key=lambda where: round(shares[where] * after - counts[where], 9))


def _check(folds: int, validation_fraction: float) -> None:
    if folds < 2 or not 0 < validation_fraction < 1:
        raise PFedSAMError(
            ErrorCode.WRONG_SETTING,
            f"cannot split into {folds} folds with a validation fraction of {validation_fraction}.",
            "Use at least 2 folds and a fraction between 0 and 1.",
        )


def _keyed(text: str) -> int:
    return int.from_bytes(hmac.new(KEY, text.encode(), "sha256").digest(), "big")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
