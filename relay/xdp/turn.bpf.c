// SPDX-License-Identifier: MIT OR GPL-2.0-only
//
// Relays channels where a frame arrives, before the host's stack sees it: ChannelData of a client to
// its peer, and what the peer sends to the client as ChannelData. RFC 8656 §11.6, §12.6, §12.7.
//
// An XDP program (eXpress Data Path) is run for each frame that a network device receives. This one
// knows a datagram by its flow: who sent it, where to, and, of a client's, in which channel. User
// space writes one route for each direction of a channel, and takes them away again; nothing ages
// here. What has no route, and all that is not plain (fragments, options, a checksum that hardware
// is to finish, no room, no neighbour), is passed on as it came: the sockets receive it and do what
// they do without this program. Nothing is ever dropped here.
//
// Compile it for little-endian machines by python -m contrib.generate.

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>

#define SECTION(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define COMPILER_BARRIER() asm volatile("" ::: "memory")

// Helpers of the kernel, bpf-helpers(7). The latest of them are of Linux 5.11.
static void *(*const bpf_map_lookup_elem)(const void *map, const void *key) =
	(void *)BPF_FUNC_map_lookup_elem;
static __u32 (*const bpf_get_prandom_u32)(void) = (void *)BPF_FUNC_get_prandom_u32;
static long (*const bpf_xdp_adjust_head)(struct xdp_md *ctx, int delta) =
	(void *)BPF_FUNC_xdp_adjust_head;
static long (*const bpf_redirect_map)(const void *map, __u64 key, __u64 flags) =
	(void *)BPF_FUNC_redirect_map;
static long (*const bpf_fib_lookup)(void *ctx, struct bpf_fib_lookup *params, int size,
				    __u32 flags) = (void *)BPF_FUNC_fib_lookup;
static __u64 (*const bpf_ktime_get_coarse_ns)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;

enum {
	IPV4 = 4,
	IPV6 = 6,
	PROTOCOL_UDP = 17,
	AF_INET_ = 2,              // <sys/socket.h>, which is not for here
	AF_INET6_ = 10,
	ETHERNET_SIZE = 14,
	IPV4_SIZE = 20,
	IPV6_SIZE = 40,
	UDP_SIZE = 8,
	CHANNEL_HEADER_SIZE = 4,   // number and length. RFC 8656 §12.4
	MOST_PADDING = 3,          // bytes behind the payload. RFC 8656 §12.5
	LONGEST_PADDED = 64,       // bytes of a frame that somebody may have padded to its least size
	LOOPBACK = 1,              // the index of lo, in every network namespace
	MAX_CHANNELS = 1 << 18,
	DEVICES = 16,
	SIZE_CLASSES = 8,
};
#define HOP_LIFETIME 1000000000ull // nanoseconds for which a next hop is believed

// --- What user space and this program share -----------------------------------------------------

// What a datagram is known by. Ports and channel are big-endian, as in the datagram.
struct flow {
	__u8 remote[16], local[16]; // IPv4 as ::ffff:a.b.c.d
	__be16 remote_port, local_port;
	__be16 channel;             // of ChannelData; 0: from a peer
	__u8 family;                // an IPv6 datagram from ::ffff:a.b.c.d is not one from a.b.c.d
	__u8 zero;
};

// The next hop, as the kernel knew it when it was asked. Only this program reads and writes it.
struct hop {
	__u32 route_id;             // of the route that it was asked for
	__u32 ifindex;
	__u64 until;                // when to ask again, in nanoseconds since the boot
	__u8 destination[6], source[6];
	__u32 mtu;
};

// The peer may be another allocation of this relay: look that up, as if this datagram had come in
// at its relay port.
#define INSIDE 1
// Send it without DSCP and ECN, whatever it came with.
#define UNMARKED 2
// The peer has an address of this host, from which nothing comes in at a device: a frame that says
// so is forged, and for the host's stack to drop.
#define ONLY_INSIDE 4

struct route {
	__u32 id;                   // no two routes ever have the same
	__be16 to_port, from_port;
	struct flow flow;           // the key once more
	__u8 to[16], from[16];
	__be16 channel;             // to frame it with; 0: it goes to a peer
	__u8 family;                // of to and from
	__u8 flags;
	__u32 last_id;              // the same, written last: see find()
	struct hop hop;             // user space writes zeros
};

