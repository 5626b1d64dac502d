"""Encrypted updates: NVFlare's CKKS filters (TenSEAL) behind our allow-list. The server adds up what it cannot read.

The sites share a secret key that the server does not have (NVFlare's `HEBuilder` puts it into their startup kits). A
site encrypts each tensor, multiplied by its number of training cases, as the last step of its outgoing chain; the
server adds ciphertexts and divides by the number of cases; from the second round on the global model is ciphertext at
the server, too, and on its disk. Every site can read the sum, and, with the server's help, each other's updates: this
is a protection against the server, not against a site.

What the server's guard still checks (`EncryptedGuard`): return codes, the data kind, the names (all of the plan's,
no others), the number of values of each tensor, that every tensor is ciphertext under the server's context, and, as
without encryption, the metadata (round, cases, fingerprint, metrics), headers and identity. What it cannot check any
more: finite values, `LARGEST_VALUE`, dtypes. The site's own filter has checked those before, which a hostile site
skips: one site can spoil the model unseen.

Only a weighted mean can be computed (`svd` is refused), and a packed payload cannot be encrypted.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from safetensors.torch import save

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.filters import IncomingGuard
from pfedsam.federated.persistor import SharedStatePersistor, model_metadata
from pfedsam.federated.plan import plan_of
from pfedsam.federated.privacy import holds_update
from pfedsam.files import read_safetensors, write_atomically
from pfedsam.parameters import Manifest
from pfedsam.storage.global_model import FINGERPRINT, ROUND, SCHEMA

try:
    import tenseal
    from nvflare.app_opt.he.constant import HE_ALGORITHM_CKKS
    from nvflare.app_opt.he.homomorphic_encrypt import load_tenseal_context_from_workspace
    from nvflare.app_opt.he.model_decryptor import HEModelDecryptor
    from nvflare.app_opt.he.model_encryptor import HEModelEncryptor
except ImportError as error:
    raise PFedSAMError(
        ErrorCode.MISSING_LIBRARY, f"encryption needs TenSEAL ({error}).", "Install the extra 'he' of pfedsam."
    ) from None

SERVER_CONTEXT = "server_context.tenseal"
#: Schema of an encrypted global model: what reads plain ones refuses it.
ENCRYPTED_SCHEMA = "ckks-1"


class EncryptUpdate(HEModelEncryptor):
    """Outgoing filter of a site, last in the chain: the update times the number of cases, as ciphertexts.

    The ciphertexts travel as bytes: NVFlare's decomposer would send the context along with every tensor.
    """

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """Encrypt all tensors.

        Raises:
            ValueError: without the site's context; NVFlare then sends a return code only.
        """
        result = super().process_dxo(DXO(dxo.data_kind, dict(dxo.data), dict(dxo.meta)), shareable, fl_ctx)
        result.data = {name: vector.serialize() for name, vector in result.data.items()}
        self.logger.info(f"payload encrypted: {sum(map(len, result.data.values()))} bytes")
        return result


class DecryptModel(HEModelDecryptor):
    """Filter of the task data at a site: the global model as float32 tensors of the plan's shapes."""

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """Decrypt a global model; the first one is plain and passes as it is."""
        result = super().process_dxo(dxo, shareable, fl_ctx)
        if result is not None:
            shared = plan_of(fl_ctx).shared()
            values = {name: np.asarray(flat, np.float32) for name, flat in result.data.items()}
            result.data = {name: flat.reshape(shared[name].shape) for name, flat in values.items()}
        return result


class EncryptedGuard(IncomingGuard):
    """`IncomingGuard` for ciphertexts; the module's text says what it can check and what not."""

    #: A site has multiplied by its number of cases before it encrypted: it cannot be lowered either.
    sees_values = False

    def __init__(self) -> None:
        super().__init__()
        self._context: Any = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Load the server's context, which holds no secret key."""
        super().handle_event(event_type, fl_ctx)
        if event_type == EventType.START_RUN:
            self._context = load_tenseal_context_from_workspace(SERVER_CONTEXT, fl_ctx)

    def _rebuilt(self, shareable: Shareable, client: str, fl_ctx: FLContext) -> Shareable:
        if shareable.get_return_code() != ReturnCode.OK or not holds_update(shareable):
            return super()._rebuilt(shareable, client, fl_ctx)
        shared = plan_of(fl_ctx).shared()
        dxo = from_shareable(shareable)
        vectors = ciphertexts(dxo.data, shared, self._context)
        # zeros in the place of ciphertexts: all the other rules are those of a plain update
        zeros = {name: np.zeros(spec.shape, spec.dtype) for name, spec in shared.items()}
        plain_update = DXO(DataKind.WEIGHT_DIFF, data=zeros, meta=dxo.meta).to_shareable()
        for key, value in (shareable.get(ReservedHeaderKey.HEADERS) or {}).items():
            plain_update.set_header(key, value)
        rebuilt = super()._rebuilt(plain_update, client, fl_ctx)
        checked = from_shareable(rebuilt)
        return DXO(DataKind.WEIGHT_DIFF, vectors, {**checked.meta, **_encrypted(vectors)}).update_shareable(rebuilt)


