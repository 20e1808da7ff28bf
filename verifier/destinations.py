"""Where a webhook may lead: over https to public addresses, and to whatever lies in networks that the settings name.

Anybody with an API key chooses the URL, and it is called from inside this service's network: no door may open there.
"""

import re
import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import httpx

from proof.errors import Malformed, Unavailable

MAX_URL_BYTES = 2048
MAX_ADDRESSES = 16  # of one name
SCHEMES = {"https": 443, "http": 80}  # http: to networks that the settings name

Resolve = Callable[[str, int], Sequence[str]]

UNICAST = ip_network(
    "2000::/3"
)  # of IPv6; what leads to IPv4 by translation or compatibility lies outside, or is named below
NOT_PUBLIC = [
    ip_network(text)
    for text in (
        "192.0.0.0/24",  # protocol assignments, RFC 6890
        "192.88.99.0/24",  # relays of 6to4, RFC 7526
        "2001::/23",  # protocol assignments, with Teredo, RFC 6890
        "2002::/16",  # 6to4: an IPv4 address inside, RFC 3056
        "3fff::/20",  # documentation, RFC 9637
    )
]

_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)


class Refused(Malformed):
    """A webhook may not lead there."""


def resolved(host: str, port: int) -> list[str]:
    """The addresses of a name as the system finds them. Raises Unavailable when it finds none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unavailable("the name does not resolve") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Destinations:
    def __init__(self, networks: Sequence[str], resolve: Resolve = resolved) -> None:
        """`networks` are those that the settings allow, as CIDR. Raises Malformed for what is none."""
        try:
            self._allowed = [ip_network(text) for text in networks]
        except ValueError as error:
            raise Malformed(f"ASSAY_WEBHOOK_NETWORKS: {error}") from error
        self._resolve = resolve

    def url(self, text: str) -> httpx.URL:
        """The URL as it will be called. Raises Refused for one that cannot be; what its name leads to is seen then."""
        try:
            url = httpx.URL(text)
        except httpx.InvalidURL as error:
            raise Refused(f"not a URL: {error}") from error
        if len(str(url)) > MAX_URL_BYTES:
            raise Refused(f"a URL of more than {MAX_URL_BYTES} bytes")
        if url.scheme not in SCHEMES or (url.scheme == "http" and not self._allowed):
            raise Refused("the URL does not begin with https://")
        if url.userinfo or url.fragment:
            raise Refused("a URL with a user, a password or a fragment")
        host = url.raw_host.decode("ascii")
        address = _address(host)
        if address is not None:
            self._check(address, url.scheme)
        elif not _NAME.fullmatch(host):
            raise Refused("not a host name")
        if url.port is not None and not 0 < url.port < 2**16:
            raise Refused("no port of this number")
        return url

    def addresses(self, url: httpx.URL) -> list[str]:
        """The addresses that may be called for a URL, all of them checked. Raises Refused, or Unavailable."""
        found = self._resolve(url.raw_host.decode("ascii"), url.port or SCHEMES[url.scheme])[:MAX_ADDRESSES]
        if not found:
            raise Unavailable("the name does not resolve")
        for text in found:
            address = _address(text)
            if address is None:
                raise Refused("the name leads to no address")
            self._check(address, url.scheme)
        return list(found)

    def _check(self, address: IPv4Address | IPv6Address, scheme: str) -> None:
        """Says no more of an address than the caller knows: a private name server may have told it."""
        if any(address in network for network in self._allowed):
            return
        if not _public(address):
            raise Refused("the URL leads to an address that is not public")
        if scheme == "http":
            raise Refused("the URL leads to a public address without TLS: https://")


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """The address that the text is, if it is one; of an IPv6 address that stands for one of IPv4, that one."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address) and address not in UNICAST:
        return False
    return address.is_global and not address.is_multicast and not any(address in network for network in NOT_PUBLIC)
