"""URLs of places in object stores: taken apart, checked, and shown without the secrets in them."""

import re
from typing import NamedTuple
from urllib.parse import unquote_plus

from flax_partial.storage.paths import SESSION_SUFFIX

SCHEMES = ("s3", "gs", "az", "memory")
HIDDEN = "***"
# Parameters that are no secrets. All others are hidden: a name may be misspelt, and what is not
# encoded, such as a signature, is cut at each `&`.
_SHOWN = re.compile(
    r"(.*_)?(algorithm|arn|bucket|enabled|endpoint|file|host|id|identifier|name|path|region|type|url)"
    r"|(aws_|google_|azure_(storage_)?)?"
    r"(conditional|copy|disable|request|s3|server_side|skip|unsigned|use|virtual_hosted)_.*"
)
# They name the file of a key; some put the key itself there.
_KEY_FILES = re.compile(r"(google_)?(application_credentials|service_account)=.*\.json")
_HOLDS_SECRETS = re.compile(r"//[^/]*@|\?")  # of a value that is a URL
# Parameters whose values may have them.
_HAVE_SLASHES = re.compile("endpoint|url|uri|path|file|credential|account|key|token|arn")


class Url(NamedTuple):
    """The URL of something in an object store; its text hides the secrets among the parameters.

    Attributes:
      scheme: One of `SCHEMES`.
      bucket: The bucket, or container; a name of its own for one in memory.
      key: The key, without slashes at its ends; may be empty.
      query: Parameters, without the question mark, and with their secrets.
    """

    scheme: str
    bucket: str
    key: str
    query: str

    def __str__(self) -> str:
        path = f"/{self.key}" if self.key else ""
        query = "&".join(map(_without_secret, self.query.split("&")))
        return f"{self.scheme}://{self.bucket}{path}" + (f"?{query}" if query else "")

    def __repr__(self) -> str:
        return repr(str(self))

    def at(self, key: str) -> "Url":
        """Returns that of another key.

        Raises:
          ValueError: There is no bucket, or no store takes the key.
        """
        found = self._replace(key=key.rstrip("/"))
        segments = found.key.split("/") if found.key else []
        if not self.bucket or any(
            one in ("", ".", "..") or not one.isprintable() for one in segments
        ):
            raise ValueError(
                f"URL {str(found)!r} does not name a place in an object store: it has to be like "
                "s3://bucket/run/12, without empty segments, '.', '..' and control characters"
            )
        return found


def is_url(text: str) -> bool:
    """Whether a path is the URL of an object store."""
    return text.split("://", 1)[0] in SCHEMES and "://" in text


def parse(text: str) -> Url:
    """Takes a URL as a user gives it, such as `s3://bucket/run/12?region=eu-north-1`.

    Raises:
      ValueError: It names no bucket, or a key that no store takes; or a secret in it is hidden.
    """
    scheme, _, rest = text.partition("://")
    path, _, query = rest.partition("?")
    bucket, _, key = path.partition("/")
    if "@" in bucket or (":" in bucket and not bucket.startswith("arn:")):
        raise ValueError(
            f"{scheme}:// is followed by what is no bucket's name. A secret there is not taken: "
            "give it to flax_partial.store_options, or by the environment"
        )
    url = Url(scheme, bucket, key, query)
    if HIDDEN in re.split("[&=]", query):
        raise ValueError(
            f"URL {str(url)!r} was printed or recorded, which puts {HIDDEN} for a secret. Pass the "
            "StorePath itself, or the URL with its secret; or give that to "
            "flax_partial.store_options, or by the environment"
        )
    _require_no_path(url)
    return url.at(key)


def _require_no_path(url: Url) -> None:
    """Raises ValueError for what was appended to a URL after its parameters, such as a step."""
    name, _, value = url.query.rpartition("&")[2].partition("=")
    before, slash, last = value.rpartition("/")
    is_step = bool(before) and last.removesuffix(SESSION_SUFFIX).isdecimal()
    if slash and (is_step or (_SHOWN.fullmatch(name) and not _HAVE_SLASHES.search(name))):
        meant = url._replace(query=url.query.removesuffix(f"/{last}"))
        raise ValueError(
            f"URL {str(url)!r} has {'/' + last!r} after its parameters, where it belongs to "
            f"{name!r}. To name what is in {str(meant)!r} use fp.StorePath(url) / {last!r}, or put "
            "it before the '?'"
        )


def is_secret(name: str, value: str) -> bool:
    """Whether a parameter is to be hidden: all are that are not known to be harmless."""
    is_shown = _SHOWN.fullmatch(name.lower()) or _KEY_FILES.fullmatch(f"{name}={value}".lower())
    return not is_shown or _HOLDS_SECRETS.search(value) is not None


def _without_secret(parameter: str) -> str:
    name, equals, value = parameter.partition("=")
    if not parameter or (equals and not is_secret(unquote_plus(name), unquote_plus(value))):
        return parameter
    return f"{name}={HIDDEN}" if equals else HIDDEN
