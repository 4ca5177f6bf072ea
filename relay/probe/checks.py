"""Whether a server is all right, as somebody asks who wants to use it: one check after the other.

Each adds a finding to the report. What cannot be tried after one that failed is left out.
"""

import ipaddress
import socket
import ssl
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509

from relay.probe.client import Answered, Credential, Signature
from relay.probe.findings import Report, State, Stopped
from relay.probe.lab import (
    TRANSPORT,
    Allocation,
    Broken,
    Inapplicable,
    Lab,
    Seen,
    described,
    expect_signed,
    expect_success,
)
from relay.probe.link import Link, LinkError, Unanswered, open_tcp, open_tls, open_udp
from relay.probe.target import Target, expired_since
from relay.probe.traffic import Flow, Ramp, Sample, raise_rate, send
from relay.stun.address import Address, format_endpoint
from relay.stun.attributes import Attr
from relay.stun.const import ErrorCode, Family, Method

PINGS: Final = 5  # Binding requests, whose median is the round trip
CHANNEL: Final = 0x4001
PEERS_CHANNEL: Final = 0x4002
CERTIFICATE_DAYS: Final = 14  # fewer are a warning
SHORT_LIFETIME: Final = 60  # seconds; clients refresh a minute before the end
SIZES: Final = (1, 160, 1200, 1400)  # bytes of payload; up to 1,200 everyone relies on
RELIED_ON: Final = 1200
CALL_RATE: Final = 100  # datagrams per second, in which a call's sound and some video go
CALL_SIZE: Final = 160  # bytes
BAD_LOSS: Final = 0.01
BAD_JITTER: Final = 0.030  # seconds, from which on speech suffers
RATE_SIZE: Final = 1000  # bytes
NOBODYS: Final = (  # peers that a relay on the internet is to refuse, and what they are
    ("127.0.0.1", "its own host"),
    ("0.0.0.0", "its own host"),  # noqa: S104  # nothing is bound to it
    ("169.254.169.254", "metadata of a cloud"),
    ("10.0.0.1", "a private network"),
    ("224.0.0.1", "multicast"),
)


@dataclass(frozen=True, slots=True)
class Options:
    """How to look."""

    credential: Credential | None = None
    other_credential: Credential | None = None
    address: str | None = None  # instead of what the name resolves to
    families: Sequence[Family] = tuple(Family)
    context: ssl.SSLContext = field(default_factory=ssl.create_default_context)
    is_firezone: bool = False  # its relays serve channels alone, and answer "success" for any peer
    time_limit: float = 5.0  # seconds for one request
    seconds: float = 5.0  # of a call, to measure latency and loss; 0: not at all
    most_per_second: float = 4000  # datagrams to which the rate is raised; 0: not at all