struct relayed { __u64 datagrams, bytes; }; // bytes of payload

// The loader makes the maps, as these say.
struct map { __u32 type, key_size, value_size, max_entries, flags; };

// Two for each channel. Memory is taken as entries come: all of it at once would be 80 MB.
const struct map routes SECTION("maps") = {
	.type = BPF_MAP_TYPE_HASH,
	.key_size = sizeof(struct flow),
	.value_size = sizeof(struct route),
	.max_entries = 2 * MAX_CHANNELS,
	.flags = BPF_F_NO_PREALLOC,
};
// By ifindex, the devices that frames may leave by other than where they came in: this program is
// there, too, so the driver can send what has no socket.
const struct map devices SECTION("maps") = {
	.type = BPF_MAP_TYPE_DEVMAP_HASH,
	.key_size = sizeof(__u32),
	.value_size = sizeof(__u32),
	.max_entries = DEVICES,
};
// What has been relayed to peers, then to clients, each by class of the payload's size.
const struct map relayed SECTION("maps") = {
	.type = BPF_MAP_TYPE_PERCPU_ARRAY,
	.key_size = sizeof(__u32),
	.value_size = sizeof(struct relayed),
	.max_entries = 2 * SIZE_CLASSES,
};

// --- Checksums ----------------------------------------------------------------------------------
//
// One's complement sums of 16-bit words, in the order of the machine. RFC 1071, RFC 1624.

INLINE __u16 swap(__u16 word) { return word >> 8 | word << 8; }

INLINE __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

INLINE __u32 sum4(const void *bytes)
{
	const __u16 *words = bytes;
	return (__u32)words[0] + words[1];
}

INLINE __u32 sum16(const void *bytes)
{
	return sum4(bytes) + sum4(bytes + 4) + sum4(bytes + 8) + sum4(bytes + 12);
}

// --- Reading ------------------------------------------------------------------------------------

// What there is to know of a datagram before its headers are overwritten.
struct datagram {
	struct flow flow;
	__u32 taken;      // the sum of what the checksum is not to cover any more
	__u16 headers;    // bytes in front of the payload
	__u16 size;       // of the payload
	__u16 check;
	__u8 ttl, tos;
};

// Read the header of a plain IPv4 datagram with UDP in it; size becomes that of the UDP datagram.
INLINE int read_ipv4(struct datagram *datagram, const struct iphdr *ip, const void *end)
{
	if ((const void *)(ip + 1) + UDP_SIZE > end)
		return 0;
	if (*(const __u8 *)ip != 0x45 || ip->protocol != PROTOCOL_UDP)
		return 0; // options, or another protocol
	if (ip->frag_off & swap(0x3fff))
		return 0; // a fragment: the first and later ones too
	__u32 addresses = sum4(&ip->saddr) + sum4(&ip->daddr);
	if (fold(sum4(ip) + sum4((void *)ip + 4) + sum4((void *)ip + 8) + addresses) != 0xffff)
		return 0; // damaged, and to be written anew it must be whole
	const __u32 mapped = 0xffff0000;
	__builtin_memcpy(datagram->flow.remote + 8, &mapped, 4);
	__builtin_memcpy(datagram->flow.remote + 12, &ip->saddr, 4);
	__builtin_memcpy(datagram->flow.local + 8, &mapped, 4);
	__builtin_memcpy(datagram->flow.local + 12, &ip->daddr, 4);
	datagram->flow.family = IPV4;
	datagram->taken = addresses;
	datagram->headers = ETHERNET_SIZE + IPV4_SIZE + UDP_SIZE;
	datagram->size = swap(ip->tot_len) - IPV4_SIZE;
	datagram->ttl = ip->ttl;
	datagram->tos = ip->tos;
	return 1;
}

