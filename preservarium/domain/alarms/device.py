"""One device's alarms: messages and operators' actions in, transitions out, state between them.

Rules (`rules.py`) say when a condition changes (`evaluation.py`), the machine (`machine.py`) what follows; here both meet
the records of the pipeline (`observation.py`) and the state document (`state.py`). The alarm agent is the only writer of
that state: people act through `alarm_actions`, in order with the readings.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from preservarium.domain.alarms.action import Action
from preservarium.domain.alarms.calm import stays_calm, waits
from preservarium.domain.alarms.machine import NEW, Alarm, Event, Occasion, Point, Refusal, State
from preservarium.domain.alarms.observation import observe, pass_time, usable, wait_anew
from preservarium.domain.alarms.rule import NO_DEVICE, DeviceRules
from preservarium.domain.alarms.state import (
    STATE_VERSION,
    Generation,
    held,
    is_watched,
    oldest_held,
    stands,
    stands_without_rule,
    unpack,
)
from preservarium.domain.alarms.turn import Outcome, Turn
from preservarium.domain.readings.lineage import GENERATION_LIVE, advance, generation_state, take

#: Ids of the last actions that a device's state keeps, so that a sender may repeat one. A repetition comes within seconds,
#: and nobody acts on one device more often than this in them.
ACTIONS_REMEMBERED: Final = 16


class DeviceAlarms:
    """The alarms of one device: takes messages and actions in order, and gives the transitions they cause.

    Made of the state document, which `document` gives back after any number of messages; how they are cut into batches
    makes no difference. Not to be shared between tasks.
    """

    def __init__(self, device_id: str, document: Mapping[str, Any] | None = None) -> None:
        self._device_id = device_id
        self._document: dict[str, Any] = dict(document) if document else {"v": STATE_VERSION, "g": {}}
        #: those that were asked for
        self._generations: dict[int, Generation] = {}
        #: as of the last message, action or tick
        self._rules: DeviceRules | None = None
        #: of the last message
        self._as_received = True
        self._turn_before: Turn | None = None
        #: the rules by which it was asked whether the device is calm, and its live generation where it is (calm.py)
        self._asked_calm: DeviceRules | None = None
        self._calm: dict[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """The state as JSON-able data."""
        for state in self._generations.values():
            state.pack()
        if self._rules is not None:
            due = self._due(self._rules)
            if due is not None:
                self._document["due"] = due
            else:
                self._document.pop("due", None)
        return self._document

    def _due(self, rules: DeviceRules) -> int | None:
        """When `tick` has something to do, µs; None: never, as things stand. Only the live generation is told of time."""
        kept = self._document["g"].get(str(GENERATION_LIVE))
        if kept is None:
            return None
        found = [kept["until"]] if "until" in kept else []
        for one in rules.sets:
            waiting = held(kept, one.lateness_us) if one.lateness_us else None
            if waiting is not None and waiting["q"]:
                found.append(waiting["seen"] + one.lateness_us)
        for rule in rules.no_data:
            for pin, row in kept["a"].get(rule.name, {}).items():
                if not row[1] and row[0] and rule.pin_position in (None, pin):
                    deadline = rule.told_at(row[0], row[2])
                    # Beyond what waits to be put in order, nothing is known yet: whatever releases that asks again.
                    if deadline is not None and deadline < oldest_held(kept, rule.lateness_us):
                        found.append(deadline + rule.lateness_us + 1)
        return min(found) if found else None

    def alarms(self, generation: int = GENERATION_LIVE) -> Iterator[tuple[Point, Alarm]]:
        """Every alarm that has state, for inspection."""
        kept = self.document()["g"].get(str(generation), {"a": {}})
        for rule, pins in kept["a"].items():
            for pin, row in pins.items():
                yield Point(self._device_id, rule, pin, generation), unpack(row).alarm

    def observe(
        self,
        message: Mapping[str, Any],
        rules: DeviceRules | None,
        *,
        as_received: bool = True,
        outcome: Outcome | None = None,
    ) -> Outcome:
        """Take one validated message.

        Readings that failed or are missing, texts, and readings in a unit that is not the datatype's are not evaluated;
        suspect ones are: an alarm missed is worse than one looked at.

        Args:
            message: a validated message of this device; messages come in the order of their partition.
            rules: the device's rules; None where the device is unknown now: nothing is evaluated or withdrawn.
            as_received: messages come as they were received, so that a silence that a clock would have told of before
                this one came is told now. Otherwise, of stored readings in the order of their own time, `received_at`
                says nothing of silence.
            outcome: of messages before, which this one's is added to and which is given back.
        """
        self._as_received = as_received
        if outcome is None:
            outcome = Outcome()
        if rules is not None and rules.calm is not None and not self._generations:
            kept = self._calm if self._asked_calm is rules else self._ask_calm(rules)
            if kept is not None and message["generation"] == GENERATION_LIVE:
                evaluated = stays_calm(message, rules.calm, kept, usable)
                if evaluated is not None:
                    outcome.duplicate = evaluated < 0
                    outcome.evaluated += max(evaluated, 0)
                    return outcome
        state = self._generations.get(message["generation"]) or self._generation(message["generation"])
        if not take(state.kept["m"], message):
            outcome.duplicate = True
            return outcome
        if rules is None:
            return outcome
        self._rules = rules
        turn = self._turn(state, rules, outcome)
        if state.checked is not rules or "until" in state.kept:
            _catch_up(turn, message["received_at"])
        observe(turn, message)
        return self._first_limited(outcome) if outcome.limited else outcome

    def tick(self, now_us: int, rules: DeviceRules | None) -> Outcome:
        """Let time pass: shelves end, silence is noticed, readings that waited for others are evaluated.

        Of the live generation only: a replay's time is that of its messages. Nothing is done twice, so a tick that is
        repeated after a crash tells the same.

        Args:
            now_us: an instant for which everything that was received before it has been observed: silence is only
                silence when nothing is on its way. Then ticks change nothing of the history but when it is told.
            rules: the device's rules; None where the device is unknown now: nothing happens.
        """
        outcome = Outcome()
        if rules is None or str(GENERATION_LIVE) not in self._document["g"]:
            return outcome
        self._rules = rules
        turn = self._turn(self._generation(GENERATION_LIVE), rules, outcome)
        _catch_up(turn, now_us)
        pass_time(turn, now_us)
        return self._first_limited(outcome)

    def act(self, action: Action, rules: DeviceRules | None, source: str, offset: int, index: int) -> Outcome:
        """Take one operator's action.

        Args:
            action: of this device.
            rules: the device's rules.
            source: which topic and partition it came from; its own watermark.
            offset: offset in it.
            index: line within the record.

        Returns:
            An outcome whose `refusal` says why nothing changed, where that is so.
        """
        outcome = Outcome()
        state = self._generation(GENERATION_LIVE)
        if not advance(state.kept["m"], source, offset, index):
            outcome.duplicate = True
            return outcome
        if action.action_id:
            remembered: list[str] = state.kept.setdefault("acts", [])
            if action.action_id in remembered:
                outcome.duplicate = True
                return outcome
            remembered.append(action.action_id)
            del remembered[:-ACTIONS_REMEMBERED]
        self._rules = rules or self._rules
        turn = self._turn(state, rules or NO_DEVICE, outcome)
        name, pin = action.rule, action.pin_position
        live = turn.live(name, pin)
        if live is None:
            outcome.refusal = Refusal.TOO_MANY_ALARMS
            return self._first_limited(outcome)
        gone = turn.rules.gone(name, pin, live.component_type)
        outcome.alarm_id = live.alarm.alarm_id
        if action.alarm_id is not None and action.alarm_id != live.alarm.alarm_id:
            outcome.refusal = Refusal.OTHER_OCCURRENCE
        elif gone is None:
            now = Occasion(action.at, action.at, until=action.until, one_shot=action.one_shot)
            turn.happens(pin, live, action.event, now, turn.rules.by_name[name], action)
        elif live.alarm != NEW:
            turn.unwatched(name, pin, live, action.event, action.at, gone, action)
        else:
            outcome.refusal = Refusal.UNKNOWN_ALARM
        if outcome.refusal is not Refusal.UNKNOWN_ALARM:
            outcome.state = live.alarm.state
        if action.alarm_id is not None and live.alarm.state is State.NORMAL:
            # Whoever names an occurrence saw it stand: it stands no longer.
            outcome.standing[name, pin] = None
        if gone is None:
            state.forget_unused(name, pin)
        elif live.alarm == NEW:
            state.forget(name, pin)
        return self._first_limited(outcome)

    def withdraw_unwatched(self, now_us: int, rules: DeviceRules | None) -> Outcome:
        """End the alarms of the live generation that nothing watches any more, without waiting for a message.

        Which rules there are comes from the registry, of which the log of messages knows nothing: a replay ends these alarms
        at another message, or not. The transition, its id and its event time are the same.

        Args:
            now_us: when it became known.
            rules: the device's rules; None: the device is not registered.
        """
        outcome = Outcome()
        if str(GENERATION_LIVE) in self._document["g"]:
            rules = rules or NO_DEVICE
            self._rules = rules
            _catch_up(self._turn(self._generation(GENERATION_LIVE), rules, outcome), now_us)
        return outcome

    @property
    def stands(self) -> bool:
        """Whether an alarm of the live generation is not normal; as of `document`."""
        kept = self._document["g"].get(str(GENERATION_LIVE))
        return kept is not None and stands(kept)

    def stands_without_rule(self, rules: DeviceRules | None) -> bool:
        """Whether such an alarm is not watched any more; as of `document`."""
        kept = self._document["g"].get(str(GENERATION_LIVE))
        return kept is not None and stands_without_rule(kept, rules or NO_DEVICE)

    def _ask_calm(self, rules: DeviceRules) -> dict[str, Any] | None:
        """The live generation, where nothing of it waits for time or other rules; as long as nothing of it is unpacked."""
        self._asked_calm = rules
        kept: dict[str, Any] | None = self._document["g"].get(str(GENERATION_LIVE))
        is_calm = kept is not None and "due" not in self._document and not waits(kept) and is_watched(kept, rules)
        self._calm = kept if is_calm else None
        return self._calm

    def _generation(self, number: int) -> Generation:
        state = self._generations.get(number)
        if state is None:
            generations: dict[str, dict[str, Any]] = self._document["g"]
            kept = generation_state(generations, number, lambda: {"m": {}, "a": {}})
            state = self._generations[number] = Generation(number, kept)
            if len(self._generations) > 1:  # a replay may have made room for it
                self._generations = {n: one for n, one in self._generations.items() if str(n) in generations}
        return state

    def _turn(self, state: Generation, rules: DeviceRules, outcome: Outcome) -> Turn:
        turn = self._turn_before
        if turn is None or turn.state is not state or turn.rules is not rules or turn.outcome is not outcome:
            turn = self._turn_before = Turn(self._device_id, state, rules, outcome)
        turn.as_received = self._as_received
        return turn

    def _first_limited(self, outcome: Outcome) -> Outcome:
        """Let it be said once only that the device has too many alarms."""
        if outcome.limited:
            outcome.limited = "limited" not in self._document
            self._document["limited"] = 1
        return outcome


def _catch_up(turn: Turn, now: int) -> None:
    """What time and the registry did since the last turn: shelves that ran out, rules that are gone."""
    state, rules = turn.state, turn.rules
    until = state.kept.get("until")
    if until is not None and until <= now:
        _unshelve(turn, now)
    if state.checked is rules:
        return
    state.checked = rules
    for name, pin, why in state.gone(rules):
        live = turn.live(name, pin)
        if live is not None and live.alarm != NEW:
            turn.unwatched(name, pin, live, Event.WITHDRAW, now, why, None)
        state.forget(name, pin)
        if name not in rules.by_name:
            state.kept.get("c", {}).pop(name, None)
    for group in sorted(state.kept.get("s", ())):
        turn.regroup(group, Occasion(now, now))
    if "i" in state.kept or "h" in state.kept:
        wait_anew(turn)


def _unshelve(turn: Turn, now: int) -> None:
    """Let the shelves end that ran out."""
    state = turn.state
    waiting: list[int] = []
    for name, pin in sorted(state.everything()):
        rule = turn.rules.by_name.get(name)
        live = turn.live(name, pin)
        if rule is None or live is None or live.alarm.shelved_until is None:
            continue
        if turn.rules.gone(name, pin, live.component_type) is not None:
            continue  # it ends anyway
        until = live.alarm.shelved_until
        if until > now:
            waiting.append(until)
            continue
        turn.happens(pin, live, Event.UNSHELVE, Occasion(until, now), rule)
        state.forget_unused(name, pin)
    state.kept.pop("until", None)
    if waiting:
        state.kept["until"] = min(waiting)
