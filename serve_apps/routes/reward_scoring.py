"""The reward scoring API."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve_apps.routes.common import ContextOf, answer_to, needs
from stack import reward_scoring
from stack.api.reward_scoring import RewardScoringRequest, RewardScoringResponse

router = APIRouter(prefix="/reward_scoring", tags=["reward scoring"], dependencies=[needs("inference")])


@router.post("/score", response_model=RewardScoringResponse)
async def score(request: Request, context: ContextOf, body: RewardScoringRequest) -> Response:
    """The scores of answers within their dialogs, by a reward model; those below a `threshold` are left out."""
    return await answer_to(request, reward_scoring.score(context, body))
