"""Google's application-default credentials. No key file is read or written."""

from google.auth import default
from google.auth.credentials import Credentials
from google.auth.exceptions import DefaultCredentialsError
from google.auth.transport.requests import Request

from deploy.common.paths import UserError

SCOPES = ["https://www.googleapis.com/auth/cloud-platform"]


def default_credentials() -> Credentials:
    """Find the application-default credentials.

    Raises:
        UserError: there are none.
    """
    try:
        credentials, _ = default(scopes=SCOPES)
    except DefaultCredentialsError as error:
        raise UserError(
            "no application-default credentials; run `gcloud auth application-default login` "
            f"(or rehearse without Google: `make rehearse`). {str(error).splitlines()[0]}"
        ) from error
    return credentials


def access_token() -> str:
    """Get an access token for curl. It is valid for an hour."""
    credentials = default_credentials()
    credentials.refresh(Request())
    return str(credentials.token)
