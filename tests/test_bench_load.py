"""The load client of bench/: what its numbers rest on, and loads on the running relay."""

import json
import select
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, Self
from xml.etree import ElementTree as ET

import pytest

from bench import load
from bench.loadlib.clients import WINDOW, Clients, Credentials, LoadError, udp_socket
from bench.loadlib.comparison import Comparison, Metric, markdown, standings
from bench.loadlib.mmsg import Inbox, Outbox, socket_name
from bench.loadlib.plot import Bar, Panel, draw
from bench.loadlib.report import panels
from bench.loadlib.table import Progress, rows, search_rows
from bench.loadlib.tally import (
    FLOW_SHIFT,
    RUN_SHIFT,
    Arrivals,
    Bucket,
    Lossless,
    Result,
    count_arrivals,
    latency_of,
    percentile,
    search,
)
from bench.loadlib.traffic import Direction, Framing, Load, Session, open_peers
from relay.stun.address import Address
from relay.stun.attributes import Attr
from relay.stun.const import Kind
from relay.stun.message import Message, decode
from tests.process import SECRET, RelayProcess, free_port
from tests.turnclient import TIMEOUT

HOST = "127.0.0.1"
USER = Credentials("user", "word")

# --- The running relay ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secret_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("load") / "secret"
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def relay(secret_file: Path) -> Iterator[RelayProcess]:
    with RelayProcess(f"--relay-secret-file={secret_file}", port=free_port()) as process:
        yield process


@pytest.fixture(params=Framing, ids=lambda framing: framing.value)
def session(request: pytest.FixtureRequest, relay: RelayProcess) -> Iterator[Session]:
    with Loaded(relay, clients=3, channels=2, framing=request.param) as session:
        yield session


