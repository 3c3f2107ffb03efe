"""Which URLs and which addresses Lorary connects to when somebody else chose them: `OutboundPolicy`, and why not.

A tenant's URL may lead to a public address alone. What leads into the operator's own network (loopback, private and
link-local ranges, cloud metadata services) is refused, in every spelling: IPv4 inside IPv6, NAT64, 6to4, Teredo,
and numbers that only the resolver understands (0x7f.1, 017700000001, 2130706433).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import httpx2

from registry.errors import Invalid

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_URL_LENGTH = 2048

# Beyond what `ipaddress` knows in every Python: metadata services on odd addresses (Azure's host agent, Oracle's), the 6to4
# relay anycast, shared and benchmark ranges, discard-only.
_INTERNAL = tuple(
    ip_network(text)
    for text in (
        *"168.63.129.16/32 192.0.0.0/24 192.88.99.0/24 100.64.0.0/10 198.18.0.0/15".split(),
        *"100::/64 2001::/23 2001:db8::/32 3fff::/20 5f00::/16".split(),
    )
)
_NAT64 = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))
_IPV4_COMPATIBLE = IPv6Network("::/96")
_LOOKS_NUMERIC = re.compile(r"(0x[0-9a-f]*|\d+)(\.(0x[0-9a-f]*|\d+))*\.?", re.IGNORECASE)
_HOST_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*", re.IGNORECASE)


class OutboundRefused(Invalid):
    """Lorary does not connect there. The sentence never says what a name resolves to: that would be a map of the inside."""

    code = "outbound_refused"


@dataclass(frozen=True)
class OutboundPolicy:
    """What the operator allows. `allow_hosts` may resolve to any address; addresses in `allow_networks` are good for any host."""

    allow_http: bool = False
    allow_hosts: frozenset[str] = frozenset()
    allow_networks: tuple[Network, ...] = ()

    @classmethod
    def parse(cls, entries: Iterable[str], *, allow_http: bool) -> OutboundPolicy:
        """Of host names, addresses and CIDR ranges. Raises ValueError for an entry that is none of them."""
        hosts, networks = set(), []
        for entry in entries:
            try:
                networks.append(ip_network(entry.strip("[]")))
            except ValueError:
                if not _HOST_NAME.fullmatch(entry) or _LOOKS_NUMERIC.fullmatch(entry):
                    raise ValueError(
                        f"LORARY_OUTBOUND_ALLOW_HOSTS names {entry!r}, which is neither a host name nor an address nor a CIDR range"
                    ) from None
                hosts.add(entry.lower())
        return cls(allow_http=allow_http, allow_hosts=frozenset(hosts), allow_networks=tuple(networks))

    def check_url(self, url: str, *, field: str = "url") -> httpx2.URL:
        """The URL, read. Raises OutboundRefused for what can be refused without asking a resolver."""
        if len(url) > MAX_URL_LENGTH or not url.isprintable() or any(char in url for char in ' \\"<>^`{|}'):
            raise _refused("holds characters that no URL holds, or is too long", url=url, field=field)
        try:
            parsed = httpx2.URL(url)
        except (httpx2.InvalidURL, ValueError) as error:
            raise _refused("cannot be read", url=url, field=field) from error
        self._check_scheme(parsed, url=url, field=field)
        if parsed.userinfo:
            raise OutboundRefused(  # the value is not repeated: it holds a password
                "the URL carries a user name or password; leave it out", field=field, remedy="send https://host/path"
            )
        if parsed.fragment:
            raise _refused("has a fragment, which no server receives", url=url, field=field)
        if parsed.port is not None and not 0 < parsed.port < 65536:
            raise _refused("names a port that does not exist", url=url, field=field)
        self._check_host(parsed.raw_host.decode("ascii"), url=url, field=field)
        return parsed

    def _check_scheme(self, parsed: httpx2.URL, *, url: str, field: str) -> None:
        allowed = ("https", "http") if self.allow_http else ("https",)
        if parsed.scheme not in allowed:
            raise _refused(f"does not start with {' or '.join(scheme + '://' for scheme in allowed)}", url=url, field=field)

    def _check_host(self, host: str, *, url: str, field: str) -> None:
        try:
            address = ip_address(host)
        except ValueError:
            if not _HOST_NAME.fullmatch(host.rstrip(".")) or _LOOKS_NUMERIC.fullmatch(host):
                raise _refused("does not name a host, or spells an address in an unusual way", url=url, field=field) from None
            return
        self.check_address(host, address, field=field)

    def check_address(self, host: str, address: Address, *, field: str = "url") -> None:
        """Raises OutboundRefused unless `host` may be reached at `address`."""
        if host.lower().rstrip(".") in self.allow_hosts or self._in_allowed_network(address):
            return
        if not is_public(address):
            raise OutboundRefused(
                f"the host {host!r:.100} does not lead to a public address",
                field=field,
                value=host,
                remedy="name a host on the internet, or ask the operator to list it in LORARY_OUTBOUND_ALLOW_HOSTS",
            )

    def _in_allowed_network(self, address: Address) -> bool:
        """The address as such: an IPv4 range is never entered through an IPv6 spelling, but for the mapped one that sockets report."""
        mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
        return any(candidate in network for candidate in (address, mapped) if candidate for network in self.allow_networks)


def is_public(address: Address) -> bool:
    """A globally routable unicast address, and every IPv4 address that it carries inside is one too."""
    return _is_public_itself(address) and all(_is_public_itself(inner) for inner in _embedded(address))


def _is_public_itself(address: Address) -> bool:
    if any(address in network for network in _INTERNAL):
        return False
    wrapped = isinstance(address, IPv6Address) and next(_embedded(address), None) is not None
    special = address.is_multicast or address.is_loopback or address.is_link_local or address.is_unspecified
    if isinstance(address, IPv6Address):
        if address.scope_id is not None or address.is_site_local:
            return False
        if address.ipv4_mapped is not None or address in _NAT64[0]:
            return True  # what counts is the address inside
    return not special and not wrapped and address.is_global and not address.is_private and not address.is_reserved


def _embedded(address: Address) -> Iterator[IPv4Address]:
    """IPv4 addresses to which an IPv6 address may lead."""
    if isinstance(address, IPv4Address):
        return
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if any(address in network for network in (*_NAT64, _IPV4_COMPATIBLE)):
        yield IPv4Address(int(address) & 0xFFFF_FFFF)


def _refused(why: str, *, url: str, field: str) -> OutboundRefused:
    return OutboundRefused(f"the URL {url!r:.200} {why}", field=field, value=url, remedy="send https://host/path")
