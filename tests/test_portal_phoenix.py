"""The portal's protocol, scenario by scenario: the test is the portal, the network and the time."""

import json
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import StringIO
from math import inf
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relay.portal.phoenix import (
    Connect,
    Disconnect,
    Output,
    Phoenix,
    PortalLost,
    PortalReady,
    PortalRefused,
    PortalUnavailable,
    Send,
    State,
)

SECRET = "7fb2ba5c5a9d1fd8c59c1d5fba40a284"
START = 1000.25  # monotonic seconds
UNIX_START = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT
DAY = 24 * 3600.0
LARGEST_STEP = 10_000  # deadlines in one stretch of time


class Talk:
    """A conversation with the portal, and what comes of it.

    ``outputs`` are those since they were last looked at; ``at`` says when each came.
    """

    def __init__(self, random: Callable[[], float] = lambda: 0.5) -> None:
        self.now = START
        self.at: list[float] = []
        self._outputs: list[Output] = []
        self.phoenix = Phoenix(SECRET, portal="portal.example", random=random, now=self.now)
        self._drain()

    def said(self) -> list[Output]:
        """Return what came out since the last look."""
        outputs, self._outputs, self.at = self._outputs, [], []
        return outputs

    def sent(self) -> list[dict[str, Any]]:
        """Return the frames sent since the last look; there is nothing else."""
        outputs = self.said()
        frames = [json.loads(output.text) for output in outputs if isinstance(output, Send)]
        assert len(frames) == len(outputs), outputs
        return frames

    def connects(self) -> Self:
        self.phoenix.handle_connected(self.now)
        return self._drain()

    def joins(self) -> Self:
        """Connect, and have the join accepted; nothing of that is left to look at."""
        self.connects()
        self.hears_reply(0)
        self.said()
        return self

    def is_rejected(
        self, status: int, headers: Mapping[str, str] | None = None, body: str = ""
    ) -> Self:
        self.phoenix.handle_rejected(
            status, headers or {}, body, now=self.now, unix_now=UNIX_START + self.now - START
        )
        return self._drain()

    def is_closed(self, reason: str = "it closed the connection") -> Self:
        self.phoenix.handle_closed(reason, self.now)
        return self._drain()

    def hears(self, event: str, payload: object = None, topic: str = "relay") -> Self:
        return self.hears_frame(topic=topic, event=event, payload=payload or {}, ref=None)

    def hears_reply(
        self, ref: object, payload: object = None, topic: str = "relay", **more: object
    ) -> Self:
        ok = {"status": "ok", "response": {}}
        return self.hears_frame(
            topic=topic, event="phx_reply", payload=payload or ok, ref=ref, **more
        )

    def hears_error(self, ref: object, response: object, topic: str = "relay") -> Self:
        return self.hears_reply(ref, {"status": "error", "response": response}, topic)

    def hears_frame(self, **frame: object) -> Self:
        return self.hears_text(json.dumps(frame))

    def hears_text(self, text: str) -> Self:
        self.phoenix.handle_text(text, self.now)
        return self._drain()

    def passes(self, seconds: float) -> Self:
        """Let time pass, and the machine act at each of its deadlines."""
        end = self.now + seconds
        for _ in range(LARGEST_STEP):
            deadline = self.phoenix.poll_timeout()
            if deadline is None or deadline > end:
                break
            self.now = max(self.now, deadline)
            self.phoenix.handle_timeout(self.now)
            self._drain()
        else:
            raise AssertionError("the machine never rests")
        self.now = end
        self.phoenix.handle_timeout(self.now)  # too early is no harm
        return self._drain()

    def passes_with_answers(self, seconds: float) -> Self:
        """Let time pass, with every heartbeat answered."""
        end = self.now + seconds
        while self.now < end:
            self.passes(min(1.0, end - self.now))
            for output in self._outputs:
                if isinstance(output, Send) and "heartbeat" in output.text:
                    self.hears_reply(json.loads(output.text)["ref"], topic="phoenix")
            self._outputs = [output for output in self._outputs if not isinstance(output, Send)]
        return self

    def _drain(self) -> Self:
        while (output := self.phoenix.next_output()) is not None:
            self._outputs.append(output)
            self.at.append(self.now - START)
        return self


def join(ref: int) -> dict[str, object]:
    payload = {"stamp_secret": SECRET}
    return {"topic": "relay", "event": "phx_join", "payload": payload, "ref": ref}


def heartbeat(ref: int) -> dict[str, object]:
    return {"topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": ref}


def lost(why: str, delay: str) -> PortalLost:
    return PortalLost(f"waiting for the portal at portal.example: {why}, next try in {delay} s")


def refused(why: str) -> PortalRefused:
    return PortalRefused(f"the portal at portal.example refuses this relay: {why}")


def refuses(why: str) -> str:
    return f"it refuses this relay: {why}"


UNAVAILABLE = PortalUnavailable("no portal at portal.example for 24 hours")


# --- Joining --------------------------------------------------------------------------------


