"""The filters and components that a job has for privacy: noise, packing and encryption."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, get_args

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.packing import Precision
from pfedsam.storage.job_plan import SERVER, component_of
from pfedsam.training.reported_weights import REPORTED
from pfedsam.training.strategy import Strategy

#: Rules that can be taken of ciphertexts, as a plain mean: what would be bounded cannot be seen.
_OF_CIPHERTEXTS = ("norm_clipped", "mean", "alternate")
#: Filters that `Privacy` adds.
NOISE = "pfedsam.federated.privacy.ClipAndNoise"
PACK, UNPACK = "pfedsam.federated.packing.PackPayload", "pfedsam.federated.packing.UnpackPayload"
_CKKS, _HE = "pfedsam.federated.encryption", "nvflare.app_opt.he"
ENCRYPT, DECRYPT, GUARD = f"{_CKKS}.EncryptUpdate", f"{_CKKS}.DecryptModel", f"{_CKKS}.EncryptedGuard"
#: Components of the server that `Privacy.encrypt` replaces.
ENCRYPTED: dict[str, dict[str, Any]] = {
    "aggregator": {
        "path": f"{_HE}.intime_accumulate_model_aggregator.HEInTimeAccumulateWeightedAggregator",
        # the sites multiply by their number of cases before they encrypt
        "args": {"expected_data_kind": "WEIGHT_DIFF", "weigh_by_local_iter": False},
    },
    "shareable_generator": {"path": f"{_HE}.model_shareable_generator.HEModelShareableGenerator"},
    "persistor": {"path": f"{_CKKS}.EncryptedStatePersistor"},
}
#: Tasks whose data are a global model.
_MODEL_FOR = ("train", "validate", "configure")


@dataclass(frozen=True)
class Privacy:
    """What is done to an update after the allow-list, in this order.

    Attributes:
        clip, noise_multiplier: see `pfedsam.federated.privacy.ClipAndNoise`; no clip for none of it.
        precision: `fp32`, or see `pfedsam.federated.packing.PackPayload`.
        encrypt: see `pfedsam.federated.encryption`.

    Raises:
        PFedSAMError: E16 for values that no site could apply or noise without a clip, E32 for a packed payload that
            shall be encrypted.
    """

    clip: float | None = None
    noise_multiplier: float = 0.0
    precision: str = "fp32"
    encrypt: bool = False

    def __post_init__(self) -> None:
        given = f"clip {self.clip}, noise {self.noise_multiplier}, precision '{self.precision}'"
        if (self.clip is not None and not 0 < self.clip < math.inf) or not 0 <= self.noise_multiplier < math.inf:
            raise PFedSAMError(
                ErrorCode.WRONG_SETTING, f"{given}.", "Clip is the largest norm, above 0; noise is a multiple of it."
            )
        if self.noise_multiplier and self.clip is None:
            raise PFedSAMError(ErrorCode.WRONG_SETTING, f"{given}.", "Noise needs a clip: it is a multiple of it.")
        if self.precision not in ("fp32", *get_args(Precision)):
            raise PFedSAMError(
                ErrorCode.WRONG_SETTING, f"{given}.", f"Precisions: fp32, {', '.join(get_args(Precision))}."
            )
        if self.encrypt and self.precision != "fp32":
            raise PFedSAMError(
                ErrorCode.CONTRADICTION,
                f"{self.precision} cannot be added up encrypted.",
                "Take fp32, or no encryption.",
            )


def add_filters(config: dict[str, Any], side: str, privacy: Privacy) -> None:
    """Noise, packing, encryption at the sites; unpacking at the server, before the guard."""
    chain = config["task_result_filters"][0]["filters"]
    if side == SERVER:
        if privacy.precision != "fp32":
            chain.insert(0, {"path": UNPACK})
        if privacy.encrypt:
            _encrypt_server(config)
        return
    if privacy.clip is not None:
        chain.append({"path": NOISE, "args": {"clip": privacy.clip, "noise_multiplier": privacy.noise_multiplier}})
    if privacy.precision != "fp32":
        chain.append({"path": PACK, "args": {"precision": privacy.precision}})
    if privacy.encrypt:
        chain.append({"path": ENCRYPT})
        config["task_data_filters"].append({"tasks": [*_MODEL_FOR], "filters": [{"path": DECRYPT}]})


def check_encryption(plan: Mapping[str, Any]) -> None:
    """Refuse an encrypted job that could not run (E31 without TenSEAL, E32 if its rule is not the mean)."""
    if find_spec("tenseal") is None:
        raise PFedSAMError(ErrorCode.MISSING_LIBRARY, "encryption needs TenSEAL.", "Install the extra 'he' of pfedsam.")
    strategy = Strategy.of(plan["strategy"])
    if strategy.downloads is not None:
        raise PFedSAMError(
            ErrorCode.CONTRADICTION,
            "a server that cannot read updates cannot tell which sites are alike.",
            "Leave out 'downloads' of the strategy, or the encryption.",
        )
    if strategy.server is not None or strategy.weights in REPORTED:
        what = "'server'" if strategy.server is not None else f"weights '{strategy.weights}'"
        raise PFedSAMError(
            ErrorCode.CONTRADICTION,
            f"{what} of the strategy needs our aggregator, and that of ciphertexts is NVFlare's own.",
            "Leave it out, or the encryption.",
        )
    rule = strategy.aggregation
    if rule not in _OF_CIPHERTEXTS:
        raise PFedSAMError(
            ErrorCode.CONTRADICTION,
            f"only the mean can be taken of ciphertexts, not '{rule}'.",
            "Set aggregation to mean.",
        )


def _encrypt_server(config: dict[str, Any]) -> None:
    """The guard, aggregator, generator and persistor of ciphertexts in place of the plain ones."""
    config["task_result_filters"][0]["filters"] = [{"path": GUARD}]
    for name, replacement in ENCRYPTED.items():
        component_of(config, name).update(replacement)
