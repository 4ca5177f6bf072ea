"""The event loop, on real descriptors, one iteration at a time."""

import select
import signal
import socket
import threading
from collections import deque
from collections.abc import Iterator
from functools import partial
from math import inf
from typing import Any

import pytest

from relay.net.listening import ListeningSocket
from relay.net.mailbox import Mailbox
from relay.net.offload import Offload
from relay.net.reactor import CROWD, MAX_EVENTS, Reactor
from relay.net.signals import Signals
from relay.net.udp import MAX_SINGLE_READS, READ_BUDGET, SINGLE_READS, PortSocket, Shared, bind_udp


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bugs() -> list[Exception]:
    return []


@pytest.fixture
def reactor(clock: Clock, bugs: list[Exception]) -> Iterator[Reactor]:
    reactor = Reactor(clock, bugs.append)
    yield reactor
    reactor.close()


class Inbox:
    """A relay port on loopback, and what came in through it."""

    def __init__(self, reactor: Reactor) -> None:
        self.sock = bind_udp("127.0.0.1", 0, 4 << 20)
        self._buffer = bytearray(65536)
        shared = Shared(memoryview(self._buffer), self.lost, Offload(wanted=False))
        self._socket = PortSocket(self.sock, shared, self, reactor)
        self.reader: Any = self._socket.reader
        self.received: list[bytes] = []
        self.losses: list[str] = []
        self._outside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._outside.connect(self.sock.getsockname())

    def on_datagram(self, size: int, _source: object, _tos: int = 0) -> None:
        self.received.append(bytes(self._buffer[:size]))

    def on_segments(self, *_: object) -> int:
        raise AssertionError("segments")

    def lost(self, name: str) -> None:
        self.losses.append(name)

    def is_sent(self, count: int) -> None:
        for number in range(count):
            self._outside.send(b"%d" % number)

    def close(self) -> None:
        self._socket.close()
        self._outside.close()


@pytest.fixture
def hot(reactor: Reactor) -> Iterator[Inbox]:
    inbox = Inbox(reactor)
    yield inbox
    inbox.close()


@pytest.fixture
def cold(reactor: Reactor) -> Iterator[Inbox]:
    inbox = Inbox(reactor)
    yield inbox
    inbox.close()


def test_a_burst_is_read_in_portions_and_in_order(reactor: Reactor, hot: Inbox) -> None:
    hot.is_sent(200)
    reactor.iterate()
    assert len(hot.received) == READ_BUDGET

    while len(hot.received) < 200:
        reactor.iterate()
    assert hot.received == [b"%d" % number for number in range(200)]
    assert hot.losses == []


def test_after_a_single_datagram_a_few_are_read_one_by_one(reactor: Reactor, hot: Inbox) -> None:
    hot.is_sent(1)
    reactor.iterate()
    hot.is_sent(200)
    for _ in range(SINGLE_READS):
        reactor.iterate()
    assert len(hot.received) == 1 + SINGLE_READS

    reactor.iterate()
    assert len(hot.received) == 1 + SINGLE_READS + READ_BUDGET


def test_the_longer_datagrams_come_alone_the_more_are_read_without_looking(
    reactor: Reactor, hot: Inbox
) -> None:
    """To look for more, and find none, costs as much as to read a datagram."""
    looks = 0
    receive = hot.reader._recvfrom_into

    def counted(buffer: memoryview) -> Any:
        nonlocal looks
        try:
            return receive(buffer)
        except BlockingIOError:
            looks += 1
            raise

    hot.reader._recvfrom_into = counted
    for _ in range(1000):
        hot.is_sent(1)
        reactor.iterate()
    assert looks < 1000 / MAX_SINGLE_READS + 5

    hot.is_sent(200)
    while len(hot.received) < 1200:
        reactor.iterate()
    hot.is_sent(1)
    reactor.iterate()
    hot.is_sent(200)
    for _ in range(SINGLE_READS):
        reactor.iterate()
    before = len(hot.received)
    reactor.iterate()
    assert len(hot.received) == before + READ_BUDGET  # a burst ends that