def test_joins_and_is_told_to_serve() -> None:
    talk = Talk()
    assert talk.said() == [Connect()]

    talk.connects()
    assert talk.said() == [
        Send(
            '{"topic":"relay","event":"phx_join",'
            f'"payload":{{"stamp_secret":"{SECRET}"}},"ref":0}}'
        )
    ]
    talk.hears_reply(0)
    assert talk.said() == []
    assert talk.phoenix.state is State.JOINED

    talk.hears("init")
    assert talk.said() == [PortalReady()]


def test_init_may_come_before_the_reply() -> None:
    talk = Talk()
    talk.connects().said()

    assert talk.hears("init").said() == [PortalReady()]
    assert talk.hears_reply(0).said() == []
    assert talk.phoenix.state is State.JOINED


def test_init_may_come_again() -> None:
    talk = Talk().joins()

    assert talk.hears("init").hears("init").said() == [PortalReady(), PortalReady()]


def test_secret_is_in_no_representation() -> None:
    talk = Talk().connects()

    assert SECRET not in repr(talk.said()) + repr(talk.phoenix)


@pytest.mark.parametrize("ref", [0, "0"])
def test_ref_of_a_reply_may_be_text(ref: object) -> None:
    talk = Talk().connects().hears_reply(ref)

    assert talk.phoenix.state is State.JOINED


@pytest.mark.parametrize("ref", [1, "1", "", "zero", None, [], {}, -1, 0.5, "\u0660", "9" * 5000])
def test_reply_to_something_else_is_no_join(ref: object) -> None:
    talk = Talk().connects().hears_reply(ref)

    assert talk.phoenix.state is State.JOINING


@pytest.mark.parametrize("status", ["OK", "", None, 1, ["ok"], {}])
def test_reply_of_another_status_is_no_join(status: object) -> None:
    talk = Talk().connects().hears_reply(0, {"status": status, "response": {}})
    talk.said()

    assert talk.phoenix.state is State.JOINING
    assert talk.passes(5).said()[1] == lost("it does not answer the join", "0.5")


def test_reply_on_another_topic_is_no_join() -> None:
    talk = Talk().connects().hears_reply(0, topic="phoenix").hears_reply(0, topic="relay:1")

    assert talk.phoenix.state is State.JOINING


def test_unanswered_join_ends_the_connection_after_5_s() -> None:
    talk = Talk().connects()
    talk.said()

    assert talk.passes(4.99).said() == []
    assert talk.passes(0.01).said() == [Disconnect(), lost("it does not answer the join", "0.5")]
    assert talk.passes(0.5).said() == [Connect()]


def test_join_answered_in_time_is_not_waited_for() -> None:
    talk = Talk().connects().passes(4.99).hears_reply(0)
    talk.said()

    assert talk.passes(5).said() == []


def test_init_does_not_answer_the_join() -> None:
    talk = Talk().connects().hears("init")
    talk.said()

    assert Disconnect() in talk.passes(5).said()


# --- Heartbeats -----------------------------------------------------------------------------


def test_heartbeats_every_10_s() -> None:
    talk = Talk().joins()
    for ref in range(1, 100):
        assert talk.passes(9.99).said() == []
        assert talk.passes(0.01).sent() == [heartbeat(ref)]
        talk.hears_reply(ref, topic="phoenix")
    assert talk.said() == []


def test_heartbeats_do_not_wait_for_silence() -> None:
    """They come every 10 s, whatever else flows."""
    talk = Talk().joins()
    sent = []
    for second in range(1, 61):
        talk.passes(1).hears("relays_presence", {"second": second})
        sent += [(second, frame["ref"]) for frame in talk.sent()]
        for _, ref in sent[-1:]:
            talk.hears_reply(ref, topic="phoenix")

    assert sent == [(10, 1), (20, 2), (30, 3), (40, 4), (50, 5), (60, 6)]


def test_heartbeats_begin_with_the_connection_not_with_the_join() -> None:
    talk = Talk().connects().passes(4).hears_reply(0)
    talk.said()

    assert talk.passes(5.99).said() == []
    assert talk.passes(0.01).sent() == [heartbeat(1)]


def test_fourth_heartbeat_while_three_are_unanswered_ends_the_connection() -> None:
    talk = Talk().joins()

    assert talk.passes(39.99).sent() == [heartbeat(1), heartbeat(2), heartbeat(3)]
    assert talk.passes(0.01).said() == [Disconnect(), lost("3 heartbeats are unanswered", "0.5")]


def test_one_late_answer_makes_room_for_one_heartbeat() -> None:
    talk = Talk().joins().passes(39)
    talk.hears_reply(1, topic="phoenix").said()

    assert talk.passes(1).sent() == [heartbeat(4)]
    assert Disconnect() in talk.passes(10).said()


def test_any_heartbeat_may_be_answered() -> None:
    talk = Talk().joins()
    for ref in range(1, 50):
        talk.passes(10)
        talk.hears_reply(str(ref), topic="phoenix")
    assert len(talk.sent()) == 49


def test_answer_counts_once_and_only_for_its_heartbeat() -> None:
    talk = Talk().joins().passes(30)
    for ref in (0, 4, 99, None, "x", 1, 1, 1):
        talk.hears_reply(ref, topic="phoenix")
    talk.hears_reply(2, topic="relay")  # of another topic
    talk.said()

    assert talk.passes(10).sent() == [heartbeat(4)]
    assert Disconnect() in talk.passes(10).said()