def test_the_command_reports_what_the_relay_did(
    relay: RelayProcess, secret_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = load.main(
        [
            f"{HOST}:{relay.port}",
            f"--secret-file={secret_file}",
            *("--clients=3", "--channels=2", "--rate=500", "--seconds=0.1"),
            f"--pid={relay.pid}",
            f"--json={tmp_path / 'report.json'}",
        ]
    )
    report = json.loads((tmp_path / "report.json").read_text())
    printed = capsys.readouterr().out

    assert code == 0
    result = report["result"]
    assert result["sent"] == result["received"] + result["lost"]
    assert result["received"] > 0
    assert (result["reordered"], result["duplicated"]) == (0, 0)
    assert result["server_cost"] > 0
    assert result["client_cost"] > 0
    assert sum(bucket["count"] for bucket in result["latency"]["histogram"]) == result["received"]
    assert report["allocates_per_second"] > 0
    assert f"{result['server_cost']:.2f} µs per datagram" in printed
    assert f"received                  {result['received']}," in printed


def test_a_search_with_a_username_goes_to_standard_output_as_json(
    relay: RelayProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    """All may be lost and a step is too short for a queue: the load client is the limit."""
    code = load.main(
        [
            f"{HOST}:{relay.port}",
            f"--username={relay.username}",
            f"--password={relay.password}",
            *("--search", "--rate=1e6", "--loss=1", "--seconds=0.01", "--json=-"),
        ]
    )
    output = capsys.readouterr()
    report = json.loads(output.out)

    assert code == 0
    assert report["lossless"]["limited_by_client"]
    assert report["steps"][0]["wanted_rate"] == 1e6
    assert "limited by the load client" in output.err


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(
    ("burst", "gso"),
    [
        pytest.param(1, False, id="one by one"),
        pytest.param(8, False, id="back to back"),
        pytest.param(8, True, id="GSO"),
    ],
)
def test_every_datagram_of_every_flow_arrives(
    session: Session, direction: Direction, burst: int, gso: bool
) -> None:
    wanted = Load(160, 2000, 0.05, direction, burst, gso)
    result = session.measure(wanted)

    assert result.sent > 0
    assert result.sent % burst == 0
    assert (result.lost, result.duplicated) == (0, 0)
    assert result.latency is not None


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("server", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("framing", Framing, ids=lambda framing: framing.value)
def test_clients_and_peers_are_of_either_family(
    relay: RelayProcess, server: str, host: str, framing: Framing
) -> None:
    with Loaded(relay, clients=2, channels=1, server=server, host=host, framing=framing) as session:
        result = session.measure(Load(rate=2000, seconds=0.01))
    assert result.received > 0
    assert result.lost == 0


def test_what_arrives_after_the_end_counts(session: Session) -> None:
    """One burst, which takes the relay longer than the load lasts."""
    result = session.measure(Load(160, 1000, 0.001, Direction.UP, burst=400))
    assert (result.sent, result.received) == (400, 400)


def test_as_fast_as_it_goes_has_no_wanted_rate(session: Session) -> None:
    result = session.measure(Load(rate=None, seconds=0.02))
    assert result.wanted_rate is None
    assert result.sent > result.received - 1 > 0
    assert result.limited_by_client == (result.lost == 0)


def test_what_is_given_back_is_free() -> None:
    """Two ports are all there is, and they are used again."""
    arguments = ("--lowest-port=30021", "--highest-port=30022")
    with RelayProcess(*arguments, port=free_port()) as small:
        for _ in range(2):
            with Loaded(small, clients=2, channels=1):
                pass
        with pytest.raises(LoadError, match=r"Allocate: 508"), Loaded(small, clients=3, channels=1):
            pass


def test_a_wrong_password_is_said(relay: RelayProcess, capsys: pytest.CaptureFixture[str]) -> None:
    server = f"{HOST}:{relay.port}"
    assert load.main([server, f"--username={relay.username}", "--password=wrong"]) == 1
    assert "Allocate: 401" in capsys.readouterr().err


def test_peers_that_the_server_refuses_are_said() -> None:
    peers = open_peers(HOST, 1)
    with RelayProcess("--deny-peer=127.0.0.1/32", port=free_port()) as strict, peers[0]:
        credentials = Credentials(strict.username, strict.password)
        session = Session((HOST, strict.port), credentials, clients=1, peers=peers)
        with pytest.raises(LoadError, match="CHANNEL_BIND: 403"), session:
            pass


class Loaded(Session):
    """A session with peers of its own."""

    def __init__(
        self,
        relay: RelayProcess,
        *,
        clients: int,
        channels: int,
        server: str = HOST,
        host: str = HOST,
        framing: Framing = Framing.CHANNELS,
    ) -> None:
        self._own_peers = open_peers(host, channels)
        super().__init__(
            (server, relay.port),
            Credentials(relay.username, relay.password),
            clients=clients,
            peers=self._own_peers,
            patience=TIMEOUT,
            framing=framing,
        )

    def _close(self) -> None:
        super()._close()
        for peer in self._own_peers:
            peer.close()


# --- The command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param([HOST], "give --username and --password", id="no credentials"),
        pytest.param([HOST, "--username=u"], "give --username and", id="half a credential"),
        pytest.param(
            [HOST, "--username=u", "--password=p", "--secret-file=f"], "or --secret", id="two"
        ),
        pytest.param([HOST, "--secret-file=/nowhere"], "/nowhere", id="no such file"),
        pytest.param([f"{HOST}:port"], "port", id="port is no number"),
        pytest.param(["a host"], "a host", id="no such host"),
        pytest.param([HOST, "--clients=0"], "at least 1", id="no clients"),
        pytest.param([HOST, "--channels=4097"], "at most 4096", id="too many channels"),
        pytest.param([HOST, "--pid=999999999"], "no such process", id="no such process"),
        pytest.param([HOST, "--rate=fast"], "--rate", id="rate is no number"),
        pytest.param([HOST, "--rate=0"], "rate is above 0", id="rate"),
        pytest.param([HOST, "--payload=15"], "payload is 16 to 65503", id="small payload"),
        pytest.param([HOST, "--payload=65504"], "payload is 16 to 65503", id="large payload"),
        pytest.param([HOST, "--seconds=241"], "at most 240", id="seconds"),
        pytest.param([HOST, "--burst=0"], "burst is at least 1", id="burst"),
        pytest.param(
            [HOST, "--gso", "--burst=55", "--payload=1200"], "at most 54", id="long burst with GSO"
        ),
        pytest.param([HOST, "--search", "--loss=5"], "--loss is a part", id="loss in percent"),
        pytest.param([HOST, "--search", "--rate=max"], "begins at a rate", id="search from max"),
    ],
)
def test_bad_options_are_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        load.main(arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("192.0.2.1", ("192.0.2.1", 3478)),
        ("192.0.2.1:80", ("192.0.2.1", 80)),
        ("2001:db8::1", ("2001:db8::1", 3478)),
        ("[2001:db8::1]", ("2001:db8::1", 3478)),
        ("[2001:db8::1]:80", ("2001:db8::1", 80)),
    ],
)
def test_a_server_is_a_host_with_or_without_a_port(text: str, server: Address) -> None:
    assert load.server_address(text) == server


