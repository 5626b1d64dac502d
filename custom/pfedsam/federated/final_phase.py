"""The final personal phase: after the last aggregation every site fits its experts beside the final theta.

Nothing is sent back but a return code. A site that fails keeps the pair of its last round, so it does not end the job.
"""

from __future__ import annotations

from nvflare.apis.client import Client
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.model import ModelLearnable, model_learnable_to_dxo
from nvflare.app_common.abstract.response_processor import ResponseProcessor
from nvflare.app_common.app_constant import AppConstants

from pfedsam.errors import code_of_reply


class FinalPersonalPhase(ResponseProcessor):
    """Sends the final theta by `BroadcastAndProcess` with task `configure`, and notes how each site did.

    The task data are the global weights with the metadata of the global model (base fingerprint) and the header
    `current_round`: the number of the round that would come next, so that it is no round of training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replies: dict[str, str] = {}

    def create_task_data(self, task_name: str, fl_ctx: FLContext) -> Shareable | None:
        """The final global model as task data.

        Args:
            task_name: name of the task.
            fl_ctx: context of the workflow, which holds the global model of `ScatterAndGather`.

        Returns:
            The task data, or None if no round was run; the workflow then ends the job.
        """
        self.replies = {}
        model = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)
        if not isinstance(model, ModelLearnable) or model.is_empty():
            self.logger.error("there is no global model: the final personal phase must come after ScatterAndGather")
            return None
        data = model_learnable_to_dxo(model).to_shareable()
        # without a round in this run (it was resumed after the last one) the next round is the one to start with
        last = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        following = fl_ctx.get_prop(AppConstants.START_ROUND, 0) if last is None else last + 1
        data.set_header(AppConstants.CURRENT_ROUND, following)
        return data

    def process_client_response(self, client: Client, task_name: str, response: Shareable, fl_ctx: FLContext) -> bool:
        """Note a site's return code. Always True: a site that failed does not end the job."""
        reply = response.get_return_code() if isinstance(response, Shareable) else ReturnCode.EMPTY_RESULT
        self.replies[client.name] = reply
        if reply == ReturnCode.OK:
            self.logger.info(f"final personal phase: site {client.name} is done")
        else:
            meaning = code.meaning if (code := code_of_reply(reply)) else "see the site's log"
            self.logger.warning(f"final personal phase: site {client.name} failed with {reply} ({meaning})")
        return True

    def final_process(self, fl_ctx: FLContext) -> bool:
        """Log which sites have no final pair. Always True."""
        expected = {client.name for client in fl_ctx.get_engine().get_clients()} | set(self.replies)
        failed = sorted(site for site in expected if self.replies.get(site) != ReturnCode.OK)
        self.logger.info(f"final personal phase: {len(expected) - len(failed)} of {len(expected)} sites done")
        if failed:
            self.logger.warning(f"final personal phase: sites {failed} keep the pair of their last round")
        return True