def test_answer_of_an_error_is_an_answer() -> None:
    talk = Talk().joins().passes(30)
    talk.said()
    talk.hears_error(1, {"reason": "unmatched topic"}, topic="phoenix")

    assert talk.passes(10).sent() == [heartbeat(4)]


def test_unanswered_heartbeats_are_forgotten_with_their_connection() -> None:
    talk = Talk().joins().passes(30).is_closed().passes(0.5).joins()

    assert talk.passes(30).sent() == [heartbeat(1), heartbeat(2), heartbeat(3)]


# --- The portal has forgotten us ------------------------------------------------------------


def test_joins_again_on_the_same_connection() -> None:
    talk = Talk().joins().passes(10)
    talk.hears_reply(1, topic="phoenix").said()

    talk.hears_error(7, {"reason": "unmatched topic"})
    assert talk.passes(1).sent() == [join(2)]
    talk.hears_reply(2).hears("init")
    assert talk.said() == [PortalReady()]
    assert talk.phoenix.state is State.JOINED


def test_joins_again_where_the_join_itself_is_unmatched() -> None:
    talk = Talk().connects()
    talk.said()

    talk.hears_error(0, {"reason": "unmatched topic"})
    assert talk.passes(1).sent() == [join(1)]


def test_second_join_has_5_s_as_well() -> None:
    talk = Talk().joins().hears_error(0, {"reason": "unmatched topic"})
    talk.passes(1).said()

    assert talk.passes(4.99).said() == []
    assert talk.passes(0.01).said() == [Disconnect(), lost("it does not answer the join", "0.5")]


def test_does_not_join_for_each_complaint() -> None:
    talk = Talk().joins()
    for _ in range(100):
        talk.hears_error(0, {"reason": "unmatched topic"})

    assert talk.passes(4).sent() == [join(1)]


def test_heartbeats_go_on_while_it_joins_again() -> None:
    talk = Talk().joins().passes(9.5)
    talk.hears_error(0, {"reason": "unmatched topic"}).said()

    assert talk.passes(1).sent() == [heartbeat(1), join(2)]


def test_late_reply_to_the_join_does_not_start_another() -> None:
    """Either it is joined, or it joins again; a join on a joined channel would close that."""
    talk = Talk().connects()
    talk.hears_error(0, {"reason": "unmatched topic"}).hears_reply(0)
    talk.said()
    is_joined = talk.phoenix.state is State.JOINED

    assert talk.passes(4).sent() == ([] if is_joined else [join(1)])


# --- Back-off -------------------------------------------------------------------------------


def delays(talk: Talk, count: int) -> list[float]:
    """Return how long each of the next pauses is, when no connection can be made."""
    found = []
    for _ in range(count):
        assert isinstance(talk.said()[-1], Connect)
        before = talk.is_closed("refused").now
        assert isinstance(talk.said()[0], PortalLost)
        deadline = talk.phoenix.poll_timeout()
        assert deadline is not None
        found.append(deadline - before)
        talk.passes(found[-1])
    return found


def test_backs_off_by_half_as_much_again_up_to_60_s() -> None:
    expected = [min(0.5 * 1.5**n, 60.0) for n in range(40)]

    assert delays(Talk(), 40) == pytest.approx(expected)


@pytest.mark.parametrize("draw", [0.0, 0.25, 0.999])
def test_pause_is_between_half_and_one_and_a_half_of_that(draw: float) -> None:
    expected = [min(0.5 * 1.5**n * (0.5 + draw), 60.0) for n in range(30)]

    assert delays(Talk(lambda: draw), 30) == pytest.approx(expected)


def test_each_pause_draws_anew() -> None:
    draws = iter([0.0, 0.5])

    assert delays(Talk(lambda: next(draws)), 2) == pytest.approx([0.25, 0.75])


def test_pause_is_as_told() -> None:
    talk = Talk()
    for delay in ("0.5", "0.8", "1.1", "1.7"):
        talk.said()
        assert talk.is_closed("refused").said() == [lost("refused", delay)]
        talk.passes(2)


def test_back_off_begins_anew_once_joined() -> None:
    talk = Talk()
    delays(talk, 10)
    talk.joins().is_closed().said()

    assert talk.passes(0.5).said() == [Connect()]


def test_back_off_goes_on_when_only_connected() -> None:
    talk = Talk()
    delays(talk, 10)
    talk.connects().hears("init").is_closed()

    assert talk.said()[-1] == lost("it closed the connection", f"{0.5 * 1.5**10:.1f}")


def test_back_off_goes_on_through_every_way_to_fail() -> None:
    talk = Talk()
    talk.is_closed().passes(0.5)
    talk.is_rejected(503).passes(0.75)
    talk.connects().hears("phx_close").passes(1.125)
    talk.connects().passes(5).passes(1.6875)
    talk.is_rejected(302, {"retry-after": "7"}).passes(7)
    talk.is_closed().said()

    assert talk.phoenix.poll_timeout() == pytest.approx(talk.now + 0.5 * 1.5**5)


def test_day_of_failures_overflows_nothing() -> None:
    talk = Talk()
    assert delays(talk, 1400)[-1] == 60.0


