"""The global model at the server: the shared tensors, never a whole network, and never a pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey, WorkspaceConstants
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.model_desc import ModelDescriptor
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
from nvflare.app_opt.pt.model_persistence_format_manager import PTModelPersistenceFormatManager
from torch import Tensor

from pfedsam.bundles import network_of
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.boundary import FINGERPRINT_KEY
from pfedsam.federated.collection import leave_out_what_is_there
from pfedsam.federated.literals import require_literal
from pfedsam.federated.plan import Plan, plan_of
from pfedsam.federated.versions import VERSIONS_KEY, installed_versions
from pfedsam.parameters import Manifest, shared_state
from pfedsam.storage.global_model import read_global_model, write_global_model
from pfedsam.storage.job_plan import SERVER

GLOBAL_MODEL_FILE = "global_model.safetensors"
BEST_GLOBAL_MODEL_FILE = "best_global_model.safetensors"
#: Folders of a job's app that may hold theta0; a file in `config` is no code, so a locked job can carry it.
_CARRIED_IN = ("config", WorkspaceConstants.CUSTOM_FOLDER_NAME)


class SharedStatePersistor(PTFileModelPersistor):
    """Loads theta_0, saves theta after every round and the best theta, as safetensors.

    theta_0 comes from `source_ckpt_file_full_name` (resume), else from `theta0`, else from the bundle's network, which
    is built once and freed. It is a `PTFileModelPersistor` because NVFlare's `PTFileModelLocator` insists on one.

    Args:
        theta0: name of a file made by `pfedsam init-global`, for a server without SAM weights; it is looked up in the
            job's `app/config`, then in its `app/custom`.
        source_ckpt_file_full_name: global model of an earlier run to go on from, carried in the same way.
        global_model_file_name: of the last global model, in the server's app folder.
        best_global_model_file_name: of the best global model, in the server's app folder.
    """

    def __init__(
        self,
        theta0: str = "",
        source_ckpt_file_full_name: str | None = None,
        global_model_file_name: str = GLOBAL_MODEL_FILE,
        best_global_model_file_name: str = BEST_GLOBAL_MODEL_FILE,
    ) -> None:
        super().__init__(
            source_ckpt_file_full_name=source_ckpt_file_full_name,
            global_model_file_name=global_model_file_name,
            best_global_model_file_name=best_global_model_file_name,
            load_weights_only=True,
        )
        self.theta0 = theta0
        # without this, a job could overwrite any file of the server's account, or send one out as the global model
        for name in (theta0, source_ckpt_file_full_name, global_model_file_name, best_global_model_file_name):
            if name and Path(name).name != name:
                raise PFedSAMError(
                    ErrorCode.WRONG_SETTING, f"{name!r} is a path.", "Give a file name; a job carries it in app/config."
                )
        self._expected: Manifest = {}
        self._fingerprint = ""
        self._about: dict[str, Any] = {}
        self._round = -1

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable | None:
        """Load theta_0.

        Args:
            fl_ctx: context of the workflow.

        Returns:
            Shared tensors as numpy arrays, with the base fingerprint in the metadata; None after a panic, which ends
            the job.
        """
        try:
            require_literal(str(fl_ctx.get_prop(FLContextKey.APP_ROOT)), SERVER, references=True)
            plan = plan_of(fl_ctx)
            self._expected = plan.shared()
            self._about = {"bundle": plan.bundle, "overrides": plan.overrides}
            state, self._fingerprint = self._theta0(plan, fl_ctx)
        except PFedSAMError as error:
            self.system_panic(reason=str(error), fl_ctx=fl_ctx)
            return None
        leave_out_what_is_there()
        self.logger.info(f"global model: {len(state)} shared tensors, base fingerprint {self._fingerprint[:12]}")
        self.persistence_manager = PTModelPersistenceFormatManager(
            {
                PTModelPersistenceFormatManager.PERSISTENCE_KEY_MODEL: state,
                PTModelPersistenceFormatManager.PERSISTENCE_KEY_META_PROPS: model_metadata(self._fingerprint),
            }
        )
        return self.persistence_manager.to_model_learnable(self.exclude_vars)

    def handle_event(self, event: str, fl_ctx: FLContext) -> None:
        """Put the metadata back after each aggregation, when the model has got the aggregator's."""
        super().handle_event(event, fl_ctx)
        if event == AppEventType.AFTER_SHAREABLE_TO_LEARNABLE and self._fingerprint:
            self._round = int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND, -1))
            model = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)
            if isinstance(model, ModelLearnable):
                meta = model.get(ModelLearnableKey.META) or {}
                model[ModelLearnableKey.META] = {**meta, **model_metadata(self._fingerprint)}

    def save_model_file(self, save_path: str) -> None:
        """Write the current model, atomically (E12 if it does not fit the plan any more)."""
        saved = self.persistence_manager.to_persistence_dict()
        state = saved[PTModelPersistenceFormatManager.PERSISTENCE_KEY_MODEL]
        write_global_model(save_path, state, self._fingerprint, self._expected, self._round, self._about)

    def get_model_inventory(self, fl_ctx: FLContext) -> dict[str, ModelDescriptor]:
        """The models for the evaluation across sites, each by its file's name without the suffix.

        NVFlare names files in a format of its own after them, which would pass for safetensors otherwise.
        """
        return {Path(name).stem: model for name, model in super().get_model_inventory(fl_ctx).items()}

    def _get_model_from_location(self, location: str, fl_ctx: FLContext) -> ModelLearnable | None:
        try:
            state, fingerprint = read_global_model(location, self._expected or plan_of(fl_ctx).shared())
        except PFedSAMError as error:
            self.logger.error(str(error))
            return None
        return make_model_learnable(
            {name: tensor.numpy() for name, tensor in state.items()}, model_metadata(fingerprint)
        )

    def _theta0(self, plan: Plan, fl_ctx: FLContext) -> tuple[dict[str, Tensor], str]:
        for given in (self.source_ckpt_file_full_name, self.theta0):
            if given:
                app = Path(fl_ctx.get_prop(FLContextKey.APP_ROOT) or "")
                places = [app / name / given for name in _CARRIED_IN]
                return read_global_model(next((p for p in places if p.is_file()), places[-1]), self._expected)
        network = network_of(plan.bundle, plan.overrides)
        return shared_state(network, plan.checked().roles), network.base_fingerprint


def model_metadata(fingerprint: str) -> dict[str, str]:
    """What a site is told of the global model beside its tensors."""
    return {FINGERPRINT_KEY: fingerprint, VERSIONS_KEY: installed_versions()}