// The same of IPv6, without extension headers. Its flow label is not relayed.
INLINE int read_ipv6(struct datagram *datagram, const struct ipv6hdr *ip, const void *end)
{
	const __u8 *first = (const __u8 *)ip;
	if ((const void *)(ip + 1) + UDP_SIZE > end)
		return 0;
	if (first[0] >> 4 != 6 || ip->nexthdr != PROTOCOL_UDP)
		return 0;
	__builtin_memcpy(datagram->flow.remote, &ip->saddr, 16);
	__builtin_memcpy(datagram->flow.local, &ip->daddr, 16);
	datagram->flow.family = IPV6;
	datagram->taken = sum16(&ip->saddr) + sum16(&ip->daddr);
	datagram->headers = ETHERNET_SIZE + IPV6_SIZE + UDP_SIZE;
	datagram->size = swap(ip->payload_len);
	datagram->ttl = ip->hop_limit;
	datagram->tos = first[0] << 4 | first[1] >> 4;
	return 1;
}

// --- Routes -------------------------------------------------------------------------------------

// Look a flow up, and copy its route: from then on nobody changes it under our hands.
//
// The kernel gives the memory of a deleted entry to the next one at once, also while another CPU
// still reads it. An entry is written from its first byte to its last, and read the other way round
// by its ids: if the last one, read before all else, is the first one, read after all else, then
// what lies in between was whole and stayed so. Whether it is the route asked for, its key tells.
// (So it is where CPUs keep the order of stores and of loads, as x86 does.)
INLINE struct route *find(const struct flow *flow, struct route *copy)
{
	struct route *route = bpf_map_lookup_elem(&routes, flow);
	if (!route)
		return 0;
	__u32 id = *(const volatile __u32 *)&route->last_id;
	COMPILER_BARRIER();
	*copy = *route;
	COMPILER_BARRIER();
	if (*(const volatile __u32 *)&route->id != id)
		return 0;
	const __u64 *is = (const __u64 *)&copy->flow, *wanted = (const __u64 *)flow;
	if (is[0] != wanted[0] || is[1] != wanted[1] || is[2] != wanted[2] || is[3] != wanted[3] ||
	    is[4] != wanted[4])
		return 0;
	return route;
}

// Ask the kernel for the way to an address, by the rules, routes and neighbours that hold for what
// this host itself sends. With lo as where it came from, only forwarding on lo has to be on, and the
// host itself forwards nothing.
INLINE long look_up(struct xdp_md *ctx, struct bpf_fib_lookup *fib, const struct route *route,
		    const __u8 *address)
{
	__builtin_memset(fib, 0, sizeof *fib);
	fib->l4_protocol = PROTOCOL_UDP;
	fib->sport = route->from_port;
	fib->dport = route->to_port;
	fib->ifindex = LOOPBACK;
	if (route->family == IPV4) {
		fib->family = AF_INET_;
		__builtin_memcpy(&fib->ipv4_src, route->from + 12, 4);
		__builtin_memcpy(&fib->ipv4_dst, address + 12, 4);
	} else {
		fib->family = AF_INET6_;
		__builtin_memcpy(fib->ipv6_src, route->from, 16);
		__builtin_memcpy(fib->ipv6_dst, address, 16);
	}
	return bpf_fib_lookup(ctx, fib, sizeof *fib, 0);
}

// Find the next hop of a route. What the host cannot send just now (it does not know the neighbour,
// say) and what it would deliver to itself is left to the sockets; so is what would come from an
// address that this host has no longer.
INLINE int find_hop(struct xdp_md *ctx, const struct route *route, struct hop *hop, __u64 now)
{
	struct bpf_fib_lookup fib;
	if (look_up(ctx, &fib, route, route->from) != BPF_FIB_LKUP_RET_NOT_FWDED) // it is not local
		return 0;
	if (look_up(ctx, &fib, route, route->to) != BPF_FIB_LKUP_RET_SUCCESS)
		return 0;
	hop->route_id = route->id;
	hop->ifindex = fib.ifindex;
	hop->until = now + HOP_LIFETIME;
	__builtin_memcpy(hop->destination, fib.dmac, 6);
	__builtin_memcpy(hop->source, fib.smac, 6);
	hop->mtu = fib.mtu_result;
	return 1;
}

INLINE void count(__u32 direction, __u64 size)
{
	__u32 key = direction + (size > 64) + (size > 128) + (size > 256) + (size > 512) +
		    (size > 1024) + (size > 1280) + (size > 1500);
	struct relayed *class = bpf_map_lookup_elem(&relayed, &key);
	if (class) {
		class->datagrams++;
		class->bytes += size;
	}
}

// --- The program --------------------------------------------------------------------------------