def test_close_during_the_pause_changes_nothing() -> None:
    talk = Talk().is_closed()
    before = talk.phoenix.poll_timeout()
    talk.said()

    assert talk.is_closed("again").said() == []
    assert talk.phoenix.poll_timeout() == before


def test_text_during_the_pause_changes_nothing() -> None:
    talk = Talk().joins().is_closed()
    talk.said()

    talk.hears("init").hears("disconnect", {"reason": "token_expired"}).hears("phx_close")
    assert talk.said() == []


# --- Refused after a join -------------------------------------------------------------------

TEN_MINUTES = 600.0


def is_refused_for(talk: Talk, seconds: float, refuses: Callable[[Talk], object]) -> None:
    """Refuse each connection that is asked for, for so long, or until nothing more is asked."""
    end = talk.now + seconds
    while talk.now < end and talk.phoenix.state is not State.FINISHED:
        if talk.phoenix.state is State.CONNECTING:
            refuses(talk)
        else:
            talk.passes(1)


REFUSALS = [
    pytest.param(lambda talk: talk.is_rejected(401, body="no"), "401 no", id="401"),
    pytest.param(lambda talk: talk.connects().hears_error(0, "no"), "no", id="join refused"),
    pytest.param(
        lambda talk: talk.connects().hears("disconnect", {"reason": "token_expired"}),
        "token_expired",
        id="expired",
    ),
]


@pytest.mark.parametrize(("refusing", "why"), REFUSALS)
def test_a_relay_that_was_welcome_is_refused_for_ten_minutes_before_it_believes_it(
    refusing: Callable[[Talk], object], why: str
) -> None:
    """A portal that is deployed may answer so, to all relays at once."""
    talk = Talk().joins().is_closed().passes(0.5)
    talk.said()
    refusing(talk)
    assert talk.said()[-1] == lost(refuses(why), "0.8")

    is_refused_for(talk, TEN_MINUTES - 62, refusing)
    assert not any(isinstance(output, PortalRefused) for output in talk.said())
    is_refused_for(talk, 124, refusing)
    assert talk.said()[-1] == refused(why)
    assert talk.phoenix.state is State.FINISHED


def test_a_portal_that_takes_it_again_has_not_refused_it() -> None:
    talk = Talk().joins().is_closed()
    for _ in range(3):
        is_refused_for(talk, TEN_MINUTES - 62, lambda talk: talk.is_rejected(401))
        talk.passes(60).joins().is_closed()
    assert not any(isinstance(output, PortalRefused) for output in talk.said())


def test_only_refusals_in_a_row_count() -> None:
    """What a portal answers that is out of order for an hour, is not what it means."""
    talk = Talk().joins().is_closed()
    for _ in range(10):
        is_refused_for(talk, TEN_MINUTES / 2, lambda talk: talk.is_rejected(401))
        talk.passes(60).is_rejected(503)
    assert not any(isinstance(output, PortalRefused) for output in talk.said())


def test_retry_after_counts_for_a_refusal_that_is_not_final() -> None:
    talk = Talk().joins().is_closed().passes(0.5)
    talk.said()
    (told,) = talk.is_rejected(401, {"retry-after": "7"}).said()
    assert told == lost(refuses("401"), "7.0")


# --- Answers of HTTP ------------------------------------------------------------------------


def test_401_is_final_and_in_the_portals_words() -> None:
    talk = Talk()
    talk.said()

    assert talk.is_rejected(401, body="Invalid token").said() == [refused("401 Invalid token")]
    assert talk.phoenix.state is State.FINISHED


def test_401_is_final_whatever_retry_after_says() -> None:
    talk = Talk()
    talk.said()

    assert talk.is_rejected(401, {"retry-after": "5"}).said() == [refused("401")]


def test_words_of_the_portal_are_one_short_printable_line() -> None:
    talk = Talk()
    talk.said()
    body = "a\r\nb\x1b[31m\x00\u202e\ud800 c" + "x" * 10_000

    (told,) = talk.is_rejected(401, body=body).said()
    assert isinstance(told, PortalRefused)
    assert "401 a b [31m c xx" not in told.detail
    assert "401 a b [31m cx" in told.detail
    assert told.detail.isprintable()
    assert len(told.detail) < 300


@pytest.mark.parametrize("status", [101, 200, 301, 302, 400, 402, 403, 404, 429, 500, 503, 999, 0])
def test_other_status_is_retried(status: int) -> None:
    talk = Talk()
    talk.said()

    assert talk.is_rejected(status, body="no").said() == [lost(f"{status} no", "0.5")]
    assert talk.passes(0.5).said() == [Connect()]


RETRY_AFTER = [
    pytest.param("7", 7.0, id="seconds"),
    pytest.param(" 7 ", 7.0, id="white space"),
    pytest.param("007", 7.0, id="zeros before"),
    pytest.param("3600", 3600.0, id="more than the cap"),
    pytest.param("Tue, 14 Nov 2023 22:13:50 GMT", 30.0, id="date"),
    pytest.param("Tuesday, 14-Nov-23 22:13:50 GMT", 30.0, id="date of RFC 850"),
    pytest.param("Tue, 14 Nov 2023 23:13:50 +0100", 30.0, id="date in another zone"),
]


