"""The service with nothing behind its front: `/churn` and `/recommend` answer the same bytes to everybody. Only to be measured.

What an answer costs above this is what deciding costs; what this costs is HTTP, the gateway, the key.
"""

from serving.fallbacks import Deadline
from serving.service import Personalization as Whole
from serving.wire import RecommendRequest, ScoreRequest, decode

_ANSWER = b'{"predictions":[{"customer_id":"c1","probability":0.5,"band":"low","source":"static","reasons":[]}],"degraded":false}'


async def _recommend(body: bytes, deadline: Deadline) -> bytes:
    decode(RecommendRequest, body)
    return _ANSWER


async def _score(body: bytes, deadline: Deadline) -> bytes:
    decode(ScoreRequest, body)
    return _ANSWER


Personalization = Whole
Personalization.core.recommend_body = _recommend  # type: ignore[method-assign]
Personalization.core.score_body = lambda task: _score  # type: ignore[method-assign,assignment,return-value]
