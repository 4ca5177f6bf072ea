"""Joining the portal: Phoenix channels over a websocket, as a pure state machine.

Phoenix's V1 serializer: each text frame is an object of topic, event, payload and ref. The
relay joins the topic ``relay`` with its secret, beats every ten seconds, and is told
``init`` when it may serve::

    -> {"topic":"relay","event":"phx_join","payload":{"stamp_secret":"..."},"ref":0}
    <- {"topic":"relay","event":"phx_reply","payload":{"status":"ok","response":{}},"ref":0}
    <- {"topic":"relay","event":"init","payload":{},"ref":null}
    -> {"topic":"phoenix","event":"heartbeat","payload":{},"ref":1}

After each input take :meth:`Phoenix.next_output` until it is None, and carry out what it says.
"""

import json
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from enum import Enum, auto
from math import inf
from typing import Any, Final

logger = logging.getLogger("relay.portal")

HEARTBEAT_INTERVAL: Final = 10.0  # seconds
MAX_UNANSWERED: Final = 3  # heartbeats
JOIN_TIMEOUT: Final = 5.0  # seconds
REJOIN_INTERVAL: Final = 1.0  # seconds, between joins on one connection
FIRST_BACKOFF: Final = 0.5  # seconds
BACKOFF_FACTOR: Final = 1.5
MAX_BACKOFF: Final = 60.0  # seconds
GIVE_UP_AFTER: Final = 24 * 3600.0  # seconds without a join
# Seconds for which a portal that once took this relay may refuse it: one that is deployed or
# restarts may do so for a while, and to all relays at once.
REFUSED_FOR_GOOD_AFTER: Final = 600.0