# --- Clients ----------------------------------------------------------------------------------


def test_more_clients_than_requests_on_their_way() -> None:
    with (
        Answering(challenge, succeed) as server,
        Clients(server.address, USER, WINDOW + 5) as clients,
    ):
        clients.allocate()
        assert {client.relayed_address for client in clients.all} == {("192.0.2.1", 50000)}


def test_a_request_without_an_answer_is_sent_again() -> None:
    with (
        Answering(challenge, succeed, deaf_to=2) as server,
        Clients(server.address, USER, 3) as clients,
    ):
        clients.allocate()
        assert {client.relayed_address for client in clients.all} == {("192.0.2.1", 50000)}


def test_a_port_that_the_server_still_knows_is_tried_again() -> None:
    with (
        Answering(refuse(437), challenge, succeed) as server,
        Clients(server.address, USER, 1) as clients,
    ):
        clients.allocate()
        assert clients.all[0].relayed_address == ("192.0.2.1", 50000)


def test_a_stale_nonce_is_replaced() -> None:
    with (
        Answering(challenge, succeed, refuse(438), succeed) as server,
        Clients(server.address, USER, 1) as clients,
    ):
        clients.allocate()
        clients.bind(0x4000, ("198.51.100.7", 9000))
        nonces = [request.get(Attr.NONCE) for request in server.requests]
    assert nonces == [None, b"nonce 0", b"nonce 0", b"nonce 2"]


def test_a_refusal_is_said() -> None:
    with (
        Answering(challenge, refuse(486)) as server,
        Clients(server.address, USER, 1) as clients,
        pytest.raises(LoadError, match="Allocate: 486"),
    ):
        clients.allocate()


Answer = Callable[[Message, int], Message]


def challenge(request: Message, number: int) -> Message:
    return _error(request, number, 401)


def refuse(code: int) -> Answer:
    """An error; only 401 and 438 come with a realm and a nonce."""
    return lambda request, number: _error(request, number, code)


def succeed(request: Message, _number: int) -> Message:
    relayed = (Attr.XOR_RELAYED_ADDRESS, ("192.0.2.1", 50000))
    return Message(Kind.SUCCESS, request.method, request.transaction_id, [relayed])


def _error(request: Message, number: int, code: int) -> Message:
    attributes: list[tuple[Any, Any]] = [(Attr.ERROR_CODE, (code, ""))]
    if code in {401, 438}:
        attributes += [(Attr.REALM, "realm"), (Attr.NONCE, b"nonce %d" % number)]
    return Message(Kind.ERROR, request.method, request.transaction_id, attributes)


class Answering:
    """A server that gives each client these answers, one after the other.

    It does not hear the first *deaf_to* datagrams.
    """

    def __init__(self, *answers: Answer, deaf_to: int = 0) -> None:
        self._answers = answers
        self._deaf_to = deaf_to
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((HOST, 0))
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)
        self.address: Address = self._socket.getsockname()
        self.requests: list[Message] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        self._thread.join()
        self._stopped.close()
        self._socket.close()

    def _serve(self) -> None:
        answered: dict[Address, int] = {}
        while select.select([self._socket, self._stopped], [], [])[0] == [self._socket]:
            datagram, client = self._socket.recvfrom(2048)
            if self._deaf_to:
                self._deaf_to -= 1
                continue
            request = decode(datagram).message
            self.requests.append(request)
            number = answered.get(client, 0)
            answered[client] = number + 1
            self._socket.sendto(self._answers[number](request, number).encode(), client)


