"""Which web pages may use the server.

A page in a browser can send a POST to any port of its user's machine without asking first, as long
as the request looks like that of a form: with the types text/plain or form, or with no type at all.
It cannot read the response, but the server would generate. Browsers add `Origin` to each such
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

    The page's own site is not an exception: by changing a name's address (DNS rebinding), any page
    can make the server look like its site.

    Raises:
        RequestError: 403; the message names the origin and the setting.
    """
    origin, allowed = header("origin"), allowed_origin()
    # A link, an image or a script has no Origin, but tells that another site asked for it.
    foreign = header("sec-fetch-site") in ("cross-site", "same-site")
    if allowed == "*" or (origin == allowed if origin else not foreign):
        return
    given = f"the web page {origin[:100]}" if origin and origin != "null" else "a web page"
    may = f"only {allowed} may" if allowed else "by default no page may"
    raise RequestError(
        403, f"the request comes from {given}; {may}. Start the server with {VARIABLE}=ORIGIN"
    )


def exposed_headers() -> dict[str, str]:
    """Return the header that lets an allowed page read all others; TorchServe adds the rest."""
    return {"access-control-expose-headers": "*"} if allowed_origin() else {}