class EncryptedStatePersistor(SharedStatePersistor):
    """Saves the global model as it is at the server: plain theta_0, ciphertexts after the first round.

    An encrypted model is a safetensors file of bytes, which only a site can read, and a federation cannot start from.
    """

    def handle_event(self, event: str, fl_ctx: FLContext) -> None:
        """Keep ciphertexts as bytes, and save the best model without NVFlare's comparison of shapes."""
        model = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)
        if event == AppEventType.AFTER_SHAREABLE_TO_LEARNABLE and _is_encrypted(model):
            # a CKKS vector without its secret key cannot be copied, and the final phase copies its task data
            weights = model[ModelLearnableKey.WEIGHTS]
            model[ModelLearnableKey.WEIGHTS] = {name: _as_bytes(value) for name, value in weights.items()}
        if event == AppEventType.GLOBAL_BEST_MODEL_AVAILABLE and _is_encrypted(model):
            self._write(model, self._best_ckpt_save_path)
            return
        super().handle_event(event, fl_ctx)

    def save_model(self, ml: ModelLearnable, fl_ctx: FLContext) -> None:
        """Write the last global model."""
        if _is_encrypted(ml):
            self._write(ml, self._ckpt_save_path)
        else:
            super().save_model(ml, fl_ctx)

    def _write(self, model: ModelLearnable, path: str) -> None:
        values = {name: _as_bytes(value) for name, value in model[ModelLearnableKey.WEIGHTS].items()}
        tensors = {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in values.items()}
        metadata = {FINGERPRINT: self._fingerprint, SCHEMA: ENCRYPTED_SCHEMA, ROUND: str(self._round)}
        write_atomically(Path(path), save(tensors, metadata=metadata))

    def _get_model_from_location(self, location: str, fl_ctx: FLContext) -> ModelLearnable | None:
        try:
            tensors, metadata = read_safetensors(Path(location))
        except ValueError as error:
            self.logger.error(f"global model {location} could not be read ({error})")
            return None
        if metadata.get(SCHEMA) != ENCRYPTED_SCHEMA:
            return super()._get_model_from_location(location, fl_ctx)
        values = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        return make_model_learnable(values, {**model_metadata(metadata[FINGERPRINT]), **_encrypted(values)})


def ciphertexts(data: Any, shared: Manifest, context: Any) -> dict[str, Any]:
    """The ciphertexts of an update.

    Args:
        data: serialised CKKS vectors by name, as received.
        shared: the tensors that must be there, all of them and no others.
        context: TenSEAL context of the server.

    Returns:
        CKKS vectors by name, flat, each with as many values as its tensor.

    Raises:
        PFedSAMError: E20 for other names, something else than ciphertext, or another number of values.
    """
    if type(data) is not dict or set(data) != set(shared):
        raise PFedSAMError(ErrorCode.REFUSED_BY_GUARD, "the encrypted update does not hold the plan's tensors.")
    vectors = {}
    for name, spec in shared.items():
        if type(data[name]) is not bytes:
            raise PFedSAMError(
                ErrorCode.REFUSED_BY_GUARD, f"'{name}' is {type(data[name]).__name__}, expected ciphertext."
            )
        try:
            vectors[name] = tenseal.ckks_vector_from(context, data[name])
        except Exception as error:
            raise PFedSAMError(
                ErrorCode.REFUSED_BY_GUARD, f"'{name}' is no ciphertext ({type(error).__name__})."
            ) from None
        if vectors[name].size() != math.prod(spec.shape):
            raise PFedSAMError(
                ErrorCode.REFUSED_BY_GUARD,
                f"'{name}' holds {vectors[name].size()} values, expected {math.prod(spec.shape)}.",
            )
    return vectors


def _encrypted(values: dict[str, Any]) -> dict[str, Any]:
    """What NVFlare's filters and aggregator read from the metadata."""
    return {MetaKey.PROCESSED_KEYS: dict.fromkeys(values, True), MetaKey.PROCESSED_ALGORITHM: HE_ALGORITHM_CKKS}


def _is_encrypted(model: Any) -> bool:
    values = (model or {}).get(ModelLearnableKey.WEIGHTS) or {}
    return any(isinstance(value, (bytes, tenseal.CKKSVector)) for value in values.values())


def _as_bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else value.serialize()