# --- System calls -----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("gso", [False, True])
def test_frames_arrive_as_they_were_sent(host: str, gso: bool) -> None:
    """With GSO they arrive in one piece, which says how large its datagrams are."""
    with closing(udp_socket(host)) as sender, closing(udp_socket(host)) as receiver:
        receiver.bind((host, 0))
        name = socket_name(*receiver.getsockname()[:2])
        outbox, inbox = Outbox(20, 5, gso=gso, name_size=len(name)), Inbox()
        outbox.buffer[:] = bytes(range(100))
        outbox.address_to(name)
        assert outbox.send(sender.fileno()) == 5
        pieces = inbox.receive(receiver.fileno())

        assert [stop - start for start, stop, _ in pieces] == ([100] if gso else [20] * 5)
        assert {step for _, _, step in pieces} == {20}
        arrived = b"".join(inbox.buffer[start:stop] for start, stop, _ in pieces)
        assert arrived == outbox.buffer


def test_a_single_datagram_after_gso_is_single() -> None:
    """What the kernel left in the control buffer does not count again."""
    with closing(udp_socket(HOST)) as sender, closing(udp_socket(HOST)) as receiver:
        receiver.bind((HOST, 0))
        sender.connect(receiver.getsockname())
        inbox = Inbox()
        Outbox(20, 2, gso=True).send(sender.fileno())
        assert inbox.receive(receiver.fileno()) == [(0, 40, 20)]
        sender.send(bytes(40))
        assert inbox.receive(receiver.fileno()) == [(0, 40, 40)]
        Outbox(20, 2, gso=True).send(sender.fileno())
        assert inbox.receive(receiver.fileno()) == [(0, 40, 20)]
        assert inbox.receive(receiver.fileno()) == []


def test_sending_to_nobody_is_an_error() -> None:
    with closing(udp_socket(HOST)) as sender, closing(udp_socket(HOST)) as receiver:
        receiver.bind((HOST, 0))
        sender.connect(receiver.getsockname())
        receiver.close()
        outbox = Outbox(20, 1, gso=False)
        outbox.send(sender.fileno())
        with pytest.raises(ConnectionRefusedError):
            outbox.send(sender.fileno())


# --- Numbers ----------------------------------------------------------------------------------


def words(*places: int, flow: int = 0, run: int = 1) -> list[int]:
    return [run << RUN_SHIFT | flow << FLOW_SHIFT | place for place in places]


@pytest.mark.parametrize(
    ("arrived", "arrivals"),
    [
        pytest.param([], Arrivals(0, 0, 0), id="none"),
        pytest.param(words(0, 1, 2), Arrivals(3, 0, 0), id="in order"),
        pytest.param(words(0, 3), Arrivals(2, 0, 0), id="two are missing"),
        pytest.param(words(2, 0, 1), Arrivals(3, 2, 0), id="two came late"),
        pytest.param(words(0, 1, 1, 0), Arrivals(2, 0, 2), id="two came again"),
        pytest.param(words(1, 0, 0), Arrivals(2, 1, 1), id="late, and again"),
        pytest.param(
            [*words(0, 1, flow=7), *words(0, flow=3), *words(2, flow=7)],
            Arrivals(4, 0, 0),
            id="flows counted separately",
        ),
        pytest.param([*words(0), *words(1, run=2)], Arrivals(1, 0, 0), id="of another run"),
    ],
)
def test_arrivals_are_counted_per_flow(arrived: list[int], arrivals: Arrivals) -> None:
    assert count_arrivals(arrived, run=1) == arrivals