class Checks:
    """The checks of one server, over one transport."""

    def __init__(self, target: Target, options: Options, report: Report) -> None:
        self._target = target
        self._options = options
        self._report = report
        self._context = options.context
        self._server: Address = ("", 0)
        self._mapped: Address | None = None
        self._is_behind_nat = False
        self.lab: Lab | None = None  # where more can be tried, once the server is found to answer

    @property
    def is_stream(self) -> bool:
        """Whether the transport is TCP or TLS."""
        return self._target.transport != "udp"

    def close(self) -> None:
        """Close all sockets."""
        if self.lab is not None:
            self.lab.close()

    def run(self) -> None:
        """Do them all, as far as it goes."""
        try:
            self._find_server()
            if self._target.relays:
                self._use_relay()
        except Stopped:
            pass
        finally:
            if self.lab is not None:
                self.lab.clear()

    # --- Is there anybody? ------------------------------------------------------------------

    def _find_server(self) -> None:
        """Look the name up, and talk to each address; the first one that answers is used."""
        working = [server for server in self._addresses() if self._answers(server)]
        if not working:
            raise Stopped
        self._server = working[0]
        options = self._options
        self.lab = Lab(
            *(self._connect, self._server, options.credential, options.other_credential),
            time_limit=options.time_limit,
        )
        with self.check("mapped address"), self._connect(None) as link:
            self._see_mapped_address(link)

    def _addresses(self) -> list[Address]:
        host, port = self._options.address or self._target.host, self._target.port
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        except OSError as error:
            self._report.failed("name", f"{host} has no address: {error.strerror}")
            raise Stopped from None
        wanted = {
            socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
            for family in self._options.families
        }
        addresses = [
            (str(address[0]), port) for family, _, _, _, address in found if family in wanted
        ]
        hosts = ", ".join(address for address, _ in addresses)
        if not addresses:
            self._report.failed("name", f"{host} has no address of the family that was asked for")
            raise Stopped
        if hosts != host:
            self._report.ok("name", f"{host} is {hosts}", addresses=[each for each, _ in addresses])
        return addresses

    def _answers(self, server: Address) -> bool:
        self._server = server
        name = f"reachable, {'IPv6' if ':' in server[0] else 'IPv4'}"
        transport = self._target.transport.upper()
        self._report.progress(f"asking {format_endpoint(*server)}")
        began = time.monotonic()
        try:
            with self._connect(None) as link:
                connected = time.monotonic() - began
                round_trips, lost = _ping(link)
                if isinstance(link.socket, ssl.SSLSocket):
                    self._see_certificate(link.socket)
        except LinkError as error:
            hint = _hint(self._target, error)
            where = f"{format_endpoint(*server)} over {transport}"
            self._report.failed(name, f"{where}: {error}{hint}")
            return False
        median = statistics.median(round_trips)
        text = f"{format_endpoint(*server)} over {transport} answers in {_ms(median)}"
        if self.is_stream:
            text += f", connected in {_ms(connected)}"
        details = {"address": server[0], "port": server[1], "round_trip_seconds": median}
        if lost:
            text += f"; {lost} of {PINGS} requests had to be sent again"
        state = State.WARNING if lost else State.OK
        self._report.add(name, state, text, **details)
        return True

    def _connect(self, credential: Credential | None) -> Link:
        """Return a new client of the server. Raises LinkError."""
        time_limit = self._options.time_limit
        if not self.is_stream:
            return Link(open_udp(self._server), credential, time_limit=time_limit)
        sock = open_tcp(self._server, time_limit)
        if self._target.transport == "tls":
            sock = self._with_tls(sock)
        return Link(sock, credential, is_stream=True, time_limit=time_limit)

    def _with_tls(self, sock: socket.socket) -> ssl.SSLSocket:
        try:
            return open_tls(sock, self._target.host, self._context)
        except LinkError as error:
            if not isinstance(error.__cause__, ssl.SSLCertVerificationError):
                raise
            # Said once; what else there is can be seen all the same.
            self._report.failed("certificate", f"{error}: browsers will not connect")
            self._context = ssl.create_default_context()
            self._context.check_hostname = False
            self._context.verify_mode = ssl.CERT_NONE
            again = open_tcp(self._server, self._options.time_limit)
            return open_tls(again, self._target.host, self._context)

    def _see_certificate(self, sock: ssl.SSLSocket) -> None:
        encoded = sock.getpeercert(binary_form=True)
        if encoded is None or any(each.name == "certificate" for each in self._report):
            return
        certificate = x509.load_der_x509_certificate(encoded)
        ends = certificate.not_valid_after_utc
        days = (ends.timestamp() - time.time()) / 86400
        cipher = sock.cipher()
        text = f"is good until {ends:%Y-%m-%d}, for {days:.0f} days; {sock.version()}"
        self._report.add(
            "certificate",
            State.OK if days > CERTIFICATE_DAYS else State.WARNING,
            text if days > CERTIFICATE_DAYS else f"{text}: renew it",
            ends=ends.timestamp(),
            version=sock.version(),
            cipher=cipher[0] if cipher else None,
        )

    def _see_mapped_address(self, link: Link) -> None:
        answer = link.request(Method.BINDING)
        message = expect_success(answer)
        mapped, local = message.get(Attr.XOR_MAPPED_ADDRESS), link.local_address
        if mapped is None:
            raise Broken("Binding succeeds without XOR-MAPPED-ADDRESS")
        self._mapped = mapped
        self._is_behind_nat = mapped != local
        text = format_endpoint(*mapped)
        if self._is_behind_nat:
            text += f", behind a NAT: {format_endpoint(*local)} here"
        else:
            text += ", as here: no NAT in between"
        software = message.get(Attr.SOFTWARE)
        if software:
            text += f"; the server is {software}"
        self._report.ok(
            *("mapped address", text),
            mapped_address=list(mapped),
            local_address=list(local),
            is_behind_nat=self._is_behind_nat,
            software=software,
        )

    # --- Does it relay? ---------------------------------------------------------------------

    def _use_relay(self) -> None:
        assert self.lab is not None
        lab = self.lab
        alice = self._authenticate(lab)
        self._see_other_family(lab, alice)
        with self.check("lifetime"):
            self._see_lifetime(alice)
        with self.check("forbidden peers"):
            self._see_forbidden_peers(lab)
        flow = None
        bob = self._see_two_clients(lab, alice)
        if bob is not None:
            flow = Flow(alice.link, CHANNEL, bob.link)
            self._see_sizes(lab, alice.link, bob.link)
            self._see_indications(lab, alice)
        to_peer = self._see_peer(lab)
        flow = flow or to_peer
        if flow is not None:
            self._measure(flow)
        with self.check("release"):
            expect_success(alice.refresh(0))

    def _authenticate(self, lab: Lab) -> Allocation:
        """Be refused without a credential, and get an allocation with it. Raises Stopped."""
        name, credential = "authentication", self._options.credential
        self._report.progress("asking for an allocation")
        with self.check(name):
            stranger = lab.link()
            answer = stranger.request(Method.ALLOCATE, TRANSPORT)
            if answer.code is None:
                self._report.failed(name, "an Allocate without credentials succeeds: it is open")
                raise Stopped
            if answer.code != ErrorCode.UNAUTHORIZED:
                raise Broken(f"an Allocate without credentials: {described(answer)}, not 401")
            if credential is None:
                self._report.add(
                    *(name, State.SKIPPED),
                    "asks for a credential, as it should; --username and --credential go on",
                )
                raise Stopped
            link = lab.link(credential)
            answer = link.request(Method.ALLOCATE, TRANSPORT)
            if answer.code is not None:
                self._explain_refusal(credential, answer)
            allocation = Allocation(link, answer)
            self._report.ok(
                name,
                f'realm "{link.client.realm}", and the credential is good',
                realm=link.client.realm,
            )
            if answer.signature is not Signature.GOOD:
                self._report.add(
                    *("signature", State.FAILED),
                    f"the answer to Allocate is {answer.signature.value}: some clients drop it",
                )
            self._see_relayed_address(allocation.relayed)
            return allocation
        raise Stopped

    def _explain_refusal(self, credential: Credential, answer: Answered) -> None:
        """Say what it means that an Allocate with a credential is refused. Raises Stopped."""
        came = described(answer)
        if answer.code == ErrorCode.UNAUTHORIZED:
            late = expired_since(credential)
            text = f"the credential is refused ({came}): "
            if late is not None:
                text += f"it expired {late:.0f} s ago"
            else:
                text += "wrong username or password, or another secret than the server's"
        elif answer.code == ErrorCode.STALE_NONCE:
            text = (
                f"each new nonce is refused as stale, {answer.challenges + 1} times ({came}): "
                "several servers at one address, or a wrong clock?"
            )
        elif answer.code == ErrorCode.ALLOCATION_QUOTA_REACHED:
            text = f"the user has as many allocations as one may ({came})"
        elif answer.code == ErrorCode.INSUFFICIENT_CAPACITY:
            text = f"the server is full, draining, or out of relay ports ({came})"
        else:
            text = f"Allocate is refused ({came})"
        self._report.failed("authentication", text, code=answer.code)
        raise Stopped

    def _see_relayed_address(self, relayed_address: Address) -> None:
        host, port = relayed_address
        version = "IPv6" if ":" in host else "IPv4"
        text = format_endpoint(host, port)
        relayed, server = ipaddress.ip_address(host), ipaddress.ip_address(self._server[0])
        details = {"relayed_address": [host, port]}
        if server.is_global and not relayed.is_global:
            self._report.failed(
                f"allocation, {version}",
                f"{text}, which nobody on the internet can reach: the server behind its NAT does "
                "not know its public address",
                **details,
            )
            return
        self._report.ok(f"allocation, {version}", text, **details)

    def _see_other_family(self, lab: Lab, alice: Allocation) -> None:
        """Ask for an address of the family that was not given unasked."""
        family = Family.IPV4 if ":" in alice.relayed[0] else Family.IPV6
        version = "IPv4" if family is Family.IPV4 else "IPv6"
        with self.check(f"allocation, {version}"):
            link = lab.link(lab.credential)
            asked = (Attr.REQUESTED_ADDRESS_FAMILY, family.value)
            answer = link.request(Method.ALLOCATE, TRANSPORT, asked)
            if answer.code == ErrorCode.ADDRESS_FAMILY_NOT_SUPPORTED:
                text = f"is not served ({described(answer)})"
                self._report.add(f"allocation, {version}", State.NOTE, text)
                return
            if answer.code is not None:
                text = f"is refused ({described(answer)}); 440 would say that it is not served"
                self._report.add(f"allocation, {version}", State.WARNING, text)
                return
            self._see_relayed_address(Allocation(link, answer).relayed)

    def _see_lifetime(self, allocation: Allocation) -> None:
        granted = allocation.answer.message.get(Attr.LIFETIME)
        answer = allocation.refresh(600)
        expect_success(answer)
        expect_signed(answer)
        refreshed = answer.message.get(Attr.LIFETIME)
        if granted is None or refreshed is None:
            raise Broken("a success without LIFETIME")
        text = f"{granted} s, and {refreshed} s by a Refresh for 600 s"
        is_short = min(granted, refreshed) < SHORT_LIFETIME
        self._report.add(
            "lifetime",
            State.WARNING if is_short else State.OK,
            f"{text}: clients have to hurry" if is_short else text,
            granted_seconds=granted,
            refreshed_seconds=refreshed,
        )

    def _see_forbidden_peers(self, lab: Lab) -> None:
        """Ask for peers that a relay on the internet should keep its users away from."""
        allocation = lab.allocation()
        if ":" in allocation.relayed[0]:
            return
        allowed = {
            host: what
            for host, what in NOBODYS
            # Its own address it has to let them send to, for other clients are there.
            if host != allocation.relayed[0] and allocation.permit((host, 9)).code is None
        }
        if not allowed:
            self._report.ok("forbidden peers", "private and local addresses are refused")
        elif self._options.is_firezone:
            text = "each peer is a success, as Firezone's relays answer"
            self._report.add("forbidden peers", State.NOTE, text)
        else:
            listed = ", ".join(f"{host} ({what})" for host, what in allowed.items())
            text = f"users may send to {listed}"
            self._report.add("forbidden peers", State.WARNING, text, allowed=sorted(allowed))

    def _see_two_clients(self, lab: Lab, alice: Allocation) -> Allocation | None:
        """Connect another client with the first one, and return it if that works."""
        connected = []
        with self.check("two clients"):
            bob = lab.allocation()
            self._connect_clients(lab, alice, bob)
            connected.append(bob)
        return connected[0] if connected else None

    def _connect_clients(self, lab: Lab, alice: Allocation, bob: Allocation) -> None:
        """Bind channels from either of two clients to the other, and relay both ways."""
        name = "two clients"
        for one, other in ((alice, bob), (bob, alice)):
            answer = one.bind(CHANNEL, other.relayed)
            if answer.code == ErrorCode.FORBIDDEN:
                text = "cannot reach each other through it: its own addresses are refused as peers"
                raise Broken(f"{text} ({described(answer)})")
            if answer.code is not None:
                raise Broken(f"ChannelBind is refused ({described(answer)})")
        for one, other, way in ((alice, bob, "one way"), (bob, alice, "the other way")):
            payload = b"to " + other.relayed[0].encode()
            send_it = _Sending(one.link, payload)
            try:
                heard = lab.reaches_client(other.link, payload, send_it)
            except Broken:
                raise Broken(f"channels are bound, and nothing is relayed {way}") from None
            if heard.channel != CHANNEL:
                raise Broken("what should come on a channel comes in an indication")
        self._report.ok(name, "reach each other by channels, both ways")

    def _see_sizes(self, lab: Lab, one: Link, other: Link) -> None:
        with self.check("sizes"):
            carried = 0
            for size in SIZES:
                payload = bytes(number % 251 for number in range(size))
                try:
                    lab.reaches_client(other, payload, _Sending(one, payload))
                except Broken:
                    break
                carried = size
            if carried < RELIED_ON:
                raise Broken(f"datagrams of up to {carried} bytes come through, longer ones not")
            self._report.ok(
                "sizes", f"datagrams of up to {carried} bytes come through", largest=carried
            )

    def _see_indications(self, lab: Lab, alice: Allocation) -> None:
        """Relay by permissions alone, as browsers do until a channel is bound."""
        name = "indications"
        with self.check(name):
            carol = lab.allocation()
            for one, other in ((alice, carol), (carol, alice)):
                answer = one.permit(other.relayed)
                if answer.code is not None:
                    raise Broken(f"CreatePermission is refused ({described(answer)})")
            try:
                lab.reaches_client(
                    *(carol.link, b"indicated"),
                    lambda: alice.link.indicate(carol.relayed, b"indicated"),
                )
            except Broken:
                if self._options.is_firezone:
                    text = "are not relayed, as by Firezone's relays: channels are"
                    self._report.add(name, State.NOTE, text)
                    return
                raise Broken(
                    "permissions are given, and Send indications are not relayed: browsers begin "
                    "with these"
                ) from None
            self._report.ok(name, "Send and Data indications are relayed, too")

    def _see_peer(self, lab: Lab) -> Flow | None:
        """Reach somebody who is not on the relay: this machine, without TURN. Return the way."""
        name = "peer outside"
        flows: list[Flow] = []
        with self.check(name):
            alice = lab.allocation()  # whom nobody has a permission to send to
            if (":" in alice.relayed[0]) != (":" in self._server[0]):
                raise Inapplicable("this machine is reached by another family")
            seen = lab.peer()
            if lab.comes_in(alice, seen, b"nobody let me in"):  # it opens a NAT, too
                raise Broken("whoever sends to a relayed address comes in, unpermitted")
            answer = alice.bind(PEERS_CHANNEL, seen.address)
            if answer.code == ErrorCode.FORBIDDEN:
                host = seen.address[0]
                text = f"cannot be tried: {host}, this machine, is refused as a peer (403)"
                raise Inapplicable(text)
            expect_success(answer)
            if self._exchange_with_peer(lab, alice, seen):
                flows.append(Flow(alice.link, PEERS_CHANNEL, seen.peer))
        return flows[0] if flows else None

    def _exchange_with_peer(self, lab: Lab, alice: Allocation, seen: Seen) -> bool:
        """Send both ways; return whether the peer is reached. Raises Broken."""
        name = "peer outside"
        is_sent = self._is_relayed_to_peer(lab, alice, seen)
        try:
            lab.hears(alice, seen, b"from a peer")
        except Broken:
            if is_sent:
                raise Broken(
                    f"nothing that a peer sends to {format_endpoint(*alice.relayed)} arrives: are "
                    "the relay's UDP ports open in its firewall?"
                ) from None
            if not self._has_failed("two clients"):
                raise Broken(
                    "no datagram goes either way between the relayed address and this machine: "
                    "a firewall at the relay's UDP ports, or here"
                ) from None
            raise
        if not is_sent and self._is_behind_nat:
            text = "comes in; what is sent to it does not come through the NAT here"
            self._report.add(name, State.NOTE, text)
        elif not is_sent:
            raise Broken("what a client sends does not reach a peer")
        else:
            self._report.ok(name, "is reached, and comes in once it is permitted")
        return is_sent

    def _is_relayed_to_peer(self, lab: Lab, alice: Allocation, seen: Seen) -> bool:
        payload = b"to a peer"
        try:
            lab.reaches_peer(seen, payload, lambda: alice.link.send_on(PEERS_CHANNEL, payload))
        except Broken:
            return False
        return True

    # --- How well? --------------------------------------------------------------------------

    def _measure(self, flow: Flow) -> None:
        options = self._options
        if options.seconds:
            with self.check("call"):
                self._report.progress(f"a call of {options.seconds:.0f} s")
                self._see_call(send(flow, CALL_RATE, options.seconds, CALL_SIZE))
        if options.most_per_second:
            with self.check("rate"):
                ramp = raise_rate(
                    *(flow, options.most_per_second, RATE_SIZE),
                    lambda rate: self._report.progress(f"{rate:.0f} datagrams per second"),
                )
                self._see_ramp(ramp)

    def _see_call(self, sample: Sample) -> None:
        if not sample.received:
            raise Broken(f"none of {sample.sent} datagrams came through")
        p50, p95, p99 = (sample.percentile(percent) for percent in (50, 95, 99))
        self._report.add(
            "latency",
            State.WARNING if sample.jitter > BAD_JITTER else State.OK,
            f"to the relay and back p50 {_ms(p50)}, p95 {_ms(p95)}, p99 {_ms(p99)}; "
            f"jitter {_ms(sample.jitter)}",
            p50_seconds=p50,
            p95_seconds=p95,
            p99_seconds=p99,
            jitter_seconds=sample.jitter,
        )
        lost = sample.sent - sample.received
        text = f"{lost} of {sample.sent} datagrams ({sample.loss:.1%})"
        for number, what in ((sample.duplicates, "twice"), (sample.reordered, "out of order")):
            if number:
                text += f", {number} came {what}"
        state = State.OK
        if sample.loss >= BAD_LOSS:
            state = State.FAILED
        elif lost or sample.duplicates or sample.reordered:
            state = State.WARNING
        self._report.add(
            *("loss", state, text),
            sent=sample.sent,
            received=sample.received,
            duplicates=sample.duplicates,
            reordered=sample.reordered,
        )

    def _see_ramp(self, ramp: Ramp) -> None:
        carried, lossy = ramp.carried, ramp.lossy
        details = {
            "carried_per_second": carried.rate if carried else None,
            "lossy_per_second": lossy.rate if lossy else None,
            "payload_bytes": RATE_SIZE,
        }
        text = f"{_bandwidth(carried)} without loss" if carried else "no rate without loss"
        if lossy is not None:
            text += f"; at {_bandwidth(lossy)} {lossy.loss:.1%} were lost"
        elif ramp.limit is not None:
            text += f"; {ramp.limit}"
        self._report.add("rate", State.OK if carried else State.WARNING, text, **details)

    # --- Helpers ----------------------------------------------------------------------------

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Report whatever goes wrong within."""
        self._report.progress(name)
        try:
            yield
        except Inapplicable as error:
            self._report.add(name, State.SKIPPED, str(error))
        except (Broken, LinkError) as error:
            self._report.failed(name, str(error))

    def _has_failed(self, name: str) -> bool:
        return any(each.name == name and each.state is State.FAILED for each in self._report)


class _Sending:
    """Sends one payload on the channel between two clients, as often as it is called."""

    def __init__(self, link: Link, payload: bytes) -> None:
        self._link = link
        self._payload = payload

    def __call__(self) -> None:
        self._link.send_on(CHANNEL, self._payload)


def _ping(link: Link) -> tuple[list[float], int]:
    """Return round trips, and how many requests had to be sent again. Raises LinkError."""
    round_trips, again = [], 0
    for _ in range(PINGS):
        answer = link.request(Method.BINDING)
        if answer.transmissions == 1:  # of one that was sent again, which time is meant?
            round_trips.append(answer.round_trip)
        else:
            again += 1
    return round_trips or [answer.round_trip], again


def _hint(target: Target, error: LinkError) -> str:
    if isinstance(error, Unanswered) and target.transport == "udp":
        return f": is UDP port {target.port} open in its firewall, and in the one here?"
    return ""


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"


def _bandwidth(sample: Sample) -> str:
    bits = sample.rate * sample.size * 8 / 1e6
    return f"{sample.rate:,.0f} datagrams of {sample.size:,} bytes per second ({bits:.3g} Mbit/s)"
