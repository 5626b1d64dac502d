"""What a network that knows nothing yet makes of the same pictures: a plain U-Net of MONAI, averaged over the sites.

    python tests/benchmarks/bench_unet.py <sites> --bundle nuclei --seeds 0,1,2 --records <runs.jsonl of a comparison> \
        --rounds 6 --set image_size=96 --set batch_size=4 --set augmentations=2

It takes the slices, batches, steps, loss and test cases that `pfedsam compare` gives `fedavg_lora` with the same
settings, in the same order; only the network and its learning rate are others. Dice by site is printed beside that of
both models of each strategy in `--records`. Runs are one JSON line each in results/unet.jsonl; what is there is not
repeated.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

from pfedsam.commands.console import literals
from pfedsam.comparison.provenance import bundle_hash, case_hash, machine
from pfedsam.comparison.run import Run
from pfedsam.data.site_folder import site_names
from pfedsam.evaluation.site import evaluate_site
from pfedsam.files import append_line, hash_of, read_lines
from pfedsam.parameters import Roles, shared_state
from pfedsam.storage.site_model import write
from pfedsam.training.aggregation import aggregate
from pfedsam.training.site import SiteTrainer
from pfedsam.training.workflow import Workflow, open_workflow

#: The smallest network of ours, which loads and evaluates for it and learns nothing.
CARRIER = {"backbone": "vit_test", "experts": 0, "adapted_blocks": 1}
CHANNELS, STRIDES, RATE = (16, 32, 64, 128, 256), (2, 2, 2, 2), 1e-3
RESULTS = Path(__file__).parent / "results" / "unet.jsonl"


class Plain(nn.Module):
    """A network that has no frozen part, as our evaluator asks for it."""

    frozen_trunk = False

    def __init__(self, classes: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = UNet(2, 3, classes, channels=CHANNELS, strides=STRIDES, num_res_units=2)

    def trunk(self, images: Tensor) -> Tensor:
        """The images."""
        return images

    def head(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] to logits `(B, C, H, W)`."""
        return self.net(images * 2 - 1)

    forward = head


def trained(run: Run, sites: Mapping[str, Workflow]) -> Plain:
    """FedAvg of a U-Net: each round as many epochs at each site as the strategy's phase has, from one AdamW each."""
    (phase,) = run.file.checked().phases
    classes = next(iter(sites.values())).trainer.data_loader.dataset[0]["label"].shape[0]  # type: ignore[attr-defined]
    network = Plain(classes, run.seed)
    weights = [len(one.cases) for one in sites.values()]
    for number in range(run.rounds):
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        deltas = []
        for one in sites.values():
            network.load_state_dict(before)
            _train(network, one, number, phase.epochs)
            after = network.state_dict()
            deltas.append({name: after[name] - tensor for name, tensor in before.items()})
        network.load_state_dict(aggregate(before, deltas, weights, "mean"))
        print(f"  round {number + 1} of {run.rounds}", flush=True)
    return network


def _train(network: Plain, site: Workflow, number: int, epochs: int) -> None:
    network.train()
    trainer = site.trainer
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01)
    for epoch in range(1, epochs + 1):
        trainer.data_loader.sampler.set_draw(number, epoch)  # type: ignore[union-attr]
        for batch in trainer.data_loader:
            optimizer.zero_grad()
            trainer.loss_function(network(batch["image"]), batch["label"]).backward()
            optimizer.step()


def measured(run: Run) -> dict[str, Any]:
    """Train, and test at each site."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        out, roles = Path(scratch), Roles(("lora_a", "lora_b", "decoder_subset"), ())
        sites = {
            name: open_workflow(run.bundle, folder, roles, out, overrides=run.settings)
            for name, folder in run.folders().items()
        }
        network = trained(run, sites).eval()
        for name, folder in run.folders().items():
            carrier = SiteTrainer(run.bundle, folder, run.file.checked(), run.settings, out)
            carrier.open()
            carrier.receive(shared_state(carrier.network, carrier.strategy.roles), carrier.fingerprint)
            write(out / "carrier.safetensors", carrier.model(round=0))
            found = evaluate_site(
                run.bundle,
                folder,
                out / "carrier.safetensors",
                overrides=run.settings,
                models=("global",),
                network=network,
                output_dir=out,
            )
            rows += [{"site": name, "case": case_hash(name, s.case), "dice": s.mean_dice} for s in found.scores]
            print(f"  {name}: {found.mean('global'):.3f}", flush=True)
    parameters = sum(tensor.numel() for tensor in network.parameters())
    return {"cases": rows, "parameters": parameters, "machine": machine()}


def key_of(run: Run) -> str:
    """Hash of all that a record depends on."""
    told = [run.training_key(), run.inputs(), bundle_hash(run.bundle), CHANNELS, STRIDES, RATE]
    return hash_of(told)[:16]


def table(records: Sequence[Mapping[str, Any]], beside: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Mean Dice over the cases of each site, of the U-Net and of both models of the strategies in other records."""
    rows = [{"model": "U-Net, FedAvg", **row} for record in records for row in record["cases"]]
    for record in beside:
        named = [(f"{record['strategy']}, {row['model']}", row) for row in record["cases"]]
        rows += [{"model": name, "site": row["site"], "dice": _mean(row)} for name, row in named]
    by_site = pd.DataFrame(rows).groupby(["model", "site"])["dice"].mean().unstack()
    return by_site.assign(mean=by_site.mean(axis=1), worst=by_site.min(axis=1)).round(3)


def _mean(row: Mapping[str, Any]) -> float:
    return float(pd.Series(row["dice"]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--bundle", default="brain_lesion_mri")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--records", type=Path, help="of a comparison of the same cases")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings, sites = {**literals(options.set), **CARRIER}, site_names(options.data)
    known = {record["key"]: record for record in read_lines(options.output)}
    found = []
    for seed in map(int, options.seeds.split(",")):
        run = Run(str(options.data), sites, options.bundle, "fedavg_lora", seed, options.rounds, settings)
        key = key_of(run)
        if key not in known:
            print(f"seed {seed}", flush=True)
            known[key] = {"key": key, "seed": seed, "rounds": options.rounds, **measured(run)}
            append_line(options.output, known[key])
        found.append(known[key])
    seeds = {record["seed"] for record in found}
    beside = read_lines(options.records) if options.records else []
    print(table(found, [record for record in beside if record["seed"] in seeds]).to_string())


if __name__ == "__main__":
    main()