@pytest.mark.parametrize(
    ("which", "value"), [(0, 1), (50, 5), (50.1, 6), (90, 9), (99, 10), (100, 10)]
)
def test_percentiles_are_nearest_rank(which: float, value: float) -> None:
    assert percentile(range(1, 11), which) == value


def test_latency_is_in_microseconds() -> None:
    latency = latency_of([900, 1_000, 5_000, 6_999, 8_000])
    assert latency is not None
    assert latency.percentiles == {"p50": 5, "p90": 8, "p99": 8, "p99.9": 8, "max": 8}
    assert latency.histogram == [
        Bucket(0, 1, 1),
        Bucket(1, 2, 1),
        Bucket(4, 8, 2),
        Bucket(8, 16, 1),
    ]
    assert latency_of([]) is None


RESULT = Result(
    wanted_rate=1000,
    seconds=2,
    sent=2000,
    under_way=0,
    received=1900,
    reordered=3,
    duplicated=4,
    latency=latency_of([1_000_000, 5_000]),
    server_cost=6.5,
    client_cost=1.25,
    client_busy=0.5,
    client_waited=0.01,
    server_waited=0.02,
)


def test_a_result_says_what_follows_from_it() -> None:
    numbers = RESULT.as_dict()
    assert (numbers["lost"], numbers["sent_rate"], numbers["received_rate"]) == (100, 1000, 950)
    assert RESULT.loss == 0.05
    assert json.loads(json.dumps(numbers)) == numbers


@pytest.mark.parametrize(
    ("changes", "limited"),
    [
        pytest.param({}, False, id="sent all"),
        pytest.param({"sent": 1930}, True, id="sent too few"),
        pytest.param({"wanted_rate": None}, False, id="no limit, and the server loses"),
        pytest.param({"wanted_rate": None, "sent": 1900}, True, id="no limit, and nothing is lost"),
    ],
)
def test_it_says_when_the_load_client_is_the_limit(changes: dict[str, Any], limited: bool) -> None:
    result = replace(RESULT, **changes)
    assert result.limited_by_client == limited
    assert any("limited by" in line for line in rows(result)) == limited


@pytest.mark.parametrize("capacity", [30.0, 999.0, 1000.0, 77_777.0])
@pytest.mark.parametrize("growth", [1.25, 2.0])
def test_a_search_ends_just_below_what_the_server_can_do(capacity: float, growth: float) -> None:
    server = Simulated(capacity)
    found = search(server.measure, start=1000, growth=growth)
    assert found.rate <= capacity <= found.rate * 1.05 * (1 + 1e-9)
    assert not found.limited_by_client


def test_a_search_forgives_what_does_not_happen_again() -> None:
    server = Simulated(10_000, stalls=(1, 2))
    assert search(server.measure, start=1000).rate > 10_000 / 1.06


def test_a_search_allows_as_much_loss_as_it_is_told() -> None:
    assert search(Simulated(10_000).measure, start=1000, loss=0.1).rate > 11_000 / 1.06


def test_what_only_queues_is_too_much_for_a_search() -> None:
    """Nothing is lost by the end of the drain."""
    found = search(Simulated(10_000, has_queue=True).measure, start=1000)
    assert 10_000 / 1.06 < found.rate < 10_001


def test_a_search_ends_where_the_load_client_does() -> None:
    found = search(Simulated(10_000, client=5000).measure, start=1000)
    assert found == Lossless(5000, limited_by_client=True)


def test_a_search_gives_up_on_a_server_that_relays_nothing() -> None:
    found = search(Simulated(0).measure, start=1000)
    assert found == Lossless(0, limited_by_client=False)


class Simulated:
    """A server of so much capacity, and a load client of so much more; some steps stall."""

    def __init__(
        self,
        capacity: float,
        client: float = 1e9,
        stalls: Sequence[int] = (),
        *,
        has_queue: bool = False,
    ) -> None:
        self._capacity = capacity
        self._has_queue = has_queue
        self._client = client
        self._stalls = stalls
        self._steps = 0

    def measure(self, rate: float) -> Result:
        """Return what a thousand seconds would find."""
        self._steps += 1
        sent = round(min(rate, self._client) * 1000)
        received = 0 if self._steps in self._stalls else min(sent, round(self._capacity * 1000))
        missing = sent - received
        result = replace(RESULT, wanted_rate=rate, seconds=1000, sent=sent)
        if self._has_queue:
            return replace(result, received=sent, under_way=missing)
        return replace(result, received=received)


