"""Accounts and permissions: temporary service accounts, their tokens, two roles.

Imitated: the JWT grant of oauth2.googleapis.com (RFC 7523), self-signed JWTs, which the SDK sends
by default (https://google.aip.dev/auth/4111), and the check of one permission per method. Keys are
made at the start and are stored in the stand-in's folder only.
"""

import json
import secrets
import time

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import exceptions, jwt

from standin.errors import ApiError, denied
from standin.settings import StandinSettings, write_private

TOKEN_SECONDS = 3600
"""Google's access tokens expire after an hour."""
CURL_TOKEN_SECONDS = 10 * 365 * 86_400
READ_ONLY = (".get", ".list")
"""Endings of the permissions that a viewer has. Source: roles/aiplatform.viewer in
https://cloud.google.com/vertex-ai/docs/general/access-control"""


class Access:
    """The accounts of one stand-in. Files: admin.json, viewer.json, token (for curl and gcloud)."""

    def __init__(self, settings: StandinSettings) -> None:
        self._keys: dict[str, bytes] = {}
        self._tokens: dict[str, tuple[str, float]] = {}
        for role in ("admin", "viewer"):
            email = f"{role}@{settings.project}.iam.gserviceaccount.com"
            self._keys[email] = _make_account(settings, role, email)
        self.admin = next(iter(self._keys))
        write_private(settings.folder / "token", self._issue(self.admin, CURL_TOKEN_SECONDS))

    def grant(self, assertion: str) -> dict[str, str | int]:
        """Return the token endpoint's response to a signed assertion.

        Raises:
            ApiError: no account of this stand-in signed the assertion.
        """
        token = self._issue(self._signer(assertion), TOKEN_SECONDS)
        return {"access_token": token, "expires_in": TOKEN_SECONDS, "token_type": "Bearer"}

    def authenticate(self, authorization: str) -> str:
        """Return the account of an `Authorization` header.

        Raises:
            ApiError: the header names no account of this stand-in.
        """
        kind, _, token = authorization.partition(" ")
        if kind.lower() != "bearer" or not token:
            raise ApiError(
                "UNAUTHENTICATED",
                "Request is missing required authentication credential. Expected OAuth 2 access "
                "token, login cookie or other valid authentication credential.",
            )
        account, expiry = self._tokens.get(token, ("", 0.0))
        return account if expiry > time.time() else self._signer(token)

    def check(self, account: str, permission: str, resource: str) -> None:
        """Check that an account has a permission.

        Raises:
            ApiError: the account does not have it.
        """
        if account != self.admin and not permission.endswith(READ_ONLY):
            raise denied(permission, resource)

    def _issue(self, account: str, seconds: int) -> str:
        token = f"standin.{secrets.token_urlsafe(32)}"
        self._tokens[token] = (account, time.time() + seconds)
        return token

    def _signer(self, token: str) -> str:
        try:
            _, payload, _, _ = jwt._unverified_decode(token)
            account = payload.get("iss", "")
            jwt.decode(token, certs=self._keys[account])
        except (exceptions.GoogleAuthError, ValueError, KeyError) as error:
            raise ApiError(
                "UNAUTHENTICATED",
                "Request had invalid authentication credentials. Expected OAuth 2 access token, "
                "login cookie or other valid authentication credential.",
            ) from error
        return account


def _make_account(settings: StandinSettings, role: str, email: str) -> bytes:
    """Write a credentials file; return the public key."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    file = {
        "type": "service_account",
        "project_id": settings.project,
        "private_key_id": f"standin-{role}",
        "private_key": private.decode(),
        "client_email": email,
        "client_id": f"standin-{role}",
        "token_uri": "https://oauth2.googleapis.com/token",
        "universe_domain": "googleapis.com",
    }
    write_private(settings.folder / f"{role}.json", json.dumps(file, indent=1))
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