UNAUTHORIZED: Final = 401  # of HTTP: the token is not good, or no longer
LONGEST_DETAIL: Final = 200  # characters of the portal's own words


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a connection; answer with handle_connected, handle_rejected or handle_closed."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send a text frame; if that fails, answer with handle_closed."""

    text: str = field(repr=False)  # it may hold the secret


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the connection. No answer is wanted."""


@dataclass(frozen=True, slots=True)
class PortalReady:
    """For the relay: the portal knows it, and its secret; serve."""


@dataclass(frozen=True, slots=True)
class PortalLost:
    """For the relay: there is no portal right now."""

    detail: str  # why, and what happens next, in plain words


@dataclass(frozen=True, slots=True)
class PortalRefused:
    """For the relay: the portal does not want it, and did not change its mind if it once did."""

    detail: str


@dataclass(frozen=True, slots=True)
class PortalUnavailable:
    """For the relay: there was no portal for so long that somebody should look into it."""

    detail: str


PortalEvent = PortalReady | PortalLost | PortalRefused | PortalUnavailable
Output = Connect | Send | Disconnect | PortalEvent


class State(Enum):
    """Where the connection stands."""

    CONNECTING = auto()
    JOINING = auto()  # connected; the join is not answered yet
    JOINED = auto()
    BACKING_OFF = auto()
    FINISHED = auto()


CONNECTED: Final = (State.JOINING, State.JOINED)


class Phoenix:
    """The conversation with one portal, over any number of connections."""

    def __init__(
        self,
        secret: str,
        *,
        portal: str,
        random: Callable[[], float],
        now: float,
        has_joined: bool = False,
    ) -> None:
        """Begin by connecting. *has_joined*: the portal has taken this relay before.

        *secret* is what the portal is to make credentials of, *portal* its name for messages.
        ``random()`` draws from [0, 1). *now* is in monotonic seconds, as everywhere here.
        """
        self._secret = secret
        self._portal = portal
        self._random = random
        self._outputs: deque[Output] = deque()
        self._state = State.CONNECTING
        self._retries = 0  # since the last join
        self._retry_at = inf
        self._give_up_at = now + GIVE_UP_AFTER
        self._has_joined = has_joined  # ever
        self._refused_since: float | None = None  # by each answer since then
        # Of the present connection:
        self._next_ref = 0
        self._join_ref = -1
        self._join_at = inf
        self._join_by = inf
        self._heartbeat_at = inf
        self._unanswered: set[int] = set()  # refs of heartbeats
        self._outputs.append(Connect())

    @property
    def state(self) -> State:
        """Where the connection stands."""
        return self._state

    def handle_connected(self, now: float) -> None:
        """Join, over a websocket that has just opened."""
        self._next_ref = 0
        self._unanswered.clear()
        self._heartbeat_at = now + HEARTBEAT_INTERVAL
        self._join(now)

    def handle_text(self, text: str, now: float) -> None:
        """Read a text frame."""
        if self._state not in CONNECTED:
            return
        try:
            frame = json.loads(text)
            topic, event, payload = frame["topic"], frame["event"], frame["payload"]
            reply_to = _number(frame.get("ref"))
        except (ValueError, TypeError, KeyError, RecursionError):
            self._ignore(text)
            return
        match topic, event:
            case "phoenix", "phx_reply":
                self._unanswered.discard(reply_to)
            case "relay", "phx_reply":
                if not self._on_reply(reply_to, payload, now):
                    self._ignore(text)
            case "relay", "init":
                logger.info("the portal says init")
                self._outputs.append(PortalReady())
            case "relay", "phx_close":
                self._reconnect("it closed the channel", now)
            case _, "disconnect" if _get(payload, "reason") == "token_expired":
                self._refused("token_expired", now)
            case _:
                self._ignore(text)

    def handle_rejected(
        self, status: int, headers: Mapping[str, str], body: str, *, now: float, unix_now: float
    ) -> None:
        """Handle an HTTP answer other than 101. *headers* by lower-case name."""
        detail = f"{status} {_say(body)}".rstrip()
        delay = _retry_after(headers.get("retry-after"), unix_now)
        if status == UNAUTHORIZED:
            self._refused(detail, now, delay)
        else:
            self._back_off(detail, now, delay)

    def handle_closed(self, reason: str, now: float) -> None:
        """Wait and try again: the connection failed, ended, or could not be made."""
        if self._state in (State.CONNECTING, *CONNECTED):
            self._back_off(reason, now)

    def handle_timeout(self, now: float) -> None:
        """Do what is due."""
        if self._state is State.FINISHED:
            return
        if now >= self._give_up_at:
            self._finish(PortalUnavailable(f"no portal at {self._portal} for 24 hours"))
        elif self._state is State.BACKING_OFF and now >= self._retry_at:
            self._state = State.CONNECTING
            self._outputs.append(Connect())
        elif self._state in CONNECTED:
            if now >= self._join_by:
                self._reconnect("it does not answer the join", now)
            elif now >= self._heartbeat_at:
                self._beat(now)
            elif now >= self._join_at:
                self._join(now)

    def poll_timeout(self) -> float | None:
        """Return when to call :meth:`handle_timeout`, in monotonic seconds, or None."""
        match self._state:
            case State.FINISHED:
                return None
            case State.CONNECTING:
                return self._give_up_at
            case State.BACKING_OFF:
                return min(self._retry_at, self._give_up_at)
            case _:
                times = (self._join_by, self._join_at, self._heartbeat_at, self._give_up_at)
                return min(times)

    def next_output(self) -> Output | None:
        """Return the next thing to do or to tell, or None when all is done."""
        return self._outputs.popleft() if self._outputs else None

    def _join(self, now: float) -> None:
        self._state = State.JOINING
        self._join_at, self._join_by = inf, now + JOIN_TIMEOUT
        self._join_ref = self._send("relay", "phx_join", {"stamp_secret": self._secret})

    def _beat(self, now: float) -> None:
        if len(self._unanswered) >= MAX_UNANSWERED:
            self._reconnect(f"{MAX_UNANSWERED} heartbeats are unanswered", now)
            return
        self._unanswered.add(self._send("phoenix", "heartbeat", {}))
        self._heartbeat_at = now + HEARTBEAT_INTERVAL

    def _on_reply(self, reply_to: int | None, payload: object, now: float) -> bool:
        """Take a reply on our topic; return whether it means anything."""
        status, response = _get(payload, "status"), _get(payload, "response")
        if status == "error" and _get(response, "reason") == "unmatched topic":
            # The portal has lost the channel, not the connection.
            logger.info("the portal does not know of our join: joining again")
            self._state = State.JOINING
            self._join_at, self._join_by = now + REJOIN_INTERVAL, inf
            self._give_up_at = min(self._give_up_at, now + GIVE_UP_AFTER)
        elif reply_to != self._join_ref or self._state is not State.JOINING:
            return False
        elif status == "ok":
            logger.info("joined the portal at %s", self._portal)
            self._state = State.JOINED
            self._has_joined = True
            self._retries = 0
            self._refused_since = None
            self._give_up_at = self._join_at = self._join_by = inf
        elif status == "error":
            self._refused(_say(response), now)
        else:
            return False
        return True

    def _ignore(self, text: str) -> None:
        logger.warning("ignored from the portal: %s", _say(text))

    def _send(self, topic: str, event: str, payload: dict[str, str]) -> int:
        """Send a frame and return its ref; refs begin at 0 on each connection."""
        ref = self._next_ref
        self._next_ref += 1
        frame = {"topic": topic, "event": event, "payload": payload, "ref": ref}
        self._outputs.append(Send(json.dumps(frame, separators=(",", ":"))))
        return ref

    def _reconnect(self, why: str, now: float) -> None:
        self._outputs.append(Disconnect())
        self._back_off(why, now)

    def _back_off(
        self, why: str, now: float, delay: float | None = None, *, is_refused: bool = False
    ) -> None:
        if not is_refused:
            self._refused_since = None
        if delay is None:
            longest = FIRST_BACKOFF * BACKOFF_FACTOR ** min(self._retries, 20)
            delay = min(longest * (0.5 + self._random()), MAX_BACKOFF)
        self._retries += 1
        self._state = State.BACKING_OFF
        self._retry_at = now + delay
        self._give_up_at = min(self._give_up_at, now + GIVE_UP_AFTER)
        self._outputs.append(
            PortalLost(
                f"waiting for the portal at {self._portal}: {why}, next try in {delay:.1f} s"
            )
        )

    def _refused(self, detail: str, now: float, delay: float | None = None) -> None:
        """End it, or if this relay was welcome once, try again for some minutes."""
        if self._refused_since is None:
            self._refused_since = now
        if not self._has_joined or now - self._refused_since >= REFUSED_FOR_GOOD_AFTER:
            detail = f"the portal at {self._portal} refuses this relay: {detail}"
            self._finish(PortalRefused(detail))
            return
        if self._state in CONNECTED:
            self._outputs.append(Disconnect())
        self._back_off(f"it refuses this relay: {detail}", now, delay, is_refused=True)

    def _finish(self, event: PortalEvent) -> None:
        if self._state in CONNECTED:
            self._outputs.append(Disconnect())
        self._state = State.FINISHED
        self._outputs.append(event)


def _number(ref: object) -> int | None:
    """Read a ref: a number, or text of one."""
    if isinstance(ref, str) and ref.isascii() and ref.isdigit():
        return int(ref[:18])
    return ref if isinstance(ref, int) else None


def _get(mapping: object, key: str) -> Any:  # noqa: ANN401
    """Look into what may not be a mapping at all."""
    return mapping.get(key) if isinstance(mapping, dict) else None


def _say(said: object) -> str:
    """Return the portal's words on one line, not too long."""
    try:
        text = said if isinstance(said, str) else json.dumps(said)
    except RecursionError:
        text = "something too deep to say"
    return " ".join("".join(c if c.isprintable() else " " for c in text[:LONGEST_DETAIL]).split())


def _retry_after(value: str | None, unix_now: float) -> float | None:
    """Read Retry-After, seconds or a date, as seconds from now; None if it makes no sense."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:18]), GIVE_UP_AFTER) or None  # 0 would be no delay at all
    try:
        delay = parsedate_to_datetime(value).timestamp() - unix_now
    except (ValueError, TypeError, OverflowError):
        return None
    return min(delay, GIVE_UP_AFTER) if delay > 0 else None
