"""A small round of a job on a site's real data, in a process of its own, and what of it would leave the site.

    python -m pfedsam.deployment.rehearsal_round <<< '{"plan": {...}, "folder": "...", ...}'

The process bounds what a rehearsal can harm: a crash of a library ends nothing else, its peak of memory is that of a
site's job, and it ends with the command that started it. It writes one line of JSON for each step and for the result.
Nothing is sent.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pfedsam.children import end, supervised
from pfedsam.deployment.rehearsal_boundary import leaving
from pfedsam.deployment.rehearsal_messages import Asked, Measured
from pfedsam.errors import ErrorCode, PFedSAMError, first_of_ours
from pfedsam.federated.plan import Plan
from pfedsam.training.rehearsal import load_first
from pfedsam.training.round_result import RoundResult
from pfedsam.training.site import SiteTrainer
from pfedsam.training.strategy import Strategy

#: What the process writes beside its lines; it names cases and stays in the temporary folder.
LOG = "log.txt"


def small_round(asked: Asked, step: Callable[[str], None]) -> Measured:
    """Run a small round in a process of its own.

    Args:
        asked: what to rehearse.
        step: called with what is done next, in words.

    Raises:
        PFedSAMError: of what went wrong, with the code that the site would answer with in a job; E99 if the process
            was ended.
    """
    log = Path(asked.work) / LOG
    with (
        log.open("w") as notes,
        subprocess.Popen(
            supervised([sys.executable, "-m", __name__]),
            env={**os.environ, "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=notes,
            text=True,
            # a session of its own: Ctrl-C in the terminal is for us, who then end it
            start_new_session=True,
        ) as process,
    ):
        try:
            return _listen(process, asked, step)
        finally:
            end(process)


def _listen(process: subprocess.Popen[str], asked: Asked, step: Callable[[str], None]) -> Measured:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(asked.model_dump_json() + "\n")
    process.stdin.close()
    for line in process.stdout:
        # a library may write there, too
        told = json.loads(line) if line.startswith("{") else {}
        if "step" in told:
            step(told["step"])
        elif "error" in told:
            raise PFedSAMError(**told["error"])
        elif "measured" in told:
            return Measured.model_validate(told["measured"])
    code = process.wait()
    lines = (Path(asked.work) / LOG).read_text(errors="replace").strip().splitlines()
    reason = "killed: out of memory?" if code == 137 else lines[-1] if lines else "without a word"
    raise PFedSAMError(
        ErrorCode.UNEXPECTED,
        f"the process of the small round ended with code {code} ({reason}).",
        "Look at the memory that is free; a smaller --cases needs less.",
    )


def run(asked: Asked, step: Callable[[str], None]) -> Measured:
    """Run a small round in this process; see `small_round`."""
    import torch

    if asked.threads:
        torch.set_num_threads(asked.threads)
    plan, work = Plan(**asked.plan), Path(asked.work)
    strategy = shortened(plan.checked())
    step("loading the first cases through the bundle's transforms")
    loaded = _loaded(asked, plan)
    local, prepared = _site(asked, plan, strategy, work)
    clock = _Clock()
    step("preparing the cases and building the network")
    local.open()
    clock.stop("open")
    _receive(local, strategy)
    step("validating the global model as it is before the first round")
    dice = local.validate(experts=False, in_round=True)["val_dice"]
    validated = int(local.evaluator.state.iteration)
    clock.stop("validate")
    step(f"training on {len(local.cases)} of {asked.all_cases} cases")
    local.train(0)
    clock.stop("first")
    result = local.train(1)
    clock.stop("later")
    further = [name for name in plan.further() if asked.may_tell is None or name in asked.may_tell]
    left = leaving(
        result,
        local,
        plan,
        asked.filters,
        cases=asked.all_cases,
        may_share=asked.may_share,
        further=further,
    )
    left = left.without_dice_if(
        len(local.validation_cases) < asked.least_validation_cases or not local.answers,
    )
    step("the final personal phase")
    finished, personal = _finish(local, strategy)
    clock.stop("final")
    step("writing the personal state, and reading it again")
    state = _kept_state(local, asked, plan, work)
    files = [path for path in prepared.rglob("*") if path.is_file()] if prepared else []
    return Measured(
        loaded=loaded,
        device=str(local.trainer.state.device),
        threads=torch.get_num_threads(),
        fingerprint=local.fingerprint,
        cases=len(local.cases),
        validated=validated,
        validation_cases=len(local.validation_cases),
        steps={name: phase.steps for name, phase in {**result.phases, **finished.phases}.items()},
        seconds=clock.seconds,
        dice_global=dice,
        dice_personal=personal,
        state_bytes=state,
        prepared_bytes=sum(path.stat().st_size for path in files),
        prepared_cases=sum(path.suffix == ".slices" for path in files),
        memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        gpu_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        leaves=left,
    )


def shortened(strategy: Strategy) -> Strategy:
    """A strategy with one epoch in each phase; the site does not look for the best length of its final phase.

    A warm-up without labels has one round, so that the next is one of those that follow it.
    """
    phases, final = (
        tuple(
            phase.model_copy(
                update={"epochs": 1, "warm_up": phase.warm_up and phase.warm_up.model_copy(update={"rounds": 1})}
            )
            for phase in phases
        )
        for phases in (strategy.phases, strategy.final)
    )
    return strategy.model_copy(update={"phases": phases, "final": final, "serving": None, "validate_every": 1})


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def stop(self, name: str) -> None:
        """Note what has passed since the last stop."""
        now = time.monotonic()
        self.seconds[name], self._since = round(now - self._since, 2), now


def _loaded(asked: Asked, plan: Plan) -> list[str]:
    """The first batch of each section, in words.

    Raises:
        PFedSAMError: of the first case that cannot be loaded.
    """
    told = {"bundle": plan.bundle, "folder": asked.folder, "overrides": dict(plan.overrides or {})}
    found = load_first({**told, "cases": asked.first, "label_map": asked.label_map})
    for error in found["errors"]:
        raise PFedSAMError(error["code"], error["message"], error["remedy"])
    return found["loaded"]


def _site(asked: Asked, plan: Plan, strategy: Strategy, work: Path) -> tuple[SiteTrainer, Path | None]:
    """As the learner makes it, but for its folders and the number of cases."""
    prepared = work / "prepared" if asked.keeps_prepared else None
    if prepared is not None:
        prepared.mkdir(mode=0o700)
    local = SiteTrainer(
        plan.bundle,
        asked.folder,
        strategy,
        plan.overrides,
        work / "bundle",
        device=asked.device,
        checkpoint=asked.checkpoint,
        cases=asked.cases,
        label_map=asked.label_map,
        prepared=prepared,
    )
    return local, prepared


def _receive(local: SiteTrainer, strategy: Strategy) -> None:
    """The first global model of a federation is what the network is before it is trained."""
    from pfedsam.parameters import shared_state

    local.receive(shared_state(local.network, strategy.roles), local.fingerprint)


def _finish(local: SiteTrainer, strategy: Strategy) -> tuple[RoundResult, float | None]:
    result = local.finish(2) if strategy.final else RoundResult({}, {})
    personal = local.validate(experts=True, in_round=True)["val_dice"] if strategy.keeps else None
    return result, personal


def _kept_state(local: SiteTrainer, asked: Asked, plan: Plan, work: Path) -> int:
    """Bytes of the personal state, which was written as in a job, below the temporary folder, and read again.

    Raises:
        PFedSAMError: E13 if it is not what was written, or if others can read it.
    """
    import torch

    from pfedsam.storage.state import SiteState
    from pfedsam.storage.state_files import CURRENT

    state = SiteState(work / "state", plan.federation, asked.site, plan.bundle, local.fingerprint)
    state.open()
    try:
        model = local.model(round=2, final=True)
        state.save(model)
        read = state.load()
    finally:
        state.close()
    file = state.folder / CURRENT
    same = read is not None and read.personal.keys() == model.personal.keys()
    if not same or not all(torch.equal(read.personal[name], model.personal[name]) for name in model.personal):  # type: ignore[union-attr]
        raise PFedSAMError(ErrorCode.PERSONAL_STATE, f"{file} was read again and is another.", "Check the disk.")
    if file.stat().st_mode & 0o077:
        raise PFedSAMError(ErrorCode.PERSONAL_STATE, f"others can read {file}.", "Take a disk that knows file modes.")
    return file.stat().st_size


def _say(told: Mapping[str, Any]) -> None:
    print(json.dumps(told), flush=True)


def main() -> None:
    """Do what a line of standard input says; an error is a line, too."""
    os.umask(0o077)
    asked = Asked.model_validate_json(sys.stdin.readline())
    try:
        measured = run(asked, lambda text: _say({"step": text}))
        _say({"measured": measured.model_dump()})
    # a bundle's own transform may raise anything
    except Exception as error:
        ours = first_of_ours(error) or PFedSAMError(ErrorCode.UNEXPECTED, f"{type(error).__name__}: {error}.")
        _say({"error": {"code": ours.code, "message": ours.message, "remedy": ours.remedy}})


if __name__ == "__main__":
    main()
