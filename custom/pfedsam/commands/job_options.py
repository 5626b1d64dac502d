"""What the options of `pfedsam job export` mean for the plan of a job."""

from __future__ import annotations

from typing import Any

import typer


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """What was said on the command line."""
    return {key: value for key, value in settings.items() if value is not None}


def changed_strategy(
    plan: dict[str, Any], strategy: str | None, aggregation: str | None, overrides: dict[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """What the plan shall say of the strategy and its settings, and the job's name if it is another strategy's."""
    settings, brought, name = plan["strategy"], plan.get("overrides") or {}, None
    if strategy is not None:
        from pfedsam.training.catalogue import find_strategy

        file = find_strategy(strategy)
        if file.kind != "federated":
            raise typer.BadParameter(f"'{strategy}' needs no server: use `pfedsam compare`", param_hint="--strategy")
        settings, brought, name = file.strategy, file.overrides, file.checked().name
    if aggregation is not None:
        settings = {**settings, "aggregation": aggregation}
    return {"strategy": settings, "overrides": {**brought, **overrides}}, name


def agreed(words: list[str]) -> int | dict[str, int]:
    """`40` or `site-1=40` texts as numbers of cases."""
    pairs = [word.rpartition("=") for word in words]
    if (
        not all(number.isascii() and number.isdecimal() for _, _, number in pairs)
        or len({bool(site) for site, _, _ in pairs}) > 1
    ):
        raise typer.BadParameter(f"{words} are not one number, or site=number each", param_hint="--most-cases")
    if pairs[0][0]:
        return {site: int(number) for site, _, number in pairs}
    if len(pairs) > 1:
        raise typer.BadParameter(f"{words} are more than one number for all", param_hint="--most-cases")
    return int(pairs[0][2])