@pytest.mark.parametrize(("value", "seconds"), RETRY_AFTER)
def test_retry_after_is_that_delay(value: str, seconds: float) -> None:
    talk = Talk()
    talk.said()

    talk.is_rejected(503, {"retry-after": value})
    assert talk.said() == [lost("503", f"{seconds:.1f}")]
    assert talk.passes(seconds - 0.01).said() == []
    assert talk.passes(0.01).said() == [Connect()]


NO_DELAY = [
    pytest.param("", id="nothing"),
    pytest.param("soon", id="word"),
    pytest.param("-5", id="negative"),
    pytest.param("1.5", id="fraction"),
    pytest.param("1e3", id="exponent"),
    pytest.param("0x10", id="hexadecimal"),
    pytest.param("nan", id="nan"),
    pytest.param("inf", id="inf"),
    pytest.param("٣", id="digit of another script"),
    pytest.param("7 s", id="unit"),
    pytest.param("Tue, 14 Nov 2023 22:13:20 GMT", id="date right now"),
    pytest.param("Sun, 06 Nov 1994 08:49:37 GMT", id="date in the past"),
    pytest.param("Fri, 31 Dec 0000 23:59:59 GMT", id="year 0"),
    pytest.param("Tue, 99 Nov 2030 22:13:50 GMT", id="day 99"),
    pytest.param("Tue, 14 Nov 99999999999 22:13:50 GMT", id="year too large"),
    pytest.param("2030-11-14T22:13:50Z", id="ISO date"),
    pytest.param(",", id="comma"),
]


@pytest.mark.parametrize("value", NO_DELAY)
def test_retry_after_without_sense_is_ignored(value: str) -> None:
    talk = Talk()
    talk.said()

    assert talk.is_rejected(503, {"retry-after": value}).said() == [lost("503", "0.5")]