def test_a_listening_socket_gets_half_of_all_reads_in_an_overload(reactor: Reactor) -> None:
    """In datagrams, of real sockets: from the second iteration on, if before they came singly."""
    ports = [Inbox(reactor) for _ in range(20)]
    received: list[int] = []

    class Listener:
        def on_datagram(self, _size: int, _source: object, _tos: int = 0) -> None:
            received.append(1)

        def on_segments(self, *_: object) -> int:
            raise AssertionError("segments")

    shared = Shared(memoryview(bytearray(65536)), ports[0].lost, Offload(wanted=False))
    sock = bind_udp("127.0.0.1", 0, 4 << 20)
    listener = ListeningSocket(sock, shared, Listener())
    reactor.register(listener, listener.reader.on_readable, comes_first=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside:
        for _ in range(100):
            outside.sendto(b"alone", listener.address)
            reactor.iterate()
        received.clear()
        for _ in range(2000):
            outside.sendto(b"x", listener.address)
        for port in ports:
            port.is_sent(4 * READ_BUDGET)
        reactor.iterate()
        received.clear()
        for port in ports:
            port.received.clear()
        for _ in range(3):
            reactor.iterate()

    assert len(received) >= sum(len(port.received) for port in ports)
    reactor.retire(listener)
    for port in ports:
        port.close()


def test_a_hot_socket_does_not_keep_a_cold_one_waiting(
    reactor: Reactor, hot: Inbox, cold: Inbox
) -> None:
    hot.is_sent(10 * READ_BUDGET)
    cold.is_sent(1)
    reactor.iterate()

    assert len(cold.received) == 1
    assert len(hot.received) == READ_BUDGET


def test_a_flood_does_not_keep_a_timer_waiting(reactor: Reactor, clock: Clock, hot: Inbox) -> None:
    at: list[int] = []
    reactor.call_at(clock.now + 1, lambda: at.append(len(hot.received)))
    hot.is_sent(10 * READ_BUDGET)
    reactor.iterate()
    assert at == []

    clock.now += 1
    reactor.iterate()
    assert at == [READ_BUDGET]  # before this iteration's portion of the flood


def test_timers_come_in_order_and_once(reactor: Reactor, clock: Clock) -> None:
    called: list[str] = []
    reactor.call_at(clock.now + 2, lambda: called.append("second"))
    reactor.call_later(1, lambda: called.append("first"))
    reactor.call_at(clock.now + 3, partial(called.append, "never"))
    clock.now += 2.5
    reactor.iterate()

    assert called == ["first", "second"]


def test_a_deadline_in_the_past_is_due_at_once(reactor: Reactor, clock: Clock) -> None:
    called: list[int] = []
    reactor.call_at(clock.now - 1000, lambda: called.append(1))
    reactor.iterate()

    assert called == [1]


def test_a_timer_can_be_moved_and_cancelled(reactor: Reactor, clock: Clock) -> None:
    called: list[float] = []

    def note() -> None:
        called.append(clock.now)

    def never() -> None:
        called.append(-1)

    reactor.call_at(clock.now + 1, note)
    reactor.call_at(clock.now + 5, note)
    reactor.call_at(clock.now + 2, never)
    reactor.cancel(never)
    reactor.cancel(never)  # it may be gone already
    reactor.call_at(clock.now + 4, reactor.stop)
    for _ in range(5):
        clock.now += 1
        if clock.now < 104:
            reactor.call_at(clock.now, lambda: None)  # so that the iteration does not wait
        reactor.iterate()

    assert called == [105.0]


def test_a_failing_handler_is_reported_and_the_rest_is_served(
    reactor: Reactor, clock: Clock, hot: Inbox, bugs: list[Exception]
) -> None:
    error = ValueError("a bug of ours")

    def fails() -> None:
        raise error

    called: list[int] = []
    reactor.call_at(clock.now, fails)
    reactor.call_at(clock.now, lambda: called.append(1))
    broken = bind_udp("127.0.0.1", 0, 4096)
    reactor.register(broken, fails)
    hot.is_sent(1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside:
        outside.sendto(b"x", broken.getsockname())
    reactor.iterate()
    reactor.retire(broken)

    assert bugs == [error, error]
    assert called == [1]
    assert len(hot.received) == 1


def test_a_socket_retired_in_a_batch_is_not_served_in_it(reactor: Reactor, clock: Clock) -> None:
    sock = bind_udp("127.0.0.1", 0, 4096)
    served: list[int] = []
    open_during_batch: list[bool] = []

    def retire() -> None:
        reactor.retire(sock)
        open_during_batch.append(sock.fileno() >= 0)

    reactor.register(sock, lambda: served.append(1))
    reactor.call_at(clock.now, retire)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside:
        outside.sendto(b"x", sock.getsockname())
    reactor.iterate()

    assert served == []
    assert open_during_batch == [True]
    assert sock.fileno() < 0


def test_retired_sockets_can_be_closed_early_for_their_port(reactor: Reactor) -> None:
    first = bind_udp("127.0.0.1", 0, 4096)
    port = first.getsockname()[1]
    reactor.register(first, lambda: None)
    reactor.retire(first)
    reactor.close_retired()

    bind_udp("127.0.0.1", port, 4096).close()


class ScriptedEpoll:
    """An epoll in which some sources are always readable. It rotates them, as the kernel's.

    Each source is its own descriptor.
    """

    def __init__(self) -> None:
        self.readable: deque[int] = deque()

    def register(self, fd: int, _events: int) -> None:
        """Begin to report a source."""
        self.readable.append(fd)

    def poll(self, _timeout: float | None, maxevents: int = 1000) -> list[tuple[int, int]]:
        reported = [self.readable.popleft() for _ in range(min(maxevents, len(self.readable)))]
        self.readable += reported
        return [(fd, select.EPOLLIN) for fd in reported]

    def close(self) -> None:
        """Do nothing."""


class Busy:
    """A source that always has more than is read of it at a time."""

    def __init__(self, fd: int, has: float = inf) -> None:
        self._fd = fd
        self._left = has
        self.served = 0

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Do nothing."""

    def on_readable(self) -> bool:
        self.served += 1
        self._left -= 1
        return self._left > 0


@pytest.fixture
def scripted(reactor: Reactor) -> None:
    reactor.close()
    scripted: list[Any] = [ScriptedEpoll(), ScriptedEpoll()]
    reactor._epoll, reactor._poll_of_first = scripted


@pytest.mark.parametrize("count", [CROWD - 1, CROWD, MAX_EVENTS - 1, MAX_EVENTS, 100, 1000])
@pytest.mark.usefixtures("scripted")
def test_what_comes_first_has_its_share_however_many_others(reactor: Reactor, count: int) -> None:
    """Half of all, which is what clients send of the traffic in both directions."""
    others = [Busy(fd) for fd in range(1, count + 1)]
    for other in others:
        reactor.register(other, other.on_readable)
    listener = Busy(0)
    reactor.register(listener, listener.on_readable, comes_first=True)

    for _ in range(200):
        before = listener.served
        reactor.iterate()
        assert listener.served > before  # whether it was reported or not
    total = listener.served + sum(other.served for other in others)

    assert listener.served >= total / 2
    # Nor does it keep the others waiting: each gets as much as any other.
    assert listener.served <= total / 2 + 200
    assert max(o.served for o in others) - min(o.served for o in others) <= 1


@pytest.mark.usefixtures("scripted")
def test_a_few_sources_are_served_once_each(reactor: Reactor) -> None:
    """That is no overload, and what calls are like: it costs no look at shares."""
    sources = [Busy(fd) for fd in range(CROWD - 1)]
    for source in sources:
        reactor.register(source, source.on_readable, comes_first=source.fileno() == 0)
    reactor.iterate()

    assert [source.served for source in sources] == [1] * (CROWD - 1)


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("count", [2, 6, 40])
def test_several_that_come_first_have_that_share_together(reactor: Reactor, count: int) -> None:
    """A flood at all addresses of a host leaves the ports their half."""
    first = [Busy(fd) for fd in range(count)]
    others = [Busy(fd) for fd in range(count, count + 60)]
    for source in (*first, *others):
        reactor.register(source, source.on_readable, comes_first=source in first)
    iterations = 600
    for _ in range(iterations):
        reactor.iterate()
    of_first, of_others = (sum(source.served for source in some) for some in (first, others))

    assert of_others <= of_first <= max(of_others, count * iterations) + iterations
    assert of_first + of_others <= (count + 2 * MAX_EVENTS) * iterations  # an iteration is bounded
    assert max(one.served for one in first) - min(one.served for one in first) <= iterations
    assert min(one.served for one in others) > 0


@pytest.mark.usefixtures("scripted")
def test_what_comes_first_is_left_alone_once_it_has_no_more(reactor: Reactor) -> None:
    listener, others = Busy(0, has=3), [Busy(fd) for fd in range(1, 10)]
    reactor.register(listener, listener.on_readable, comes_first=True)
    for other in others:
        reactor.register(other, other.on_readable)
    reactor.iterate()

    assert listener.served == 3
    assert [other.served for other in others] == [1] * 9


@pytest.mark.usefixtures("scripted")
def test_a_failure_of_what_comes_first_is_reported_and_the_rest_is_served(
    reactor: Reactor, bugs: list[Exception]
) -> None:
    error = ValueError("a bug of ours")

    def fails() -> bool:
        raise error

    other = Busy(1)
    reactor.register(Busy(0), fails, comes_first=True)
    reactor.register(other, other.on_readable)
    reactor.iterate()

    assert bugs == [error]
    assert other.served == 1


def test_what_is_retired_in_a_batch_is_not_served_again_in_it(
    reactor: Reactor, hot: Inbox, cold: Inbox
) -> None:
    """Even if it comes first and has more."""
    listener = bind_udp("127.0.0.1", 0, 4096)
    served: list[int] = []

    def retires_itself() -> bool:
        served.append(1)
        reactor.retire(listener)
        return True

    reactor.register(listener, retires_itself, comes_first=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside:
        outside.sendto(b"x", listener.getsockname())
    hot.is_sent(1)
    cold.is_sent(1)
    reactor.iterate()

    assert served == [1]
    assert len(hot.received) == len(cold.received) == 1


def test_mail_wakes_the_loop_from_another_thread(reactor: Reactor) -> None:
    got: list[int] = []
    mailbox: Mailbox[int] = Mailbox(got.append)
    reactor.register(mailbox, mailbox.deliver)
    sender = threading.Thread(target=mailbox.post, args=(7,))
    sender.start()
    while not got:
        reactor.iterate()
    sender.join()

    assert got == [7]
    reactor.retire(mailbox)


def test_no_mail_is_lost_or_reordered_between_threads(reactor: Reactor) -> None:
    got: list[tuple[int, int]] = []
    mailbox: Mailbox[tuple[int, int]] = Mailbox(got.append)
    reactor.register(mailbox, mailbox.deliver)

    def send(sender: int) -> None:
        for number in range(500):
            mailbox.post((sender, number))

    threads = [threading.Thread(target=send, args=(sender,)) for sender in range(4)]
    for thread in threads:
        thread.start()
    while len(got) < 2000:
        reactor.iterate()  # hangs if a wake-up gets lost
    for thread in threads:
        thread.join()

    for sender in range(4):
        assert [number for who, number in got if who == sender] == list(range(500))
    reactor.retire(mailbox)


def test_mail_behind_a_failing_item_is_delivered(reactor: Reactor, bugs: list[Exception]) -> None:
    got: list[int] = []

    def take(item: int) -> None:
        if item == 1:
            raise ValueError("a bug of ours")
        got.append(item)

    mailbox = Mailbox(take)
    reactor.register(mailbox, mailbox.deliver)
    for item in (0, 1, 2):
        mailbox.post(item)
    reactor.iterate()
    reactor.iterate()

    assert got == [0, 2]
    assert len(bugs) == 1
    reactor.retire(mailbox)


def send(number: signal.Signals) -> None:
    """Send a signal to this thread: of a process, any thread that there may be would get it."""
    signal.pthread_kill(threading.get_ident(), number)


def test_signals_arrive_in_the_loop(reactor: Reactor) -> None:
    got: list[int] = []
    with Signals((signal.SIGUSR1, signal.SIGUSR2), got.append) as signals:
        reactor.register(signals, signals.deliver)
        send(signal.SIGUSR1)
        send(signal.SIGUSR2)
        while len(got) < 2:
            reactor.iterate()
        reactor.retire(signals)

    assert got == [signal.SIGUSR1, signal.SIGUSR2]
    send(signal.SIGUSR1)  # by default this would end the process
    assert len(got) == 2
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)


def test_a_storm_of_one_signal_counts_as_one(reactor: Reactor) -> None:
    """As it would without us: signals of one number that wait are one."""
    got: list[int] = []
    with Signals((signal.SIGUSR1,), got.append) as signals:
        reactor.register(signals, signals.deliver)
        for _ in range(100):
            send(signal.SIGUSR1)
        reactor.iterate()
        reactor.retire(signals)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)

    assert got == [signal.SIGUSR1]


def test_signals_held_back_until_they_can_be_handled_are_handled(reactor: Reactor) -> None:
    got: list[int] = []
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
    send(signal.SIGUSR1)  # by default this would end the process
    with Signals((signal.SIGUSR1,), got.append) as signals:
        reactor.register(signals, signals.deliver)
        reactor.iterate()
        reactor.retire(signals)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)

    assert got == [signal.SIGUSR1]


def test_the_longest_iteration_is_remembered_for_two_minutes(
    reactor: Reactor, clock: Clock
) -> None:
    def take(seconds: float) -> None:
        def busy() -> None:
            assert reactor.awake_since == clock.now
            clock.now += seconds

        reactor.call_at(clock.now, busy)
        reactor.iterate()
        assert reactor.awake_since is None

    for seconds in (0.05, 3.0, 1.0, 2.0, 0.0001):
        take(seconds)
    assert reactor.longest_iteration() == 3.0
    assert reactor.slow_iterations == 3

    clock.now += 118
    assert reactor.longest_iteration() == 2.0
    clock.now += 2.1
    assert reactor.longest_iteration() == 0.0
    take(0.5)
    assert reactor.longest_iteration() == 0.5


def test_run_returns_when_stopped(reactor: Reactor, clock: Clock) -> None:
    reactor.call_at(clock.now, reactor.stop)
    reactor.run()


# --- Streams ---------------------------------------------------------------------------------


def test_a_stream_can_be_waited_for_until_it_takes_more(reactor: Reactor, clock: Clock) -> None:
    """Only while something waits to be written: else it would be ready in each iteration."""
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        calls: list[int] = []
        reactor.register(near, lambda: calls.append(1))
        turn(reactor, clock)
        assert calls == []
        reactor.watch(near, readable=True, writable=True)
        turn(reactor, clock)
        assert calls == [1]
        reactor.watch(near, readable=True, writable=False)
        far.send(b"x")
        turn(reactor, clock)
        assert calls == [1, 1]
        reactor.watch(near, readable=False, writable=False)
        turn(reactor, clock)
        assert calls == [1, 1]


def test_what_is_left_for_the_end_is_done_once_all_events_are_served(
    reactor: Reactor, clock: Clock, bugs: list[Exception]
) -> None:
    """With what that leaves for the end; a bug in it is no reason to leave out the rest."""
    near, far = socket.socketpair()
    with near, far:
        done: list[str] = []

        def fails() -> None:
            raise RuntimeError("a bug")

        def at_end() -> None:
            done.append("end")
            reactor.call_at_end(lambda: done.append("end of the end"))

        def on_readable() -> None:
            near.recv(1)
            reactor.call_at_end(fails)
            reactor.call_at_end(at_end)
            done.append("event")

        reactor.register(near, on_readable)
        far.send(b"x")
        turn(reactor, clock)
        turn(reactor, clock)
        assert done == ["event", "end", "end of the end"]
        assert [str(bug) for bug in bugs] == ["a bug"]


def turn(reactor: Reactor, clock: Clock) -> None:
    """Let the loop turn once, without waiting for anything."""
    reactor.call_at(clock.now, lambda: None)
    reactor.iterate()
