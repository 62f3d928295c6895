"""Who asks and what they may: throwaway service accounts, their tokens, two roles.

Imitated: the JWT grant of oauth2.googleapis.com (RFC 7523), self-signed JWTs, which the SDK sends
by default (https://google.aip.dev/auth/4111), and the check of one permission per method. Keys are
made at the start and live in the stand-in's folder only.
"""

import json
import secrets
import time

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import exceptions, jwt

from standin.errors import ApiError, denied
from standin.settings import Settings, write_private

SECONDS = 3600
READ_ONLY = (".get", ".list")
"""What a viewer may: permissions with these ends. Source: roles/aiplatform.viewer in
https://cloud.google.com/vertex-ai/docs/general/access-control"""


class Access:
    """The accounts of one stand-in. Files: admin.json, viewer.json, token (for curl and gcloud)."""

    def __init__(self, settings: Settings) -> None:
        self._keys: dict[str, bytes] = {}
        self._tokens: dict[str, tuple[str, float]] = {}
        for role in ("admin", "viewer"):
            email = f"{role}@{settings.project}.iam.gserviceaccount.com"
            self._keys[email] = _make_account(settings, role, email)
        self.admin = next(iter(self._keys))
        write_private(settings.folder / "token", self._issue(self.admin, 10 * 365 * 86_400))

    def grant(self, assertion: str) -> dict[str, str | int]:
        """The reply of the token endpoint to a signed assertion.

        Raises:
            ApiError: no account of ours signed it.
        """
        token = self._issue(self._signer(assertion), SECONDS)
        return {"access_token": token, "expires_in": SECONDS, "token_type": "Bearer"}

    def who(self, authorization: str) -> str:
        """The account an `Authorization` header speaks for.

        Raises:
            ApiError: none does.
        """
        kind, _, token = authorization.partition(" ")
        if kind.lower() != "bearer" or not token:
            raise ApiError(
                "UNAUTHENTICATED",
                "Request is missing required authentication credential. Expected OAuth 2 access "
                "token, login cookie or other valid authentication credential.",
            )
        account, until = self._tokens.get(token, ("", 0.0))
        return account if until > time.time() else self._signer(token)

    def check(self, account: str, permission: str, resource: str) -> None:
        """Make sure that an account has a permission.

        Raises:
            ApiError: it has not.
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


def _make_account(settings: Settings, role: str, email: str) -> bytes:
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
