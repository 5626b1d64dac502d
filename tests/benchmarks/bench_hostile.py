"""What one hostile site of four does to the global model, by the rule that the server takes the sites' updates with.

    python tests/benchmarks/bench_hostile.py

Four sites of a phantom, each with its own scanner, site-4 the most shifted: sites that differ honestly. All run
`fedavg_lora` in one process with the same slices and steps; site-2 is the hostile one and changes what it sends:

    none    nothing: what a rule costs honest sites
    absent  site-2 takes no part
    cases   it claims a million training cases
    scale   its update times 1000
    flip    its update with the other sign
    all     the three together

Dice is that of the last global model on the test cases of the three other sites. Every run is one line of the results;
what is there is not repeated, so the command can be stopped. A late or replayed update and a forged validation Dice
never get as far as a rule: the guard and the selection of the best model see to them
(`tests/jobs/test_hostile_site.py`).
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pfedsam.comparison.provenance import machine
from pfedsam.data.phantom import write_phantom
from pfedsam.data.site_folder import site_names
from pfedsam.evaluation.site import evaluate_site
from pfedsam.files import append_line, read_lines
from pfedsam.training import federation as module
from pfedsam.training.aggregation import combine
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.federation import Federation, run_federation
from pfedsam.training.judgement import Judgement

RESULTS = Path(__file__).parent / "results" / "hostile.jsonl"
BUNDLE, STRATEGY, HOSTILE = "brain_lesion_mri", "fedavg_lora", "site-2"
#: Sites, cases of each, in-plane voxels and slices.
PHANTOM = (4, 15, (96, 96, 12))
#: Training cases of a site: few, so that a run takes minutes; all test cases are tested.
CASES = 5
SETTINGS: dict[str, Any] = {
    "image_size": 64,
    "batch_size": 2,
    "augmentations": 1,
    "adapted_blocks": 1,
    "positives_per_case": 4,
    "negatives_per_case": 2,
}
RULES = ("norm_clipped", "mean", "trimmed_mean", "median", "krum")
#: Factor of the update, and the number of cases that is claimed (None: the true one).
ATTACKS: dict[str, tuple[float, float | None]] = {
    "none": (1, None),
    "absent": (1, None),
    "all": (-1000, 1e6),
    "flip": (-1, None),
    "scale": (1000, None),
    "cases": (1, 1e6),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=RULES, choices=RULES)
    parser.add_argument("--attacks", nargs="+", default=tuple(ATTACKS), choices=tuple(ATTACKS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="of phantom, draws and split")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-hostile"), help="folder of phantom and trainings")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def attacked(attack: str, place: int, left_out: list[bool]) -> Callable[..., tuple[dict[str, Tensor], list[Judgement]]]:
    """The aggregation of a round in which the site at `place` lies; whether it was left out is noted."""

    def changed(
        theta: Mapping[str, Tensor],
        deltas: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        how: str,
        start: Mapping[str, Tensor] | None,
    ) -> tuple[dict[str, Tensor], list[Judgement]]:
        factor, cases = ATTACKS[attack]
        told = [
            {name: factor * tensor for name, tensor in delta.items()} if number == place else delta
            for number, delta in enumerate(deltas)
        ]
        claims = [cases if cases and number == place else weight for number, weight in enumerate(weights)]
        change, judged = combine(theta, told, claims, how, start=start)
        left_out.append(place < len(told) and judged[place].left_out)
        return change, judged

    return changed


def run(rule: str, attack: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train, test, and give the line of results."""
    data = args.work / f"phantom-{args.seed}"
    write_phantom(data, *PHANTOM, args.seed)
    names = [name for name in site_names(data) if attack != "absent" or name != HOSTILE]
    file, out = find_strategy(STRATEGY), args.work / f"{rule}-{attack}-{args.rounds}-{args.seed}"
    strategy = file.checked().model_copy(update={"aggregation": rule, "validate_every": args.rounds})
    overrides = {**SETTINGS, **file.overrides, "seed": args.seed}
    settings = {"feature_store": args.work / "features", "cases": CASES}
    left_out: list[bool] = []
    module.combine = attacked(attack, names.index(HOSTILE) if HOSTILE in names else len(names), left_out)
    federation = Federation(BUNDLE, {one: data / one for one in names}, strategy, out, args.rounds, overrides, settings)
    run_federation(federation)
    dice = {}
    for name in (one for one in site_names(data) if one != HOSTILE):
        found = evaluate_site(
            BUNDLE,
            data / name,
            federation.model_of(name),
            overrides=overrides,
            models=("personal",),
            feature_store=args.work / "features",
            output_dir=out,
        )
        dice[name] = round(found.mean("personal"), 4)
    return {
        **{"rule": rule, "attack": attack, "rounds": args.rounds, "seed": args.seed, "dice": dice},
        "left_out": sum(left_out),
        "machine": machine(),
    }


def show(lines: Sequence[dict[str, Any]], attacks: Sequence[str]) -> None:
    table = Table(title=f"Dice of the global model at the honest sites: mean, and the most shifted one; {HOSTILE} lies")
    table.add_column("rule")
    for attack in attacks:
        table.add_column(attack, justify="right")
    for rule in dict.fromkeys(line["rule"] for line in lines):
        found = {line["attack"]: line["dice"] for line in lines if line["rule"] == rule}
        cells = [f"{np.mean(list(d.values())):.3f} ({d['site-4']:.3f})" if (d := found.get(a)) else "" for a in attacks]
        table.add_row(rule, *cells)
    Console().print(table)


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    key = ("rule", "attack", "rounds", "seed")
    for attack in args.attacks:
        for rule in args.rules:
            wanted = (rule, attack, args.rounds, args.seed)
            if all(tuple(line[k] for k in key) != wanted for line in read_lines(args.output)):
                append_line(args.output, run(rule, attack, args))
                print(json.dumps(read_lines(args.output)[-1]), flush=True)
    mine = [line for line in read_lines(args.output) if (line["rounds"], line["seed"]) == (args.rounds, args.seed)]
    show(mine, args.attacks)


if __name__ == "__main__":
    main()
