"""What decides the result of a run, kept with the run: one that was finished must not answer for another question.

<run>/run.json   the terms: federation, bundle, job, strategy, settings, base weights; of each site its cases with their
                 sections and the hashes of their images and labels. It names cases, so it stays where the data is.

The number of rounds is not among them: more rounds go on where fewer have ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pfedsam
from pfedsam.bundles import settings_of
from pfedsam.comparison.provenance import INDIFFERENT, bundle_hash, weights_checksum
from pfedsam.data.sites import read_split
from pfedsam.errors import ErrorCode, PFedSAMError, few
from pfedsam.files import content_hash, hash_of, write_atomically
from pfedsam.training.strategy import Strategy

TERMS_FILE = "run.json"
#: Differences that are told, and names in each.
_TOLD, _NAMES = 8, 3
#: What is kept as a hash only.
_HASHED = {"weights": "the base weights have", "bundle_files": "the bundle's own configuration has"}


def terms_of(plan: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run, without the data.

    Args:
        plan: `federation`, `bundle`, `strategy` and `overrides` as the job will have them.
        job: what else of the job decides, see `pfedsam.deployment.job_terms`.

    Raises:
        PFedSAMError: E16 or E18 for wrong settings.
    """
    bundle, overrides = plan["bundle"], plan["overrides"]
    settings = settings_of(bundle, overrides)
    terms = {
        "federation": plan["federation"],
        "bundle": bundle,
        "bundle_files": bundle_hash(bundle),
        "weights": weights_checksum(bundle, overrides),
        "settings": {key: value for key, value in settings.items() if key not in (*INDIFFERENT, "checkpoint")},
        # with the defaults of today: they may be others tomorrow
        "strategy": Strategy.of(plan["strategy"]).model_dump(mode="json"),
        "job": job,
    }
    return json.loads(json.dumps(terms, default=str))


def with_data(terms: Mapping[str, Any], sites: Mapping[str, Path], kept: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is kept in `run.json`: the terms with the data of the sites.

    Args:
        terms: see `terms_of`.
        sites: site folders by name.
        kept: what was kept before; a file whose size and time of change are still the same is not read again.

    Raises:
        PFedSAMError: as `read_split`.
    """
    seed, folds = (int(terms["settings"].get(key, value)) for key, value in (("seed", 0), ("folds", 3)))
    before = (kept or {}).get("files", {})
    files: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for site, folder in sites.items():
        data[site] = {}
        for section, cases in read_split(folder, seed, folds).items():
            for case in cases:
                case_terms = {"section": section}
                for kind, path in (("image", case.image), ("label", case.label)):
                    name = f"{site}/{kind}/{case.name}"
                    files[name] = _seen(path, before.get(name, {}))
                    case_terms[kind] = files[name]["hash"]
                data[site][case.name] = case_terms
    whole = {**terms, "sites": data}
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    by = f"pfedsam {pfedsam.__version__}"
    return {"made": made, "by": by, "digest": hash_of(whole)[:16], "terms": whole, "files": files}


def kept_terms(folder: Path) -> dict[str, Any] | None:
    """What `keep_terms` has written, None if there is nothing that can be read."""
    try:
        content = json.loads((folder / TERMS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("terms"), dict) else None


def keep_terms(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the terms of a run into its folder, before anything of it starts.

    Raises:
        OSError: if they cannot be written.
    """
    write_atomically(folder / TERMS_FILE, f"{json.dumps(content, indent=1)}\n".encode())


def require_same(what: str, kept: Mapping[str, Any] | None, terms: Mapping[str, Any], remedy: str) -> None:
    """Refuse to go on with a run whose terms are others, or not known.

    Args:
        what: the run, as the start of a sentence.
        kept: what was kept with it.
        terms: of now; without data, the data are not compared.
        remedy: what to do instead.

    Raises:
        PFedSAMError: E25 naming what differs.
    """
    if kept is None:
        message = f"{what} is of an earlier version, which noted neither its settings nor its data."
        raise PFedSAMError(ErrorCode.OTHER_RUN, message, remedy)
    changes = differences(kept["terms"], terms)
    if changes:
        more = f"; and {len(changes) - _TOLD} more" if len(changes) > _TOLD else ""
        raise PFedSAMError(ErrorCode.OTHER_RUN, f"{what} is another one: {'; '.join(changes[:_TOLD])}{more}.", remedy)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the terms of two runs, in words; the data only where both tell them."""
    plain = [{key: value for key, value in terms.items() if key != "sites"} for terms in (then, now)]
    before, after = (dict(_flat(terms)) for terms in plain)
    changes = [
        _difference(key, before.get(key), after.get(key))
        for key in [*before, *(key for key in after if key not in before)]
        if before.get(key) != after.get(key)
    ]
    if "sites" in then and "sites" in now:
        changes += _of_sites(then["sites"], now["sites"])
    return changes


def _difference(key: tuple[str, ...], then: Any, now: Any) -> str:
    first, *rest = key
    if first in _HASHED:
        return f"{_HASHED[first]} changed"
    name = " ".join(["setting" if first == "settings" else first, *([".".join(rest)] if rest else [])])
    before, after = ("none" if value is None else json.dumps(value) for value in (then, now))
    return f"{name}: {before} then, {after} now"


def _of_sites(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for site in sorted({*then, *now}):
        if site not in now:
            yield f"{site} took part then"
        elif site not in then:
            yield f"{site} takes part now"
        else:
            yield from _of_cases(site, then[site], now[site])


def _of_cases(site: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    both = [case for case in now if case in then]
    moved = [case for case in both if then[case]["section"] != now[case]["section"]]
    changed = [case for case in both if any(then[case][kind] != now[case][kind] for kind in ("image", "label"))]
    new, gone = [case for case in now if case not in then], [case for case in then if case not in now]
    by_change = {
        "are new": new,
        "are gone": gone,
        "are in another section of the split": moved,
        "have another image or label": changed,
    }
    for what, cases in by_change.items():
        if cases:
            yield f"{site}: {len(cases)} case(s) {what} ({few(cases, _NAMES)})"


def _flat(value: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of a nested value; an item of a list of dictionaries has its id, its name or its number as key."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flat(item, (*key, name))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from _flat(item, (*key, str(item.get("id") or item.get("name") or number)))
    else:
        yield key, value


def _seen(path: Path | None, before: Mapping[str, Any]) -> dict[str, Any]:
    """Hash of a file or of a folder of DICOM slices, with the sizes and times of change that it had."""
    if path is None:
        return {"seen": None, "hash": ""}
    parts = sorted(part for part in path.iterdir() if part.is_file()) if path.is_dir() else [path]
    seen = hash_of([(part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in parts])[:16]
    return {"seen": seen, "hash": before["hash"] if before.get("seen") == seen else content_hash(path)}