SECTION("xdp") int turn(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;
	struct datagram datagram = {};
	struct udphdr *udp;

	// 1. Is it one whole UDP datagram, in headers without anything uncommon?
	if ((void *)(ethernet + 1) > end || ethernet->h_dest[0] & 1) // multicast, broadcast
		return XDP_PASS;
	if (ethernet->h_proto == swap(ETH_P_IP)) {
		if (!read_ipv4(&datagram, data + ETHERNET_SIZE, end))
			return XDP_PASS;
		udp = data + ETHERNET_SIZE + IPV4_SIZE;
	} else if (ethernet->h_proto == swap(ETH_P_IPV6)) {
		if (!read_ipv6(&datagram, data + ETHERNET_SIZE, end))
			return XDP_PASS;
		udp = data + ETHERNET_SIZE + IPV6_SIZE;
	} else {
		return XDP_PASS;
	}
	// The frame may be longer, for Ethernet pads to 60 bytes, but not shorter than its headers say.
	__u16 length = swap(udp->len);
	if (length != datagram.size || length < UDP_SIZE || (void *)udp + length > end)
		return XDP_PASS;
	if ((void *)udp + length != end && end - data > LONGEST_PADDED) // what follows would go along
		return XDP_PASS;
	if (!udp->source || datagram.ttl < 2) // to port 0 nobody answers; loops between relays end
		return XDP_PASS;
	// A checksum of the pseudo-header alone is one that hardware is to finish, of which there is none
	// between two hosts on one machine. That is also what a train of datagrams has (GRO, GSO).
	datagram.taken += udp->len;
	datagram.check = udp->check;
	if (datagram.check == 0 ? datagram.flow.family == IPV6
				: datagram.check == fold(datagram.taken + swap(PROTOCOL_UDP)))
		return XDP_PASS;
	// The length is covered twice: in the header, and in the pseudo-header.
	datagram.taken += udp->len + udp->source + udp->dest;
	datagram.flow.remote_port = udp->source;
	datagram.flow.local_port = udp->dest;
	datagram.size = length - UDP_SIZE;

	// 2. Where does it go? What begins like ChannelData may be that, or what a peer happens to send.
	struct route route;
	struct route *entry = 0;
	__u32 direction = SIZE_CLASSES;
	__be16 *header = (void *)(udp + 1);
	if (datagram.size >= CHANNEL_HEADER_SIZE && (void *)(header + 2) <= end &&
	    (*(__u8 *)header & 0xc0) == 0x40) {
		datagram.flow.channel = header[0];
		entry = find(&datagram.flow, &route);
	}
	if (entry) {
		direction = 0;
		__u16 size = swap(header[1]), padding = datagram.size - CHANNEL_HEADER_SIZE - size;
		if (size > 0x3fff || padding > MOST_PADDING) // it wraps where size is too large
			return XDP_PASS;
		// Padding stays where it is, as bytes that follow the datagram in the frame.
		__u8 *tail = (void *)(header + 2) + size;
		for (int i = 0; i < MOST_PADDING; i++)
			if (i < padding) {
				if ((void *)(tail + i + 1) > end)
					return XDP_PASS;
				datagram.taken += (size + i) & 1 ? tail[i] << 8 : tail[i];
			}
		datagram.taken += header[0] + header[1];
		datagram.headers += CHANNEL_HEADER_SIZE;
		datagram.size = size;
	} else {
		datagram.flow.channel = 0;
		entry = find(&datagram.flow, &route);
		if (!entry || route.flags & ONLY_INSIDE)
			return XDP_PASS;
	}
	int is_inside = route.flags & INSIDE;
	if (is_inside) {
		struct flow inside = {};
		__builtin_memcpy(inside.remote, route.from, 16);
		__builtin_memcpy(inside.local, route.to, 16);
		inside.remote_port = route.from_port;
		inside.local_port = route.to_port;
		inside.family = route.family;
		entry = find(&inside, &route);
		if (!entry || route.flags & INSIDE)
			return XDP_PASS;
	}
	if (datagram.check == 0 && route.family == IPV6) // which has to have one. RFC 8200 §8.1
		return XDP_PASS;

	// 3. By which next hop, and does it fit? Nothing has been changed until here.
	__u16 ip_size = route.family == IPV4 ? IPV4_SIZE : IPV6_SIZE;
	__u16 udp_length = UDP_SIZE + datagram.size;
	if (route.channel)
		udp_length += CHANNEL_HEADER_SIZE;
	__u64 now = bpf_ktime_get_coarse_ns();
	if (now >= route.hop.until || route.hop.route_id != route.id) {
		if (!find_hop(ctx, &route, &route.hop, now))
			return XDP_PASS;
		// If the entry has become another's by now, that one sees whose hop it is.
		entry->hop = route.hop;
	}
	if (ip_size + udp_length > route.hop.mtu)
		return XDP_PASS;
	int goes_back = route.hop.ifindex == ctx->ingress_ifindex;
	if (!goes_back && !bpf_map_lookup_elem(&devices, &route.hop.ifindex))
		return XDP_PASS;
	int shorter = datagram.headers + datagram.size - ETHERNET_SIZE - ip_size - udp_length;
	if (shorter && bpf_xdp_adjust_head(ctx, shorter)) // a driver without room in front
		return XDP_PASS;

	// 4. Write the headers anew. That they fit is known; the verifier has to be told.
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	ethernet = data;
	if ((void *)(ethernet + 1) > end)
		return XDP_ABORTED;
	__builtin_memcpy(ethernet->h_dest, route.hop.destination, 6);
	__builtin_memcpy(ethernet->h_source, route.hop.source, 6);
	__u8 tos = route.flags & UNMARKED ? 0 : datagram.tos;
	__u32 sum = (__u16)~datagram.check + (__u16)~fold(datagram.taken);
	if (route.family == IPV4) {
		struct iphdr *ip = data + ETHERNET_SIZE;
		if ((void *)(ip + 1) + UDP_SIZE > end)
			return XDP_ABORTED;
		ethernet->h_proto = swap(ETH_P_IP);
		struct iphdr new = {
			.version = 4,
			.ihl = 5,
			.tos = tos,
			.tot_len = swap(ip_size + udp_length),
			.id = bpf_get_prandom_u32(), // DF is clear, as at the sockets: it may be fragmented
			.ttl = datagram.ttl - 1,
			.protocol = PROTOCOL_UDP,
		};
		__builtin_memcpy(&new.saddr, route.from + 12, 4);
		__builtin_memcpy(&new.daddr, route.to + 12, 4);
		new.check = ~fold(sum16(&new) + sum4((void *)&new + 16));
		*ip = new;
		udp = (void *)(ip + 1);
		sum += sum4(&new.saddr) + sum4(&new.daddr);
	} else {
		struct ipv6hdr *ip = data + ETHERNET_SIZE;
		if ((void *)(ip + 1) + UDP_SIZE > end)
			return XDP_ABORTED;
		ethernet->h_proto = swap(ETH_P_IPV6);
		__u8 *first = (__u8 *)ip;
		first[0] = 6 << 4 | tos >> 4;
		first[1] = tos << 4;
		first[2] = first[3] = 0;
		ip->payload_len = swap(udp_length);
		ip->nexthdr = PROTOCOL_UDP;
		ip->hop_limit = datagram.ttl - 1;
		__builtin_memcpy(&ip->saddr, route.from, 16);
		__builtin_memcpy(&ip->daddr, route.to, 16);
		udp = (void *)(ip + 1);
		sum += sum16(route.from) + sum16(route.to);
	}
	udp->source = route.from_port;
	udp->dest = route.to_port;
	udp->len = swap(udp_length);
	sum += udp->source + udp->dest + 2 * udp->len;
	if (route.channel) {
		header = (void *)(udp + 1);
		if ((void *)(header + 2) > end)
			return XDP_ABORTED;
		header[0] = route.channel;
		header[1] = swap(datagram.size);
		sum += header[0] + header[1];
	}
	// Updated, not made anew: what was damaged stays so, and its receiver sees that.
	__u16 check = ~fold(sum);
	udp->check = datagram.check == 0 ? 0 : check ? check : 0xffff;

	count(direction, datagram.size);
	if (is_inside) // from one client of this relay to another, it counts for both
		count(SIZE_CLASSES, datagram.size);
	return goes_back ? XDP_TX : bpf_redirect_map(&devices, route.hop.ifindex, 0);
}

// The kernel lets only programs under the GPL ask for routes.
const char LICENSE[] SECTION("license") = "Dual MIT/GPL";