# --- What people read ---------------------------------------------------------------------------


def test_the_table_has_a_bar_for_each_range_of_latency() -> None:
    lines = rows(RESULT)
    assert "lost                      100 (5.000%)" in lines
    assert "latency, µs               p50 5  p90 1,000  p99 1,000  p99.9 1,000  max 1,000" in lines
    assert sum("█" in line for line in lines) == 2


def test_a_search_is_shown_step_by_step() -> None:
    lines = search_rows(
        [RESULT, replace(RESULT, server_cost=None, latency=None)], Lossless(7, True)
    )
    assert [line.split() for line in lines[1:3]] == [
        ["1,000", "1,000", "100", "6.50", "1,000"],
        ["1,000", "1,000", "100", "-", "-"],
    ]
    assert lines[-1].endswith("7 datagrams per second, limited by the load client")


def test_the_progress_bar_is_for_terminals() -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe = Terminal(), StringIO()
    for stream in (terminal, pipe):
        progress = Progress(stream)
        progress.show(0.5, 100, 90)
        progress.clear()
    assert "[" + "#" * 15 + " " * 15 + "]  50%  sent 100  received 90" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\033[K")
    assert pipe.getvalue() == ""


FASTER = Comparison("one", Metric.RATE, relay=[30, 10, 20], coturn=[10, 10, 10])
DEARER = Comparison("one", Metric.COST, relay=[3.0], coturn=[2.0], limited=True)


def test_a_comparison_takes_ratios_round_by_round() -> None:
    drifting = Comparison("noise", Metric.COST, relay=[1, 30, 100], coturn=[2, 20, 200])
    assert drifting.ratios == [0.5, 1.5, 0.5]
    assert drifting.ratio == 0.5
    assert drifting.relay_is_ahead
    assert FASTER.ratio == 2
    assert FASTER.relay_is_ahead
    assert not DEARER.relay_is_ahead
    assert not replace(FASTER, relay=[10] * 3).relay_is_ahead


def test_comparisons_are_a_markdown_table() -> None:
    other = replace(FASTER, case="two")
    assert markdown([FASTER, DEARER, other]) == (
        "|  | lossless rate, datagrams/s | CPU per datagram, µs |\n"
        "| --- | --- | --- |\n"
        "| one | **2.00** (1.00 to 3.00) 20 : 10 | 1.50† 3.0 : 2.0 |\n"
        "| two | **2.00** (1.00 to 3.00) 20 : 10 |  |\n"
    )
    assert standings([FASTER, DEARER, other])[1] == (
        "CPU per datagram, µs (less is better): the relay is ahead in 0 of 1;"
        " ratios 1.50 to 1.50, median 1.50"
    )


def test_the_picture_has_a_bar_for_each_ratio() -> None:
    tables = {"Singles & more": [FASTER, replace(FASTER, case="two"), DEARER]}
    drawn = draw(panels(tables))
    rectangles = ET.fromstring(drawn).findall(".//{http://www.w3.org/2000/svg}rect")
    assert len(rectangles) == 1 + 3  # the background too
    assert "Singles &amp; more: CPU per datagram, µs" in drawn


def test_bars_grow_from_one_to_both_sides() -> None:
    bars = [Bar("twice", 2, 2, 2, True), Bar("half", 0.5, 0.5, 0.5, False)]
    root = ET.fromstring(draw([Panel("", bars)]))
    _, twice, half = root.findall(".//{http://www.w3.org/2000/svg}rect")
    one = float(twice.attrib["x"])
    assert float(half.attrib["x"]) + float(half.attrib["width"]) == one
    assert half.attrib["width"] == twice.attrib["width"]
