"""Asking one registry: over TLS or not, with a token or a password, after redirects, a few times while there is hope.

Rules this file obeys:

- Credentials go to the registry, and to the realm it names, over TLS; plain HTTP is for this machine, or by a flag.
  Where a redirect leads gets none, and is not asked whom it wants to know.
- What is not streamed is small, and refused when it is not.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import ipaddress
import re
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import urlencode, urljoin, urlsplit

import httpx

from unionfsd import __version__
from unionfsd.errors import UserError
from unionfsd.images import auth, certificates, challenge, documents
from unionfsd.images.auth import Credentials
from unionfsd.images.compress import CHUNK, BrokenOffError
from unionfsd.images.reference import DOCKER_HUB, LOCAL
from unionfsd.images.registriesconf import Endpoint
from unionfsd.typed import Any, Final

_HUB: Final = "registry-1.docker.io"
TRIES: Final = 4
_TIMEOUT: Final = httpx.Timeout(30.0, read=60.0)
#: Of this machine it is asked whether it speaks TLS, when it might be that it does not.
_PROBE: Final = 5.0
_REDIRECTS: Final = 5
RETRIED: Final = (408, 429, 500, 502, 503, 504)
#: Seconds that we wait at most when a registry asks for it.
_LONGEST: Final = 60.0
_ABOUT_BODY: Final = ("content-encoding", "content-length", "transfer-encoding")
_PORTS: Final = {"http": 80, "https": 443}


class RegistryError(UserError):
    """The registry said no; `status` is that of HTTP, `wait` the seconds after which it may be asked again."""

    def __init__(self, message: str, status: int, *, hint: str | None = None, wait: float = 0) -> None:
        super().__init__(message, hint=hint, code=1)
        self.status = status
        self.wait = wait


def joined(base: str, url: str) -> str:
    """Where `url`, which came with the answer of `base`, leads; RegistryError for nonsense."""
    try:
        return urljoin(base, url)
    except ValueError as error:
        raise RegistryError(f"{base} leads to {url!r:.200}: {error}", 310) from None


class Session:
    """Requests about the repository `at` in its registry, in the name of `name`.

    `scopes` are what a token is asked for; `plain_http` allows HTTP without TLS for any host. Safe to use from several
    threads.
    """

    def __init__(
        self,
        name: str,
        at: Endpoint,
        scopes: Sequence[str],
        *,
        plain_http: bool = False,
        credentials: Credentials | None = None,
    ) -> None:
        self._name = name
        host = _HUB if at.host == DOCKER_HUB else at.host
        self._plain = plain_http or at.insecure or _is_here(host)
        self._scopes = list(scopes)
        self._credentials = credentials or auth.find(f"{at.host}/{at.path}")
        self._authorization: str | None = None
        self._client = httpx.Client(
            timeout=_TIMEOUT,
            # A blob has the digest of its bytes as they are.
            headers={"User-Agent": f"unionfsd/{__version__}", "Accept-Encoding": "identity"},
            follow_redirects=False,
            # Go's rule, which everybody else follows: no proxy leads to this machine.
            mounts={f"all://{_without_port(host)}": None} if _is_here(host) else None,
            verify=certificates.context(host, verify=not at.insecure),
        )
        self._origin = f"{self._scheme(host, plain_http)}://{host}"
        self.base = f"{self._origin}/v2/{at.path}/"

    def _scheme(self, host: str, plain_http: bool) -> str:
        if plain_http or not self._plain:
            return "http" if plain_http else "https"
        if _is_here(host):
            # What speaks plain HTTP may wait for the end of a line that TLS does not have: TLS is tried last.
            return "https" if not self._answers(host, "http") and self._answers(host, "https") else "http"
        return "https" if self._answers(host, "https") else "http"

    def _answers(self, host: str, scheme: str) -> bool:
        """Whether a host speaks HTTP, with TLS or without; also when we do not trust its certificate."""
        try:
            answer = self._client.head(f"{scheme}://{host}/v2/", timeout=_PROBE if _is_here(host) else _TIMEOUT)
        except httpx.ConnectError as error:
            return scheme == "https" and _is_about_certificates(error)
        except httpx.HTTPError:
            return False
        return answer.status_code != 400 or scheme == "https"  # what servers that want TLS say

    def close(self) -> None:
        self._client.close()

    def send(self, method: str, url: str, *, stream: bool = False, **more: Any) -> httpx.Response:
        """The answer to a request, after a challenge and redirects; RegistryError for one that is no success.

        BrokenOffError when nobody answers.
        """
        content: Callable[[], Any] | None = more.pop("content", None)
        headers: dict[str, str] = more.pop("headers", {})
        target = joined(self.base, url)
        challenged = False
        for _ in range(_REDIRECTS + 2):
            mine = dict(headers)
            if self._authorization and self._is_ours(target):
                mine["Authorization"] = self._authorization
            answer = self._ask(method, target, headers=mine, content=content() if content is not None else None, **more)
            if answer.status_code == 401 and not challenged and self._is_ours(target):
                challenged = True
                answer.close()
                self._authorize(answer.headers.get_list("www-authenticate"))
            elif answer.is_redirect and "location" in answer.headers:
                answer.close()
                target = joined(target, answer.headers["location"])
                self._refuse_downgrade(target)
            elif answer.is_success:
                return answer if stream else self._whole(answer)
            else:
                raise self._refused(answer, method)
        raise RegistryError(f"{self._name}: too many redirects", 310)

    def _is_ours(self, url: str) -> bool:
        """Whether a URL is of the registry itself."""
        return _origin(url) == _origin(self._origin)

    def _ask(self, method: str, url: str, **more: Any) -> httpx.Response:
        """An answer whose body is yet to be read."""
        try:
            return self._client.send(self._client.build_request(method, url, **more), stream=True)
        except (httpx.InvalidURL, ValueError) as error:
            raise RegistryError(f"{self._name}: leads to {url!r:.200}: {error}", 310) from None
        except httpx.HTTPError as error:
            raise BrokenOffError(f"{self._origin}: {str(error) or type(error).__name__}", code=1) from None

    def _whole(self, answer: httpx.Response) -> httpx.Response:
        """The answer with its body, which is small; UserError for another."""
        body = b""
        try:
            for piece in answer.iter_bytes(CHUNK):
                body += piece
                if len(body) > documents.MAX_DOCUMENT:
                    raise UserError(f"{self._name}: an answer of more than {documents.MAX_DOCUMENT} bytes", code=1)
        except httpx.HTTPError as error:
            raise BrokenOffError(f"{self._origin}: {str(error) or type(error).__name__}", code=1) from None
        finally:
            answer.close()
        kept = [(key, value) for key, value in answer.headers.multi_items() if key not in _ABOUT_BODY]
        return httpx.Response(answer.status_code, headers=kept, content=body, request=answer.request)

    def _refuse_downgrade(self, target: str) -> None:
        if _origin(target)[0] != "https" and not self._plain:
            raise RegistryError(f"{self._name}: redirects to {target:.200}, which is not https", 310)

    def _refused(self, answer: httpx.Response, method: str) -> RegistryError:
        said, wait = "", _wait(answer)
        with contextlib.suppress(UserError, ValueError, KeyError, IndexError, TypeError, AttributeError):
            first = self._whole(answer).json()["errors"][0]
            said = str(first.get("message") or first["code"])
        hint = {
            401: "log in with podman login, or docker login",
            403: "you may not",
            404: "no such image there, or not for you",
            429: f"too many requests: wait {f'{wait:.0f} s' if wait else 'a while'}",
        }.get(answer.status_code)
        what = said or answer.reason_phrase
        text = f"{self._name}: {method}: {answer.status_code} {what:.300}"
        return RegistryError(text, answer.status_code, hint=hint, wait=wait)

    # Authorization: the challenge says how ("Token Authentication Specification" of distribution).

    def _authorize(self, headers: Sequence[str]) -> None:
        """Do what the first challenge wants that we can meet; tokens first."""
        found = sorted(challenge.read(headers), key=lambda each: each.scheme != "bearer")
        for kind, parameters in found:
            if kind == "bearer" and "realm" in parameters:
                self._authorization = f"Bearer {self._token(parameters)}"
                return
            if kind == "basic" and self._credentials is not None:
                self._authorization = _basic(self._credentials)
                return
        raise RegistryError(f"{self._name}: authentication required", 401, hint="podman login, or docker login")

    def _token(self, wanted: Mapping[str, str]) -> str:
        realm = wanted["realm"]
        self._refuse_downgrade(realm)
        params: dict[str, Any] = {"service": wanted["service"]} if "service" in wanted else {}
        if self._credentials is not None and self._credentials.is_token:
            form = {**params, "scope": " ".join(self._scopes), "client_id": "unionfsd"}
            form |= {"grant_type": "refresh_token", "refresh_token": self._credentials.password}
            answer = self._ask("POST", realm, data=form)
        else:
            headers = {"Authorization": _basic(self._credentials)} if self._credentials is not None else {}
            # What stands in the realm's own query is part of it.
            query = urlencode({**params, "scope": self._scopes}, doseq=True)
            answer = self._ask("GET", f"{realm}{'&' if '?' in realm else '?'}{query}", headers=headers)
        if not answer.is_success:
            raise self._refused(answer, "token")
        with contextlib.suppress(ValueError):
            document = self._whole(answer).json()
            if isinstance(document, dict) and (token := document.get("token") or document.get("access_token")):
                return str(token)
        raise RegistryError(f"{self._name}: its realm gave no token", 401)

    def again(self, ask: Callable[[], httpx.Response]) -> httpx.Response:
        """Ask a few times while there is hope."""
        for attempt in range(TRIES):
            pause = 0.2 * 2**attempt
            try:
                return ask()
            except BrokenOffError:
                if attempt == TRIES - 1:
                    raise
            except RegistryError as error:
                if error.status not in RETRIED or attempt == TRIES - 1 or error.wait > _LONGEST:
                    raise
                pause = max(pause, error.wait)
            time.sleep(pause)
        raise AssertionError


def _is_about_certificates(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def _basic(credentials: Credentials) -> str:
    return "Basic " + base64.b64encode(f"{credentials.username}:{credentials.password}".encode()).decode()


def _origin(url: str) -> tuple[str, str | None, int | None]:
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return "", None, None


def _wait(answer: httpx.Response) -> float:
    """The seconds that an answer asks us to wait: a number or a date (RFC 9110, 10.2.3); 0 for none."""
    text = answer.headers.get("retry-after", "").strip()
    if text.isdecimal() and len(text) < 10:
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def _without_port(host: str) -> str:
    return re.sub(r"(?<=[^:]):\d+$", "", host)


def _is_here(host: str) -> bool:
    """Whether a host, perhaps with a port, is this machine."""
    name = _without_port(host)
    if name == LOCAL:
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    return False
