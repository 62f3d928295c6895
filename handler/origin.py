"""Which web pages may use the server.

A page in a browser can send a POST to any port of its user's machine without a preflight, if the
request looks like that of a form: its type is text/plain or that of a form, or it has none. The
page cannot read the response, but the server would generate. Browsers add `Origin` to each such
request, and pages can neither change nor remove it. Other clients do not send it.
"""

import os

from handler.errors import RequestError
from handler.headers import Header

VARIABLE = "CORS_ORIGIN"
"""The environment variable with the origin of the pages that may use the server: empty for none,
`*` for all. `deploy/torchserve/launch.py` checks it and makes TorchServe send the CORS headers."""


def allowed_origin() -> str:
    """Return the setting; empty if no page may use the server."""
    return os.environ.get(VARIABLE, "")


def check_origin(header: Header) -> None:
    """Reject a request that a web page sent, unless its origin is allowed.

    A page of the server's own origin is rejected too: by changing the address of its name (DNS
    rebinding), any page can have that origin.

    Raises:
        RequestError: 403; the message names the origin and the setting.
    """
    origin, allowed = header("origin"), allowed_origin()
    # Requests for links, images and scripts have no Origin, but this header.
    foreign = header("sec-fetch-site") in ("cross-site", "same-site")
    if allowed == "*" or (origin == allowed if origin else not foreign):
        return
    given = f"the web page {origin[:100]}" if origin and origin != "null" else "a web page"
    pages = f"only the pages of {allowed}" if allowed else "no web pages"
    raise RequestError(
        403,
        f"the request comes from {given}; the server allows {pages}. To allow others, start it "
        f"with {VARIABLE}=ORIGIN",
    )


def exposed_headers() -> dict[str, str]:
    """Return the header that lets an allowed page read all others; TorchServe adds the rest."""
    return {"access-control-expose-headers": "*"} if allowed_origin() else {}
