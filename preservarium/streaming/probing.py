"""Asks the servers behind circuit breakers whether they answer, so that a worker with nothing to do knows it as well."""

import asyncio
from typing import Final

import structlog
from mode import Service

from preservarium import metrics
from preservarium.breaker import Breaker, back, breakers
from preservarium.waiting import one_line

log = structlog.get_logger(__name__)

#: A server is asked this often.
ASK_S: Final = 2.0
#: One that has not answered a ping for so long is down for our purpose. With ASK_S it is told within 7 s.
ANSWER_S: Final = 5.0


class Prober(Service):
    """Asks every server that has a probe."""

    async def on_start(self) -> None:
        """Begin. Each on its own: one that does not answer must not delay the look at another."""
        for breaker in breakers():
            if breaker.probe is not None:
                self.add_future(self._ask_often(breaker))

    async def _ask_often(self, breaker: Breaker) -> None:
        while not self.should_stop:
            await probe(breaker)
            await self.sleep(ASK_S)


async def probe(breaker: Breaker) -> None:
    """Ask once; where a server answers that did not, whoever waits for it may try at once."""
    assert breaker.probe is not None
    try:
        async with asyncio.timeout(ANSWER_S):
            await breaker.probe()
    except Exception as e:
        if not breaker.silence:
            log.warning("dependency_does_not_answer", dependency=breaker.name, error=repr(e))
        breaker.silence = "no answer in time" if isinstance(e, TimeoutError) else one_line(e)
        metrics.DEPENDENCY_ANSWERS.labels(breaker.server).set(0)
        return
    metrics.DEPENDENCY_ANSWERS.labels(breaker.server).set(1)
    if breaker.silence:
        breaker.silence = ""
        log.info("dependency_answers_again", dependency=breaker.name)
        for one in breakers():
            if one.server == breaker.server:
                one.try_now()
        back.wake()