@pytest.mark.parametrize("value", ["86400", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_retry_after_of_days_is_for_somebody_to_look_into(value: str) -> None:
    talk = Talk()
    talk.said()
    talk.is_rejected(503, {"retry-after": value})
    assert talk.said() == [lost("503", "86400.0")]

    assert talk.passes(DAY).said() == [UNAVAILABLE]


@given(st.text() | st.text("0123456789:+-,. GMTJanWed", max_size=40))
def test_retry_after_of_any_text_is_a_delay_of_at_most_a_day(value: str) -> None:
    talk = Talk().is_rejected(503, {"retry-after": value})

    deadline = talk.phoenix.poll_timeout()
    assert deadline is not None
    assert talk.now <= deadline <= talk.now + DAY


# --- The other rows of the table ------------------------------------------------------------


JOIN_ERRORS = [
    pytest.param({"reason": "relay is disabled"}, '{"reason": "relay is disabled"}', id="reason"),
    pytest.param("no", "no", id="text"),
    pytest.param(None, "null", id="null"),
    pytest.param({}, "{}", id="empty"),
    pytest.param(["a\nb"], '["a\\nb"]', id="list"),
]


@pytest.mark.parametrize(("response", "told"), JOIN_ERRORS)
def test_error_to_the_join_is_final(response: object, told: str) -> None:
    talk = Talk().connects()
    talk.said()

    assert talk.hears_error(0, response).said() == [Disconnect(), refused(told)]
    assert talk.phoenix.state is State.FINISHED


def test_error_to_something_else_is_ignored() -> None:
    talk = Talk().joins()

    assert talk.hears_error(0, {"reason": "no"}).hears_error(5, "no").said() == []
    assert talk.phoenix.state is State.JOINED


@pytest.mark.parametrize("topic", ["relay", "phoenix", "anything"])
def test_expired_token_of_a_joined_relay_is_tried_again(topic: str) -> None:
    talk = Talk().joins()
    talk.hears("disconnect", {"reason": "token_expired"}, topic=topic)

    assert talk.said() == [Disconnect(), lost(refuses("token_expired"), "0.5")]
    assert talk.passes(0.5).said() == [Connect()]


def test_expired_token_is_final_before_the_join_is_answered() -> None:
    talk = Talk().connects()
    talk.said()

    talk.hears("disconnect", {"reason": "token_expired"})
    assert talk.said() == [Disconnect(), refused("token_expired")]


@pytest.mark.parametrize("payload", [{"reason": "other"}, {"reason": None}, {"x": 1}, "x", [1]])
def test_disconnect_for_another_reason_is_ignored(payload: object) -> None:
    talk = Talk().joins()

    assert talk.hears("disconnect", payload).said() == []
    assert talk.phoenix.state is State.JOINED


def test_closed_channel_is_a_lost_portal() -> None:
    talk = Talk().joins()

    assert talk.hears("phx_close").said() == [
        Disconnect(),
        lost("it closed the channel", "0.5"),
    ]
    assert talk.passes(0.5).said() == [Connect()]


def test_closed_channel_of_another_topic_is_ignored() -> None:
    talk = Talk().joins()

    assert talk.hears("phx_close", topic="phoenix").said() == []


@pytest.mark.parametrize("event", ["phx_error", "shutdown", "INIT", "", "phx_join", "heartbeat"])
def test_other_event_is_logged_and_ignored(event: str, caplog: pytest.LogCaptureFixture) -> None:
    talk = Talk().joins()
    caplog.clear()

    assert talk.hears(event, {"what": "this"}).said() == []
    assert talk.phoenix.state is State.JOINED
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert event in record.getMessage()
    assert '{"what": "this"}' in record.getMessage()


def test_init_on_another_topic_is_ignored() -> None:
    talk = Talk().joins()

    assert talk.hears("init", topic="phoenix").hears("init", topic="relay:1").said() == []


GARBAGE = [
    pytest.param("", id="nothing"),
    pytest.param("{", id="cut"),
    pytest.param("null", id="null"),
    pytest.param("true", id="true"),
    pytest.param("0", id="number"),
    pytest.param("1e999", id="infinity"),
    pytest.param("NaN", id="NaN"),
    pytest.param("1" * 10_000, id="many digits"),
    pytest.param('"relay"', id="text"),
    pytest.param("[]", id="list"),
    pytest.param('["0","0","relay","phx_reply",{"status":"ok","response":{}}]', id="V2"),
    pytest.param("{}", id="empty"),
    pytest.param('{"topic":"relay","event":"init"}', id="no payload"),
    pytest.param('{"topic":"relay","payload":{}}', id="no event"),
    pytest.param('{"event":"init","payload":{}}', id="no topic"),
    pytest.param("[" * 100_000, id="deep list"),
    pytest.param('{"a":' * 100_000, id="deep object"),
    pytest.param("\ufeff{}", id="byte order mark"),
    pytest.param("\x00", id="zero"),
    pytest.param("\ud800", id="half of a character"),
]


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_is_logged_and_ignored(text: str, caplog: pytest.LogCaptureFixture) -> None:
    talk = Talk().joins()
    caplog.clear()

    assert talk.hears_text(text).said() == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert len(record.getMessage()) < 5000
    assert talk.hears("init").said() == [PortalReady()]


@pytest.mark.parametrize("key", ["topic", "event", "payload", "ref", "more"])
def test_any_depth_is_ignored(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the recursion limit strikes, in parsing or in logging, it does no harm."""
    logger = logging.getLogger("relay.portal")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(StringIO())])
    frame: dict[str, object] = {
        "topic": "relay",
        "event": "new",
        "payload": {},
        "ref": None,
        key: "@",
    }
    text = json.dumps(frame)

    def hears_all() -> None:
        with suppress(RecursionError):  # which leaves `harmed` as it is
            for depth in range(900, 1000):
                talk = Talk().connects().hears_text(text.replace('"@"', "[" * depth + "]" * depth))
                assert talk.phoenix.state is State.JOINING
            harmed.clear()

    harmed = [key]
    thread = threading.Thread(target=hears_all)  # with a shallow stack, as the client has
    thread.start()
    thread.join()
    assert harmed == []


@pytest.mark.parametrize("key", ["topic", "event"])
def test_long_names_are_not_logged_at_length(key: str, caplog: pytest.LogCaptureFixture) -> None:
    frame: dict[str, object] = {
        "topic": "relay",
        "event": "new",
        "payload": {},
        "ref": None,
        key: "x" * 100_000,
    }
    talk = Talk().joins()
    caplog.clear()
    talk.hears_frame(**frame)

    (record,) = caplog.records
    assert len(record.getMessage()) < 5000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["status", "response", "reason"]) | st.text(), inner)
    ),
    max_leaves=10,
)
FRAMES = st.fixed_dictionaries(
    {
        "topic": st.sampled_from(["relay", "phoenix"]) | JSON,
        "event": st.sampled_from(["phx_reply", "init", "phx_close", "disconnect", "new"]) | JSON,
        "payload": JSON
        | st.fixed_dictionaries(
            {
                "status": st.sampled_from(["ok", "error"]) | JSON,
                "response": JSON | st.just({"reason": "unmatched topic"}),
            }
        )
        | st.just({"reason": "token_expired"}),
        "ref": st.integers(0, 3) | st.just("0") | JSON,
    }
)
TEXTS = FRAMES.map(json.dumps) | JSON.map(json.dumps) | st.text()


@given(st.text() | JSON.map(json.dumps))
def test_any_text_leaves_the_connection_usable(text: str) -> None:
    talk = Talk().connects().hears_text(text)
    assert isinstance(talk.said()[-1], Send)

    talk.hears_reply(0).hears("init")
    assert talk.said() == [PortalReady()]
    assert talk.passes(10).sent() == [heartbeat(1)]


@given(st.lists(TEXTS, max_size=5))
def test_any_frames_leave_a_machine_that_goes_on(texts: list[str]) -> None:
    talk = Talk().connects()
    for text in texts:
        talk.hears_text(text)

    assert talk.phoenix.state is not State.CONNECTING
    assert talk.passes(60).phoenix.state in (State.CONNECTING, State.FINISHED)


# --- A day without a join -------------------------------------------------------------------


def test_day_without_any_answer_is_for_somebody_to_look_into() -> None:
    talk = Talk()
    talk.said()
    assert talk.passes(DAY - 0.01).said() == []

    assert talk.passes(0.01).said() == [UNAVAILABLE]
    assert talk.phoenix.state is State.FINISHED


def test_day_of_failures_is_for_somebody_to_look_into() -> None:
    talk = Talk()
    while talk.now < START + DAY - 60:
        talk.is_closed().passes(60)
    assert not any(isinstance(output, PortalUnavailable) for output in talk.said())

    assert talk.is_closed().passes(60).said()[-1] == UNAVAILABLE


def test_day_of_connections_without_a_join_is_for_somebody_to_look_into() -> None:
    """The end may come while one is open, and then closes it."""
    talk = Talk()
    while talk.now < START + DAY - 2:
        talk.connects().passes(5).passes(min(60, max(0, START + DAY - 2 - talk.now)))
        if talk.phoenix.state is State.BACKING_OFF:
            talk.passes(1)
    if talk.phoenix.state is State.CONNECTING:
        talk.connects()
    talk.passes(2)

    assert talk.said()[-1] == UNAVAILABLE


def test_end_of_the_day_closes_the_connection() -> None:
    talk = Talk().passes(DAY - 1).connects()
    talk.said()

    assert talk.passes(1).said() == [Disconnect(), UNAVAILABLE]


def test_day_is_counted_from_the_loss_of_a_joined_portal() -> None:
    talk = Talk().passes(DAY - 1).joins().passes_with_answers(100).is_closed()
    talk.said()

    assert not talk.passes(0.5).passes(DAY - 0.51).said().count(UNAVAILABLE)
    assert talk.passes(0.01).said() == [UNAVAILABLE]


def test_day_is_counted_from_the_first_loss() -> None:
    talk = Talk().joins().is_closed()
    for _ in range(3):
        talk.passes(6 * 3600).connects().is_closed()
    talk.said()

    assert talk.passes(6 * 3600).said() == [Connect(), UNAVAILABLE]


def test_joined_portal_is_never_unavailable() -> None:
    talk = Talk().joins()

    assert talk.passes_with_answers(DAY + 60).said() == []
    assert talk.phoenix.state is State.JOINED


def test_day_of_a_portal_that_knows_no_topic_is_for_somebody_to_look_into() -> None:
    """The connection holds, its heartbeats are answered, and yet there is no join."""
    talk = Talk().joins().hears_error(0, {"reason": "unmatched topic"})
    outputs: list[Output] = []
    while talk.now < START + DAY + 60:
        outputs = talk.passes(5.9).said()  # a join after 1 s, and 4.9 s without an answer
        for output in outputs:
            frame = json.loads(output.text) if isinstance(output, Send) else {}
            if frame.get("event") == "heartbeat":
                talk.hears_reply(frame["ref"], topic="phoenix")
            elif frame:
                talk.hears_error(frame["ref"], {"reason": "unmatched topic"})
        if not all(isinstance(output, Send) for output in outputs):
            break

    assert outputs[-2:] == [Disconnect(), UNAVAILABLE]


# --- Connections follow each other ----------------------------------------------------------


def test_refs_begin_at_zero_and_the_secret_stays_on_each_connection() -> None:
    talk = Talk()
    for _ in range(5):
        assert Connect() in talk.said()
        assert talk.connects().sent() == [join(0)]
        talk.hears_reply(0)
        assert talk.passes(20).sent() == [heartbeat(1), heartbeat(2)]
        talk.is_closed().passes(0.5)


def test_nothing_of_a_connection_outlives_it() -> None:
    """Neither its unanswered join, nor its next heartbeat, nor a join that was due."""
    talk = Talk().connects().hears_error(0, {"reason": "unmatched topic"}).is_closed()
    talk.passes(0.5).said()

    assert talk.passes(3600).said() == []
    assert talk.connects().sent() == [join(0)]
    assert talk.passes(4.99).sent() == []


def test_lost_for_each_connection_that_fails() -> None:
    talk = Talk()
    talk.said()
    for n in range(3):
        delay = 0.5 * 1.5**n
        assert talk.is_closed("TLS failed").said() == [lost("TLS failed", f"{delay:.1f}")]
        assert talk.passes(delay).said() == [Connect()]


# --- The end --------------------------------------------------------------------------------


ENDS = [
    pytest.param(lambda talk: talk.is_rejected(401), id="401"),
    pytest.param(lambda talk: talk.connects().hears_error(0, "no"), id="join refused"),
    pytest.param(
        lambda talk: talk.connects().hears("disconnect", {"reason": "token_expired"}), id="expired"
    ),
    pytest.param(lambda talk: talk.passes(DAY), id="a day"),
]


@pytest.mark.parametrize("ends", ENDS)
def test_nothing_comes_after_the_end(ends: Callable[[Talk], object]) -> None:
    talk = Talk()
    ends(talk)
    assert isinstance(talk.said()[-1], PortalRefused | PortalUnavailable)

    talk.hears("init").hears_reply(0).hears("phx_close").is_closed().passes(2 * DAY)
    talk.hears_error(0, {"reason": "unmatched topic"}).passes(60)
    assert talk.said() == []
    assert talk.phoenix.state is State.FINISHED
    assert talk.phoenix.poll_timeout() is None


# --- Anything in any order ------------------------------------------------------------------


class PortalMachine(RuleBasedStateMachine):
    """A client that obeys the machine, with an arbitrary portal and clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.is_asked_to_connect = self.is_connected = self.is_finished = False
        self.refs: list[int] = []  # sent on this connection
        self.has_joined = False
        self.phoenix = Phoenix(SECRET, portal="portal.example", random=lambda: 0.3, now=self.now)
        self.drain()

    def drain(self) -> None:
        while (output := self.phoenix.next_output()) is not None:
            assert not self.is_finished, output
            match output:
                case Connect():
                    assert not self.is_asked_to_connect
                    assert not self.is_connected
                    self.is_asked_to_connect = True
                case Send(text):
                    assert self.is_connected
                    frame = json.loads(text)
                    assert frame["ref"] == len(self.refs)
                    assert frame in (join(frame["ref"]), heartbeat(frame["ref"]))
                    self.refs.append(frame["ref"])
                case Disconnect():
                    assert self.is_connected
                    self.is_connected = False
                case PortalReady():
                    assert self.is_connected
                case PortalLost():
                    assert not self.is_connected
                    assert not self.is_asked_to_connect
                case PortalRefused() | PortalUnavailable():
                    assert not self.is_connected
                    self.is_finished = True
                    self.is_asked_to_connect = False

    def hears(self, **frame: object) -> None:
        self.phoenix.handle_text(json.dumps(frame), self.now)
        self.drain()

    @precondition(lambda self: self.is_asked_to_connect)
    @rule()
    def connects(self) -> None:
        self.is_asked_to_connect, self.is_connected, self.refs = False, True, []
        self.phoenix.handle_connected(self.now)
        self.drain()
        assert self.refs == [0]

    @precondition(lambda self: self.is_asked_to_connect)
    @rule(
        status=st.sampled_from([200, 302, 401, 403, 503, 503, 503]),
        headers=st.just({}) | st.fixed_dictionaries({"retry-after": st.text() | st.just("9")}),
        body=st.text(),
    )
    def is_rejected(self, status: int, headers: dict[str, str], body: str) -> None:
        self.is_asked_to_connect = False
        self.phoenix.handle_rejected(
            status, headers, body, now=self.now, unix_now=UNIX_START + self.now
        )
        self.drain()
        if status != 401:
            assert not self.is_finished
        elif not self.has_joined:
            assert self.is_finished

    @rule()
    def is_closed(self) -> None:
        self.is_asked_to_connect = self.is_connected = False
        self.phoenix.handle_closed("cut", self.now)
        self.drain()
        assert not self.is_connected

    @rule(seconds=st.floats(0, 30) | st.floats(0, 2 * DAY))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.acts()

    @precondition(lambda self: self.phoenix.poll_timeout() not in (None, inf))
    @rule()
    def deadline_comes(self) -> None:
        self.now = max(self.now, self.phoenix.poll_timeout() or 0)
        before = self.phoenix.poll_timeout()
        self.phoenix.handle_timeout(self.now)
        self.drain()
        assert self.phoenix.poll_timeout() != before

    def acts(self) -> None:
        """Call as often as the machine wants it; at one instant that is not often."""
        for _ in range(5):
            self.phoenix.handle_timeout(self.now)
            self.drain()
            deadline = self.phoenix.poll_timeout()
            if deadline is None or deadline > self.now:
                return
        raise AssertionError("it never rests")

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), topic=st.sampled_from(["relay", "phoenix"]))
    def last_is_answered(self, data: st.DataObject, topic: str) -> None:
        ref = data.draw(st.sampled_from(self.refs[-3:]))
        self.hears(topic=topic, event="phx_reply", payload={"status": "ok"}, ref=ref)

    @rule()
    def join_is_answered(self) -> None:
        self.hears(topic="relay", event="phx_reply", payload={"status": "ok"}, ref=0)

    @rule()
    def topic_is_unmatched(self) -> None:
        payload = {"status": "error", "response": {"reason": "unmatched topic"}}
        self.hears(topic="relay", event="phx_reply", payload=payload, ref=0)

    @rule(event=st.sampled_from(["init", "init", "init", "phx_error", "phx_close"]))
    def event_comes(self, event: str) -> None:
        self.hears(topic="relay", event=event, payload={}, ref=None)

    @rule(text=TEXTS)
    def text_comes(self, text: str) -> None:
        self.phoenix.handle_text(text, self.now)
        self.drain()

    @invariant()
    def machine_agrees_with_its_client(self) -> None:
        state = self.phoenix.state
        assert self.is_connected == (state in (State.JOINING, State.JOINED))
        assert self.is_asked_to_connect == (state is State.CONNECTING)
        assert self.is_finished == (state is State.FINISHED)

    @invariant()
    def there_is_a_deadline_until_the_end(self) -> None:
        deadline = self.phoenix.poll_timeout()
        self.has_joined |= self.phoenix.state is State.JOINED
        assert (deadline is None) == self.is_finished
        assert deadline != inf

    @invariant()
    def waits_never_for_more_than_a_day(self) -> None:
        deadline = self.phoenix.poll_timeout()
        assert deadline is None or deadline <= self.now + DAY


PortalMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestPortalMachine = PortalMachine.TestCase
