"""Where the server writes the scalars that sites send: TensorBoard's files, or MLflow."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.scalars import EVENT

#: Receives what sites send for TensorBoard, too. At a site it could send scalars to any address that a job names.
MLFLOW = "nvflare.app_opt.tracking.mlflow.mlflow_receiver.MLflowReceiver"
TENSORBOARD = "nvflare.app_opt.tracking.tb.tb_receiver.TBAnalyticsReceiver"
#: The component of a server's configuration, whatever its class.
RECEIVER_ID = "tb_receiver"
_WORDS = "'tensorboard', 'mlflow', or 'mlflow=http://host:port' for a server of MLflow's"


def set_tracker(config: dict[str, Any], tracker: str | None, experiment: str) -> None:
    """Set the component that receives scalars, in place.

    Args:
        config: a server's configuration.
        tracker: `tensorboard`, `mlflow`, or `mlflow=<address>` of a tracking server; without an address MLflow writes
            `mlflow.db` into the job's result. None leaves it as it is.
        experiment: its name in MLflow.

    Raises:
        PFedSAMError: E16 if it is something else, or the address is none or holds a password: each site gets the whole
            job.
    """
    if tracker is None:
        return
    kind, _, address = tracker.partition("=")
    arguments: dict[str, Any] = {"events": [EVENT]}
    if kind == "mlflow":
        arguments["kw_args"] = {"experiment_name": experiment}
        if "=" in tracker:
            arguments["tracking_uri"] = _checked(address)
    elif tracker != "tensorboard":
        raise PFedSAMError(ErrorCode.WRONG_SETTING, f"there is no tracker '{tracker}'.", f"Give {_WORDS}.")
    component = {"id": RECEIVER_ID, "path": MLFLOW if kind == "mlflow" else TENSORBOARD, "args": arguments}
    for present in config["components"]:
        if present.get("id") == RECEIVER_ID:
            present.clear()
            present.update(component)
            return
    config["components"].append(component)


def _checked(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PFedSAMError(ErrorCode.WRONG_SETTING, f"'{address}' is no address of a server.", f"Give {_WORDS}.")
    if parts.username or parts.password:
        raise PFedSAMError(
            ErrorCode.WRONG_SETTING,
            "the tracker's address holds a user or a password, and every site gets the whole job.",
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the server runs.",
        )
    return address
