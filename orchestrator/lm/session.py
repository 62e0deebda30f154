"""The HTTP client that providers are asked with: aiohttp, with nothing done that was not asked for.

No redirect is followed, no cookie kept, no reply unpacked, no request sent a second time (a POST is not, by aiohttp).
"""

from __future__ import annotations

import ssl
import urllib.request
from typing import TYPE_CHECKING

import aiohttp
import yarl

from orchestrator.core.errors import ProviderRefused

if TYPE_CHECKING:
    from aiohttp.connector import Connection

# A server closes an idle connection after 5 s or more. What is sent over it at that moment is lost, and paid for.
KEPT_S = 4.0
HEADER_BYTES = 1 << 16  # of one header of a reply


class Response(aiohttp.ClientResponse):
    """Closed before its end, it ends the connection at once."""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        protocol = connection.protocol
        assert protocol is not None
        await super().start(connection)
        # llama.cpp's server hangs up after a stream without a word of it, which the next request would run into.
        if self.headers.get("Server") == "llama.cpp":
            protocol.force_close()
            if self.connection is None:  # the whole reply came with its head, and the connection was put back
                protocol.close()
        return self

    def close(self) -> None:
        """A mere close would wait for the server: to read the rest of the request, to say farewell in TLS."""
        if self.connection is not None and self.connection.protocol is not None:
            self.connection.protocol.abort()
        super().close()


def open_session(url: yarl.URL, api_key: str) -> aiohttp.ClientSession:
    """For requests to `url` and nowhere else. Raises ProviderRefused."""
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json", "User-Agent": "airlock"}
    if url.user is None:  # a name and password in the address go before the key
        headers["Authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(
        # The proxy bounds how many requests there are at once. Without TLS, the system's certificates are not read.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_S, ssl=_trusted(url)),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=headers,
        auto_decompress=False,
        max_line_size=HEADER_BYTES,
        max_field_size=HEADER_BYTES,
        proxy=_proxy(url),
        response_class=Response,
    )


def _trusted(url: yarl.URL) -> ssl.SSLContext | bool:
    if url.scheme != "https":
        return True
    import httpx2  # finds the system's certificates also where OpenSSL was built for another system

    context = httpx2.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _proxy(url: yarl.URL) -> str | None:
    """What HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY say of this address."""
    named = urllib.request.getproxies()
    proxy = named.get(url.scheme) or named.get("all")
    # NO_PROXY names an IPv6 address without brackets, which the address with its port has.
    if not proxy or any(map(urllib.request.proxy_bypass, (url.host_port_subcomponent or "", url.host or ""))):
        return None
    if "://" not in proxy:
        return f"http://{proxy}"
    if not proxy.startswith(("http://", "https://")):
        error = ProviderRefused(f"the environment names a proxy for {url.host} that is no HTTP proxy: set NO_PROXY")
        error.server = url.host or ""
        raise error
    return proxy


def never_sent(error: aiohttp.ClientError) -> bool:
    """Whether it is certain that no request went out: there was no connection, or no way through a proxy.

    All else may have been billed: a connection that was used before and closed meanwhile says the same as one that
    broke while the model was at work.
    """
    return isinstance(
        error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | aiohttp.ClientHttpProxyError
    )
